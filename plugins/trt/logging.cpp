#include "logging.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

namespace stm::trt {
namespace {
constexpr int kMaxMessage = 768;
std::atomic<nvinfer1::ILoggerFinder*> g_logger_finder{nullptr};

void say_text(Severity severity, const char* text) noexcept {
  nvinfer1::ILogger* logger = nullptr;
  try {  // findLogger, the one call here that is not noexcept
    if (nvinfer1::ILoggerFinder* finder = g_logger_finder.load()) logger = finder->findLogger();
  } catch (...) {
  }
  if (logger) {
    logger->log(severity, text);
  } else if (severity <= Severity::kERROR) {
    std::fprintf(stderr, "%s\n", text);
  }
}
}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { g_logger_finder = finder; }

void say(Severity severity, const char* format, ...) noexcept {
  char text[kMaxMessage];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  say_text(severity, text);
}

bool Where::fail(const char* format, ...) const noexcept {
  char text[kMaxMessage];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  const bool named = node && *node;
  say(Severity::kERROR, "%s%s%s%s: %s", op, named ? " '" : "", named ? node : "", named ? "'" : "", text);
  return false;
}

}  // namespace stm::trt
