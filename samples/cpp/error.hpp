// error.hpp: what goes wrong, in words, with the exit code that the stm tools use for it.
#pragma once
#include <stdexcept>
#include <string>

namespace sample {

enum ExitCode { kOk = 0, kFailed = 1, kUsage = 2, kNoGpu = 3, kPlugin = 6, kMismatch = 9 };

struct Error : std::runtime_error {
  Error(ExitCode code_, const std::string& what) : std::runtime_error(what), code(code_) {}
  ExitCode code;
};

}  // namespace sample
