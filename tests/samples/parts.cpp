// parts.cpp: the samples' headers one by one, for test_cpp_sample.py.
//   parts preprocess IMAGE HEIGHT WIDTH MEAN STD RATIO OUT   float32 (3, height, width)
//   parts resize IMAGE WIDTH HEIGHT OUT                      bytes (height, width, 3)
//   parts json FILE...  |  parts sidecar FILE...             one line a file: "ok" or the error; ends well either way
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "preprocess.hpp"
#include "sidecar.hpp"

namespace {
using namespace sample;

template <typename T>
void write(const char* path, const std::vector<T>& values) {
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
}

void describe(const Json& value, std::string& out) {
  switch (value.type) {
    case Json::kNull: out += "null"; break;
    case Json::kBool: out += value.boolean ? "true" : "false"; break;
    case Json::kNumber: {
      char text[64];
      std::snprintf(text, sizeof text, "%.17g", value.number);
      out += text;
      break;
    }
    case Json::kString:
      for (unsigned char c : value.string) {
        char text[4];
        std::snprintf(text, sizeof text, "%02x", c);
        out += text;
      }
      break;
    case Json::kArray:
      out += '[';
      for (const Json& item : value.array) describe(item, out), out += ' ';
      out += ']';
      break;
    case Json::kObject:
      out += '{';
      for (const auto& [key, item] : value.object) out += key + '=', describe(item, out), out += ' ';
      out += '}';
      break;
  }
}
}  // namespace

int main(int argc, char** argv) {
  const std::string verb = argc > 1 ? argv[1] : "";
  if (verb == "preprocess" && argc == 9) {
    const float mean = std::strtof(argv[5], nullptr), std = std::strtof(argv[6], nullptr);
    write(argv[8], preprocess(read_image(argv[2]), std::atoi(argv[3]), std::atoi(argv[4]), {{mean, mean, mean}, {std, std, std}, std::atof(argv[7])}));
    return 0;
  }
  if (verb == "resize" && argc == 6) {
    write(argv[5], resize(read_image(argv[2]), std::atoi(argv[3]), std::atoi(argv[4])).rgb);
    return 0;
  }
  if (verb != "json" && verb != "sidecar") return 2;
  for (int i = 2; i < argc; ++i) {
    try {
      if (verb == "json") {
        std::string text;
        describe(read_json(argv[i]), text);
        std::printf("ok %s\n", text.c_str());
      } else {
        std::printf("ok %s\n", SidecarReader::read(argv[i]).model.c_str());
      }
    } catch (const Error& error) {
      std::printf("error %d %s\n", error.code, error.what());
    }
  }
  return 0;
}
