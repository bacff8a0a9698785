// text.h: appends to a buffer of fixed size; never allocates, cuts what does not fit.
#pragma once
#include <cstdarg>
#include <cstddef>
#include <cstdio>

namespace stm::trt {

class Text {
 public:
  Text(char* buffer, size_t capacity) noexcept : buffer_(buffer), capacity_(capacity) {
    if (capacity_) buffer_[0] = 0;
  }

  __attribute__((format(printf, 2, 3))) void add(const char* format, ...) noexcept {
    if (length_ + 1 >= capacity_) return;
    va_list args;
    va_start(args, format);
    const int wanted = std::vsnprintf(buffer_ + length_, capacity_ - length_, format, args);
    va_end(args);
    if (wanted > 0) length_ += size_t(wanted) < capacity_ - length_ ? size_t(wanted) : capacity_ - length_ - 1;
  }

  size_t length() const noexcept { return length_; }

 private:
  char* buffer_;
  size_t capacity_, length_ = 0;
};

}  // namespace stm::trt
