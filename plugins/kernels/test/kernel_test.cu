// kernel_test.cu: every kernel, tactic and type against a float64 reference on the CPU; with --time, how long they
// take.
//   kernel_test [--quick] [--time [--size MODEL:BATCH:TOKENS]...] [--only conv|scan|linear|norm|patch] [--type fp32|fp16|bf16] [--verbose]
// Outputs start as NaN, with canaries behind them; each case runs twice, the second time from a captured graph, and
// both results must be equal bit for bit. The reference gets the inputs as rounded to T. Exit code 1 after a failure.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../add_merge_norm.h"
#include "../conv_xproj.h"
#include "../conv_xproj_impl.h"
#include "../linear.h"
#include "../mamba_scan.h"
#include "../patch_rows.h"

namespace {

using namespace stm;

#define CHECK_CUDA(call)                                                                               \
  do {                                                                                                 \
    const cudaError_t status_ = (call);                                                                \
    if (status_ != cudaSuccess) {                                                                      \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status_));          \
      std::exit(2);                                                                                    \
    }                                                                                                  \
  } while (0)

// ---- element types on the host ----------------------------------------------------------------------------------

size_t size_of(DataType type) { return type == DataType::kFloat32 ? 4 : 2; }
const char* name_of(DataType type) {
  return type == DataType::kFloat32 ? "fp32" : type == DataType::kFloat16 ? "fp16" : "bf16";
}
const DataType kTypes[] = {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16};

double round_to(DataType type, double v) {
  const float f = static_cast<float>(v);
  if (type == DataType::kFloat16) return __half2float(__float2half_rn(f));
  if (type == DataType::kBFloat16) return __bfloat162float(__float2bfloat16_rn(f));
  return f;
}

struct Random {  // splitmix64 and Box-Muller: the same numbers on every platform
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15ull + 1) {}
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  double uniform() { return (static_cast<double>(next() >> 11) + 0.5) * 0x1p-53; }
  double gauss() { return std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()); }
};

using Values = std::vector<double>;

Values gaussian(DataType type, int64_t n, double mean, double deviation, uint64_t seed) {
  Random random(seed);
  Values v(static_cast<size_t>(n));
  for (double& x : v) x = round_to(type, mean + deviation * random.gauss());
  return v;
}

// ---- device memory ----------------------------------------------------------------------------------------------

constexpr size_t kCanaryBytes = 256;
constexpr int kCanary = 0xa5;

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  explicit Buffer(size_t size) : bytes(size) {
    CHECK_CUDA(cudaMalloc(&data, bytes + kCanaryBytes));
    poison();
  }
  Buffer(const Values& v, DataType type) : Buffer(v.size() * size_of(type)) {
    std::vector<unsigned char> raw(bytes + 1);
    for (size_t i = 0; i < v.size(); i++) {
      const float f = static_cast<float>(v[i]);
      if (type == DataType::kFloat32) {
        std::memcpy(&raw[4 * i], &f, 4);
      } else if (type == DataType::kFloat16) {
        const __half h = __float2half_rn(f);
        std::memcpy(&raw[2 * i], &h, 2);
      } else {
        const __nv_bfloat16 h = __float2bfloat16_rn(f);
        std::memcpy(&raw[2 * i], &h, 2);
      }
    }
    if (bytes) CHECK_CUDA(cudaMemcpy(data, raw.data(), bytes, cudaMemcpyHostToDevice));
  }
  explicit Buffer(const std::vector<int32_t>& v) : Buffer(v.size() * 4) {
    if (bytes) CHECK_CUDA(cudaMemcpy(data, v.data(), bytes, cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
  void poison() {  // 0xffff and 0xffffffff are NaN in every type
    if (bytes) CHECK_CUDA(cudaMemset(data, 0xff, bytes));
    CHECK_CUDA(cudaMemset(static_cast<char*>(data) + bytes, kCanary, kCanaryBytes));
  }
  std::vector<unsigned char> raw() const {
    std::vector<unsigned char> v(bytes + kCanaryBytes);
    CHECK_CUDA(cudaMemcpy(v.data(), data, v.size(), cudaMemcpyDeviceToHost));
    return v;
  }
  template <typename P>
  P* as() const {
    return static_cast<P*>(data);
  }
};

Values decode(const std::vector<unsigned char>& raw, size_t bytes, DataType type) {
  Values v(bytes / size_of(type));
  for (size_t i = 0; i < v.size(); i++) {
    if (type == DataType::kFloat32) {
      float f;
      std::memcpy(&f, &raw[4 * i], 4);
      v[i] = f;
    } else if (type == DataType::kFloat16) {
      __half h;
      std::memcpy(&h, &raw[2 * i], 2);
      v[i] = __half2float(h);
    } else {
      __nv_bfloat16 h;
      std::memcpy(&h, &raw[2 * i], 2);
      v[i] = __bfloat162float(h);
    }
  }
  return v;
}

void parallel_for(int64_t n, const std::function<void(int64_t)>& body) {
  const int64_t workers = std::min<int64_t>(n, std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> threads;
  for (int64_t w = 0; w < workers; w++)
    threads.emplace_back([=, &body] {
      for (int64_t i = w; i < n; i += workers) body(i);
    });
  for (auto& t : threads) t.join();
}

// ---- results ----------------------------------------------------------------------------------------------------

struct Options {
  bool quick = false, time = false, verbose = false;
  double soak = 0;      // seconds
  bool shared = false;  // others use the card: what the soak leaves of its memory says nothing
  std::string only, type;
  std::vector<std::string> sizes;  // to time, instead of all
} options;

struct Group {
  int cases = 0, failures = 0;
  double worst = 0, worst_ratio = 0;
  std::string worst_case;
};
std::map<std::string, Group> groups;
int failures = 0;

void report(const std::string& group, const std::string& what, double error, double bound, const std::string& trouble) {
  Group& g = groups[group];
  g.cases++;
  const bool ok = trouble.empty() && error <= bound;  // a NaN error fails
  if (!(error / bound <= g.worst_ratio)) g.worst = error, g.worst_ratio = error / bound, g.worst_case = what;
  if (!ok) g.failures++, failures++;
  if (!ok || options.verbose)
    std::printf("%s %-28s %-64s error %.2e bound %.1e %s\n", ok ? "ok  " : "FAIL", group.c_str(), what.c_str(), error,
                bound, trouble.c_str());
}

// norm of the difference over norm of the reference
double relative_error(const Values& got, const Values& want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); i++) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-300));
}

struct Output {
  Buffer* buffer;
  DataType type;
};

// Whether all of v from `from` up to `to` are `value`.
bool all_are(int value, const std::vector<unsigned char>& v, size_t from, size_t to) {
  return std::all_of(v.data() + from, v.data() + to, [value](unsigned char byte) { return byte == value; });
}

// Runs `enqueue` twice, the second time captured; returns what is wrong apart from the values, and the values.
std::string run_twice(const std::function<cudaError_t(cudaStream_t)>& enqueue, const std::vector<Output>& outputs,
                      std::vector<Values>& values) {
  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreate(&stream));
  std::vector<std::vector<unsigned char>> first;
  std::string trouble;
  for (int pass = 0; pass < 2; pass++) {
    for (const Output& o : outputs) o.buffer->poison();
    CHECK_CUDA(cudaDeviceSynchronize());
    cudaError_t status = cudaSuccess;
    if (pass == 0) {
      status = enqueue(stream);
    } else {
      cudaGraph_t graph;
      cudaGraphExec_t instance;
      CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
      status = enqueue(stream);
      CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
      CHECK_CUDA(cudaGraphInstantiate(&instance, graph, 0));
      CHECK_CUDA(cudaGraphLaunch(instance, stream));
      CHECK_CUDA(cudaStreamSynchronize(stream));
      CHECK_CUDA(cudaGraphExecDestroy(instance));
      CHECK_CUDA(cudaGraphDestroy(graph));
    }
    if (status != cudaSuccess) {
      trouble = std::string("returns ") + cudaGetErrorString(status);
      break;
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    for (size_t i = 0; i < outputs.size(); i++) {
      const auto raw = outputs[i].buffer->raw();
      const size_t bytes = outputs[i].buffer->bytes;
      if (!all_are(kCanary, raw, bytes, raw.size())) trouble += " canary of output " + std::to_string(i);
      if (pass == 0) {
        first.push_back(raw);
        values.push_back(decode(raw, bytes, outputs[i].type));
        int64_t nans = 0;
        for (double v : values.back()) nans += std::isnan(v);
        if (nans) trouble += " " + std::to_string(nans) + " NaN in output " + std::to_string(i);
      } else if (std::memcmp(raw.data(), first[i].data(), bytes) != 0) {
        trouble += " runs differ in output " + std::to_string(i);
      }
    }
  }
  CHECK_CUDA(cudaStreamDestroy(stream));
  return trouble;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }

// ---- inputs of one layer ----------------------------------------------------------------------------------------

enum class Level { kTrained, kHard, kExtreme };
const char* name_of(Level level) {
  return level == Level::kTrained ? "" : level == Level::kHard ? " hard" : " extreme";
}

struct Case {
  int batch = 2, seqlen = 197, d_inner = 96, d_state = 16, dt_rank = 12, cls = -1, mode = 0;
  bool scaled = false;
  Level level = Level::kTrained;
  int pairs = 0;  // 0: the edge rule with two sources a side; 1: long spans and both directions; 2: the edge rule with 21;
                  // 3: several runs, on both sides of a target and at both ends
  int row() const { return (dt_rank + 2 * d_state + 7) / 8 * 8; }
  std::string text() const {
    char s[160];
    std::snprintf(s, sizeof s, "B%d L%d E%d N%d R%d%s%s%s%s%s", batch, seqlen, d_inner, d_state, dt_rank,
                  cls >= 0 ? (" cls" + std::to_string(cls)).c_str() : "", scaled ? " scaled" : "",
                  mode ? (" mode" + std::to_string(mode)).c_str() : "",
                  pairs ? (" pairs" + std::to_string(pairs)).c_str() : "", name_of(level));
    return s;
  }
};

// Trained-like: delta has its median at 0.017 and 0.1 % above 0.3; A = -(1..16) with 5 % noise. Hard: delta up to 3,
// 30 % noise. Extreme: delta up to 10 and down to 1e-6, A over six decades, large x: where clamps and fast functions
// break.
struct Layer {
  Values xz, x_dbl, conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D, scale;
  Layer(const Case& c, DataType T) {
    const int64_t B = c.batch, L = c.seqlen, E = c.d_inner, N = c.d_state, R = c.dt_rank, P = c.row();
    const DataType f = DataType::kFloat32;
    const bool extreme = c.level == Level::kExtreme;
    const double deviation = c.level == Level::kTrained ? 0.68 : 1.6, noise = c.level == Level::kTrained ? 0.05 : 0.3;
    xz = gaussian(T, B * L * 2 * E, 0, extreme ? 2 : 1, 1);
    x_dbl = gaussian(T, 2 * B * L * P, 0, 1, 2);
    conv_weight = gaussian(f, 2 * E * 4, 0, 0.5, 3);
    conv_bias = gaussian(f, 2 * E, 0, 0.1, 4);
    x_proj_weight = gaussian(T, 2 * P * E, 0, 1 / std::sqrt(static_cast<double>(E)), 5);
    for (int d = 0; d < 2; d++)  // the padding rows of the contract
      for (int64_t o = R + 2 * N; o < P; o++)
        for (int64_t e = 0; e < E; e++) x_proj_weight[(d * P + o) * E + e] = 0;
    dt_weight = gaussian(T, 2 * E * R, 0, deviation / std::sqrt(static_cast<double>(R)), 6);
    dt_bias = gaussian(f, 2 * E, -4.07, deviation, 7);
    A = gaussian(f, 2 * E * N, 0, 1, 8);
    for (int64_t i = 0; i < 2 * E * N; i++) {
      double v = (i % N + 1) * std::exp(noise * A[i]);
      if (extreme && (i / N) % 2) v = std::pow(10., 3 * std::max(-1., std::min(1., A[i] / 2)));
      A[i] = round_to(f, -v);
    }
    if (extreme)
      for (int64_t e = 0; e < 2 * E; e += 3) dt_bias[e] = round_to(f, e % 2 ? 7 : -13);
    D = gaussian(f, 2 * E, 1, 0.1, 9);
    scale = gaussian(f, L, 1.3, 0.4, 10);
    for (double& s : scale) s = round_to(f, std::fabs(s));
  }
};

// The edge rule: `side` tokens at each end, into the next one inward.
std::vector<int32_t> edge_pairs(int L, int side) {
  std::vector<int32_t> pairs;
  for (int i = 0; i < side; i++) pairs.insert(pairs.end(), {i, side});
  for (int i = 0; i < side; i++) pairs.insert(pairs.end(), {L - 1 - i, L - 1 - side});
  return pairs;
}

std::vector<int32_t> merge_pairs(const Case& c) {
  const int L = c.seqlen;
  std::vector<int32_t> pairs;
  auto add = [&](int p, int q) { pairs.push_back(std::min(p, L - 1)), pairs.push_back(std::min(q, L - 1)); };
  if (c.pairs == 0) {
    const int last = L - 1;
    add(0, 2), add(1, 2), add(std::max(last - 1, 0), std::max(last - 2, 0)), add(last, std::max(last - 2, 0));
  } else if (c.pairs == 1) {
    add(0, L - 1), add(L - 1, 0), add(3, L / 2), add(L / 2, 3), add(L / 2, L / 2 + 9), add(10, 2), add(5, 5);
  } else if (c.pairs == 2) {
    pairs = edge_pairs(L, std::min(21, (L - 1) / 2));
  } else {
    for (int i : {4, 2, 1, 5, 6, 3, 8}) add(i, 3);
    for (int i : {0, 1, 7, 5, L - 2}) add(i, 0);
    for (int i = 1; i < 7; i++) add(std::max(L - i * i, 0), L - 1);
    add(0, L - 1);
  }
  return pairs;
}

// u of one channel and direction, by token
void conv_reference(const Layer& w, const Case& c, int dir, int b, int e, Values& u) {
  const int L = c.seqlen, E = c.d_inner;
  u.assign(L, 0);
  for (int t = 0; t < L; t++) {
    double s = w.conv_bias[dir * E + e];
    for (int j = 0; j < 4; j++) {
      const int from = dir ? t + 3 - j : t - 3 + j;
      if (from >= 0 && from < L)
        s += w.conv_weight[(static_cast<int64_t>(dir) * E + e) * 4 + j] *
             w.xz[(static_cast<int64_t>(b) * L + from) * 2 * E + e];
    }
    u[t] = s * sigmoid(s);
  }
}

double delta_reference(const Layer& w, const Case& c, int dir, int b, int e, int t) {
  const int64_t L = c.seqlen, E = c.d_inner, R = c.dt_rank, P = c.row();
  double s = w.dt_bias[dir * E + e];
  for (int64_t r = 0; r < R; r++)
    s += w.dt_weight[(dir * E + e) * R + r] * w.x_dbl[((dir * c.batch + b) * L + t) * P + r];
  return softplus(s);
}

// ---- conv_xproj -------------------------------------------------------------------------------------------------

#ifdef STM_SM90A  // the library has the kernels of Hopper
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

const char* name_of(ConvXProjShape shape) {
  const char* names[] = {"few",     "few, cluster 2", "few, cluster 4", "few, cluster 8",
                         "split 8", "split 4",        "split 2",        "many",
                         "wide",    "wgmma"};
  static_assert(sizeof names / sizeof *names == kConvXProjShapes);
  return names[static_cast<int>(shape)];
}

void test_conv(const Case& c, DataType T) {
  const int64_t B = c.batch, L = c.seqlen, E = c.d_inner, P = c.row();
  const Layer w(c, T);
  Values want(2 * B * L * P, 0.);
  parallel_for(2 * B, [&](int64_t i) {
    const int dir = static_cast<int>(i / B), b = static_cast<int>(i % B);
    Values u;
    for (int e = 0; e < E; e++) {
      conv_reference(w, c, dir, b, e, u);
      for (int64_t t = 0; t < L; t++)
        for (int64_t o = 0; o < P; o++) want[(i * L + t) * P + o] += u[t] * w.x_proj_weight[(dir * P + o) * E + e];
    }
  });
  Buffer xz(w.xz, T), conv_weight(w.conv_weight, DataType::kFloat32), conv_bias(w.conv_bias, DataType::kFloat32),
      x_proj_weight(w.x_proj_weight, T), x_dbl(want.size() * size_of(T)),
      workspace(conv_xproj_workspace_bytes(B, L, E, P, T));
  int32_t tactics[8];
  const int32_t count = conv_xproj_tactics(c.seqlen, c.d_inner, c.row(), T, tactics, 8, true);
  // fp16: u and the result are rounded, 2e-4 each, by the shapes for many tokens the taps as well; bf16 eight times as
  // coarse
  const double bound = T == DataType::kFloat32 ? 3e-6 : T == DataType::kFloat16 ? 6e-4 : 5e-3;
  ConvXProjParams p{};
  p.batch = c.batch, p.seqlen = c.seqlen, p.d_inner = c.d_inner, p.row = c.row(), p.type = T;
  p.xz = xz.data, p.conv_weight = conv_weight.as<float>(), p.conv_bias = conv_bias.as<float>();
  p.x_proj_weight = x_proj_weight.data, p.x_dbl = x_dbl.data, p.workspace = workspace.data;
  for (int i = 0; i < count; i++) {
    const auto tactic = static_cast<ConvXProjTactic>(tactics[i]);
    std::vector<Values> got;
    const std::string trouble = run_twice([&](cudaStream_t s) { return conv_xproj(p, tactic, s); },
                                          {{&x_dbl, T}, {&workspace, T}}, got);
    report(std::string("conv_xproj ") + (tactics[i] == 1 ? "simple " : "tensor core ") + name_of(T), c.text(),
           got.empty() ? NAN : relative_error(got[0], want), bound, trouble);
  }
  if (!conv_xproj_tensor_core_supported(c.d_inner, c.row(), T)) return;
  int major = 0;
  CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  const bool every = major >= 9 && major != 12 && c.d_inner >= 256 && c.d_inner <= 1536;
  for (int i = 0; i < kConvXProjShapes; i++) {
    const auto shape = static_cast<ConvXProjShape>(i);
    const cudaError_t status = conv_xproj_tensor_core(p, shape, nullptr);
    CHECK_CUDA(cudaDeviceSynchronize());
    // Not conv_xproj_wgmma_supported: a build that has lost the kernel says no, too.
    const bool wide = conv_xproj_wide_supported(c.d_inner, c.row());
    const bool refused =
        (shape == ConvXProjShape::kWide && !wide) || (shape == ConvXProjShape::kWgmma && !(kHasWgmma && major == 9 && wide));
    if (status == cudaErrorInvalidConfiguration && (!every || refused)) continue;
    std::vector<Values> got;
    const std::string trouble =
        run_twice([&](cudaStream_t s) { return conv_xproj_tensor_core(p, shape, s); }, {{&x_dbl, T}}, got);
    report(std::string("conv_xproj ") + name_of(shape) + " " + name_of(T), c.text(),
           got.empty() ? NAN : relative_error(got[0], want), bound, trouble);
  }
}

// ---- mamba_scan -------------------------------------------------------------------------------------------------

const char* name_of(MambaScanTactic tactic) {
  switch (tactic) {
    case MambaScanTactic::kSimple: return "simple";
    case MambaScanTactic::kWalkMma: return "walk mma";
    case MambaScanTactic::kSegments: return "segments";
    case MambaScanTactic::kAdaptive: return "adaptive";
    case MambaScanTactic::kWalkMmaTwoPass: return "two pass";
  }
  return "?";
}

struct ScanReference {
  // What rounding is relative to: terms, the absolute sum of y's; weight_scale, a weight's mean absolute term.
  Values y, terms, weights, weight_scale;
};

ScanReference scan_reference(const Layer& w, const Case& c, const std::vector<int32_t>& pairs) {
  const int64_t B = c.batch, L = c.seqlen, E = c.d_inner, N = c.d_state, R = c.dt_rank, P = c.row();
  const int64_t L_out = c.cls >= 0 ? 1 : L;
  ScanReference r;
  r.y.assign(B * L_out * E, 0), r.terms = r.y;
  parallel_for(B * E, [&](int64_t i) {
    const int b = static_cast<int>(i / E), e = static_cast<int>(i % E);
    Values u, h(N);
    for (int dir = 0; dir < 2; dir++) {
      conv_reference(w, c, dir, b, e, u);
      std::fill(h.begin(), h.end(), 0.);
      for (int64_t k = 0; k < L; k++) {
        const int64_t t = dir ? L - 1 - k : k;
        const double* row = &w.x_dbl[((dir * B + b) * L + t) * P + R];
        const double delta = delta_reference(w, c, dir, b, e, static_cast<int>(t)), s = c.scaled ? w.scale[t] : 1;
        double sum = w.D[dir * E + e] * u[t], terms = std::fabs(sum);
        for (int64_t n = 0; n < N; n++) {
          h[n] = std::exp(s * delta * w.A[(dir * E + e) * N + n]) * h[n] + delta * row[n] * u[t];
          sum += h[n] * row[N + n], terms += std::fabs(h[n] * row[N + n]);
        }
        if (c.cls >= 0 && t != c.cls) continue;
        const double z = w.xz[(b * L + t) * 2 * E + E + e], gate = z * sigmoid(z);
        const int64_t at = (b * L_out + (c.cls < 0 ? t : 0)) * E + e;
        r.y[at] += sum * gate, r.terms[at] += terms * std::fabs(gate);
      }
    }
  });
  if (c.mode == 0) return r;
  const int64_t S = static_cast<int64_t>(pairs.size()) / 2;
  r.weights.assign(B * S, 0), r.weight_scale.assign(B * S, 0);
  parallel_for(B * S, [&](int64_t i) {
    const int b = static_cast<int>(i / S), p = pairs[2 * (i % S)], q = pairs[2 * (i % S) + 1];
    const int dir = p < q ? 0 : 1, step = dir ? -1 : 1;
    const double* source = &w.x_dbl[((dir * B + b) * L + p) * P + R];
    const double* target = &w.x_dbl[((dir * B + b) * L + q) * P + R];
    double sum = 0, norm = 0, scale = 0;
    for (int e = 0; e < E; e++) {
      double sigma = 0;
      for (int t = p; t != q;) t += step, sigma += (c.scaled ? w.scale[t] : 1) * delta_reference(w, c, dir, b, e, t);
      const double dp = delta_reference(w, c, dir, b, e, p), dq = delta_reference(w, c, dir, b, e, q);
      for (int64_t n = 0; n < N; n++) {
        const double decay = std::exp(w.A[(dir * E + e) * N + n] * sigma), from = dp * source[n], to = dq * target[n];
        const double term = c.mode == 1   ? decay * from * to
                            : c.mode == 2 ? decay
                                          : decay * from / (to + (to < 0 ? -1e-6 : 1e-6));
        sum += term, scale += std::fabs(term), norm += to * to;
      }
    }
    if (c.mode == 1)
      r.weights[i] = std::min(1., std::max(0., sum / (norm + 1e-12))), r.weight_scale[i] = scale / (norm + 1e-12);
    else
      r.weights[i] = sum / (E * N), r.weight_scale[i] = scale / (E * N);
  });
  return r;
}

// Norm of the difference over that of y, or over a quarter of its terms' where they cancel more. Over a whole sequence the
// terms' norm is 2 to 4 times y's; but a class token is few values, and one channel that cancels can rule them: 2,000 hard
// ones, emulated, had up to 16, where torch's roundings (fp16 u, dt, y) err by up to 3e-3 of y's norm.
double scan_error(const Values& got, const ScanReference& want) {
  double norm = 0, terms = 0;
  for (size_t i = 0; i < want.y.size(); i++) norm += want.y[i] * want.y[i], terms += want.terms[i] * want.terms[i];
  return relative_error(got, want.y) * std::sqrt(norm / std::max({norm, terms / 16, 1e-300}));
}

struct ScanBuffers {
  Buffer xz, x_dbl, conv_weight, conv_bias, dt_weight, dt_bias, A, D, scale, pairs, y, weights, workspace, scratch, meetings;
  ScanBuffers(const Layer& w, const Case& c, DataType T, const std::vector<int32_t>& merges)
      : xz(w.xz, T), x_dbl(w.x_dbl, T), conv_weight(w.conv_weight, DataType::kFloat32),
        conv_bias(w.conv_bias, DataType::kFloat32), dt_weight(w.dt_weight, T), dt_bias(w.dt_bias, DataType::kFloat32),
        A(w.A, DataType::kFloat32), D(w.D, DataType::kFloat32), scale(w.scale, DataType::kFloat32), pairs(merges),
        y(static_cast<size_t>(c.batch) * (c.cls < 0 ? c.seqlen : 1) * c.d_inner * size_of(T)),
        weights(static_cast<size_t>(c.batch) * (merges.size() / 2) * 4),
        workspace(mamba_scan_workspace_bytes(c.batch, c.seqlen, c.d_inner, c.d_state,
                                             static_cast<int64_t>(merges.size() / 2), T)),
        scratch(kMergeScratchBytes), meetings(kMeetingBytes) {
    CHECK_CUDA(cudaMemset(scratch.data, 0, scratch.bytes));
    CHECK_CUDA(cudaMemset(meetings.data, 0, meetings.bytes));
  }
  MambaScanParams params(const Case& c, DataType T) const {
    MambaScanParams p{};
    p.batch = c.batch, p.seqlen = c.seqlen, p.d_inner = c.d_inner, p.d_state = c.d_state, p.dt_rank = c.dt_rank;
    p.row = c.row(), p.cls_index = c.cls, p.type = T, p.weight_mode = static_cast<WeightMode>(c.mode);
    p.nb_pairs = c.mode ? static_cast<int32_t>(pairs.bytes / 8) : 0;
    p.xz = xz.data, p.x_dbl = x_dbl.data, p.conv_weight = conv_weight.as<float>();
    p.conv_bias = conv_bias.as<float>(), p.dt_weight = dt_weight.data, p.dt_bias = dt_bias.as<float>();
    p.A = A.as<float>(), p.D = D.as<float>(), p.merge_pairs = c.mode ? pairs.as<int32_t>() : nullptr;
    p.decay_scale = c.scaled ? scale.as<float>() : nullptr;
    p.y = y.data, p.merge_weights = c.mode ? weights.as<float>() : nullptr, p.workspace = workspace.data;
    p.merge_scratch = scratch.data, p.meetings = meetings.data;
    return p;
  }
  void poison_sums() const {  // of the scratch, not its tickets
    constexpr size_t kTickets = kMergeBlocks * sizeof(int32_t);
    CHECK_CUDA(cudaMemset(scratch.as<char>() + kTickets, 0xff, kMergeScratchBytes - kTickets));
  }
};

void test_scan(const Case& c, DataType T) {
  const Layer w(c, T);
  const std::vector<int32_t> pairs = c.mode ? merge_pairs(c) : std::vector<int32_t>();
  const ScanReference want = scan_reference(w, c, pairs);
  ScanBuffers buffers(w, c, T, pairs);
  const MambaScanParams p = buffers.params(c, T);
  int32_t tactics[8];
  const int32_t count = mamba_scan_tactics(c.seqlen, c.d_inner, c.d_state, c.dt_rank, c.row(), T, tactics, 8, true);
  for (int i = 0; i < count; i++) {
    const auto tactic = static_cast<MambaScanTactic>(tactics[i]);
    std::vector<Output> outputs = {{&buffers.y, T}};
    if (c.mode) outputs.push_back({&buffers.weights, DataType::kFloat32});
    buffers.workspace.poison();
    buffers.poison_sums();
    std::vector<Values> got;
    std::string trouble = run_twice([&](cudaStream_t s) { return mamba_scan(p, tactic, s); }, outputs, got);
    const auto scratch = buffers.scratch.raw();
    if (!all_are(0, scratch, 0, kMergeBlocks * sizeof(int32_t))) trouble += " tickets are left";
    if (!all_are(kCanary, scratch, kMergeScratchBytes, scratch.size())) trouble += " canary of the scratch";
    const auto meetings = buffers.meetings.raw();
    if (!all_are(0, meetings, 0, kMeetingBytes)) trouble += " meetings are left";
    if (!all_are(kCanary, meetings, kMeetingBytes, meetings.size())) trouble += " canary of the meetings";
    const auto workspace = buffers.workspace.raw();
    if (!all_are(kCanary, workspace, buffers.workspace.bytes, workspace.size())) trouble += " canary of the workspace";
    // fp32: 2 ulp of ex2.approx, compounded over the memory of a slow state. fp16: prototypes had 2.1e-4 to 5.3e-4.
    const double bound = T == DataType::kFloat32 ? (c.level == Level::kTrained ? 1e-5 : 3e-5)
                         : T == DataType::kFloat16 ? 1e-3 : 8e-3;
    const std::string group = std::string("mamba_scan ") + name_of(tactic) + " " + name_of(T);
    report(group, c.text(), got.empty() ? NAN : scan_error(got[0], want), bound, trouble);
    auto report_weights = [&](const std::vector<Values>& values) {
      double worst = 0;
      if (!c.mode || values.size() < 2) return;
      for (size_t k = 0; k < want.weights.size(); k++) {
        const double error = std::fabs(values[1][k] - want.weights[k]) / std::max(want.weight_scale[k], 1e-30);
        if (!(error <= worst)) worst = error;
      }
      report(std::string("merge_weights ") + name_of(T), c.text(), worst, 2e-5, "");
    };
    report_weights(got);
    if (tactic == MambaScanTactic::kWalkMmaTwoPass) {
      MambaScanParams apart = p;  // a kernel each
      apart.meetings = nullptr;
      buffers.workspace.poison();
      std::vector<Values> two;
      trouble = run_twice([&](cudaStream_t s) { return mamba_scan(apart, tactic, s); }, outputs, two);
      report(group + " apart", c.text(), two.empty() ? NAN : scan_error(two[0], want), bound, trouble);
      report_weights(two);
    }
    const bool sliced = tactic == MambaScanTactic::kWalkMma || tactic == MambaScanTactic::kWalkMmaTwoPass;
    if ((c.mode == 1 || c.mode == 2) && sliced) {
      MambaScanParams alone = p;  // a group of weights in one block
      alone.merge_scratch = nullptr;
      std::vector<Values> whole;
      trouble = run_twice([&](cudaStream_t s) { return mamba_scan(alone, tactic, s); }, outputs, whole);
      double worst = whole.size() > 1 && got.size() > 1 ? 0 : NAN;
      for (size_t k = 0; worst == worst && k < want.weights.size(); k++) {
        const double error = std::fabs(whole[1][k] - got[1][k]) / std::max(want.weight_scale[k], 1e-30);
        if (!(error <= worst)) worst = error;
      }
      report("merge_weights in slices", c.text(), worst, 2e-6, trouble);
    }
  }
}

// ---- add_merge_norm ---------------------------------------------------------------------------------------------

struct NormCase {
  int batch = 2, seqlen = 197, d_model = 384;
  MergeRule rule = MergeRule::kNone;
  int left = 0, right = 0, cls = -1;
  bool per_image = true, residual_per_image = true;
  std::string text() const {
    char s[128];
    const char* rules[] = {"none", "edge", "table"};
    std::snprintf(s, sizeof s, "B%d L%d d%d %s %d+%d%s%s%s", batch, seqlen, d_model, rules[static_cast<int>(rule)],
                  left, right, cls >= 0 ? (" cls" + std::to_string(cls)).c_str() : "",
                  per_image ? "" : " shared weights", residual_per_image ? "" : " shared residual");
    return s;
  }
};

struct NormTables {
  int seqlen_out, nb_weights;
  std::vector<int32_t> begin, members, member_weight;
  NormTables(const NormCase& c) : seqlen_out(c.seqlen), nb_weights(c.left + c.right) {
    if (c.cls >= 0) seqlen_out = 1;
    if (c.rule == MergeRule::kEdge) seqlen_out = c.seqlen - c.left - c.right;
    if (c.rule != MergeRule::kTable) return;
    begin.push_back(0);  // groups of 1, 2, 3, 4, 1, ...: the last member is the target, the others have a weight
    nb_weights = 0;
    for (int t = 0, size = 1; t < c.seqlen; size = size % 4 + 1) {
      const int end = std::min(t + size, c.seqlen);
      for (; t < end; t++) {
        members.push_back(t);
        member_weight.push_back(t == end - 1 ? -1 : nb_weights++);
      }
      begin.push_back(t);
    }
    seqlen_out = static_cast<int>(begin.size()) - 1;
  }
};

void test_norm(const NormCase& c, DataType T) {
  const int64_t B = c.batch, L = c.seqlen, d = c.d_model, L_hidden = c.cls >= 0 ? 1 : L;
  const NormTables tables(c);
  const int64_t W = tables.nb_weights, L_out = tables.seqlen_out;
  const DataType f = DataType::kFloat32;
  const float epsilon = 1e-5f;
  const int64_t B_residual = c.residual_per_image ? B : 1;
  const Values residual = gaussian(f, B_residual * L * d, 0, 2, 1), hidden = gaussian(T, B * L_hidden * d, 0, 1, 2),
               norm_weight = gaussian(f, d, 1, 0.2, 3), weights = gaussian(f, (c.per_image ? B : 1) * W, 0.5, 0.3, 4);
  Values want_residual(B * L_out * d), want_normed(B * L_out * d);
  for (int64_t b = 0; b < B; b++)
    for (int64_t t = 0; t < L_out; t++) {
      std::vector<std::pair<int64_t, double>> members;
      const double* weight = weights.data() + (c.per_image ? b * W : 0);
      const int64_t b_residual = c.residual_per_image ? b : 0;
      if (c.cls >= 0) {
        members = {{c.cls, 1}};
      } else if (c.rule == MergeRule::kTable) {
        for (int m = tables.begin[t]; m < tables.begin[t + 1]; m++)
          members.push_back({tables.members[m], tables.member_weight[m] < 0 ? 1. : weight[tables.member_weight[m]]});
      } else {
        members = {{t + c.left, 1}};
        if (t == 0)
          for (int i = 0; i < c.left; i++) members.push_back({i, weight[i]});
        if (t == L_out - 1)
          for (int i = 0; i < c.right; i++) members.push_back({L - c.right + i, weight[c.left + i]});
      }
      double square = 0;
      for (int64_t k = 0; k < d; k++) {
        double x = 0;
        for (auto [from, factor] : members)
          x += factor * (residual[(b_residual * L + from) * d + k] +
                         hidden[(b * L_hidden + (c.cls >= 0 ? 0 : from)) * d + k]);
        want_residual[(b * L_out + t) * d + k] = x;
        square += x * x;
      }
      for (int64_t k = 0; k < d; k++)
        want_normed[(b * L_out + t) * d + k] =
            want_residual[(b * L_out + t) * d + k] / std::sqrt(square / d + epsilon) * norm_weight[k];
    }
  Buffer residual_in(residual, f), hidden_in(hidden, T), norm_in(norm_weight, f), weights_in(weights, f),
      begin(tables.begin), members(tables.members), member_weight(tables.member_weight),
      residual_out(want_residual.size() * 4), normed(want_normed.size() * size_of(T));
  AddMergeNormParams p{};
  p.batch = c.batch, p.seqlen_in = c.seqlen, p.seqlen_out = tables.seqlen_out, p.d_model = c.d_model, p.rule = c.rule;
  p.left = c.left, p.right = c.right, p.nb_weights = tables.nb_weights, p.weights_per_image = c.per_image;
  p.residual_per_image = c.residual_per_image;
  p.cls_index = c.cls, p.epsilon = epsilon, p.type = T, p.residual = residual_in.as<float>(), p.hidden = hidden_in.data;
  p.norm_weight = norm_in.as<float>(), p.merge_weights = weights_in.as<float>();
  p.begin = begin.as<int32_t>(), p.members = members.as<int32_t>(), p.member_weight = member_weight.as<int32_t>();
  p.residual_out = residual_out.as<float>(), p.normed = normed.data;
  std::vector<Values> got;
  const std::string trouble =
      run_twice([&](cudaStream_t s) { return add_merge_norm(p, s); }, {{&residual_out, f}, {&normed, T}}, got);
  const bool ran = got.size() == 2;
  const std::string group = std::string("add_merge_norm ") + name_of(T);
  report(group, c.text() + " residual", ran ? relative_error(got[0], want_residual) : NAN, 1e-6, trouble);
  // rounding alone is 2.1e-4 in fp16 and 1.7e-3 in bf16
  const double bound = T == f ? 1e-6 : T == DataType::kFloat16 ? 4e-4 : 3e-3;
  report(group, c.text() + " normed", ran ? relative_error(got[1], want_normed) : NAN, bound, trouble);
}

// ---- linear ------------------------------------------------------------------------------------------------------

struct LinearCase {
  int64_t rows;
  int in_features, out_features;
};

std::string name_of(const LinearShape& shape) {
  const std::string tile = std::to_string(shape.rows) + " x " + std::to_string(shape.columns) + ", ";
  return tile + (shape.wgmma ? "wgmma, " + std::to_string(shape.wgmma) + " blocks" : std::to_string(shape.across) + " x " + std::to_string(shape.along) + " warps");
}

// y = x weight^T, x being (rows, K)
Values product(const Values& x, const Values& weight, int64_t rows, int64_t N, int64_t K) {
  Values y(static_cast<size_t>(rows * N));
  parallel_for(rows, [&](int64_t m) {
    for (int64_t n = 0; n < N; n++) {
      double s = 0;
      for (int64_t k = 0; k < K; k++) s += x[m * K + k] * weight[n * K + k];
      y[m * N + n] = s;
    }
  });
  return y;
}

// Whether a shape can run: divisions, and shared memory for the weights, six chunks of x, and what a norm needs beside them;
// wgmma on Hopper only, where all of its shapes have room.
bool linear_fits(const LinearShape& shape, int K, int N, bool norm) {
  int most = 0, major = 0;
  CHECK_CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  if (N % shape.columns != 0) return false;
  if (shape.wgmma) return kHasWgmma && major == 9 && K % 64 == 0;
  if (K % (32 * shape.along) != 0) return false;
  const int chunk = 32 * shape.along, sums = shape.along * shape.rows * (shape.columns + 4) * 4;
  const int tiles = 2 * K * shape.columns + 2 * shape.rows * chunk * std::min(K / chunk, 6);
  return std::max(tiles, sums) + (norm ? shape.rows * (shape.columns + 5) * 4 : 0) <= most;
}

LinearParams linear_params(const LinearCase& c, DataType T, const Buffer& x, const Buffer& weight, const Buffer& y) {
  LinearParams p{};
  p.rows = c.rows, p.in_features = c.in_features, p.out_features = c.out_features, p.type = T;
  p.x = x.data, p.weight = weight.data, p.y = y.data;
  return p;
}

void test_linear(const LinearCase& c, DataType T) {
  const int64_t K = c.in_features, N = c.out_features;
  const Values x = gaussian(T, c.rows * K, 0, 1, 1), weight = gaussian(T, N * K, 0, 1 / std::sqrt(static_cast<double>(K)), 2);
  const Values want = product(x, weight, c.rows, N, K);
  const Buffer x_buffer(x, T), weight_buffer(weight, T);
  Buffer y(want.size() * size_of(T));
  const LinearParams p = linear_params(c, T, x_buffer, weight_buffer, y);
  const std::string text = "rows " + std::to_string(c.rows) + ", " + std::to_string(K) + " to " + std::to_string(N);
  if (T == DataType::kFloat32) {
    report("linear fp32", text, 0, 1, linear_supported(c.in_features, c.out_features, T) ? "is said to be supported" : "");
    return;
  }
  for (const LinearShape& shape : kLinearShapes)
    if (linear_fits(shape, c.in_features, c.out_features, true) && !linear_supported(c.in_features, c.out_features, T))
      report("linear refusals", text, 0, 1, name_of(shape) + " runs it, but it is said not to be supported");
  const double bound = T == DataType::kFloat16 ? 4e-4 : 3e-3;  // y is rounded to T
  for (int i = -1; i < kNbLinearShapes; i++) {
    auto enqueue = [&](cudaStream_t s) { return i < 0 ? linear(p, s) : linear(p, i, s); };
    if (i < 0 ? !linear_supported(c.in_features, c.out_features, T) : !linear_fits(kLinearShapes[i], c.in_features, c.out_features, false)) {
      report("linear refusals", text, 0, 1, enqueue(nullptr) == cudaErrorInvalidConfiguration ? "" : "runs, or another error");
      continue;
    }
    std::vector<Values> got;
    const std::string trouble = run_twice(enqueue, {{&y, T}}, got);
    report(std::string("linear ") + (i < 0 ? "as chosen" : name_of(kLinearShapes[i])) + " " + name_of(T), text,
           got.empty() ? NAN : relative_error(got[0], want), bound, trouble);
  }
}

// Two of them with a norm between: K -> N, the residual added, tokens of `images` merged, normalised, N -> K.
void test_linear_norm(const LinearCase& c, DataType T, int images = 1, int left = 0, int right = 0) {
  const int64_t K = c.in_features, N = c.out_features, seqlen = c.rows / images, kept = seqlen - left - right, rows = kept * images;
  const DataType f = DataType::kFloat32;
  if (T == f || N % 64 != 0) return;
  const double epsilon = 1e-5, size = rows % 2 ? 30 : 0.02;  // of the residual
  const Values x = gaussian(T, c.rows * K, 0, 1, 1), weight = gaussian(T, N * K, 0, 1 / std::sqrt(static_cast<double>(K)), 2);
  const Values residual = gaussian(f, c.rows * N, 0, size, 3), merge_weights = gaussian(f, (left ? images : 1) * (left + right), 0.5, 0.3, 5);
  const Values back = gaussian(T, K * N, 0, 1 / std::sqrt(static_cast<double>(N)), 4);
  Values every = product(x, weight, c.rows, N, K), sum(static_cast<size_t>(rows * N));
  for (size_t i = 0; i < every.size(); i++) every[i] += residual[i];
  for (int64_t m = 0; m < rows; m++)
    for (int64_t n = 0; n < N; n++) {
      const int64_t image = m / kept, token = m % kept + left;
      auto of = [&](int64_t t) { return every[(image * seqlen + t) * N + n]; };
      const double* w = merge_weights.data() + (left ? image : 0) * (left + right);  // one row for all images where nothing merges on the left
      double v = of(token);
      for (int s = 0; token == left && s < left; s++) v += w[s] * of(s);
      for (int s = 0; token == left + kept - 1 && s < right; s++) v += w[left + s] * of(left + kept + s);
      sum[m * N + n] = v;
    }
  Values squares(static_cast<size_t>(rows * N / kSquaredColumns)), stream, normed(sum.size());
  for (size_t i = 0; i < sum.size(); i++) squares[i / kSquaredColumns] += sum[i] * sum[i], stream.push_back(sum[i] / 16);
  // The second reads what the first should have made, so that each is judged alone.
  Values given;
  for (double v : stream) given.push_back(round_to(T, v));
  for (int64_t m = 0; m < rows; m++) {
    double total = 0;
    for (int64_t n = 0; n < N / kSquaredColumns; n++) total += squares[m * (N / kSquaredColumns) + n];
    for (int64_t n = 0; n < N; n++) normed[m * N + n] = given[m * N + n] * 16 / std::sqrt(total / static_cast<double>(N) + epsilon);
  }
  const Values want = product(normed, back, rows, K, N);
  const Buffer x_buffer(x, T), weight_buffer(weight, T), residual_buffer(residual, f), back_buffer(back, T), given_buffer(given, T),
      squares_buffer(squares, f), merge_buffer(merge_weights, f);
  Buffer y(sum.size() * size_of(T)), out(sum.size() * 4), squares_out(squares.size() * 4), last(want.size() * size_of(T));
  LinearParams p = linear_params(c, T, x_buffer, weight_buffer, y);
  p.residual = residual_buffer.as<float>(), p.residual_out = out.as<float>(), p.squares_out = squares_out.as<float>();
  p.seqlen = static_cast<int32_t>(seqlen), p.left = left, p.right = right, p.merge_weights = merge_buffer.as<float>(), p.weights_per_image = left > 0;
  LinearParams q = linear_params({rows, static_cast<int>(N), static_cast<int>(K)}, T, given_buffer, back_buffer, last);
  q.squares = squares_buffer.as<float>(), q.epsilon = static_cast<float>(epsilon);
  std::string text = "rows " + std::to_string(c.rows) + ", " + std::to_string(K) + " to " + std::to_string(N);
  if (left + right > 0) text += ", " + std::to_string(images) + " images merge " + std::to_string(left) + "+" + std::to_string(right);
  const double bound = T == DataType::kFloat16 ? 4e-4 : 3e-3;
  for (int i = -1; i < kNbLinearShapes; i++) {
    const std::string group = "linear norm " + (i < 0 ? "as chosen" : name_of(kLinearShapes[i])) + " " + name_of(T);
    auto fits = [&](int in, int outward) {
      return i < 0 ? linear_supported(in, outward, T) : linear_fits(kLinearShapes[i], in, outward, true);
    };
    auto enqueue = [&](const LinearParams& which) {
      return [&, i](cudaStream_t s) { return i < 0 ? linear(which, s) : linear(which, i, s); };
    };
    if (fits(c.in_features, c.out_features)) {
      std::vector<Values> got;
      const std::string trouble = run_twice(enqueue(p), {{&y, T}, {&out, f}, {&squares_out, f}}, got);
      const bool whole = got.size() == 3;
      report(group, text + ", y", whole ? relative_error(got[0], stream) : NAN, bound, trouble);
      report(group, text + ", sum", whole ? relative_error(got[1], sum) : NAN, 3e-6, "");
      report(group, text + ", squares", whole ? relative_error(got[2], squares) : NAN, 6e-6, "");
    }
    if (fits(c.out_features, c.in_features)) {
      std::vector<Values> got;
      const std::string trouble = run_twice(enqueue(q), {{&last, T}}, got);
      report(group, text + ", back", got.empty() ? NAN : relative_error(got[0], want), bound, trouble);
    }
  }
  LinearParams broken = p;
  broken.squares_out = nullptr;
  report("linear norm refusals", text, 0, 1, linear(broken, nullptr) == cudaErrorInvalidValue ? "" : "a residual without squares_out is taken");
  for (int what = 0; what < 6; what++) {
    if (what == 5 && seqlen == 1) continue;  // any rows are images of one token
    broken = p;
    broken.left = 1, broken.merge_weights = merge_buffer.as<float>();
    if (what == 0) broken.left = kMostMerged + 1;
    if (what == 1) broken.left = -1;
    if (what == 2) broken.seqlen = 1 + right;
    if (what == 3) broken.residual = nullptr;
    if (what == 4) broken.merge_weights = nullptr;
    if (what == 5) broken.rows += 1;
    report("linear norm refusals", text, 0, 1, linear(broken, nullptr) == cudaErrorInvalidValue ? "" : "a merge that cannot be is taken");
  }
}

// ---- patch_rows -------------------------------------------------------------------------------------------------

struct PatchCase {
  int batch = 2, height = 48, width = 64, patch = 16, stride = 16, cls = 6;
  int offset = 0;  // floats from an aligned address to the images
  int grid_h() const { return (height - patch) / stride + 1; }
  int grid_w() const { return (width - patch) / stride + 1; }
  int seqlen() const { return grid_h() * grid_w() + (cls >= 0); }
  std::string text() const {
    char s[128];
    std::snprintf(s, sizeof s, "B%d %dx%d p%d s%d cls%d%s", batch, height, width, patch, stride, cls,
                  offset ? " offset" : "");
    return s;
  }
};

// Nothing is computed, so every value must be the pixel as rounded to T, or zero.
void test_patch(const PatchCase& c, DataType T) {
  const int64_t B = c.batch, H = c.height, W = c.width, P = c.patch, K = 3 * P * P, L = c.seqlen();
  const Values images = gaussian(DataType::kFloat32, c.offset + B * 3 * H * W, 0, 1, 1);
  const double* first = images.data() + c.offset;
  Values want(B * L * K, 0.);
  for (int64_t b = 0; b < B; b++)
    for (int64_t n = 0; n < c.grid_h() * c.grid_w(); n++) {
      const int64_t y = n / c.grid_w() * c.stride, x = n % c.grid_w() * c.stride, t = n + (c.cls >= 0 && n >= c.cls);
      for (int64_t k = 0; k < K; k++)
        want[(b * L + t) * K + k] =
            round_to(T, first[((b * 3 + k / (P * P)) * H + y + k / P % P) * W + x + k % P]);
    }
  Buffer images_in(images, DataType::kFloat32), rows(want.size() * size_of(T));
  PatchRowsParams p{};
  p.batch = c.batch, p.height = c.height, p.width = c.width, p.patch = c.patch, p.stride = c.stride;
  p.cls_index = c.cls, p.type = T, p.images = images_in.as<float>() + c.offset, p.rows = rows.data;
  std::vector<Values> got;
  const std::string trouble = run_twice([&](cudaStream_t s) { return patch_rows(p, s); }, {{&rows, T}}, got);
  double wrong = got.empty() ? NAN : 0;
  for (size_t i = 0; i < want.size() && !got.empty(); i++) wrong += !(got[0][i] == want[i]);
  report(std::string("patch_rows ") + name_of(T), c.text(), wrong, 0.5, trouble);
}

// ---- what must be refused ---------------------------------------------------------------------------------------

// What a ViM takes where it counts: a build that has lost the kernel would only be slower.
void test_conv_shapes() {
  int major = 0;
  CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  if (!kHasWgmma || major != 9) return;
  ConvXProjParams p{};
  p.seqlen = 197, p.d_inner = 768, p.row = 56, p.type = DataType::kFloat16;
  for (int batch : {64, 512}) {  // over 20 tokens a multiprocessor of any card
    p.batch = batch;
    report("shapes", "ViM-S, batch " + std::to_string(batch), conv_xproj_shape(p) == ConvXProjShape::kWgmma ? 0 : 1, 0.5, "");
  }
}

// Pairs of tokens that do not exist: NaN there, every other weight as without them, in slices and in one block.
void test_broken_pairs() {
  Case c;
  c.batch = 2, c.seqlen = 300, c.d_inner = 768, c.dt_rank = 24;
  for (int mode : {1, 2})
    for (int far : {20, 90}) {  // the second is a run too long for the fast path
      c.mode = mode;
      const Layer w(c, DataType::kFloat16);
      const int L = c.seqlen;
      const std::vector<int32_t> good = {0, far, 1, far, 2, far, 3, far, L - 4, L - 5, L - 3, L - 5, L - 2, L - 5, L - 1, L - 5};
      const ScanBuffers whole(w, c, DataType::kFloat16, good);
      for (int broken : {0, 1, 3, 4, 7}) {
        std::vector<int32_t> pairs = good;
        pairs[static_cast<size_t>(2 * broken + (broken & 1))] = broken < 4 ? -1 : L;
        const ScanBuffers buffers(w, c, DataType::kFloat16, pairs);
        for (bool slices : {true, false}) {
          std::vector<Values> got;
          for (const ScanBuffers* which : {&whole, &buffers}) {
            MambaScanParams p = which->params(c, DataType::kFloat16);
            if (!slices) p.merge_scratch = nullptr;
            CHECK_CUDA(cudaMemset(which->weights.data, 0, which->weights.bytes));
            CHECK_CUDA(mamba_scan(p, MambaScanTactic::kWalkMma, nullptr));
            CHECK_CUDA(cudaDeviceSynchronize());
            got.push_back(decode(which->weights.raw(), which->weights.bytes, DataType::kFloat32));
          }
          int wrong = 0;
          for (size_t i = 0; i < got[0].size(); i++)
            wrong += static_cast<int>(i % 8) == broken ? !std::isnan(got[1][i])
                                                       : !(std::fabs(got[1][i] - got[0][i]) <= 1e-5 * std::fabs(got[0][i]));
          report("broken pairs", c.text() + " pair " + std::to_string(broken) + (slices ? "" : " one block"), wrong, 0.5, "");
        }
      }
    }
}

// Scans whose blocks wait for each other, on several streams at once, each with memory of its own: the same bits as alone.
void test_streams() {
  constexpr int kStreams = 6, kRounds = 40;
  Case c;
  c.batch = 1, c.seqlen = 577, c.d_inner = 768, c.dt_rank = 24, c.mode = 1;
  const Layer w(c, DataType::kFloat16);
  const std::vector<int32_t> pairs = edge_pairs(c.seqlen, 5);
  std::vector<std::unique_ptr<ScanBuffers>> buffers;
  std::vector<cudaStream_t> streams(kStreams);
  for (auto& stream : streams) {
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    buffers.push_back(std::make_unique<ScanBuffers>(w, c, DataType::kFloat16, pairs));
  }
  auto results = [&](int i) {
    std::vector<unsigned char> all = buffers[i]->y.raw();
    const std::vector<unsigned char> weights = buffers[i]->weights.raw();
    all.insert(all.end(), weights.begin(), weights.end());
    return all;
  };
  std::vector<unsigned char> alone;
  int wrong = 0;
  for (int round = 0; round <= kRounds; round++) {
    const int count = round ? kStreams : 1;  // first alone
    for (int i = 0; i < count; i++)
      for (const Buffer* b : {&buffers[i]->workspace, &buffers[i]->y, &buffers[i]->weights})
        CHECK_CUDA(cudaMemsetAsync(b->data, 0xff, b->bytes, streams[i]));
    for (int i = 0; i < count; i++)
      CHECK_CUDA(mamba_scan(buffers[i]->params(c, DataType::kFloat16), MambaScanTactic::kWalkMmaTwoPass, streams[i]));
    CHECK_CUDA(cudaDeviceSynchronize());
    if (!round) alone = results(0);
    for (int i = 0; round && i < kStreams; i++) wrong += results(i) != alone;
  }
  for (double v : decode(alone, buffers[0]->y.bytes, DataType::kFloat16)) wrong += std::isnan(v);
  for (const auto& b : buffers) wrong += !all_are(0, b->meetings.raw(), 0, kMeetingBytes);
  // one kernel where the card is large enough, two without a place to meet
  cudaDeviceProp device;
  CHECK_CUDA(cudaGetDeviceProperties(&device, 0));
  for (bool meet : {true, false}) {
    MambaScanParams p = buffers[0]->params(c, DataType::kFloat16);
    if (!meet) p.meetings = nullptr;
    cudaGraph_t graph;
    size_t nodes = 0;
    CHECK_CUDA(cudaStreamBeginCapture(streams[0], cudaStreamCaptureModeGlobal));
    CHECK_CUDA(mamba_scan(p, MambaScanTactic::kWalkMmaTwoPass, streams[0]));
    CHECK_CUDA(cudaStreamEndCapture(streams[0], &graph));
    CHECK_CUDA(cudaGraphGetNodes(graph, nullptr, &nodes));
    CHECK_CUDA(cudaGraphDestroy(graph));
    if (!meet || (device.multiProcessorCount >= 100 && device.sharedMemPerMultiprocessor >= 160 * 1024))
      report("streams", meet ? "one kernel" : "two kernels", nodes == (meet ? 1 : 2) ? 0 : 1, 0.5, "");
  }
  for (auto& stream : streams) CHECK_CUDA(cudaStreamDestroy(stream));
  report("streams", "two pass, " + std::to_string(kStreams) + " at once", wrong, 0.5, "");
}

void test_refusals() {
  auto expect = [](const char* what, cudaError_t got) {
    report("refusals", what, got == cudaErrorInvalidValue ? 0 : 1, 0.5, "");
  };
  MambaScanParams scan{};
  scan.batch = 1, scan.seqlen = 8, scan.d_inner = 64, scan.d_state = 17, scan.dt_rank = 12, scan.row = 48;
  scan.cls_index = -1, scan.type = DataType::kFloat16;
  expect("walk mma, d_state 17", mamba_scan(scan, MambaScanTactic::kWalkMma, nullptr));
  scan.d_state = 16;
  expect("two passes over 8 tokens", mamba_scan(scan, MambaScanTactic::kWalkMmaTwoPass, nullptr));
  scan.seqlen = 209;
  expect("segments of 209 tokens", mamba_scan(scan, MambaScanTactic::kSegments, nullptr));
  scan.seqlen = 8;
  scan.d_state = 65, scan.row = 144;
  expect("d_state 65", mamba_scan(scan, MambaScanTactic::kSimple, nullptr));
  scan.d_state = 16, scan.row = 40;
  expect("row shorter than dt_rank + 2 d_state", mamba_scan(scan, MambaScanTactic::kSimple, nullptr));
  scan.row = 48, scan.cls_index = 8;
  expect("cls_index 8 of 8", mamba_scan(scan, MambaScanTactic::kSimple, nullptr));
  ConvXProjParams conv{};
  conv.batch = 1, conv.seqlen = 8, conv.d_inner = 33, conv.row = 48, conv.type = DataType::kFloat16;
  expect("conv tensor core, d_inner 33", conv_xproj(conv, ConvXProjTactic::kTensorCore, nullptr));
  AddMergeNormParams norm{};
  norm.batch = 1, norm.seqlen_in = 8, norm.seqlen_out = 7, norm.d_model = 64, norm.cls_index = -1;
  expect("no merge, lengths 8 and 7", add_merge_norm(norm, nullptr));
  PatchRowsParams patch{};
  patch.batch = 1, patch.height = 16, patch.width = 16, patch.patch = 17, patch.stride = 16, patch.cls_index = -1;
  expect("patch 17 of 16 pixels", patch_rows(patch, nullptr));
  patch.patch = 16, patch.cls_index = 2;
  expect("class token 2 of 2 rows", patch_rows(patch, nullptr));
  patch.cls_index = -1, patch.stride = 0;
  expect("patch stride 0", patch_rows(patch, nullptr));
}

// ---- cases ------------------------------------------------------------------------------------------------------

struct Model {
  const char* name;
  int d_inner, dt_rank;
};
const Model kModels[] = {{"Ti", 384, 12}, {"S", 768, 24}, {"B", 1536, 48}};

bool wanted(const char* op) { return options.only.empty() || options.only == op; }

template <typename Edit>
Case with(Edit edit) {
  Case c;
  edit(c);
  return c;
}

std::vector<Case> scan_cases() {
  std::vector<Case> cases;
  if (options.quick) {
    cases.push_back(with([](Case& c) { c.batch = 1, c.seqlen = 21, c.d_inner = 64, c.mode = 1, c.scaled = true; }));
    cases.push_back(with([](Case& c) { c.batch = 2, c.seqlen = 9, c.d_inner = 33, c.d_state = 17, c.dt_rank = 3; }));
    cases.push_back(with([](Case& c) { c.batch = 2, c.seqlen = 19, c.d_inner = 64, c.cls = 9; }));
    cases.push_back(with([](Case& c) { c.batch = 1, c.seqlen = 230, c.d_inner = 32, c.mode = 2, c.pairs = 1; }));
    cases.push_back(with([](Case& c) { c.batch = 64, c.seqlen = 9, c.d_inner = 384; }));  // 32 channels a warp
    return cases;
  }
  for (int L : {1, 2, 3, 7, 8, 9, 16, 17, 63, 64, 65, 127, 128, 129, 197, 208, 209, 577})
    cases.push_back(with([&](Case& c) { c.seqlen = L, c.d_inner = 64; }));
  cases.push_back(with([](Case& c) { c.seqlen = 1025, c.d_inner = 64, c.batch = 1; }));
  cases.push_back(with([](Case& c) { c.seqlen = 4097, c.d_inner = 32, c.batch = 1; }));
  cases.push_back(with([](Case& c) { c.seqlen = 4097, c.d_inner = 32, c.batch = 1, c.level = Level::kHard; }));
  for (int E : {16, 32, 33, 48, 96, 384, 768}) cases.push_back(with([&](Case& c) { c.d_inner = E, c.seqlen = 65; }));
  for (int N : {1, 4, 16, 17, 33, 64}) cases.push_back(with([&](Case& c) { c.d_state = N, c.seqlen = 65; }));
  for (int R : {1, 3, 4, 8, 12, 16, 20, 24, 32, 48, 64})
    cases.push_back(with([&](Case& c) { c.dt_rank = R, c.seqlen = 65; }));
  for (int B : {1, 2, 5}) cases.push_back(with([&](Case& c) { c.batch = B, c.seqlen = 65; }));
  for (int cls : {0, 1, 98, 99, 100, 195, 196}) cases.push_back(with([&](Case& c) { c.cls = cls; }));
  for (int cls : {0, 300, 576}) cases.push_back(with([&](Case& c) { c.cls = cls, c.seqlen = 577; }));
  cases.push_back(with([](Case& c) { c.cls = 0, c.seqlen = 1; }));
  cases.push_back(with([](Case& c) { c.scaled = true; }));
  cases.push_back(with([](Case& c) { c.scaled = true, c.cls = 98, c.mode = 1; }));
  cases.push_back(with([](Case& c) { c.scaled = true, c.seqlen = 577; }));
  for (int mode : {1, 3}) cases.push_back(with([&](Case& c) { c.mode = mode, c.pairs = 2, c.seqlen = 577; }));
  for (int mode : {1, 2, 3})
    for (int pairs : {0, 1})
      for (int L : {9, 197})
        cases.push_back(with([&](Case& c) {
          c.mode = mode, c.pairs = pairs, c.seqlen = L, c.scaled = L == 9 || mode == 2, c.d_state = pairs ? 16 : 17;
        }));
  for (int pairs : {2, 3})  // merge weights of 16 states: ranks, channels that fill no tile, spans of 63 and 64 tokens
    for (int mode : {1, 2}) {
      auto merging = [&](auto edit) {
        cases.push_back(with([&](Case& c) { c.mode = mode, c.pairs = pairs, c.seqlen = 65, edit(c); }));
      };
      for (int R : {4, 16, 20, 36, 64}) merging([&](Case& c) { c.dt_rank = R, c.scaled = R == 20; });
      for (int E : {16, 100, 132}) merging([&](Case& c) { c.d_inner = E, c.scaled = true; });
      merging([&](Case& c) { c.level = Level::kHard, c.seqlen = 9; });
    }
  for (Level level : {Level::kHard, Level::kExtreme}) {
    for (int L : {8, 197}) cases.push_back(with([&](Case& c) { c.level = level, c.seqlen = L; }));
    cases.push_back(with([&](Case& c) { c.level = level, c.mode = 1, c.pairs = 1, c.scaled = true; }));
  }
  for (const Model& m : kModels)
    cases.push_back(with([&](Case& c) { c.d_inner = m.d_inner, c.dt_rank = m.dt_rank, c.mode = 1; }));
  // Merge weights beside more walks than are resident at once: in several slices of a few groups, in one of very many
  for (auto [B, E] : {std::pair<int, int>{64, 512}, {48, 768}, {530, 128}})
    cases.push_back(with([&, B = B, E = E](Case& c) {
      c.batch = B, c.d_inner = E, c.dt_rank = 24, c.seqlen = 9, c.mode = 1, c.pairs = 1;
    }));
  // Segments with 6 (one image) and 12 channels a block (two), as chosen for 132 multiprocessors
  for (int B : {1, 2}) {
    auto wide = [&](auto edit) {
      cases.push_back(with([&](Case& c) { c.batch = B, c.d_inner = 768, c.seqlen = 65, edit(c); }));
    };
    for (int L : {1, 79, 80, 81, 104, 105, 150, 200, 201, 208}) wide([&](Case& c) { c.seqlen = L; });
    for (int R : {4, 32, 36, 64}) wide([&](Case& c) { c.dt_rank = R; });
    for (int cls : {0, 98, 196}) wide([&](Case& c) { c.cls = cls, c.seqlen = 197; });
    wide([&](Case& c) { c.d_inner = 772, c.scaled = true; });
    for (Level level : {Level::kHard, Level::kExtreme}) wide([&](Case& c) { c.level = level, c.seqlen = 197; });
  }
  // The walk in two passes: pieces of every length, a class token in many of them
  for (int L : {210, 215, 216, 223, 401, 788, 1031})
    cases.push_back(with([&](Case& c) { c.seqlen = L, c.d_inner = 48; }));
  for (int E : {16, 384, 768}) cases.push_back(with([&](Case& c) { c.seqlen = 333, c.d_inner = E, c.batch = 3; }));
  for (int R : {4, 36, 64}) cases.push_back(with([&](Case& c) { c.seqlen = 250, c.d_inner = 32, c.dt_rank = R; }));
  for (int cls : {7, 8, 16, 100, 287, 288, 560, 575})
    cases.push_back(with([&](Case& c) { c.cls = cls, c.seqlen = 577, c.scaled = cls == 288; }));
  for (Level level : {Level::kHard, Level::kExtreme})
    cases.push_back(with([&](Case& c) { c.level = level, c.mode = 1, c.pairs = 1, c.scaled = true, c.seqlen = 577; }));
  // The walk with 32 channels a warp: only where there are many (24,576)
  auto many = [&](auto edit) {
    Case c;
    c.batch = 32, c.d_inner = 768, c.dt_rank = 24, c.seqlen = 17;
    edit(c);
    cases.push_back(c);
  };
  for (int L : {1, 2, 7, 8, 9, 40, 63, 197, 230}) many([&](Case& c) { c.seqlen = L; });
  for (int R : {4, 36, 64}) many([&](Case& c) { c.dt_rank = R; });
  for (int cls : {0, 8, 16}) many([&](Case& c) { c.cls = cls; });
  for (int pairs : {0, 1}) many([&](Case& c) { c.mode = 1, c.pairs = pairs, c.scaled = true; });
  for (Level level : {Level::kHard, Level::kExtreme}) many([&](Case& c) { c.level = level, c.seqlen = 33; });
  return cases;
}

std::vector<Case> conv_cases() {
  std::vector<Case> cases;
  if (options.quick) {
    cases.push_back(with([](Case& c) { c.batch = 2, c.seqlen = 21, c.d_inner = 64; }));
    cases.push_back(with([](Case& c) { c.batch = 2, c.seqlen = 9, c.d_inner = 33, c.dt_rank = 3; }));
    cases.push_back(with([](Case& c) { c.batch = 70, c.seqlen = 65, c.d_inner = 32; }));
    return cases;
  }
  for (int L : {1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 197, 577, 1025})
    cases.push_back(with([&](Case& c) { c.seqlen = L; }));
  cases.push_back(with([](Case& c) { c.seqlen = 4097, c.d_inner = 32, c.batch = 1; }));
  for (int L : {1, 2, 3, 5, 6, 7, 197})  // enough tokens for the large-batch kernel
    cases.push_back(with([&](Case& c) { c.seqlen = L, c.batch = 20000 / L, c.d_inner = 64; }));
  for (int L : {6, 11, 12, 13, 47, 48, 49})  // groups of 6, images that end in the middle of a tile
    cases.push_back(with([&](Case& c) { c.seqlen = L, c.batch = 9, c.d_inner = 64; }));
  // Wide blocks of an H100: 96 and 64 tokens; the same, two on every processor; 64 twice; 64 once; 96 twice.
  for (auto [B, L] : {std::pair<int, int>{128, 158}, {106, 197}, {128, 118}, {40, 197}, {128, 197}})
    cases.push_back(with([&, b = B, l = L](Case& c) { c.batch = b, c.seqlen = l, c.d_inner = 128; }));
  // Of wgmma, with 132 multiprocessors: tiles of 192 tokens, two rounds, two tokens more than one has; short images whose
  // tiles need every row of a slot, over several steps.
  for (auto [B, L] : {std::pair<int, int>{132, 192}, {150, 197}, {2, 12673}})
    cases.push_back(with([&, b = B, l = L](Case& c) { c.batch = b, c.seqlen = l, c.d_inner = 128; }));
  for (auto [B, L] : {std::pair<int, int>{388, 64}, {401, 61}})
    cases.push_back(with([&, b = B, l = L](Case& c) { c.batch = b, c.seqlen = l, c.d_inner = 192; }));
  for (int E : {32, 33, 64, 96, 160, 288, 384, 768, 1056})
    cases.push_back(with([&](Case& c) { c.d_inner = E, c.seqlen = 65; }));
  for (int R : {1, 3, 12, 24, 48, 64}) {
    cases.push_back(with([&](Case& c) { c.dt_rank = R, c.seqlen = 65; }));
    cases.push_back(with([&](Case& c) { c.dt_rank = R, c.batch = 102; }));
  }
  for (int N : {1, 4, 17, 64}) cases.push_back(with([&](Case& c) { c.d_state = N, c.seqlen = 65; }));
  for (int B : {1, 2, 5}) cases.push_back(with([&](Case& c) { c.batch = B; }));
  for (Level level : {Level::kHard, Level::kExtreme}) cases.push_back(with([&](Case& c) { c.level = level; }));
  for (const Model& m : kModels)
    cases.push_back(with([&](Case& c) { c.d_inner = m.d_inner, c.dt_rank = m.dt_rank; }));
  return cases;
}

std::vector<LinearCase> linear_cases() {
  if (options.quick) return {{9, 64, 32}, {41, 384, 192}, {197, 192, 768}, {70, 1536, 768}, {123, 128, 128}};  // the last: three images merge
  std::vector<LinearCase> cases;
  for (int rows : {1, 7, 8, 9, 23, 24, 25, 39, 40, 41, 56, 57, 79, 80, 81, 123, 161, 591}) cases.push_back({rows, 128, 384});
  for (auto [K, N] : {std::pair<int, int>{64, 32}, {128, 16}, {128, 32}, {192, 96}, {448, 64}, {576, 128}, {1024, 16}, {2048, 192}, {6912, 192}})
    cases.push_back({50, K, N});
  for (const Model& m : kModels)
    for (int rows : {158, 197, 577}) {
      cases.push_back({rows, m.d_inner / 2, 2 * m.d_inner});
      cases.push_back({rows, m.d_inner, m.d_inner / 2});
    }
  return cases;
}

std::vector<NormCase> norm_cases() {
  std::vector<NormCase> cases;
  auto add = [&](auto edit) {
    NormCase c;
    edit(c);
    cases.push_back(c);
  };
  for (int L : {1, 2, 63, 197, 1025}) add([&](NormCase& c) { c.seqlen = L, c.d_model = 192; });
  for (int d : {1, 4, 7, 64, 130, 192, 256, 384, 500, 512, 640, 768, 1024, 1028, 1500})
    add([&](NormCase& c) { c.d_model = d, c.seqlen = 9; });
  for (int d : {100, 192, 500, 768, 1024})  // ends with many sources: all warps of a block
    for (auto [left, right] : {std::pair<int, int>{41, 42}, {7, 0}, {1, 9}, {6, 2}})
      add([&, l = left, r = right](NormCase& c) {
        c.d_model = d, c.batch = 3, c.rule = MergeRule::kEdge, c.left = l, c.right = r, c.residual_per_image = r != 9;
      });
  for (int d : {384, 6}) {
    for (auto [left, right] :
         {std::pair<int, int>{1, 1}, {2, 0}, {0, 3}, {5, 5}, {6, 0}, {0, 7}, {41, 41}, {100, 95}, {0, 195}, {100, 96},
          {190, 6}, {3, 193}})
      for (bool per_image : {true, false})
        add([&, l = left, r = right](NormCase& c) {
          c.d_model = d, c.rule = MergeRule::kEdge, c.left = l, c.right = r, c.per_image = per_image;
        });
    for (bool per_image : {true, false})
      add([&](NormCase& c) { c.d_model = d, c.rule = MergeRule::kTable, c.per_image = per_image; });
    for (int cls : {0, 98, 196}) add([&](NormCase& c) { c.d_model = d, c.cls = cls; });
    for (int B : {1, 3}) add([&](NormCase& c) { c.d_model = d, c.batch = B, c.residual_per_image = false; });
    add([&](NormCase& c) { c.d_model = d, c.cls = 98, c.residual_per_image = false; });
    for (MergeRule rule : {MergeRule::kEdge, MergeRule::kTable})
      add([&](NormCase& c) {
        c.d_model = d, c.rule = rule, c.residual_per_image = false;
        if (rule == MergeRule::kEdge) c.left = 2, c.right = 1;
      });
  }
  if (options.quick) {
    std::vector<NormCase> few;
    for (size_t i = 0; i < cases.size(); i += 4) few.push_back(cases[i]);
    return few;
  }
  return cases;
}

std::vector<PatchCase> patch_cases() {
  std::vector<PatchCase> cases;
  auto add = [&](auto edit) {
    PatchCase c;
    edit(c);
    cases.push_back(c);
  };
  auto sides = [&](int height, int width, int patch, int stride) {
    add([&](PatchCase& c) {
      c.height = height, c.width = width, c.patch = patch, c.stride = stride;
      c.cls = c.grid_h() * c.grid_w() / 2;
    });
  };
  for (int cls : {-1, 0, 6, 12}) add([&](PatchCase& c) { c.cls = cls; });
  for (int cls : {-1, 0, 12}) add([&](PatchCase& c) { c.cls = cls, c.patch = 14, c.stride = 13; });
  add([](PatchCase& c) { c.offset = 1; });
  sides(50, 68, 16, 16);  // pixels left over, vectors still fit
  sides(50, 67, 16, 16);
  sides(51, 61, 8, 5);
  for (int patch : {1, 2, 4, 8, 12, 14, 32, 64, 68}) sides(2 * patch + 3, 3 * patch + 4 - 3 * patch % 4, patch, patch);
  for (int patch : {4, 8, 16}) sides(2 * patch, 4 * patch, patch, 4);
  sides(16, 16, 16, 16);
  sides(32, 1040, 16, 16);  // more patches in a row than a block copies at once
  sides(14, 1001, 14, 7);
  for (int B : {1, 3}) {
    add([&](PatchCase& c) { c.batch = B, c.height = 224, c.width = 224, c.cls = 98; });
    add([&](PatchCase& c) { c.batch = B, c.height = 224, c.width = 224, c.stride = 8, c.cls = 364; });
  }
  if (options.quick) {
    std::vector<PatchCase> few;
    for (size_t i = 0; i + 3 < cases.size(); i += 3) few.push_back(cases[i]);
    return few;
  }
  return cases;
}

// ---- soak -------------------------------------------------------------------------------------------------------

// Random extents, types and options for so many seconds, each against float64 like the fixed cases; then what was
// allocated must be free again.
void soak(double seconds) {
  std::mt19937 random(20261123);
  auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  auto free_bytes = [] {
    size_t free = 0, total = 0;
    CHECK_CUDA(cudaMemGetInfo(&free, &total));
    return free;
  };
  const auto start = std::chrono::steady_clock::now();
  size_t before = 0;
  int rounds = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    Case c;
    const int granules[] = {1, 4, 16, 32};
    const int granule = granules[below(4)];
    c.seqlen = below(20) ? 1 + below(260) : 261 + below(1200);
    c.d_inner = granule * (1 + below(256 / granule));
    c.d_state = below(3) ? 16 : 1 + below(64);
    c.dt_rank = below(3) ? 4 * (1 + below(16)) : 1 + below(64);
    c.batch = 1 + below(4);
    while (c.batch > 1 && static_cast<double>(c.batch) * c.seqlen * c.d_inner * c.d_state > 4e6) c.batch--;
    if (below(5) == 0) c.cls = below(c.seqlen);
    c.mode = c.seqlen >= 9 ? below(4) : 0;
    c.pairs = below(4), c.scaled = below(2), c.level = below(2) ? Level::kTrained : Level::kHard;
    const DataType T = kTypes[below(3)];
    if (static_cast<double>(c.batch) * c.seqlen * c.d_inner * c.d_state <= 2e7) test_scan(c, T);
    test_conv(c, T);
    NormCase n;
    n.batch = 1 + below(5), n.seqlen = 3 + below(300), n.d_model = 4 * (1 + below(300));
    n.rule = below(2) ? MergeRule::kEdge : MergeRule::kNone;
    if (n.rule == MergeRule::kEdge) n.left = below(n.seqlen / 3 + 1), n.right = below(n.seqlen / 3 + 1);
    test_norm(n, T);
    const LinearCase l = {1 + below(400), 64 * (1 + below(12)), 64 * (1 + below(8))};
    test_linear(l, T), test_linear_norm(l, T);
    const int64_t images = 1 + below(3), seqlen = 24 + below(100);
    test_linear_norm({images * seqlen, l.in_features, l.out_features}, T, static_cast<int>(images), static_cast<int>(below(12)), static_cast<int>(below(12)));
    if (++rounds == 20) before = free_bytes();  // lazily loaded kernels have taken their memory
  }
  const size_t after = free_bytes();
  std::printf("soak: %.0f s, %d rounds, memory lost since round 20: %.1f MiB\n", seconds, rounds,
              before > after ? static_cast<double>(before - after) / 1048576. : 0.);
  if (!options.shared)
    report("soak", "memory", before && before > after ? static_cast<double>(before - after) : 0., 16. * 1048576., "");
}

// ---- timing -----------------------------------------------------------------------------------------------------

// median us of one call inside a graph of `calls`
double time_us(const std::function<cudaError_t(cudaStream_t)>& enqueue) {
  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreate(&stream));
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  auto once = [&](const std::function<void()>& work) {
    CHECK_CUDA(cudaEventRecord(begin, stream));
    work();
    CHECK_CUDA(cudaEventRecord(end, stream));
    CHECK_CUDA(cudaEventSynchronize(end));
    float ms = 0;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    return ms;
  };
  CHECK_CUDA(enqueue(stream));
  const float single = once([&] { CHECK_CUDA(enqueue(stream)); });
  const int calls = single > 5 ? 1 : single > 0.5 ? 4 : 20;
  cudaGraph_t graph;
  cudaGraphExec_t instance;
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < calls; i++) CHECK_CUDA(enqueue(stream));
  CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&instance, graph, 0));
  std::vector<float> times;
  for (int i = 0; i < 13; i++) {
    const float ms = once([&] { CHECK_CUDA(cudaGraphLaunch(instance, stream)); });
    if (i >= 2) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  CHECK_CUDA(cudaGraphExecDestroy(instance));
  CHECK_CUDA(cudaGraphDestroy(graph));
  CHECK_CUDA(cudaEventDestroy(begin));
  CHECK_CUDA(cudaEventDestroy(end));
  CHECK_CUDA(cudaStreamDestroy(stream));
  return times[times.size() / 2] * 1e3 / calls;
}

// Trained-like inputs of full size, cheaply: a block of random values over and over.
Values repeat(Values block, int64_t n) {
  Values v(static_cast<size_t>(n));
  for (size_t i = 0; i < v.size(); i++) v[i] = block[i % block.size()];
  return v;
}

void time_layer(const char* model, int E, int R, int batch, int L, DataType T) {
  Case c;
  c.batch = 1, c.seqlen = 211, c.d_inner = E, c.dt_rank = R;  // 211 is prime: repeats do not line up with images
  Layer w(c, T);
  c.batch = batch, c.seqlen = L;
  const int64_t tokens = static_cast<int64_t>(batch) * L, P = c.row(), d = E / 2;
  w.xz = repeat(w.xz, tokens * 2 * E), w.x_dbl = repeat(w.x_dbl, 2 * tokens * P);
  const double size = static_cast<double>(size_of(T)), mufu = 4.15e6, bytes = 3.0e6;  // a microsecond
  const double elements = static_cast<double>(tokens) * E;
  const double conv_floor = std::max(elements * 2 / mufu, (elements * size + 2. * tokens * P * size) / bytes);
  const double scan_floor = std::max(elements * 42 / mufu, (elements * 3 * size + 2. * tokens * P * size) / bytes);
  const double norm_floor = static_cast<double>(tokens) * d * (8 + 2 * size) / bytes;
  auto line = [&](const char* op, const char* tactic, double us, double floor) {
    std::printf("%-3s b%-4d L%-5d %-5s %-14s %-22s %10.1f us, floor %8.1f, x %.2f\n", model, batch, L, name_of(T), op,
                tactic, us, floor, us / std::max(floor, 0.9));
    std::fflush(stdout);
  };
  const int side = std::max(2, L / 98);  // merged at each end: what rate 0.2 merges in a layer
  ScanBuffers buffers(w, c, T, edge_pairs(L, side));
  if (wanted("conv")) {
    Buffer weight(w.x_proj_weight, T);
    ConvXProjParams p{};
    p.batch = batch, p.seqlen = L, p.d_inner = E, p.row = c.row(), p.type = T;
    p.xz = buffers.xz.data, p.conv_weight = buffers.conv_weight.as<float>();
    p.conv_bias = buffers.conv_bias.as<float>(), p.x_proj_weight = weight.data;
    Buffer x_dbl(static_cast<size_t>(2 * tokens * P) * size_of(T));
    p.x_dbl = x_dbl.data;
    int32_t tactics[8];
    const int32_t count = conv_xproj_tactics(L, E, c.row(), T, tactics, 8, true);
    for (int i = 0; i < count; i++) {
      const auto tactic = static_cast<ConvXProjTactic>(tactics[i]);
      line("conv_xproj", tactics[i] == 1 ? "simple" : "tensor core",
           time_us([&](cudaStream_t s) { return conv_xproj(p, tactic, s); }), conv_floor);
    }
    for (int i = 0; i < kConvXProjShapes && T != DataType::kFloat32; i++) {
      const auto shape = static_cast<ConvXProjShape>(i);
      if (conv_xproj_tensor_core(p, shape, nullptr) != cudaSuccess) continue;
      line("conv_xproj", (std::string(name_of(shape)) + (shape == conv_xproj_shape(p) ? " (chosen)" : "")).c_str(),
           time_us([&](cudaStream_t s) { return conv_xproj_tensor_core(p, shape, s); }), conv_floor);
    }
  }
  if (wanted("scan")) {
    int32_t tactics[8];
    const int32_t count = mamba_scan_tactics(L, E, c.d_state, R, c.row(), T, tactics, 8, true);
    for (int i = 0; i < count; i++) {
      const auto tactic = static_cast<MambaScanTactic>(tactics[i]);
      c.mode = 0;
      const MambaScanParams plain = buffers.params(c, T);
      line("mamba_scan", name_of(tactic), time_us([&](cudaStream_t s) { return mamba_scan(plain, tactic, s); }),
           scan_floor);
      if (tactic == MambaScanTactic::kWalkMmaTwoPass) {
        MambaScanParams apart = plain;
        apart.meetings = nullptr;
        line("mamba_scan", "two pass, two kernels", time_us([&](cudaStream_t s) { return mamba_scan(apart, tactic, s); }), scan_floor);
      }
      if (tactic != MambaScanTactic::kAdaptive) continue;
      c.mode = 1;
      const MambaScanParams merging = buffers.params(c, T);
      line("mamba_scan", (std::string(name_of(tactic)) + " + weights").c_str(),
           time_us([&](cudaStream_t s) { return mamba_scan(merging, tactic, s); }), scan_floor);
    }
  }
  if (wanted("linear") && T != DataType::kFloat32 && tokens <= 8192) {
    for (const LinearCase& extents : {LinearCase{tokens, static_cast<int>(d), 2 * E}, {tokens, E, static_cast<int>(d)}}) {
      const int64_t K = extents.in_features, N = extents.out_features;
      const Values some = gaussian(T, 4999, 0, 1, 1);
      const Buffer x(repeat(some, tokens * K), T), weight(repeat(some, N * K), T);
      Buffer y(static_cast<size_t>(tokens * N) * size_of(T));
      const LinearParams p = linear_params(extents, T, x, weight, y);
      const double floor = static_cast<double>(tokens * (K + N) + N * K) * size / bytes;
      const Buffer residual(repeat(some, tokens * N), DataType::kFloat32), squares(repeat({1.}, tokens * K / 16), DataType::kFloat32);
      Buffer residual_out(residual.bytes), squares_out(static_cast<size_t>(tokens * N / 16) * 4);
      LinearParams with_norm = p;
      if (K < N) with_norm.squares = squares.as<float>(), with_norm.epsilon = 1e-5f;
      else with_norm.residual = residual.as<float>(), with_norm.residual_out = residual_out.as<float>(), with_norm.squares_out = squares_out.as<float>();
      for (int i = 0; i < kNbLinearShapes; i++) {
        if (linear(p, i, nullptr) != cudaSuccess) continue;
        line(K < N ? "in_proj" : "out_proj", (name_of(kLinearShapes[i]) + (i == linear_shape(p) ? " (chosen)" : "")).c_str(),
             time_us([&](cudaStream_t s) { return linear(p, i, s); }), floor);
      }
      line(K < N ? "in_proj" : "out_proj", "with its part of the norm", time_us([&](cudaStream_t s) { return linear(with_norm, s); }), floor);
    }
    // As in a model: out_proj, norm and in_proj of layer after layer, whose weights come from DRAM where L2 does not hold all.
    constexpr int kLayers = 12;
    const int64_t in_weights = 2 * E * d, out_weights = E * d;
    const Values some = gaussian(T, 4999, 0, 1e-2, 1);
    const Buffer weights(repeat(some, kLayers * (in_weights + out_weights)), T), residual(repeat(some, tokens * d), DataType::kFloat32);
    Buffer xz(static_cast<size_t>(tokens * 2 * E) * size_of(T)), hidden(static_cast<size_t>(tokens * d) * size_of(T)), stream(residual.bytes),
        squares(residual.bytes / kSquaredColumns);
    CHECK_CUDA(cudaMemset(xz.data, 0, xz.bytes));
    const double us = time_us([&](cudaStream_t s) {
      for (int layer = 0; layer < kLayers; layer++) {
        LinearParams out = linear_params({tokens, E, static_cast<int>(d)}, T, xz, weights, hidden);
        LinearParams in = linear_params({tokens, static_cast<int>(d), 2 * E}, T, hidden, weights, xz);
        out.weight = static_cast<const char*>(weights.data) + static_cast<size_t>(layer * (in_weights + out_weights)) * size_of(T);
        in.weight = static_cast<const char*>(out.weight) + static_cast<size_t>(out_weights) * size_of(T);
        out.residual = residual.as<float>(), out.residual_out = stream.as<float>(), out.squares_out = squares.as<float>();
        in.squares = squares.as<float>(), in.epsilon = 1e-5f;
        for (const LinearParams& each : {out, in})
          if (const cudaError_t status = linear(each, s); status != cudaSuccess) return status;
      }
      return cudaSuccess;
    });
    line("both", "with norm, 12 layers", us / kLayers,
         (static_cast<double>(tokens * (3 * E + 2 * d) + 3 * E * d) * size + static_cast<double>(tokens * d * 8)) / bytes);
  }
  if (wanted("norm")) {
    Buffer residual(static_cast<size_t>(tokens * d) * 4), hidden(static_cast<size_t>(tokens * d) * size_of(T)),
        norm_weight(static_cast<size_t>(d) * 4), residual_out(residual.bytes), normed(hidden.bytes);
    CHECK_CUDA(cudaMemset(residual.data, 0, residual.bytes));
    CHECK_CUDA(cudaMemset(hidden.data, 0, hidden.bytes));
    AddMergeNormParams p{};
    p.batch = batch, p.seqlen_in = L, p.seqlen_out = L, p.d_model = static_cast<int32_t>(d), p.cls_index = -1;
    p.epsilon = 1e-5f, p.type = T, p.residual = residual.as<float>(), p.hidden = hidden.data;
    p.residual_per_image = true;
    p.norm_weight = norm_weight.as<float>(), p.residual_out = residual_out.as<float>(), p.normed = normed.data;
    line("add_merge_norm", "no merge", time_us([&](cudaStream_t s) { return add_merge_norm(p, s); }), norm_floor);
    p.residual_per_image = false;
    line("add_merge_norm", "shared residual", time_us([&](cudaStream_t s) { return add_merge_norm(p, s); }),
         static_cast<double>(tokens) * d * (4 + 2 * size) / bytes);
    p.residual_per_image = true;
    p.rule = MergeRule::kEdge, p.left = p.right = side, p.seqlen_out = L - 2 * side, p.nb_weights = 2 * side;
    p.weights_per_image = true, p.merge_weights = buffers.weights.as<float>();
    const std::string ends = std::to_string(side);
    line("add_merge_norm", ("edge " + ends + " + " + ends).c_str(), time_us([&](cudaStream_t s) { return add_merge_norm(p, s); }),
         norm_floor);
  }
}

void time_patches(int batch, int side, int stride, DataType T) {
  PatchRowsParams p{};
  p.batch = batch, p.height = side, p.width = side, p.patch = 16, p.stride = stride, p.type = T;
  p.cls_index = static_cast<int32_t>(patch_rows_seqlen(side, side, 16, stride, -1)) / 2;
  const int64_t seqlen = patch_rows_seqlen(side, side, 16, stride, p.cls_index);
  const size_t pixels = static_cast<size_t>(batch) * 3 * side * side;
  Buffer images(pixels * 4), rows(static_cast<size_t>(batch * seqlen * 768) * size_of(T));
  CHECK_CUDA(cudaMemset(images.data, 0, images.bytes));
  p.images = images.as<float>(), p.rows = rows.data;
  const double floor = static_cast<double>(images.bytes + rows.bytes) / 3.0e6;
  const double us = time_us([&](cudaStream_t s) { return patch_rows(p, s); });
  std::printf("    b%-4d L%-5d %-5s %-14s %-22s %10.1f us, floor %8.1f, x %.2f\n", batch, static_cast<int>(seqlen),
              name_of(T), "patch_rows", ("patch 16 stride " + std::to_string(stride)).c_str(), us, floor,
              us / std::max(floor, 0.9));
}

// "S:1:788" is ViM-S, batch 1, 788 tokens, in fp16 or what --type says.
bool time_size(const std::string& size) {
  char name[3] = {};
  int batch = 0, tokens = 0, end = 0;
  if (std::sscanf(size.c_str(), "%2[TiSB]:%d:%d%n", name, &batch, &tokens, &end) != 3 || end != static_cast<int>(size.size()) ||
      batch < 1 || tokens < 1)
    return false;
  for (const Model& m : kModels)
    if (m.name == std::string(name)) {
      DataType type = DataType::kFloat16;
      for (DataType T : kTypes)
        if (options.type == name_of(T)) type = T;
      time_layer(m.name, m.d_inner, m.dt_rank, batch, tokens, type);
      return true;
    }
  return false;
}

void time_all() {
  std::printf("Floors: 3.0 TB/s, 4.15 T special-function operations a second (facts/perf.md), a launch is 0.9 us.\n");
  if (wanted("patch")) {
    for (int batch : {1, 8, 64, 128}) time_patches(batch, 224, 16, DataType::kFloat16);
    time_patches(128, 224, 16, DataType::kFloat32);
    time_patches(64, 224, 8, DataType::kFloat16);
    time_patches(16, 1024, 16, DataType::kFloat16);
  }
  if (options.only == "patch") return;
  for (const Model& m : kModels)
    for (int batch : {1, 8, 64, 128}) time_layer(m.name, m.d_inner, m.dt_rank, batch, 197, DataType::kFloat16);
  for (int batch : {2, 4, 16, 32}) time_layer("S", 768, 24, batch, 197, DataType::kFloat16);
  if (options.only == "conv")
    for (const Model& m : {kModels[0], kModels[2]})
      for (int batch : {2, 4, 16, 32}) time_layer(m.name, m.d_inner, m.dt_rank, batch, 197, DataType::kFloat16);
  for (const Model& m : kModels)
    for (int L : {158, 118}) time_layer(m.name, m.d_inner, m.dt_rank, 128, L, DataType::kFloat16);
  for (int L : {577, 788, 4097}) time_layer("S", 768, 24, 1, L, DataType::kFloat16);
  for (int L : {1025, 4097}) time_layer("S", 768, 24, 16, L, DataType::kFloat16);
  for (DataType T : {DataType::kFloat32, DataType::kBFloat16}) time_layer("S", 768, 24, 128, 197, T);
}

}  // namespace

const char kUsage[] =
    "usage: kernel_test [--quick] [--time [--size Ti|S|B:BATCH:TOKENS]...] [--soak SECONDS [--shared]] [--only conv|scan|linear|norm|patch] [--type fp32|fp16|bf16] [--verbose]";

int main(int argc, char** argv) {
  for (int i = 1; i < argc; i++) {
    const std::string a = argv[i];
    if (a == "--quick") options.quick = true;
    else if (a == "--time") options.time = true;
    else if (a == "--verbose") options.verbose = true;
    else if (a == "--soak" && i + 1 < argc) options.soak = std::atof(argv[++i]);
    else if (a == "--shared") options.shared = true;
    else if (a == "--only" && i + 1 < argc) options.only = argv[++i];
    else if (a == "--size" && i + 1 < argc) options.sizes.push_back(argv[++i]);
    else if (a == "--type" && i + 1 < argc) options.type = argv[++i];
    else {
      std::printf("unknown option '%s'\n%s\n", a.c_str(), kUsage);
      return 2;
    }
  }
  cudaDeviceProp device;
  CHECK_CUDA(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, sm_%d%d, kernel version %d\n", device.name, device.major, device.minor, kKernelVersion);
  if (options.time) {
    for (const std::string& size : options.sizes)
      if (!time_size(size)) {
        std::printf("--size %s: not MODEL:BATCH:TOKENS, such as S:1:788 (models Ti, S, B)\n", size.c_str());
        return 2;
      }
    if (options.sizes.empty()) time_all();
    return 0;
  }
  if (options.soak > 0) soak(options.soak);
  for (DataType T : kTypes) {
    if (options.soak > 0 || (!options.type.empty() && options.type != name_of(T))) continue;
    if (wanted("linear"))
      for (const LinearCase& c : linear_cases()) {
        test_linear(c, T), test_linear_norm(c, T);
        const int64_t images = c.rows % 3 == 0 && c.rows > 40 ? 3 : 1, seqlen = c.rows / images;
        const int most = static_cast<int>(std::min<int64_t>(kMostMerged, (seqlen - 1) / 2));
        test_linear_norm(c, T, static_cast<int>(images), most, most);
        if (seqlen > 2) test_linear_norm(c, T, static_cast<int>(images), 0, 2), test_linear_norm(c, T, static_cast<int>(images), 1, 0);
      }
    if (wanted("norm"))
      for (const NormCase& c : norm_cases()) test_norm(c, T);
    if (wanted("patch"))
      for (const PatchCase& c : patch_cases()) test_patch(c, T);
    if (wanted("conv"))
      for (const Case& c : conv_cases()) test_conv(c, T);
    if (wanted("scan"))
      for (const Case& c : scan_cases()) test_scan(c, T);
    std::fflush(stdout);
  }
  if (options.only.empty() && options.soak == 0) {
    test_refusals();
    test_broken_pairs();
    test_streams();
    test_conv_shapes();
  }
  std::printf("%-30s %6s %6s  %9s %8s  %s\n", "kernel", "cases", "failed", "worst", "of bound", "worst case");
  for (const auto& [name, g] : groups)
    std::printf("%-30s %6d %6d  %9.2e %8.2f  %s\n", name.c_str(), g.cases, g.failures, g.worst, g.worst_ratio,
                g.worst_case.c_str());
  std::printf(failures ? "FAILED: %d\n" : "all passed (%d failures)\n", failures);
  return failures ? 1 : 0;
}
