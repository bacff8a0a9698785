// logging.h: messages to TensorRT's logger.
#pragma once
#include <NvInferRuntime.h>

namespace stm::trt {

using Severity = nvinfer1::ILogger::Severity;

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// Errors go to stderr while TensorRT has no logger (no Builder or Runtime lives), so that none is lost.
__attribute__((format(printf, 2, 3))) void say(Severity severity, const char* format, ...) noexcept;

// Whom a message is about: an op and, where there is one, the name that its node bears in the network.
struct Where {
  const char* op;
  const char* node;
  // Logs "<op> '<node>': <message>" as an error and returns false.
  __attribute__((format(printf, 2, 3))) bool fail(const char* format, ...) const noexcept;
};

}  // namespace stm::trt
