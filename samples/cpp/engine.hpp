// engine.hpp: an engine made by stm-export, loaded and run; copy it into your app. Needs TensorRT, the CUDA runtime and stm::trt.
//   Engine engine("vim.engine", sidecar);        // once
//   Session session(engine, batch, use_graph);   // one for each thread: a context, a stream and the buffers of one batch size;
//                                                // a multiple of the engine's largest runs in pieces, in a piece's activation memory
//   session.upload(images);  session.run();  logits = session.download();
#pragma once
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <stm_plugins.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "error.hpp"
#include "sidecar.hpp"

namespace sample {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Error(kFailed, std::string(what) + ": " + cudaGetErrorString(status));
}

// Keeps TensorRT's errors, so that an Error can say them.
class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR) return;
    try {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (said_.size() < 4096) said_ += std::string("\n  TensorRT: ") + message;
    } catch (...) {  // no memory for a message: go on without it
    }
  }

  std::string take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(said_, {});
  }

 private:
  std::mutex mutex_;
  std::string said_;
};

struct CudaDeleter {
  void operator()(float* memory) const { cudaFree(memory); }
  void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
  void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
};
template <typename Handle>  // CUDA's handles are pointers
using CudaUnique = std::unique_ptr<std::remove_pointer_t<Handle>, CudaDeleter>;
using DeviceFloats = CudaUnique<float*>;
using Stream = CudaUnique<cudaStream_t>;
using Event = CudaUnique<cudaEvent_t>;

inline DeviceFloats device_floats(std::size_t count) {
  float* memory = nullptr;
  check_cuda(cudaMalloc(reinterpret_cast<void**>(&memory), count * sizeof(float)), "cannot allocate GPU memory");
  return DeviceFloats(memory);
}

inline Stream new_stream() {
  cudaStream_t stream = nullptr;
  // Not the default stream: TensorRT would synchronise, and it cannot be captured.
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cannot create a stream");
  return Stream(stream);
}

inline Event new_event() {
  cudaEvent_t event = nullptr;
  check_cuda(cudaEventCreate(&event), "cannot create an event");
  return Event(event);
}

struct Gpu {
  std::string name, sm;
};

inline Gpu current_gpu() {
  int count = 0, device = 0;
  // TensorRT without a driver ends the process or hands out objects that crash: ask first.
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    throw Error(kNoGpu, std::string("no usable GPU: ") + (status == cudaSuccess ? "none found" : cudaGetErrorString(status)) +
                            ". An engine runs on an NVIDIA GPU only; `stm-export -o vim.onnx` makes a file for the CPU");
  }
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "cannot use the GPU");
  check_cuda(cudaGetDeviceProperties(&properties, device), "cannot use the GPU");
  return {properties.name, std::to_string(properties.major) + "." + std::to_string(properties.minor)};
}

inline std::string loaded_tensorrt() {
  const int32_t version = getInferLibVersion();
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." + std::to_string(version % 100);
}

class Engine {
 public:
  // Raises Error: no GPU, no plugin, or the engine is not one for this TensorRT and GPU; says which.
  Engine(const std::string& path, const Sidecar& sidecar) : gpu_(current_gpu()), sidecar_(sidecar) {
    if (const int32_t status = stm_register_plugins(); status != 0) {
      throw Error(kPlugin, status == 1 ? "the plugins of stm serve TensorRT " + std::to_string(stm_plugin_tensorrt_major()) + ", this app has " +
                                             loaded_tensorrt() + ": build stm_plugins with this TensorRT's headers"
                                       : "TensorRT refuses to register the plugins of stm: another library has plugins of the same name");
    }
    std::ifstream file(path, std::ios::binary);
    if (!file) throw Error(kMismatch, "cannot open " + path);
    const std::vector<char> plan{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    runtime_.reset(nvinfer1::createInferRuntime(logger_));
    if (!runtime_) throw Error(kNoGpu, "TensorRT cannot start" + logger_.take());
    runtime_->setEngineHostCodeAllowed(sidecar_.version_compatible);  // such an engine carries the code of a runtime
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    if (!engine_) throw Error(kMismatch, "cannot load " + path + why_refused() + logger_.take());
    check_io(path);
  }

  const Sidecar& sidecar() const { return sidecar_; }
  const Gpu& gpu() const { return gpu_; }
  int32_t min_batch() const { return min_batch_; }
  int32_t max_batch() const { return max_batch_; }
  std::size_t image_floats() const { return 3 * static_cast<std::size_t>(sidecar_.height) * static_cast<std::size_t>(sidecar_.width); }
  std::size_t num_classes() const { return static_cast<std::size_t>(sidecar_.num_classes); }

  std::unique_ptr<nvinfer1::IExecutionContext> new_context() const {
    std::unique_ptr<nvinfer1::IExecutionContext> context(engine_->createExecutionContext());
    if (!context) throw Error(kFailed, "TensorRT cannot make an execution context (GPU memory?)" + errors());
    return context;
  }

  std::string errors() const { return logger_.take(); }

 private:
  // The likely reasons, from the sidecar, for what TensorRT says in its own words.
  std::string why_refused() const {
    std::string why;
    if (sidecar_.tensorrt != loaded_tensorrt() && sidecar_.tensorrt.rfind(loaded_tensorrt() + ".", 0) != 0) {
      why += ": it was built with TensorRT " + sidecar_.tensorrt + ", this is " + loaded_tensorrt();
    }
    if (sidecar_.sm != gpu_.sm) {
      why += (why.empty() ? ": it was built" : "; and") + (" for a GPU of compute capability " + sidecar_.sm) + " (" + sidecar_.gpu_name +
             "), this is " + gpu_.sm + " (" + gpu_.name + ")";
    }
    if (!why.empty()) return why + ". Build it on this machine with stm-export";
    if (!sidecar_.plugin_library.empty() && sidecar_.kernel_version != stm_plugin_kernel_version()) {
      return ": its plugins were version " + std::to_string(sidecar_.kernel_version) + ", the library's is " +
             std::to_string(stm_plugin_kernel_version()) + ". Use the library it was built with, or build the engine anew";
    }
    return ". Is it a TensorRT engine, and whole?";
  }

  void check_io(const std::string& path) {
    const char *in = sidecar_.input.c_str(), *out = sidecar_.output.c_str();
    if (engine_->getNbIOTensors() != 2 || engine_->getTensorIOMode(in) != nvinfer1::TensorIOMode::kINPUT ||
        engine_->getTensorIOMode(out) != nvinfer1::TensorIOMode::kOUTPUT) {
      throw Error(kMismatch, path + " has not just the input '" + sidecar_.input + "' and the output '" + sidecar_.output +
                                 "' that its sidecar names; use the sidecar that was made with it" + errors());
    }
    check_shape(path, in, {-1, 3, sidecar_.height, sidecar_.width});
    check_shape(path, out, {-1, sidecar_.num_classes});
    min_batch_ = static_cast<int32_t>(engine_->getProfileShape(in, 0, nvinfer1::OptProfileSelector::kMIN).d[0]);
    max_batch_ = static_cast<int32_t>(engine_->getProfileShape(in, 0, nvinfer1::OptProfileSelector::kMAX).d[0]);
  }

  void check_shape(const std::string& path, const char* name, const std::vector<int64_t>& wanted) const {
    const nvinfer1::Dims found = engine_->getTensorShape(name);
    bool same = found.nbDims == static_cast<int32_t>(wanted.size()) && engine_->getTensorDataType(name) == nvinfer1::DataType::kFLOAT;
    for (int32_t i = 1; same && i < found.nbDims; ++i) same = found.d[i] == wanted[static_cast<std::size_t>(i)];
    if (same) return;
    auto text = [](auto begin, auto end) {
      std::string out;
      for (auto at = begin; at != end; ++at) out += (at == begin ? "" : ",") + std::to_string(*at);
      return "(" + out + ")";
    };
    throw Error(kMismatch, path + ": '" + name + "' has shape " + text(found.d, found.d + std::max(found.nbDims, 0)) + ", its sidecar says " +
                               text(wanted.begin(), wanted.end()) + " in float32; use the sidecar that was made with it");
  }

  mutable Logger logger_;  // must outlive what logs
  Gpu gpu_;
  Sidecar sidecar_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  int32_t min_batch_ = 0, max_batch_ = 0;
};

class Session {
 public:
  // `use_graph`: record the kernels once and launch them together from then on; the smaller the batch, the more it helps.
  // Raises Error: the engine does not take this batch size; says which it takes.
  Session(const Engine& engine, int32_t batch, bool use_graph) : engine_(engine), piece_(std::min(batch, engine.max_batch())) {
    if (batch < engine.min_batch() || batch % piece_ != 0) {
      throw Error(kUsage, "batch is " + std::to_string(batch) + ", the engine takes " + std::to_string(engine.min_batch()) + " to " +
                              std::to_string(engine.max_batch()) + ", or multiples of the latter; stm-export --batch MIN:OPT:MAX makes another");
    }
    pieces_ = batch / piece_;
    const Sidecar& s = engine.sidecar();
    image_floats_ = static_cast<std::size_t>(batch) * engine.image_floats();
    logit_floats_ = static_cast<std::size_t>(batch) * engine.num_classes();
    images_ = device_floats(image_floats_);
    logits_ = device_floats(logit_floats_);
    stream_ = new_stream();
    context_ = engine.new_context();
    if (!context_->setInputShape(s.input.c_str(), nvinfer1::Dims4{piece_, 3, s.height, s.width})) {
      throw Error(kFailed, "TensorRT refuses batch " + std::to_string(piece_) + engine.errors());
    }
    if (use_graph) record();
  }

  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session() { cudaStreamSynchronize(stream_.get()); }  // what still runs uses the buffers

  // (batch, 3, height, width), normalised.
  void upload(const std::vector<float>& images) {
    if (images.size() != image_floats_) {
      throw Error(kUsage, "got " + std::to_string(images.size()) + " floats, the batch has " + std::to_string(image_floats_));
    }
    check_cuda(cudaMemcpyAsync(images_.get(), images.data(), image_floats_ * sizeof(float), cudaMemcpyHostToDevice, stream_.get()), "upload");
  }

  // Enqueues; does not wait.
  void run() {
    if (graph_) {
      check_cuda(cudaGraphLaunch(graph_.get(), stream_.get()), "cannot launch the CUDA graph");
    } else {
      enqueue();
    }
  }

  // Waits; returns (batch, num_classes).
  std::vector<float> download() {
    std::vector<float> logits(logit_floats_);
    check_cuda(cudaMemcpyAsync(logits.data(), logits_.get(), logit_floats_ * sizeof(float), cudaMemcpyDeviceToHost, stream_.get()), "download");
    check_cuda(cudaStreamSynchronize(stream_.get()), "the engine failed");
    return logits;
  }

  cudaStream_t stream() const { return stream_.get(); }

 private:
  void enqueue() {
    if (!try_enqueue()) throw Error(kFailed, "TensorRT cannot run the engine" + engine_.errors());
  }

  bool try_enqueue() {
    const Sidecar& s = engine_.sidecar();
    for (int32_t i = 0; i < pieces_; ++i) {
      const std::size_t first = static_cast<std::size_t>(i) * static_cast<std::size_t>(piece_);
      if (!context_->setTensorAddress(s.input.c_str(), images_.get() + first * engine_.image_floats()) ||
          !context_->setTensorAddress(s.output.c_str(), logits_.get() + first * engine_.num_classes()) || !context_->enqueueV3(stream_.get()))
        return false;
    }
    return true;
  }

  void record() {
    check_cuda(cudaMemsetAsync(images_.get(), 0, image_floats_ * sizeof(float), stream_.get()), "cannot clear the input");
    enqueue();  // the first run after a shape is set does work that must not be recorded
    check_cuda(cudaStreamSynchronize(stream_.get()), "the engine failed");
    cudaGraph_t raw = nullptr;
    check_cuda(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), "cannot record a CUDA graph");
    const bool enqueued = try_enqueue();
    const cudaError_t status = cudaStreamEndCapture(stream_.get(), &raw);  // also after a failure: a stream must leave capture
    const CudaUnique<cudaGraph_t> graph(raw);
    if (!enqueued) throw Error(kFailed, "TensorRT cannot record the engine as a CUDA graph; run without --graph" + engine_.errors());
    check_cuda(status, "cannot record a CUDA graph");
    cudaGraphExec_t executable = nullptr;
    check_cuda(cudaGraphInstantiateWithFlags(&executable, graph.get(), 0), "cannot make the CUDA graph");
    graph_.reset(executable);
  }

  const Engine& engine_;
  int32_t piece_ = 1, pieces_ = 1;  // images of an enqueue; enqueues of a batch
  std::size_t image_floats_ = 0, logit_floats_ = 0;
  DeviceFloats images_, logits_;
  Stream stream_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  CudaUnique<cudaGraphExec_t> graph_;
};

}  // namespace sample
