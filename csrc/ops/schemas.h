// The operators' schemas, the same for every backend. All of them write into their (a!) arguments and return nothing,
// but that the backward passes of blocks also return the gradients of their layers' tensors.
#pragma once

#include "stable.h"

namespace dx::ops {

// BatchNorm's five arguments, wherever an operator takes a norm; and where mean and var may be None: no norm.
#define NORM "Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps"
// A norm by given statistics, or by those of its input, which are taken first.
#define POOLED_NORM                                                                                                \
  "Tensor? mean, Tensor? var, Tensor(a!)? taken_mean, Tensor(b!)? taken_var, Tensor? weight, Tensor? bias, float " \
  "eps"
#define MAYBE_NORM "Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, float eps"

inline void define_operators(torch::stable::detail::StableLibrary& m) {
  m.def("channel_stats(Tensor x, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def(
      "append_features(Tensor src, Tensor(a!) out, Tensor(b!)? mean, Tensor(c!)? var, float drop_rate, Tensor? seed, "
      "int layer, int drop_rows=1) -> ()");
  m.def("bn_relu(Tensor x, " NORM ", Tensor(a!) out) -> ()");
  m.def("cat_bn_relu(Tensor[] features, " NORM ", Tensor(a!) out) -> ()");
  m.def("bn_relu_conv1x1(Tensor x, " NORM
        ", Tensor conv_weight, Tensor? out_bias, bool out_relu, Tensor(a!) out, Tensor(b!)? out_mean, "
        "Tensor(c!)? out_var, bool tf32=False, bool bf16=False) -> ()");
  m.def(
      "feature_grad(Tensor grad, Tensor x, Tensor mean, Tensor grad_mean, Tensor grad_var, float drop_rate, "
      "Tensor? seed, int layer, Tensor(a!) out, int drop_rows=1) -> ()");
  m.def("bn_relu_backward_reduce(Tensor grad, Tensor x, " NORM
        ", Tensor(a!) grad_weight, Tensor(b!) grad_bias, Tensor(c!)? out=None) -> ()");
  m.def("bn_relu_backward(Tensor grad, Tensor x, " NORM
        ", Tensor? grad_weight, Tensor? grad_bias, Tensor(a!) grad_x) -> ()");
  m.def("bn_relu_conv1x1_backward(Tensor x, " NORM
        ", Tensor conv_weight, Tensor grad_out, Tensor? z, Tensor? z_mean, Tensor? z_var, Tensor? z_weight, "
        "Tensor? z_bias, float z_eps, Tensor? z_grad_weight, Tensor? z_grad_bias, Tensor? grad_in, bool accumulate, "
        "Tensor(a!) grad_x, Tensor(b!)? grad_conv_weight, Tensor(c!) grad_weight, Tensor(d!) grad_bias, "
        "Tensor(e!)? grad_mean, Tensor(f!)? grad_var, bool tf32=False, bool bf16=False) -> ()");
  m.def("bn_relu_conv3x3(Tensor x, int[] size, " MAYBE_NORM
        ", Tensor conv_weight, Tensor? conv_bias, float drop_rate, Tensor? seed, int layer, int drop_rows, "
        "Tensor(a!) out, Tensor(b!)? out_mean, Tensor(c!)? out_var, bool tf32=False, bool bf16=False) -> ()");
  m.def("bn_relu_conv3x3_backward(Tensor x, int[] size, " MAYBE_NORM
        ", Tensor conv_weight, Tensor grad, Tensor? features, Tensor? features_mean, Tensor? features_grad_mean, "
        "Tensor? features_grad_var, float drop_rate, Tensor? seed, int layer, int drop_rows, bool scaled, "
        "Tensor? grad_in, bool accumulate, Tensor(a!)? grad_x, Tensor(b!)? grad_conv_weight, "
        "Tensor(c!)? grad_conv_bias, Tensor(d!)? grad_weight, Tensor(e!)? grad_bias, Tensor(f!)? grad_mean, "
        "Tensor(g!)? grad_var, bool tf32=False, bool bf16=False) -> ()");
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
  m.def("whole_transition(Tensor x, int[] size, int[] window, " POOLED_NORM
        ", Tensor? conv, Tensor? conv_bias, Tensor(c!) pooled, Tensor(d!)? out, bool tf32=False, bool bf16=False, "
        "bool packed_weights=False) -> ()");
  m.def("whole_transition_backward(Tensor grad, Tensor x, int[] size, int[] window, " NORM
        ", bool batch, bool sums, Tensor? conv, Tensor(a!)? pooled, Tensor(b!) grad_weight, Tensor(c!) grad_bias, "
        "Tensor(d!)? grad_x, Tensor(e!)? grad_conv, Tensor(f!)? grad_conv_bias) -> ()");
  m.def("whole_stem(Tensor x, int[] size, int[] window, int[] stride, int[] padding, " POOLED_NORM
        ", Tensor(c!) out, Tensor(d!)? index) -> ()");
  m.def(
      "whole_stem_backward(Tensor grad, Tensor index, Tensor x, int[] size, int[] window, int[] stride, int[] "
      "padding, " NORM
      ", bool batch, bool sums, Tensor(a!) grad_weight, Tensor(b!) grad_bias, Tensor(c!)? grad_x) -> ()");
  m.def(
      "first_conv(Tensor x, Tensor conv_weight, Tensor? conv_bias, int[] stride, int[] padding, Tensor(a!) out) -> ()");
  // Tensors that are kept (kept.h); the number stands for them in the operators below, until they are dropped.
  m.def("keep_tensors(Tensor[] tensors) -> int");
  m.def("kept_hold(int kept) -> bool");
  m.def("drop_kept(int kept) -> ()");
  // Weights whose packed forms the operators below keep where they are told `packed_weights`: that they stay what they
  // are.
  m.def("keep_packed(Tensor[] weights) -> int");
  m.def(
      "keep_norms(Tensor[] running_means, Tensor[] running_vars, Tensor[] counters, int[] which, int[] starts, "
      "float[] momenta) -> int");
  m.def("move_running_stats(int norms, Tensor[] means, Tensor[] vars, float unbiased) -> ()");
  // The layers of a block: the tensors that are there, with a bit for each in `given`, and what is no tensor.
  m.def(
      "keep_layers(Tensor[] tensors, int[] given, bool[] batch_stats, float[] eps, float[] drop_rates, "
      "bool[] drop_channels, float[] inner_drop_rates, bool[] inner_drop_channels, bool new_first) -> int");
  m.def(
      "dense_layers(Tensor x, int layers, int[] size, Tensor? seed, Tensor(a!) out, Tensor(b!)? z, Tensor(c!)? mean, "
      "Tensor(d!)? var, Tensor(e!)? z_mean, Tensor(f!)? z_var, Tensor(g!) scratch, bool tf32=False, bool bf16=False, "
      "bool packed_weights=False) -> ()");
  m.def(
      "dense_layers_backward(Tensor(a!) grad, bool writable, int layers, int[] size, Tensor? seed, Tensor out, "
      "Tensor? z, Tensor? mean, Tensor? var, Tensor? z_mean, Tensor? z_var, Tensor(b!)? grad_x, int[] asked, "
      "Tensor(c!) scratch, bool tf32=False, bool bf16=False) -> Tensor[]");
  m.def(
      "basic_layers(Tensor x, int layers, int[] size, Tensor? seed, Tensor(a!) out, Tensor(b!)? mean, "
      "Tensor(c!)? var, Tensor(d!) scratch, bool bf16=False, bool packed_weights=False) -> ()");
  m.def(
      "basic_layers_backward(Tensor(a!) grad, bool writable, int layers, int[] size, Tensor? seed, Tensor out, "
      "Tensor? mean, Tensor? var, Tensor(b!)? grad_x, int[] asked, Tensor(c!) scratch, bool bf16=False) -> Tensor[]");
}
#undef NORM
#undef MAYBE_NORM
#undef POOLED_NORM

}  // namespace dx::ops
