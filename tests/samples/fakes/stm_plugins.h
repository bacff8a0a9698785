// The plugin library's functions, without the library.
#pragma once
#include <cstdint>
#include <cstdlib>

inline int32_t stm_register_plugins() { return std::getenv("FAKE_REGISTER") ? std::atoi(std::getenv("FAKE_REGISTER")) : 0; }
inline int32_t stm_plugin_tensorrt_major() { return 10; }
inline int32_t stm_plugin_kernel_version() { return 3; }
