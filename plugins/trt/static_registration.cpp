// static_registration.cpp: the shim libstm_trt<MAJOR>_static.so. Registers the core library's plugins when it is opened, for
// tools that do no more than that (Polygraphy --plugins, trtexec --staticPlugins, Triton, DeepStream), and for apps that link it.
// Finds getPluginRegistry at run time and links against no TensorRT, so one binary serves the full, lean and dispatch
// runtimes of its major version. Never give it to loadLibrary.
#include "stm_plugins.h"

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <initializer_list>

#define STM_EXPORT extern "C" __attribute__((visibility("default")))
#define STM_STRING_(x) #x
#define STM_STRING(x) STM_STRING_(x)
#define STM_MAJOR STM_STRING(NV_TENSORRT_MAJOR)

extern "C" nvinfer1::IPluginCreatorInterface* const* stm_trt_creators(int32_t& count);
extern "C" void stm_trt_set_logger_finder(nvinfer1::ILoggerFinder* finder);

namespace {
using namespace nvinfer1;

constexpr const char* kRuntimes[] = {"libnvinfer.so." STM_MAJOR, "libnvinfer_lean.so." STM_MAJOR, "libnvinfer_dispatch.so." STM_MAJOR};

// The runtime of our major version: one that the process has, else one on the library path.
void* open_runtime() noexcept {
  // Python loads its extensions with RTLD_LOCAL: libnvinfer is then in the process but not in the global scope.
  for (const char* name : kRuntimes) {
    if (void* handle = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) return handle;
  }
  // Linked in statically, or under another name: anything in the global scope whose version is ours.
  auto version = reinterpret_cast<int32_t (*)()>(dlsym(RTLD_DEFAULT, "getInferLibVersion"));
  if (version) return version() / 10000 == NV_TENSORRT_MAJOR ? dlopen(nullptr, RTLD_LAZY) : nullptr;
  // Polygraphy opens plugin libraries before it imports tensorrt: bring the runtime in.
  for (const char* name : kRuntimes) {
    if (void* handle = dlopen(name, RTLD_LAZY)) return handle;
  }
  return nullptr;
}

struct Finder final : ILoggerFinder {
  ILogger* (*get)() = nullptr;
  ILogger* findLogger() override { return get ? get() : nullptr; }
};

int32_t register_all() noexcept {
  void* runtime = open_runtime();
  auto get_registry = reinterpret_cast<IPluginRegistry* (*)()>(runtime ? dlsym(runtime, "getPluginRegistry") : nullptr);
  IPluginRegistry* registry = get_registry ? get_registry() : nullptr;
  if (!registry) {
    std::fprintf(stderr, "stm: no TensorRT " STM_MAJOR " in this process or on the library path (libnvinfer.so." STM_MAJOR
                         "): no plugin registered. Load TensorRT first, set LD_LIBRARY_PATH, or use the library of another major version\n");
    return 1;
  }
  static Finder finder;
  finder.get = reinterpret_cast<ILogger* (*)()>(dlsym(runtime, "getLogger"));
  if (finder.get) stm_trt_set_logger_finder(&finder);
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = stm_trt_creators(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
    // False, and no harm, for a name that is there already. Asking getCreator first would log an error in the good case.
    if (registry->registerCreator(*creator, creator->getPluginNamespace())) continue;
    if (registry->getCreator(creator->getPluginName(), creator->getPluginVersion(), creator->getPluginNamespace())) continue;
    std::fprintf(stderr, "stm: TensorRT refused to register %s\n", creator->getPluginName());
    return 2;
  }
  return count > 0 ? 0 : 2;
}

const int32_t g_at_load = register_all();
}  // namespace

STM_EXPORT int32_t stm_register_plugins(void) { return g_at_load == 0 ? 0 : register_all(); }
