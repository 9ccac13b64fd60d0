// bn_relu_avg_pool, bn_relu_max_pool and their backward passes
#pragma once

#include "images.h"
#include "tensors.h"

namespace dx::ops {
// Kernels number the pixels of a side, with its padding, in 32 bits.
constexpr int64_t kMostOfASide = INT32_MAX;

// size [N, D, H, W]; window, stride, padding [3]; output sizes in floor mode.
inline Pooling pooling(const Ints& size, const Ints& window, const Ints& stride, const Ints& padding) {
  check_image_size(size);
  check_entries(window, 3, 1, "window");
  check_entries(stride, 3, 1, "stride");
  check_entries(padding, 3, 0, "padding");
  Pooling g = {};
  g.batch = size[0];
  for (int i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(padding[i] <= window[i] / 2, "densenet_ext: padding: expected at most half of the window ",
                    window[i], ", got ", padding[i]);
    STD_TORCH_CHECK(window[i] - padding[i] <= size[i + 1] + padding[i], "densenet_ext: window: expected at most ",
                    size[i + 1] + 2 * padding[i], " (the padded input), got ", window[i]);
    STD_TORCH_CHECK(size[i + 1] + 2 * padding[i] <= kMostOfASide, "densenet_ext: size: expected sides of at most ",
                    kMostOfASide, " pixels with their padding, got ", text_of(size));
    STD_TORCH_CHECK(stride[i] <= kMostOfASide, "densenet_ext: stride: expected at most ", kMostOfASide, ", got ",
                    text_of(stride));
    g.size[i] = size[i + 1];
    g.window[i] = window[i];
    g.stride[i] = stride[i];
    g.padding[i] = padding[i];
    g.out[i] = (size[i + 1] + 2 * padding[i] - window[i]) / stride[i] + 1;
  }
  return g;
}
inline Pooling average(const Ints& size, const Ints& window) { return pooling(size, window, window, {0, 0, 0}); }
inline Pooling maximum(const Ints& size, const Ints& window, const Ints& stride, const Ints& padding) {
  const Pooling g = pooling(size, window, stride, padding);
  STD_TORCH_CHECK(pixels(window, "window") <= 256,
                  "densenet_ext: window: expected at most 256 pixels (positions are kept in a byte), got ",
                  g.window[0] * g.window[1] * g.window[2]);
  return g;
}

// The three passes, for either kind of pooling: `kernel` picks it from the table.
template <class D, class K>
void forward(const Pooling& g, const K& kernel, const Tensor& x, const Tensor& mean, const Tensor& var,
             const OptionalTensor& weight, const OptionalTensor& bias, double eps, const Tensor& out,
             const OptionalTensor& index) {
  const D at(defined(x, "x"));
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    const int64_t C = x.size(1);
    const BnReluPool<T> p = {C,
                             g,
                             rows<T>(at, x, "x", g.in_rows(), C),
                             norm<Acc<T>>(at, mean, var, weight, bias, eps, C),
                             rows_out<T>(at, out, "out", g.out_rows(), C),
                             index ? rows_out<uint8_t>(at, *index, "index", g.out_rows(), C) : Rows<uint8_t>{}};
    at.check_apart();
    if (C > 0) kernel(at, p, g.in_rows() * C);
  });
}

template <class D, class K>
void backward_reduce(const Pooling& g, const K& kernel, const Tensor& grad_out, const OptionalTensor& index,
                     const Tensor& x, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                     const OptionalTensor& bias, double eps, const OptionalTensor& pooled, const Tensor& grad_weight,
                     const Tensor& grad_bias) {
  const D at(defined(x, "x"));
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t C = x.size(1);
    const BnReluPoolBackwardReduce<T> p = {
        C,
        g,
        rows<T>(at, grad_out, "grad_out", g.out_rows(), C),
        index ? rows<uint8_t>(at, *index, "index", g.out_rows(), C) : Rows<const uint8_t>{},
        rows<T>(at, x, "x", g.in_rows(), C),
        norm<A>(at, mean, var, weight, bias, eps, C),
        pooled ? rows_out<T>(at, *pooled, "pooled", g.out_rows(), C) : Rows<T>{},
        dense_out<A>(at, grad_weight, "grad_weight", C),
        dense_out<A>(at, grad_bias, "grad_bias", C)};
    at.check_apart();
    if (C > 0) kernel(at, p, g.in_rows() * C);
  });
}

template <class D, class K>
void backward(const Pooling& g, const K& kernel, const Tensor& grad_out, const OptionalTensor& index, const Tensor& x,
              const Tensor& mean, const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
              double eps, const OptionalTensor& grad_weight, const OptionalTensor& grad_bias, const Tensor& grad_x) {
  const D at(defined(x, "x"));
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t C = x.size(1);
    check_together(grad_weight, grad_bias, "grad_weight and grad_bias");
    const BnReluPoolBackward<T> p = {
        C,
        g,
        rows<T>(at, grad_out, "grad_out", g.out_rows(), C),
        index ? rows<uint8_t>(at, *index, "index", g.out_rows(), C) : Rows<const uint8_t>{},
        rows<T>(at, x, "x", g.in_rows(), C),
        norm<A>(at, mean, var, weight, bias, eps, C),
        dense<A>(at, grad_weight, "grad_weight", C),
        dense<A>(at, grad_bias, "grad_bias", C),
        rows_out<T>(at, grad_x, "grad_x", g.in_rows(), C)};
    at.check_apart();
    if (C > 0) kernel(at, p, g.in_rows() * C);
  });
}

template <class D>
void bn_relu_avg_pool(const Tensor& x, const Ints& size, const Ints& window, const Tensor& mean, const Tensor& var,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps, const Tensor& out) {
  forward<D>(
      average(size, window), [](const D& at, const auto& p, int64_t elements) { at.bn_relu_avg_pool(p, elements); }, x,
      mean, var, weight, bias, eps, out, std::nullopt);
}
template <class D>
void bn_relu_avg_pool_backward_reduce(const Tensor& grad_out, const Tensor& x, const Ints& size, const Ints& window,
                                      const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                                      const OptionalTensor& bias, double eps, const OptionalTensor& pooled,
                                      const Tensor& grad_weight, const Tensor& grad_bias) {
  backward_reduce<D>(
      average(size, window),
      [](const D& at, const auto& p, int64_t elements) { at.bn_relu_avg_pool_backward_reduce(p, elements); }, grad_out,
      std::nullopt, x, mean, var, weight, bias, eps, pooled, grad_weight, grad_bias);
}
template <class D>
void bn_relu_avg_pool_backward(const Tensor& grad_out, const Tensor& x, const Ints& size, const Ints& window,
                               const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                               const OptionalTensor& bias, double eps, const OptionalTensor& grad_weight,
                               const OptionalTensor& grad_bias, const Tensor& grad_x) {
  backward<D>(
      average(size, window),
      [](const D& at, const auto& p, int64_t elements) { at.bn_relu_avg_pool_backward(p, elements); }, grad_out,
      std::nullopt, x, mean, var, weight, bias, eps, grad_weight, grad_bias, grad_x);
}
template <class D>
void bn_relu_max_pool(const Tensor& x, const Ints& size, const Ints& window, const Ints& stride, const Ints& padding,
                      const Tensor& mean, const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
                      double eps, const Tensor& out, const OptionalTensor& index) {
  forward<D>(
      maximum(size, window, stride, padding),
      [](const D& at, const auto& p, int64_t elements) { at.bn_relu_max_pool(p, elements); }, x, mean, var, weight,
      bias, eps, out, index);
}
template <class D>
void bn_relu_max_pool_backward_reduce(const Tensor& grad_out, const Tensor& index, const Tensor& x, const Ints& size,
                                      const Ints& window, const Ints& stride, const Ints& padding, const Tensor& mean,
                                      const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
                                      double eps, const Tensor& grad_weight, const Tensor& grad_bias) {
  backward_reduce<D>(
      maximum(size, window, stride, padding),
      [](const D& at, const auto& p, int64_t elements) { at.bn_relu_max_pool_backward_reduce(p, elements); }, grad_out,
      index, x, mean, var, weight, bias, eps, std::nullopt, grad_weight, grad_bias);
}
template <class D>
void bn_relu_max_pool_backward(const Tensor& grad_out, const Tensor& index, const Tensor& x, const Ints& size,
                               const Ints& window, const Ints& stride, const Ints& padding, const Tensor& mean,
                               const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                               const OptionalTensor& grad_weight, const OptionalTensor& grad_bias,
                               const Tensor& grad_x) {
  backward<D>(
      maximum(size, window, stride, padding),
      [](const D& at, const auto& p, int64_t elements) { at.bn_relu_max_pool_backward(p, elements); }, grad_out, index,
      x, mean, var, weight, bias, eps, grad_weight, grad_bias, grad_x);
}

template <class D>
void implement_pool(torch::stable::detail::StableLibrary& m) {
  m.impl("bn_relu_avg_pool", TORCH_BOX(&bn_relu_avg_pool<D>));
  m.impl("bn_relu_avg_pool_backward_reduce", TORCH_BOX(&bn_relu_avg_pool_backward_reduce<D>));
  m.impl("bn_relu_avg_pool_backward", TORCH_BOX(&bn_relu_avg_pool_backward<D>));
  m.impl("bn_relu_max_pool", TORCH_BOX(&bn_relu_max_pool<D>));
  m.impl("bn_relu_max_pool_backward_reduce", TORCH_BOX(&bn_relu_max_pool_backward_reduce<D>));
  m.impl("bn_relu_max_pool_backward", TORCH_BOX(&bn_relu_max_pool_backward<D>));
}

}  // namespace dx::ops
