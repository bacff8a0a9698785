// sidecar.hpp: vim.engine.json, which stm-export writes beside vim.engine: how images want to be prepared, what classes mean.
#pragma once
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "json.hpp"

namespace sample {

struct Normalization {
  std::array<float, 3> mean{}, std{};
  double crop_ratio = 0.875;
};

struct Sidecar {
  std::string model, weights, precision, input, output;
  bool weights_random = false;
  int32_t height = 0, width = 0, num_classes = 0;
  Normalization normalization;
  std::vector<std::string> classes;                // empty: unnamed
  std::string tensorrt, gpu_name, sm;              // what built the engine
  std::string plugin_library;                      // empty: an engine without our plugin
  int32_t kernel_version = 0;
  bool version_compatible = false;                 // it carries a runtime's code
};

class SidecarReader {
 public:
  // Raises Error: the file is missing, malformed, or lacks a field; names it and what it needs.
  static Sidecar read(const std::string& path) {
    const SidecarReader in{path};
    const Json root = read_json(path);
    if (root.type != Json::kObject) in.fail("the file", "an object", root.type);
    const int32_t schema = in.integer(in.get(root, "schema"), "schema", 1, 1 << 20);
    const std::string kind = in.string(root, "kind");
    if (schema != 1 || kind != "engine") {
      throw Error(kMismatch, path + " has schema " + std::to_string(schema) + ", kind '" + kind + "'; this program reads schema 1, kind 'engine'");
    }
    Sidecar out;
    out.model = in.string(root, "model");
    out.weights = in.string(root, "weights");
    out.weights_random = in.get(root, "weights_random", Json::kBool).boolean;
    out.precision = in.string(root, "precision");
    out.input = in.string(root, "input");
    out.output = in.string(root, "output");
    const Json& size = in.get(root, "image_size", Json::kArray);
    if (size.array.size() != 2) throw Error(kMismatch, path + ": image_size has " + std::to_string(size.array.size()) + " numbers, needs 2");
    out.height = in.integer(size.array[0], "image_size[0]", 1, kMaxSide);
    out.width = in.integer(size.array[1], "image_size[1]", 1, kMaxSide);
    out.num_classes = in.integer(in.get(root, "num_classes"), "num_classes", 1, 1 << 24);

    const Json& norm = in.get(root, "normalization", Json::kObject);
    if (in.string(norm, "scale") != "0..1" || in.string(norm, "resize") != "bicubic") {
      throw Error(kMismatch, path + ": normalization asks for scale '" + in.string(norm, "scale") + "', resize '" + in.string(norm, "resize") +
                                 "'; this program does '0..1' and 'bicubic'");
    }
    out.normalization.mean = in.triple(norm, "mean", -1e6);
    out.normalization.std = in.triple(norm, "std", 1e-6);
    out.normalization.crop_ratio = in.number(in.get(norm, "crop_ratio"), "crop_ratio", 0.01, 1);

    const Json& classes = in.get(root, "classes");
    if (classes.type == Json::kArray) {
      for (const Json& name : classes.array) {
        if (name.type != Json::kString) in.fail("a class", "a string", name.type);
        out.classes.push_back(name.string);
      }
      if (out.classes.size() != static_cast<std::size_t>(out.num_classes)) {
        throw Error(kMismatch, path + " names " + std::to_string(out.classes.size()) + " classes, num_classes is " + std::to_string(out.num_classes));
      }
    } else if (classes.type != Json::kNull) {
      in.fail("classes", "an array or null", classes.type);
    }

    out.tensorrt = in.string(root, "tensorrt");
    const Json& gpu = in.get(root, "gpu", Json::kObject);
    out.gpu_name = in.string(gpu, "name");
    out.sm = in.string(gpu, "sm");
    const Json& plugin = in.get(root, "plugin");
    if (plugin.type == Json::kObject) {
      out.plugin_library = in.string(plugin, "library");
      out.kernel_version = in.integer(in.get(plugin, "kernel_version"), "kernel_version", 0, 1 << 30);
    } else if (plugin.type != Json::kNull) {
      in.fail("plugin", "an object or null", plugin.type);
    }
    const auto build = root.object.find("build");
    if (build != root.object.end()) {
      const auto compatible = build->second.object.find("version_compatible");
      out.version_compatible = compatible != build->second.object.end() && compatible->second.boolean;
    }
    return out;
  }

 private:
  explicit SidecarReader(const std::string& path_) : path(path_) {}

  static constexpr int32_t kMaxSide = 16384;

  [[noreturn]] void fail(const std::string& name, const std::string& wanted, Json::Type found) const {
    throw Error(kMismatch, path + ": " + name + " is " + json_type_name(found) + ", needs " + wanted);
  }

  const Json& get(const Json& object, const std::string& name) const {
    const auto found = object.object.find(name);
    if (found == object.object.end()) throw Error(kMismatch, path + " has no '" + name + "'; make the engine anew with stm-export");
    return found->second;
  }

  const Json& get(const Json& object, const std::string& name, Json::Type type) const {
    const Json& value = get(object, name);
    if (value.type != type) fail(name, json_type_name(type), value.type);
    return value;
  }

  std::string string(const Json& object, const std::string& name) const { return get(object, name, Json::kString).string; }

  double number(const Json& value, const std::string& name, double low, double high) const {
    if (value.type != Json::kNumber) fail(name, "a number", value.type);
    if (!(value.number >= low && value.number <= high)) {
      char text[96];
      std::snprintf(text, sizeof text, " is %g, needs %g to %g", value.number, low, high);
      throw Error(kMismatch, path + ": " + name + text);
    }
    return value.number;
  }

  int32_t integer(const Json& value, const std::string& name, int32_t low, int32_t high) const {
    const double found = number(value, name, low, high);
    if (found != std::floor(found)) throw Error(kMismatch, path + ": " + name + " is not a whole number");
    return static_cast<int32_t>(found);
  }

  std::array<float, 3> triple(const Json& object, const std::string& name, double low) const {
    const Json& list = get(object, name, Json::kArray);
    if (list.array.size() != 3) throw Error(kMismatch, path + ": " + name + " has " + std::to_string(list.array.size()) + " numbers, needs 3");
    std::array<float, 3> out;
    for (std::size_t i = 0; i < 3; ++i) out[i] = static_cast<float>(number(list.array[i], name, low, 1e6));
    return out;
  }

  const std::string& path;
};

}  // namespace sample
