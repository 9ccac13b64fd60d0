// whole_transition, whole_stem and their backward passes: a unit in one call. A transition without a convolution is a
// head.
#pragma once

#include "../around.h"
#include "block_call.h"
#include "pool.h"

namespace dx::ops {

// The arguments that all four have in common. The norm's statistics are `mean` and `var`, or taken of x first, into
// `taken_mean` and `taken_var`.
template <class D, class T>
class AroundCall {
 public:
  using A = Acc<T>;

  AroundCall(const D& at, const Pooling& pooling, const Tensor& x, const OptionalTensor& mean,
             const OptionalTensor& var, const OptionalTensor& taken_mean, const OptionalTensor& taken_var,
             const OptionalTensor& weight, const OptionalTensor& bias, double eps)
      : at_(at), parameters_(at) {
    check_is_features(x, "x");
    check_together(mean, var, "mean and var");
    check_together(taken_mean, taken_var, "taken_mean and taken_var");
    STD_TORCH_CHECK(mean.has_value() != taken_mean.has_value(),
                    "densenet_ext: mean, taken_mean: expected one of them, got ", mean ? "both" : "neither");
    check_eps(eps, "eps");
    const int64_t C = x.size(1);
    STD_TORCH_CHECK(C > 0, "densenet_ext: x: expected at least one channel, got shape ", shape_of(x));
    unit.C = C, unit.pooling = pooling;
    unit.x = features<T>(at, x, "x", pooling.in_rows(), C);
    unit.mean = dense_out<A>(at, taken_mean, "taken_mean", C), unit.var = dense_out<A>(at, taken_var, "taken_var", C);
    unit.norm = {unit.mean, unit.var, vector(weight, "weight", C), vector(bias, "bias", C), eps};
    if (mean) unit.norm.mean = vector(mean, "mean", C), unit.norm.var = vector(var, "var", C);
  }

  SameConvolution<T> convolution(const OptionalTensor& weight, const OptionalTensor& bias) {
    STD_TORCH_CHECK(weight || !bias, "densenet_ext: conv_bias: expected None, as conv is, got a tensor");
    if (!weight) return {unit.C, unit.C, {1, 1, 1}, {}, nullptr, nullptr};
    check_convolution(*weight);
    const int64_t N = weight->size(0);
    const A* data = parameters_.template matrix<A>(*weight, "conv", N, unit.C);
    return {unit.C, N, {1, 1, 1}, {data, unit.C, 1, 1}, vector(bias, "conv_bias", N), nullptr};
  }
  SameConvolutionGrads<T> convolution_grads(const OptionalTensor& weight, const OptionalTensor& bias, int64_t N) {
    A* data = matrix_out<A>(at_, weight, "grad_conv", N, unit.C);
    return {{data, unit.C, 1, 1}, dense_out<A>(at_, bias, "grad_conv_bias", N)};
  }
  PooledNormGrads<T> grads(bool batch, bool sums, const Tensor& weight, const Tensor& bias,
                           const OptionalTensor& grad_x) const {
    const Rows<T> dx = grad_x ? features_out<T>(at_, *grad_x, "grad_x", unit.pooling.in_rows(), unit.C) : Rows<T>{};
    STD_TORCH_CHECK(sums || !batch || !grad_x,
                    "densenet_ext: sums: expected True for a norm of the batch's statistics, got False");
    return {{dense_out<A>(at_, weight, "grad_weight", unit.C), dense_out<A>(at_, bias, "grad_bias", unit.C)},
            sums,
            batch,
            dx};
  }

  PooledNorm<T> unit;

 private:
  static void check_convolution(const Tensor& weight) {
    STD_TORCH_CHECK(weight.dim() >= 2, "densenet_ext: conv: expected shape [N, C, 1, ...], got ", shape_of(weight));
  }
  const A* vector(const OptionalTensor& t, const char* name, int64_t count) {
    return parameters_.template dense<A>(t ? &*t : nullptr, name, count);
  }

  const D& at_;
  Parameters<D> parameters_;
};

template <class D>
void transition(const Tensor& x, const Ints& size, const Ints& window, const OptionalTensor& mean,
                const OptionalTensor& var, const OptionalTensor& taken_mean, const OptionalTensor& taken_var,
                const OptionalTensor& weight, const OptionalTensor& bias, double eps, const OptionalTensor& conv_weight,
                const OptionalTensor& conv_bias, const Tensor& pooled, const OptionalTensor& out, bool tf32, bool bf16,
                bool packed_weights) {
  const D at(defined(x, "x"));
  at.use_packed(packed_weights);
  for_features_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    AroundCall<D, T> call(at, average(size, window), x, mean, var, taken_mean, taken_var, weight, bias, eps);
    const SameConvolution<T> conv = call.convolution(conv_weight, conv_bias);
    STD_TORCH_CHECK(conv_weight.has_value() == out.has_value(),
                    "densenet_ext: out: expected a tensor where there is a convolution, got ", out ? "one" : "None");
    const int64_t M = call.unit.pooling.out_rows();
    const Rows<T> average_rows = features_out<T>(at, pooled, "pooled", M, conv.C);
    const Rows<T> result = out ? features_out<T>(at, *out, "out", M, conv.N) : Rows<T>{};
    at.check_apart();
    if (M > 0) dx::transition(at, call.unit, conv, average_rows, result, tf32, bf16);
  });
}

template <class D>
void transition_backward(const Tensor& grad, const Tensor& x, const Ints& size, const Ints& window, const Tensor& mean,
                         const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                         bool batch, bool sums, const OptionalTensor& conv_weight, const OptionalTensor& pooled,
                         const Tensor& grad_weight, const Tensor& grad_bias, const OptionalTensor& grad_x,
                         const OptionalTensor& grad_conv, const OptionalTensor& grad_conv_bias) {
  const D at(defined(x, "x"));
  for_features_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    AroundCall<D, T> call(at, average(size, window), x, mean, var, std::nullopt, std::nullopt, weight, bias, eps);
    SameConvolution<T> conv = call.convolution(conv_weight, std::nullopt);
    STD_TORCH_CHECK(conv_weight.has_value() == pooled.has_value(),
                    "densenet_ext: pooled: expected a tensor where there is a convolution, got ",
                    pooled ? "one" : "None");
    STD_TORCH_CHECK(conv_weight || (!grad_conv && !grad_conv_bias),
                    "densenet_ext: grad_conv, grad_conv_bias: expected None, as conv is, got a tensor");
    const int64_t M = call.unit.pooling.out_rows();
    const Rows<const T> g = features<T>(at, grad, "grad", M, conv.N);
    const Rows<T> average_rows = pooled ? features_out<T>(at, *pooled, "pooled", M, conv.C) : Rows<T>{};
    const auto conv_grads = call.convolution_grads(grad_conv, grad_conv_bias, conv.N);
    const auto grads = call.grads(batch, sums, grad_weight, grad_bias, grad_x);
    at.check_apart();
    if (M == 0) return;
    WeightCopies<T> copies(at, x, 0);
    copies.add(conv, conv_grads.weight.data);
    dx::transition_backward(at, call.unit, conv, g, conv_grads, grads, average_rows);
    copies.write();
  });
}

template <class D>
void stem(const Tensor& x, const Ints& size, const Ints& window, const Ints& stride, const Ints& padding,
          const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& taken_mean,
          const OptionalTensor& taken_var, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
          const Tensor& out, const OptionalTensor& index) {
  const D at(defined(x, "x"));
  for_features_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    AroundCall<D, T> call(at, maximum(size, window, stride, padding), x, mean, var, taken_mean, taken_var, weight, bias,
                          eps);
    const int64_t M = call.unit.pooling.out_rows(), C = call.unit.C;
    const Rows<T> result = features_out<T>(at, out, "out", M, C);
    const Rows<uint8_t> positions = index ? features_out<uint8_t>(at, *index, "index", M, C) : Rows<uint8_t>{};
    at.check_apart();
    if (M > 0) dx::stem(at, call.unit, result, positions);
  });
}

template <class D>
void stem_backward(const Tensor& grad, const Tensor& index, const Tensor& x, const Ints& size, const Ints& window,
                   const Ints& stride, const Ints& padding, const Tensor& mean, const Tensor& var,
                   const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool batch, bool sums,
                   const Tensor& grad_weight, const Tensor& grad_bias, const OptionalTensor& grad_x) {
  const D at(defined(x, "x"));
  for_features_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    AroundCall<D, T> call(at, maximum(size, window, stride, padding), x, mean, var, std::nullopt, std::nullopt, weight,
                          bias, eps);
    const int64_t M = call.unit.pooling.out_rows(), C = call.unit.C;
    const Rows<const T> g = features<T>(at, grad, "grad", M, C);
    const Rows<const uint8_t> positions = features<uint8_t>(at, index, "index", M, C);
    const auto grads = call.grads(batch, sums, grad_weight, grad_bias, grad_x);
    at.check_apart();
    if (M > 0) dx::stem_backward(at, call.unit, g, positions, grads);
  });
}

template <class D>
void implement_around(torch::stable::detail::StableLibrary& m) {
  m.impl("whole_transition", TORCH_BOX(&transition<D>));
  m.impl("whole_transition_backward", TORCH_BOX(&transition_backward<D>));
  m.impl("whole_stem", TORCH_BOX(&stem<D>));
  m.impl("whole_stem_backward", TORCH_BOX(&stem_backward<D>));
}

}  // namespace dx::ops
