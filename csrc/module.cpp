// The one library: operator schemas (LibTorch stable ABI) and the Python module with what is not a tensor operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu/levels.h"

// BatchNorm's five arguments, wherever an operator takes a norm.
#define NORM "Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps"

STABLE_TORCH_LIBRARY(densenet_ext, m) {
  m.def("channel_stats(Tensor x, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def(
      "append_features(Tensor src, Tensor(a!) out, Tensor(b!)? mean, Tensor(c!)? var, float drop_rate, Tensor? seed, "
      "int layer) -> ()");
  m.def("bn_relu(Tensor x, " NORM ", Tensor(a!) out) -> ()");
  m.def("cat_bn_relu(Tensor[] features, " NORM ", Tensor(a!) out) -> ()");
  m.def("bn_relu_conv1x1(Tensor x, " NORM
        ", Tensor conv_weight, Tensor? out_bias, bool out_relu, Tensor(a!) out, Tensor(b!)? out_mean, "
        "Tensor(c!)? out_var) -> ()");
  m.def(
      "feature_grad(Tensor grad, Tensor x, Tensor mean, Tensor grad_mean, Tensor grad_var, float drop_rate, "
      "Tensor? seed, int layer, Tensor(a!) out) -> ()");
  m.def("bn_relu_backward_reduce(Tensor grad, Tensor x, " NORM ", Tensor(a!) grad_weight, Tensor(b!) grad_bias) -> ()");
  m.def("bn_relu_backward(Tensor grad, Tensor x, " NORM
        ", Tensor? grad_weight, Tensor? grad_bias, Tensor(a!) grad_x) -> ()");
  m.def("bn_relu_conv1x1_backward(Tensor x, " NORM
        ", Tensor conv_weight, Tensor grad_out, Tensor? z, Tensor? z_mean, Tensor? z_var, Tensor? z_weight, "
        "Tensor? z_bias, float z_eps, Tensor? z_grad_weight, Tensor? z_grad_bias, Tensor? grad_in, bool accumulate, "
        "Tensor(a!) grad_x, Tensor(b!)? grad_conv_weight, Tensor(c!) grad_weight, Tensor(d!) grad_bias, "
        "Tensor(e!)? grad_mean, Tensor(f!)? grad_var) -> ()");
  m.def("bn_relu_avg_pool(Tensor x, int[] size, int[] window, " NORM ", Tensor(a!) out) -> ()");
  m.def("bn_relu_avg_pool_backward_reduce(Tensor grad_out, Tensor x, int[] size, int[] window, " NORM
        ", Tensor(a!)? pooled, Tensor(b!) grad_weight, Tensor(c!) grad_bias) -> ()");
  m.def("bn_relu_avg_pool_backward(Tensor grad_out, Tensor x, int[] size, int[] window, " NORM
        ", Tensor? grad_weight, Tensor? grad_bias, Tensor(a!) grad_x) -> ()");
  m.def("bn_relu_max_pool(Tensor x, int[] size, int[] window, int[] stride, int[] padding, " NORM
        ", Tensor(a!) out, Tensor(b!)? index) -> ()");
  m.def(
      "bn_relu_max_pool_backward_reduce(Tensor grad_out, Tensor index, Tensor x, int[] size, int[] window, "
      "int[] stride, int[] padding, " NORM ", Tensor(a!) grad_weight, Tensor(b!) grad_bias) -> ()");
  m.def(
      "bn_relu_max_pool_backward(Tensor grad_out, Tensor index, Tensor x, int[] size, int[] window, int[] stride, "
      "int[] padding, " NORM ", Tensor? grad_weight, Tensor? grad_bias, Tensor(a!) grad_x) -> ()");
}

namespace {

pybind11::dict build_facts() {
  pybind11::dict facts;
#if defined(__clang__)
  facts["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  facts["compiler"] = "gcc " __VERSION__;
#else
  facts["compiler"] = "unknown";
#endif
  facts["torch"] = DX_BUILD_TORCH;
  facts["cuda"] = DX_BUILD_CUDA;
  facts["cuda_architectures"] = DX_BUILD_ARCHS;
  return facts;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Build facts of densenet_ext and the hooks that its tests need.";
  m.def("build_facts", &build_facts, "Compiler, torch and CUDA that this was built with.");
  m.def("simd_level", [] { return std::string(dx::cpu::level().name); }, "The SIMD level in use.");
  m.def(
      "simd_levels",
      [] {
        std::vector<std::string> names;
        for (const dx::cpu::Level* level : dx::cpu::levels()) names.push_back(level->name);
        return names;
      },
      "The SIMD levels of this build on this processor, narrowest first.");
  m.def(
      "set_simd_level",
      [](const std::string& name) {
        if (!dx::cpu::set_level(name)) throw pybind11::value_error("no SIMD level '" + name + "' on this processor");
      },
      pybind11::arg("name"), "Use another SIMD level, for tests.");
}
