// plugin_library.cpp: what libstm_trt<MAJOR>.so exports. It links against no TensorRT library and registers nothing by itself:
// a library that does and is given to loadLibrary refuses itself and leaves a dangling creator behind (see
// static_registration.cpp for tools that only open libraries).
#include "stm_plugins.h"

#include "../kernels/types.h"
#include "add_merge_norm_plugin.h"
#include "conv_xproj_plugin.h"
#include "linear_plugin.h"
#include "mamba_scan_plugin.h"
#include "patch_rows_plugin.h"

#include <NvInferRuntime.h>
#include <link.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#define STM_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
using namespace stm::trt;

constexpr int kNbOps = 5;

struct Ops {
  OpEntry entries[kNbOps] = {patch_rows_op(), conv_xproj_op(), mamba_scan_op(), add_merge_norm_op(), linear_op()};
  nvinfer1::IPluginCreatorInterface* creators[kNbOps];
  Ops() noexcept {
    for (int i = 0; i < kNbOps; ++i) creators[i] = entries[i].creator;
  }
};

Ops& ops() noexcept {
  static Ops instance;
  return instance;
}

// A library built for another major version is accepted by loadLibrary and dies at its first message: ILoggerFinder and
// IPluginRegistry have other virtuals there. So look which runtimes (full, lean, dispatch) this process has.
struct Runtimes {
  bool ours = false;
  int other = 0;
};

int note_runtime(dl_phdr_info* info, size_t, void* data) {
  const char* slash = info->dlpi_name ? std::strrchr(info->dlpi_name, '/') : nullptr;
  const char* file = slash ? slash + 1 : info->dlpi_name;
  if (!file) return 0;
  for (const char* stem : {"libnvinfer.so.", "libnvinfer_lean.so.", "libnvinfer_dispatch.so."}) {
    if (std::strncmp(file, stem, std::strlen(stem)) != 0) continue;
    const int major = std::atoi(file + std::strlen(stem));
    auto* found = static_cast<Runtimes*>(data);
    if (major == NV_TENSORRT_MAJOR) {
      found->ours = true;
    } else {
      found->other = major;
    }
  }
  return 0;
}

bool runtime_fits() noexcept {
  Runtimes found;
  dl_iterate_phdr(note_runtime, &found);
  if (found.ours || found.other == 0) return true;
  static std::atomic_flag told = ATOMIC_FLAG_INIT;
  if (!told.test_and_set()) {
    std::fprintf(stderr, "stm: this library is for TensorRT %d, but the process runs TensorRT %d: load libstm_trt%d.so\n",
                 NV_TENSORRT_MAJOR, found.other, found.other);
  }
  return false;
}
}  // namespace

// Names of our own for the shim: two plugin libraries in one global scope both have a getCreators, and the first would win.
STM_EXPORT void stm_trt_set_logger_finder(nvinfer1::ILoggerFinder* finder) {
  if (runtime_fits()) set_logger_finder(finder);
}
STM_EXPORT nvinfer1::IPluginCreatorInterface* const* stm_trt_creators(int32_t& count) {
  count = runtime_fits() ? kNbOps : 0;
  return ops().creators;
}

// The names that IPluginRegistry::loadLibrary (and setPluginsToSerialize) looks for.
STM_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { stm_trt_set_logger_finder(finder); }
STM_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) { return stm_trt_creators(count); }

STM_EXPORT int32_t stm_plugin_abi_version(void) { return STM_PLUGIN_ABI_VERSION; }
STM_EXPORT int32_t stm_plugin_kernel_version(void) { return stm::kKernelVersion; }
STM_EXPORT int32_t stm_plugin_tensorrt_major(void) { return NV_TENSORRT_MAJOR; }

STM_EXPORT const char* stm_plugin_build_info(void) {
  static const struct Info {
    char text[512];
    Info() noexcept {
      Text(text, sizeof text)
          .add("{\"version\": \"" STM_VERSION "\", \"abi\": %d, \"kernels\": %d, \"tensorrt\": \"%d.%d.%d\", \"cuda\": \"%d.%d\", "
               "\"archs\": \"" STM_ARCHS "\"}",
               STM_PLUGIN_ABI_VERSION, stm::kKernelVersion, NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH,
               CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    }
  } info;
  return info.text;
}

STM_EXPORT const char* stm_plugin_op_schema(void) {
  static const struct Schema {
    char buffer[16384];
    Schema() noexcept {
      Text text(buffer, sizeof buffer);
      text.add("{\"abi\": %d, \"plugin_version\": \"1\", \"plugin_namespace\": \"\", \"ops\": [", STM_PLUGIN_ABI_VERSION);
      for (int i = 0; i < kNbOps; ++i) {
        if (i) text.add(", ");
        print_op(ops().entries[i], text);
      }
      text.add("]}");
    }
  } schema;
  return schema.buffer;
}
