// bn_relu_conv3x3, bn_relu_conv3x3_backward
#pragma once

#include "dropout.h"
#include "images.h"
#include "tensors.h"

namespace dx::ops {

// A 3x3 convolution's weight or its gradient: [N, C, 3], [N, C, 3, 3] or [N, C, 3, 3, 3], contiguous or channels_last,
// in the acc dtype.
template <class A, class D>
Taps<A> checked_taps(const D& at, const Tensor& t, const char* name, int64_t dims, int64_t N, int64_t C, bool written) {
  check_dtype<A>(at, t, name);
  bool fits = t.dim() == dims && dims >= 3 && dims <= 5 && t.size(0) == N && t.size(1) == C;
  int64_t taps = 1;
  for (int64_t i = dims - 1; fits && i >= 2; --i, taps *= 3) fits = t.size(i) == 3;
  const auto has_strides = [&](int64_t input, int64_t tap) {
    if (N * C == 0) return true;
    bool has = (N <= 1 || t.stride(0) == C * taps) && (C <= 1 || t.stride(1) == input);
    for (int64_t i = dims - 1, stride = tap; i >= 2; --i, stride *= 3) has = has && t.stride(i) == stride;
    return has;
  };
  const bool contiguous = fits && has_strides(taps, 1), channels_last = fits && has_strides(1, C);
  STD_TORCH_CHECK(contiguous || channels_last, "densenet_ext: ", name, ": expected contiguous or channels_last shape [",
                  N, ", ", C, ", 3", dims > 3 ? ", 3" : "", dims > 4 ? ", 3" : "", "], got shape ", shape_of(t),
                  fits ? ", in another layout" : "");
  A* data = check_memory<A>(at, t, name, 1, N * C * taps, N * C * taps, written);
  return contiguous ? Taps<A>{data, C * taps, taps, 1} : Taps<A>{data, C * taps, 1, C};
}

inline int64_t window_dims(const Tensor& weight) {
  const int64_t dims = defined(weight, "conv_weight").dim();
  STD_TORCH_CHECK(dims >= 3 && dims <= 5,
                  "densenet_ext: conv_weight: expected shape [N, C, 3], [N, C, 3, 3] or [N, C, 3, 3, 3], got shape ",
                  shape_of(weight));
  return dims;
}

// What both passes have in common.
template <class A, class D, class Params>
void set_convolution(const D& at, Params& p, const Tensor& x, const Ints& size, const OptionalTensor& mean,
                     const OptionalTensor& var, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                     const Tensor& conv_weight, int64_t N, double drop_rate, const OptionalTensor& seed, int64_t layer,
                     int64_t drop_rows) {
  check_image_size(size);
  p.C = x.size(1), p.N = N;
  p.images = {size[0], {size[1], size[2], size[3]}};
  p.x = rows<std::remove_const_t<std::remove_pointer_t<decltype(p.x.data)>>>(at, x, "x", p.images.rows(), p.C);
  check_together(mean, var, "mean and var");
  if (mean) {
    p.norm = norm<A>(at, *mean, *var, weight, bias, eps, p.C);
  } else {
    STD_TORCH_CHECK(!weight, "densenet_ext: weight: expected None, as mean is, got a tensor");
    STD_TORCH_CHECK(!bias, "densenet_ext: bias: expected None, as mean is, got a tensor");
  }
  const int64_t dims = window_dims(conv_weight);
  for (int i = 0; i < 3; ++i) p.window[i] = i < 5 - dims ? 1 : 3;
  const Taps<A> taps = checked_taps<A>(at, conv_weight, "conv_weight", dims, N, p.C, false);
  p.weight = {taps.data, taps.output, taps.input, taps.tap};
  p.drop_rate = drop_rate;
  p.seed = check_dropout(at, drop_rate, seed, layer, drop_rows);
  p.layer = layer;
  p.drop_rows = drop_rows;
}

template <class D>
void bn_relu_conv3x3(const Tensor& x, const Ints& size, const OptionalTensor& mean, const OptionalTensor& var,
                     const OptionalTensor& weight, const OptionalTensor& bias, double eps, const Tensor& conv_weight,
                     const OptionalTensor& conv_bias, double drop_rate, const OptionalTensor& seed, int64_t layer,
                     int64_t drop_rows, const Tensor& out, const OptionalTensor& out_mean,
                     const OptionalTensor& out_var, bool tf32, bool bf16) {
  const D at(defined(x, "x"));
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    check_two_dims(out, "out");
    check_together(out_mean, out_var, "out_mean and out_var");
    BnReluConv3x3<T> p = {};
    set_convolution<A>(at, p, x, size, mean, var, weight, bias, eps, conv_weight, out.size(1), drop_rate, seed, layer,
                       drop_rows);
    const int64_t M = p.images.rows();
    p.bias = dense<A>(at, conv_bias, "conv_bias", p.N);
    p.out = rows_out<T>(at, out, "out", M, p.N);
    p.out_mean = dense_out<A>(at, out_mean, "out_mean", p.N);
    p.out_var = dense_out<A>(at, out_var, "out_var", p.N);
    p.tf32 = tf32, p.bf16 = bf16;
    at.check_apart();
    if (p.C + p.N > 0) at.bn_relu_conv3x3(p, M * (p.C + p.N));
  });
}

inline void check_belongs_to_features(const OptionalTensor& features, const OptionalTensor& t, const char* name) {
  STD_TORCH_CHECK(!t || features, "densenet_ext: ", name, ": expected None, as features is, got a tensor");
  STD_TORCH_CHECK(t || !features, "densenet_ext: ", name, ": expected a tensor with features, got None");
}

template <class D>
void bn_relu_conv3x3_backward(const Tensor& x, const Ints& size, const OptionalTensor& mean, const OptionalTensor& var,
                              const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                              const Tensor& conv_weight, const Tensor& grad, const OptionalTensor& features,
                              const OptionalTensor& features_mean, const OptionalTensor& features_grad_mean,
                              const OptionalTensor& features_grad_var, double drop_rate, const OptionalTensor& seed,
                              int64_t layer, int64_t drop_rows, bool scaled, const OptionalTensor& grad_in,
                              bool accumulate, const OptionalTensor& grad_x, const OptionalTensor& grad_conv_weight,
                              const OptionalTensor& grad_conv_bias, const OptionalTensor& grad_weight,
                              const OptionalTensor& grad_bias, const OptionalTensor& grad_mean,
                              const OptionalTensor& grad_var, bool tf32, bool bf16) {
  const D at(defined(x, "x"));
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    check_two_dims(grad, "grad");
    check_together(grad_weight, grad_bias, "grad_weight and grad_bias");
    check_together(grad_mean, grad_var, "grad_mean and grad_var");
    BnReluConv3x3Backward<T> p = {};
    set_convolution<A>(at, p, x, size, mean, var, weight, bias, eps, conv_weight, grad.size(1), drop_rate, seed, layer,
                       drop_rows);
    const int64_t M = p.images.rows(), C = p.C, N = p.N;
    p.grad = rows<T>(at, grad, "grad", M, N);
    check_belongs_to_features(features, features_mean, "features_mean");
    check_belongs_to_features(features, features_grad_mean, "features_grad_mean");
    check_belongs_to_features(features, features_grad_var, "features_grad_var");
    if (features) p.features = rows<T>(at, *features, "features", M, N);
    p.features_mean = dense<A>(at, features_mean, "features_mean", N);
    p.features_grad_mean = dense<A>(at, features_grad_mean, "features_grad_mean", N);
    p.features_grad_var = dense<A>(at, features_grad_var, "features_grad_var", N);
    STD_TORCH_CHECK(mean || !scaled, "densenet_ext: scaled: expected False without a norm, got True");
    STD_TORCH_CHECK(mean || !grad_weight, "densenet_ext: grad_weight: expected None without a norm, got a tensor");
    STD_TORCH_CHECK(mean || !grad_mean, "densenet_ext: grad_mean: expected None without a norm, got a tensor");
    STD_TORCH_CHECK(!grad_in || (scaled && grad_x),
                    "densenet_ext: grad_in: expected None, as grad_x is not scaled or None, got a tensor");
    STD_TORCH_CHECK(!accumulate || (scaled && grad_x),
                    "densenet_ext: accumulate: expected False, as grad_x is not scaled or None, got True");
    p.scaled = scaled && grad_x;
    if (grad_in) p.grad_in = rows<T>(at, *grad_in, "grad_in", M, C);
    p.accumulate = accumulate;
    if (grad_x) p.grad_x = rows_out<T>(at, *grad_x, "grad_x", M, C);
    if (grad_conv_weight)
      p.grad_conv_weight =
          checked_taps<A>(at, *grad_conv_weight, "grad_conv_weight", window_dims(conv_weight), N, C, true);
    p.grad_conv_bias = dense_out<A>(at, grad_conv_bias, "grad_conv_bias", N);
    p.grad_weight = dense_out<A>(at, grad_weight, "grad_weight", C);
    p.grad_bias = dense_out<A>(at, grad_bias, "grad_bias", C);
    p.grad_mean = dense_out<A>(at, grad_mean, "grad_mean", C);
    p.grad_var = dense_out<A>(at, grad_var, "grad_var", C);
    p.tf32 = tf32, p.bf16 = bf16;
    at.check_apart({{"grad_x", "grad_in"}});
    if (C + N > 0) at.bn_relu_conv3x3_backward(p, M * (C + N));
  });
}

template <class D>
void implement_conv3x3(torch::stable::detail::StableLibrary& m) {
  m.impl("bn_relu_conv3x3", TORCH_BOX(&bn_relu_conv3x3<D>));
  m.impl("bn_relu_conv3x3_backward", TORCH_BOX(&bn_relu_conv3x3_backward<D>));
}

}  // namespace dx::ops
