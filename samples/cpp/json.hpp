// json.hpp: a strict JSON reader (RFC 8259; duplicate keys refused). Any bytes in: a value or an Error, never a crash.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "error.hpp"

namespace sample {

struct Json {
  enum Type { kNull, kBool, kNumber, kString, kArray, kObject };
  Type type = kNull;
  bool boolean = false;
  double number = 0;
  std::string string;
  std::vector<Json> array;
  std::map<std::string, Json> object;
};

inline const char* json_type_name(Json::Type type) {
  constexpr const char* kNames[] = {"null", "a boolean", "a number", "a string", "an array", "an object"};
  return kNames[type];
}

class JsonReader {
 public:
  // `name` is the file's, for messages.
  static Json parse(const std::string& text, const std::string& name) {
    JsonReader reader(text, name);
    Json value = reader.value(0);
    reader.skip_space();
    if (reader.at_ != text.size()) reader.fail("something follows the value");
    return value;
  }

 private:
  static constexpr int kMaxDepth = 32;

  JsonReader(const std::string& text, const std::string& name) : text_(text), name_(name) {}

  [[noreturn]] void fail(const std::string& what) const {
    auto end = text_.begin() + static_cast<std::ptrdiff_t>(std::min(at_, text_.size()));
    throw Error(kMismatch, name_ + " is not valid JSON: line " + std::to_string(1 + std::count(text_.begin(), end, '\n')) + ": " + what);
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool take(char c) {
    if (peek() != c || at_ >= text_.size()) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!take(c)) fail(std::string("expected '") + c + "'" + (at_ >= text_.size() ? ", the file ends" : ""));
  }

  void skip_space() {
    while (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t') ++at_;
  }

  bool take_word(const char* word) {
    const std::string wanted(word);
    if (text_.compare(at_, wanted.size(), wanted) != 0) return false;
    at_ += wanted.size();
    return true;
  }

  Json value(int depth) {
    if (depth > kMaxDepth) fail("nested deeper than " + std::to_string(kMaxDepth));
    skip_space();
    Json out;
    if (take('{')) {
      out.type = Json::kObject;
      skip_space();
      if (take('}')) return out;
      do {
        skip_space();
        std::string key = string();
        skip_space();
        expect(':');
        if (!out.object.emplace(key, value(depth + 1)).second) fail("key \"" + key + "\" appears twice");
        skip_space();
      } while (take(','));
      expect('}');
    } else if (take('[')) {
      out.type = Json::kArray;
      skip_space();
      if (take(']')) return out;
      do {
        out.array.push_back(value(depth + 1));
        skip_space();
      } while (take(','));
      expect(']');
    } else if (peek() == '"') {
      out.type = Json::kString;
      out.string = string();
    } else if (take_word("true")) {
      out.type = Json::kBool;
      out.boolean = true;
    } else if (take_word("false")) {
      out.type = Json::kBool;
    } else if (!take_word("null")) {
      out.type = Json::kNumber;
      out.number = number();
    }
    return out;
  }

  bool digits() {
    const std::size_t begin = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    return at_ > begin;
  }

  double number() {
    const std::size_t begin = at_;
    take('-');
    if (!take('0') && !digits()) fail("expected a value");
    if (take('.') && !digits()) fail("a number ends with its point");
    if (take('e') || take('E')) {
      if (!take('+')) take('-');
      if (!digits()) fail("a number has no exponent after its 'e'");
    }
    // strtod follows the locale; the "C" locale is the one of a program that does not call setlocale.
    const double out = std::strtod(text_.substr(begin, at_ - begin).c_str(), nullptr);
    if (!std::isfinite(out)) fail("a number is too large");
    return out;
  }

  std::uint32_t hex4() {
    std::uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = peek();
      const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
      if (digit < 0) fail("\\u needs four hexadecimal digits");
      out = out * 16 + static_cast<std::uint32_t>(digit);
      ++at_;
    }
    return out;
  }

  static void append_utf8(std::string& out, std::uint32_t code) {
    auto byte = [&out](std::uint32_t value) { out.push_back(static_cast<char>(value)); };
    if (code < 0x80) return byte(code);
    if (code < 0x800) return byte(0xC0 | code >> 6), byte(0x80 | (code & 0x3F));
    if (code < 0x10000) return byte(0xE0 | code >> 12), byte(0x80 | (code >> 6 & 0x3F)), byte(0x80 | (code & 0x3F));
    byte(0xF0 | code >> 18), byte(0x80 | (code >> 12 & 0x3F)), byte(0x80 | (code >> 6 & 0x3F)), byte(0x80 | (code & 0x3F));
  }

  std::string string() {
    expect('"');
    std::string out;
    for (;;) {
      if (at_ >= text_.size()) fail("a string has no end");
      const char c = text_[at_++];
      if (c == '"') return out;
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character stands in a string");
      if (c != '\\') {
        out.push_back(c);
        continue;
      }
      static constexpr char kFrom[] = "\"\\/bfnrt", kTo[] = "\"\\/\b\f\n\r\t";
      const char escape = peek();
      ++at_;
      if (escape == 'u') {
        std::uint32_t code = hex4();
        if (code >= 0xDC00 && code < 0xE000) fail("half a surrogate pair");
        if (code >= 0xD800 && code < 0xDC00) {
          if (!take('\\') || !take('u')) fail("half a surrogate pair");
          const std::uint32_t low = hex4();
          if (low < 0xDC00 || low >= 0xE000) fail("half a surrogate pair");
          code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        append_utf8(out, code);
      } else {
        const char* found = escape ? std::find(kFrom, kFrom + 8, escape) : kFrom + 8;
        if (found == kFrom + 8) fail("unknown escape in a string");
        out.push_back(kTo[found - kFrom]);
      }
    }
  }

  const std::string& text_;
  const std::string& name_;
  std::size_t at_ = 0;
};

inline Json read_json(const std::string& path) {
  constexpr std::size_t kMaxBytes = std::size_t{64} << 20;
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Error(kMismatch, "cannot open " + path);
  std::string text;
  char buffer[65536];
  while (file.read(buffer, sizeof buffer) || file.gcount() > 0) {
    text.append(buffer, static_cast<std::size_t>(file.gcount()));
    if (text.size() > kMaxBytes) throw Error(kMismatch, path + " is larger than 64 MiB; it is no sidecar of an engine");
  }
  return JsonReader::parse(text, path);
}

}  // namespace sample
