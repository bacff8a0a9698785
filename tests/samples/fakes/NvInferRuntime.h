// A TensorRT on the CPU, as much of it as samples/cpp calls. A plan is the text "FAKE min max height width classes"; its
// logits are pixels of the image: logits[b, k] = images[b].flatten()[7 k mod n]. The first enqueue after a shape was set
// cannot be recorded, as in TensorRT.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <string>

inline int32_t getInferLibVersion() { return 100600; }

namespace nvinfer1 {
enum class DataType : int32_t { kFLOAT, kHALF };
enum class TensorIOMode : int32_t { kNONE, kINPUT, kOUTPUT };
enum class OptProfileSelector : int32_t { kMIN, kOPT, kMAX };
struct Dims {
  int32_t nbDims = -1;
  int64_t d[8] = {};
};
struct Dims4 : Dims {
  Dims4(int64_t a, int64_t b, int64_t c, int64_t e) : Dims{4, {a, b, c, e}} {}
};

class ILogger {
 public:
  enum class Severity : int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
  virtual void log(Severity severity, const char* message) noexcept = 0;
  virtual ~ILogger() = default;
};

struct Plan {
  int min = 0, max = 0, height = 0, width = 0, classes = 0;
};

class IExecutionContext {
 public:
  explicit IExecutionContext(const Plan& plan) : plan_(plan) {}
  bool setInputShape(const char* name, const Dims& dims) {
    batch_ = dims.d[0];
    fresh_ = true;
    return std::string(name) == "images" && dims.nbDims == 4 && batch_ >= plan_.min && batch_ <= plan_.max && dims.d[1] == 3 &&
           dims.d[2] == plan_.height && dims.d[3] == plan_.width;
  }
  bool setTensorAddress(const char* name, void* address) {
    (std::string(name) == "images" ? images_ : logits_) = static_cast<float*>(address);
    return address != nullptr;
  }
  bool enqueueV3(cudaStream_t stream) {
    if (!images_ || !logits_ || batch_ == 0 || (fresh_ && stream->recording)) return false;
    fresh_ = false;
    const int64_t n = int64_t{3} * plan_.height * plan_.width;
    return fake::enqueue(stream, [=, batch = batch_, classes = plan_.classes, images = images_, logits = logits_] {
             for (int64_t b = 0; b < batch; ++b) {
               for (int64_t k = 0; k < classes; ++k) logits[b * classes + k] = images[b * n + 7 * k % n];
             }
           }) == cudaSuccess;
  }

 private:
  Plan plan_;
  int64_t batch_ = 0;
  bool fresh_ = true;
  float *images_ = nullptr, *logits_ = nullptr;
};

class ICudaEngine {
 public:
  explicit ICudaEngine(const Plan& plan) : plan_(plan) {}
  IExecutionContext* createExecutionContext() { return new IExecutionContext(plan_); }
  int32_t getNbIOTensors() const { return 2; }
  TensorIOMode getTensorIOMode(const char* name) const {
    return std::string(name) == "images" ? TensorIOMode::kINPUT : std::string(name) == "logits" ? TensorIOMode::kOUTPUT : TensorIOMode::kNONE;
  }
  DataType getTensorDataType(const char*) const { return DataType::kFLOAT; }
  Dims getTensorShape(const char* name) const {
    return std::string(name) == "images" ? Dims{4, {-1, 3, plan_.height, plan_.width}} : Dims{2, {-1, plan_.classes}};
  }
  Dims getProfileShape(const char*, int32_t, OptProfileSelector which) const {
    return Dims{4, {which == OptProfileSelector::kMIN ? plan_.min : plan_.max, 3, plan_.height, plan_.width}};
  }

 private:
  Plan plan_;
};

class IRuntime {
 public:
  explicit IRuntime(ILogger& logger) : logger_(logger) {}
  void setEngineHostCodeAllowed(bool allowed) noexcept { host_code_ = allowed; }
  ICudaEngine* deserializeCudaEngine(const void* data, std::size_t size) {
    Plan p;
    std::string text(static_cast<const char*>(data), size);
    if (text.rfind("CODE ", 0) == 0 && host_code_) text.erase(0, 5);  // a version-compatible plan
    if (std::sscanf(text.c_str(), "FAKE %d %d %d %d %d", &p.min, &p.max, &p.height, &p.width, &p.classes) == 5) return new ICudaEngine(p);
    logger_.log(ILogger::Severity::kERROR, "the fake magic tag does not match");
    return nullptr;
  }

 private:
  ILogger& logger_;
  bool host_code_ = false;
};
inline IRuntime* createInferRuntime(ILogger& logger) { return new IRuntime(logger); }
}  // namespace nvinfer1
