// preprocess.hpp: the published preprocessing, as exporter/images.py does it with Pillow: resize so that the crop is
// `crop_ratio` of it (bicubic, antialiased), centre crop, scale to 0..1, normalise.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "image.hpp"
#include "sidecar.hpp"

namespace sample {

// Which input pixels make each output pixel of one axis, and how much. Pillow's: the filter grows with the scale, so that
// shrinking averages; weights are fixed point with 22 bits after the point.
struct ResizeWeights {
  static constexpr int kBits = 32 - 8 - 2;
  std::vector<int32_t> first, count, weights;  // weights: (out, stride)
  int32_t stride = 0;

  ResizeWeights(int32_t in, int32_t out) {
    const double scale = static_cast<double>(in) / out, filter_scale = std::max(scale, 1.0), support = 2.0 * filter_scale, step = 1.0 / filter_scale;
    stride = static_cast<int32_t>(std::ceil(support)) * 2 + 1;
    first.resize(static_cast<std::size_t>(out));
    count.resize(static_cast<std::size_t>(out));
    weights.resize(static_cast<std::size_t>(out) * static_cast<std::size_t>(stride));
    std::vector<double> exact(static_cast<std::size_t>(stride));
    for (int32_t o = 0; o < out; ++o) {
      const double center = (o + 0.5) * scale;
      const int32_t begin = std::max(0, static_cast<int32_t>(center - support + 0.5));
      const int32_t n = std::min(in, static_cast<int32_t>(center + support + 0.5)) - begin;
      double sum = 0;
      for (int32_t i = 0; i < n; ++i) sum += exact[static_cast<std::size_t>(i)] = bicubic((i + begin - center + 0.5) * step);
      for (int32_t i = 0; i < n; ++i) {
        const double weight = exact[static_cast<std::size_t>(i)] / sum * (1 << kBits);
        weights[static_cast<std::size_t>(o) * static_cast<std::size_t>(stride) + static_cast<std::size_t>(i)] =
            static_cast<int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
      }
      first[static_cast<std::size_t>(o)] = begin;
      count[static_cast<std::size_t>(o)] = n;
    }
  }

  static double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::abs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
    return 0;
  }
};

// `in` is (outer, length, inner) bytes; returns (outer, out_length, inner).
inline std::vector<uint8_t> resize_axis(const std::vector<uint8_t>& in, std::size_t outer, std::size_t length, std::size_t inner, std::size_t out_length) {
  if (length == out_length) return in;
  const ResizeWeights w(static_cast<int32_t>(length), static_cast<int32_t>(out_length));
  std::vector<uint8_t> out(outer * out_length * inner);
  std::vector<int32_t> sums(inner);
  for (std::size_t a = 0; a < outer; ++a) {
    for (std::size_t o = 0; o < out_length; ++o) {
      std::fill(sums.begin(), sums.end(), 1 << (ResizeWeights::kBits - 1));  // rounds
      for (std::size_t i = 0; i < static_cast<std::size_t>(w.count[o]); ++i) {
        const int32_t weight = w.weights[o * static_cast<std::size_t>(w.stride) + i];
        const uint8_t* row = in.data() + (a * length + static_cast<std::size_t>(w.first[o]) + i) * inner;
        for (std::size_t c = 0; c < inner; ++c) sums[c] += row[c] * weight;
      }
      uint8_t* to = out.data() + (a * out_length + o) * inner;
      for (std::size_t c = 0; c < inner; ++c) to[c] = static_cast<uint8_t>(std::clamp(sums[c] >> ResizeWeights::kBits, 0, 255));
    }
  }
  return out;
}

inline Image resize(const Image& in, int32_t width, int32_t height) {
  Image out;
  allocate(out, width, height, "the resized image");
  const auto n = [](int32_t x) { return static_cast<std::size_t>(x); };
  // Both passes round to 8 bits, so their order shows. Across first, but as Pillow does since version 13 not where the height
  // shrinks by more than twice what the width does (tall images).
  if (in.height > height && in.height - height > 2 * (in.width - width)) {
    out.rgb = resize_axis(in.rgb, 1, n(in.height), n(in.width) * 3, n(height));
    out.rgb = resize_axis(out.rgb, n(height), n(in.width), 3, n(width));
  } else {
    out.rgb = resize_axis(in.rgb, n(in.height), n(in.width), 3, n(width));
    out.rgb = resize_axis(out.rgb, 1, n(in.height), n(width) * 3, n(height));
  }
  return out;
}

// Returns (3, height, width), float32, for the engine's input.
inline std::vector<float> preprocess(const Image& image, int32_t height, int32_t width, const Normalization& normal) {
  const double ratio = normal.crop_ratio;
  // The shorter side decides; the longer one is cut to whole pixels, as torchvision does it.
  const double least_height = std::floor(height / ratio), least_width = std::floor(width / ratio);
  const bool by_width = image.width * least_height <= image.height * least_width;
  const double wide = by_width ? least_width : std::max(least_width, std::floor(least_height * image.width / image.height));
  const double high = by_width ? std::max(least_height, std::floor(least_width * image.height / image.width)) : least_height;
  if (wide * high > static_cast<double>(kMaxPixels)) {
    throw Error(kUsage, "an image of " + std::to_string(image.width) + "x" + std::to_string(image.height) + " is too long and thin to resize");
  }
  const Image resized = resize(image, static_cast<int32_t>(wide), static_cast<int32_t>(high));
  // nearbyint rounds halves to even, as Python's round.
  const auto left = static_cast<std::size_t>(std::nearbyint((resized.width - width) / 2.0));
  const auto top = static_cast<std::size_t>(std::nearbyint((resized.height - height) / 2.0));

  const auto h = static_cast<std::size_t>(height), w = static_cast<std::size_t>(width), stride = static_cast<std::size_t>(resized.width);
  std::vector<float> out(3 * h * w);
  for (std::size_t c = 0; c < 3; ++c) {
    for (std::size_t y = 0; y < h; ++y) {
      for (std::size_t x = 0; x < w; ++x) {
        const float pixel = static_cast<float>(resized.rgb[((top + y) * stride + left + x) * 3 + c]) / 255.0F;
        out[(c * h + y) * w + x] = (pixel - normal.mean[c]) / normal.std[c];
      }
    }
  }
  return out;
}

}  // namespace sample
