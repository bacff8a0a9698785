// classify.cpp: the five likeliest classes of an image, by an engine that stm-export made.
//   classify vim.engine cat.ppm [--batch N] [--graph] [--benchmark N] [--dump logits.bin]
//   classify vim.engine --input images.bin --dump logits.bin
// Reads vim.engine and vim.engine.json beside it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

#include "engine.hpp"
#include "image.hpp"
#include "preprocess.hpp"
#include "sidecar.hpp"

namespace {
using namespace sample;

constexpr const char* kUsageText =
    "usage: classify ENGINE [IMAGE] [options]\n"
    "  ENGINE           vim.engine, made by stm-export; vim.engine.json lies beside it\n"
    "  IMAGE            PPM (P6) or 24-bit BMP; others: `convert cat.jpg cat.ppm`\n"
    "  --input FILE     instead of IMAGE: float32 (N,3,H,W), normalised, in native byte order\n"
    "  --batch N        repeat the image N times (default 1)\n"
    "  --graph          run as a CUDA graph\n"
    "  --benchmark N    time N runs and print the median\n"
    "  --dump FILE      write the logits: float32 (N, classes)\n";

struct Arguments {
  std::string engine, image, input, dump;
  int32_t batch = 0, benchmark = 0;  // 0: not given
  bool graph = false, help = false;
};

int32_t whole_number(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end || value < 1 || value > 1'000'000) {
    throw Error(kUsage, option + " is '" + text + "', needs a whole number from 1 to 1000000");
  }
  return static_cast<int32_t>(value);
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments out;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    auto value = [&] {
      if (i + 1 == words.size()) throw Error(kUsage, word + " needs a value");
      return words[++i];
    };
    if (word == "--help" || word == "-h") {
      out.help = true;
      return out;
    }
    if (word == "--graph") {
      out.graph = true;
    } else if (word == "--batch") {
      out.batch = whole_number(word, value());
    } else if (word == "--benchmark") {
      out.benchmark = whole_number(word, value());
    } else if (word == "--input") {
      out.input = value();
    } else if (word == "--dump") {
      out.dump = value();
    } else if (word.size() > 1 && word[0] == '-') {
      throw Error(kUsage, "unknown option " + word + "\n" + kUsageText);
    } else if (out.engine.empty()) {
      out.engine = word;
    } else if (out.image.empty()) {
      out.image = word;
    } else {
      throw Error(kUsage, "one image only; got " + out.image + " and " + word);
    }
  }
  if (out.engine.empty() || out.image.empty() == out.input.empty()) throw Error(kUsage, std::string("give an engine, and IMAGE or --input\n") + kUsageText);
  if (!out.input.empty() && out.batch) throw Error(kUsage, "--batch repeats IMAGE; with --input the file says how many images there are");
  return out;
}

// float32 (N, 3, height, width); N follows from the file's size.
std::vector<float> read_floats(const std::string& path, std::size_t image_floats) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw Error(kUsage, "cannot open " + path);
  const std::streamoff size = file.tellg();
  const std::size_t bytes = size > 0 ? static_cast<std::size_t>(size) : 0, image_bytes = image_floats * sizeof(float);
  if (bytes == 0 || bytes % image_bytes != 0) {
    throw Error(kUsage, path + " has " + std::to_string(bytes) + " bytes; needs a multiple of " + std::to_string(image_bytes) + ", an image's");
  }
  std::vector<float> out(bytes / sizeof(float));
  file.seekg(0);
  if (!file.read(reinterpret_cast<char*>(out.data()), static_cast<std::streamsize>(bytes))) throw Error(kUsage, "cannot read " + path);
  return out;
}

void write_floats(const std::string& path, const std::vector<float>& values) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(float)));
  file.close();
  if (!file) throw Error(kFailed, "cannot write " + path);
}

void print_top(const float* logits, const Sidecar& sidecar, std::size_t count) {
  const auto classes = static_cast<std::size_t>(sidecar.num_classes);
  std::vector<std::size_t> order(classes);
  std::iota(order.begin(), order.end(), std::size_t{0});
  count = std::min(count, classes);
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count), order.end(),
                    [logits](std::size_t a, std::size_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  double sum = 0;
  for (std::size_t i = 0; i < classes; ++i) sum += std::exp(static_cast<double>(logits[i] - logits[order[0]]));
  for (std::size_t i = 0; i < count; ++i) {
    const double chance = std::exp(static_cast<double>(logits[order[i]] - logits[order[0]])) / sum;
    const std::string name = sidecar.classes.empty() ? std::to_string(order[i]) : sidecar.classes[order[i]];
    std::printf("%6.2f%%  %s\n", 100 * chance, name.c_str());
  }
}

// Milliseconds on the GPU of each run, without copies.
std::vector<float> benchmark(Session& session, int32_t runs) {
  const Event begin = new_event(), end = new_event();
  std::vector<float> times;
  for (int32_t i = -std::max(10, runs / 10); i < runs; ++i) {  // below 0: warming up
    check_cuda(cudaEventRecord(begin.get(), session.stream()), "cannot time");
    session.run();
    check_cuda(cudaEventRecord(end.get(), session.stream()), "cannot time");
    check_cuda(cudaEventSynchronize(end.get()), "the engine failed");
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, begin.get(), end.get()), "cannot time");
    if (i >= 0) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times;
}

void run(const Arguments& args) {
  const Sidecar sidecar = SidecarReader::read(args.engine + ".json");
  if (sidecar.weights_random) std::fprintf(stderr, "WARNING: %s: the classes below mean nothing\n", sidecar.weights.c_str());
  const std::size_t image_floats = 3 * static_cast<std::size_t>(sidecar.height) * static_cast<std::size_t>(sidecar.width);
  // Images before the engine: a wrong one is told at once.
  std::vector<float> images = args.input.empty() ? preprocess(read_image(args.image), sidecar.height, sidecar.width, sidecar.normalization)
                                                 : read_floats(args.input, image_floats);
  const auto batch = args.input.empty() ? std::max(args.batch, 1) : static_cast<int32_t>(std::min<std::size_t>(images.size() / image_floats, INT32_MAX));

  const Engine engine(args.engine, sidecar);
  if (!sidecar.plugin_library.empty() && sidecar.kernel_version != stm_plugin_kernel_version()) {
    std::fprintf(stderr, "NOTE: the engine was built with plugins of version %d, the library is version %d: speed and last digits may differ\n",
                 sidecar.kernel_version, stm_plugin_kernel_version());
  }
  Session session(engine, batch, args.graph);
  if (args.input.empty()) {
    images.resize(image_floats * static_cast<std::size_t>(batch));
    for (std::size_t i = 1; i < static_cast<std::size_t>(batch); ++i) {
      std::copy_n(images.begin(), image_floats, images.begin() + static_cast<std::ptrdiff_t>(i * image_floats));
    }
  }
  session.upload(images);
  session.run();
  const std::vector<float> logits = session.download();
  if (!std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); })) {
    throw Error(kFailed, "the logits are not finite; check the engine with `stm verify " + args.engine + "`");
  }
  if (!args.dump.empty()) write_floats(args.dump, logits);

  if (args.input.empty()) {
    print_top(logits.data(), sidecar, 5);
  } else {
    for (int32_t i = 0; i < batch; ++i) {
      std::printf("image %d: ", i);
      print_top(logits.data() + static_cast<std::size_t>(i) * engine.num_classes(), sidecar, 1);
    }
  }
  if (args.benchmark) {
    const std::vector<float> ms = benchmark(session, args.benchmark);
    std::printf("latency: median %.4f ms, p95 %.4f ms (%d runs, batch %d, %s, GPU time without copies, %s, TensorRT %s)\n",
                static_cast<double>(ms[ms.size() / 2]), static_cast<double>(ms[ms.size() * 95 / 100]), args.benchmark, batch,
                args.graph ? "CUDA graph" : "no CUDA graph", engine.gpu().name.c_str(), loaded_tensorrt().c_str());
  }
}
}  // namespace

int main(int argc, char** argv) {
  try {
    const Arguments args = parse({argv + 1, argv + argc});
    if (args.help) {
      std::fputs(kUsageText, stdout);
    } else {
      run(args);
    }
    return kOk;
  } catch (const Error& error) {
    std::fprintf(stderr, "classify: %s\n", error.what());
    return error.code;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "classify: %s\n", error.what());
    return kFailed;
  }
}
