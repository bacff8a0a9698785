// image.hpp: reads PPM (P6) and 24-bit BMP. For other formats: `convert cat.jpg cat.ppm` (ImageMagick), or with Pillow
//   python -c "from PIL import Image; Image.open('cat.jpg').convert('RGB').save('cat.ppm')"
#pragma once
#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

#include "error.hpp"

namespace sample {

struct Image {
  int32_t width = 0, height = 0;
  std::vector<uint8_t> rgb;  // (height, width, 3)
};

constexpr int64_t kMaxPixels = 100'000'000;

inline void allocate(Image& image, int64_t width, int64_t height, const std::string& path) {
  if (width < 1 || height < 1 || width > kMaxPixels || height > kMaxPixels || width * height > kMaxPixels) {
    throw Error(kUsage, path + " says it has " + std::to_string(width) + "x" + std::to_string(height) + " pixels; 1 to 100 million are read");
  }
  image.width = static_cast<int32_t>(width);
  image.height = static_cast<int32_t>(height);
  image.rgb.resize(static_cast<std::size_t>(width * height) * 3);
}

inline Image read_ppm(std::istream& in, const std::string& path) {
  int64_t numbers[3];  // width, height, largest value
  for (int64_t& number : numbers) {
    int c = in.get();
    while (c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '#') {
      if (c == '#') {
        while (c != '\n' && c != EOF) c = in.get();
      } else {
        c = in.get();
      }
    }
    number = 0;
    if (c < '0' || c > '9') throw Error(kUsage, path + ": damaged PPM header");
    for (; c >= '0' && c <= '9'; c = in.get()) {
      number = number * 10 + (c - '0');
      if (number > kMaxPixels) throw Error(kUsage, path + ": damaged PPM header");
    }
  }  // exactly one white space after the last number is eaten
  if (numbers[2] != 255) throw Error(kUsage, path + " has " + std::to_string(numbers[2]) + " as its largest value; only 255 (8 bits) is read");
  Image image;
  allocate(image, numbers[0], numbers[1], path);
  if (!in.read(reinterpret_cast<char*>(image.rgb.data()), static_cast<std::streamsize>(image.rgb.size()))) {
    throw Error(kUsage, path + " is cut off: " + std::to_string(in.gcount()) + " of " + std::to_string(image.rgb.size()) + " bytes of pixels");
  }
  return image;
}

inline Image read_bmp(std::istream& in, const std::string& path) {
  uint8_t header[52];  // what follows "BM"
  if (!in.read(reinterpret_cast<char*>(header), sizeof header)) throw Error(kUsage, path + ": damaged BMP header");
  auto u32 = [&header](int at) {
    const uint8_t* p = header + at - 2;
    return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 | static_cast<uint32_t>(p[3]) << 24;
  };
  const uint32_t offset = u32(10), bits = u32(28) & 0xFFFF, compression = u32(30);
  const int64_t width = static_cast<int32_t>(u32(18)), signed_height = static_cast<int32_t>(u32(22));
  if (bits != 24 || compression != 0) {
    throw Error(kUsage, path + ": BMP with " + std::to_string(bits) + " bits, compression " + std::to_string(compression) +
                            "; 24 bits uncompressed is read. Convert it to PPM");
  }
  Image image;
  allocate(image, width, signed_height < 0 ? -signed_height : signed_height, path);
  in.seekg(offset);
  std::vector<uint8_t> row((static_cast<std::size_t>(image.width) * 3 + 3) / 4 * 4);
  for (int32_t i = 0; i < image.height; ++i) {
    if (!in.read(reinterpret_cast<char*>(row.data()), static_cast<std::streamsize>(row.size()))) throw Error(kUsage, path + " is cut off");
    const int32_t y = signed_height < 0 ? i : image.height - 1 - i;  // stored from the bottom up, as a rule
    uint8_t* out = image.rgb.data() + static_cast<std::size_t>(y) * static_cast<std::size_t>(image.width) * 3;
    for (std::size_t x = 0; x < static_cast<std::size_t>(image.width); ++x) {
      for (std::size_t c = 0; c < 3; ++c) out[x * 3 + c] = row[x * 3 + 2 - c];
    }
  }
  return image;
}

inline Image read_image(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  char magic[2] = {};
  if (!in || !in.read(magic, 2)) throw Error(kUsage, "cannot read image " + path);
  if (magic[0] == 'P' && magic[1] == '6') return read_ppm(in, path);
  if (magic[0] == 'B' && magic[1] == 'M') return read_bmp(in, path);
  throw Error(kUsage, path + " is neither PPM (P6) nor BMP. Convert it: `convert " + path + " image.ppm`, or " +
                          "python -c \"from PIL import Image; Image.open('" + path + "').convert('RGB').save('image.ppm')\"");
}

}  // namespace sample
