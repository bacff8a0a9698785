// stm_plugins.h: what C and C++ apps and loaders may call in the TensorRT plugin libraries. Needs no TensorRT header.
//   libstm_trt<MAJOR>.so         the plugins; hand it to IPluginRegistry::loadLibrary
//   libstm_trt<MAJOR>_static.so  registers them when it is opened; link it and call stm_register_plugins
#ifndef STM_PLUGINS_H_
#define STM_PLUGINS_H_

#include <stdint.h>

// Raised when inputs, outputs or attributes of an op change. Engines and libraries must agree on it.
#define STM_PLUGIN_ABI_VERSION 2

#ifdef __cplusplus
extern "C" {
#endif

// In libstm_trt<MAJOR>_static.so. Registers the plugins with the TensorRT of this process. 0: they are registered (now or
// before); 1: no TensorRT of this major version was found; 2: the registry refused. Errors go to stderr. The library does
// it by itself when it is opened; the call keeps the linker from dropping a library that nothing else refers to.
int32_t stm_register_plugins(void);

// In libstm_trt<MAJOR>.so.
int32_t stm_plugin_abi_version(void);     // STM_PLUGIN_ABI_VERSION of the build
int32_t stm_plugin_kernel_version(void);  // kKernelVersion: part of every timing-cache key
int32_t stm_plugin_tensorrt_major(void);  // the major version of TensorRT that may load the library
const char* stm_plugin_build_info(void);  // JSON: version, abi, kernels, tensorrt, cuda, archs
const char* stm_plugin_op_schema(void);   // JSON: each op's inputs, outputs and attributes as the plugins read them

#ifdef __cplusplus
}
#endif
#endif  // STM_PLUGINS_H_
