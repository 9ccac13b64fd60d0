// channel_stats, append_features, bn_relu, feature_grad, bn_relu_backward(_reduce), cat_bn_relu
#pragma once

#include "dropout.h"
#include "tensors.h"

namespace dx::ops {

template <class D>
void channel_stats(const Tensor& x, const Tensor& mean, const Tensor& var) {
  const D at(defined(x, "x"));
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t M = x.size(0), C = x.size(1);
    const ChannelStats<T> p = {M, C, rows<T>(at, x, "x", M, C), dense_out<A>(at, mean, "mean", C),
                               dense_out<A>(at, var, "var", C)};
    at.check_apart();
    if (C > 0) at.channel_stats(p, M * C);
  });
}

template <class D>
void append_features(const Tensor& src, const Tensor& out, const OptionalTensor& mean, const OptionalTensor& var,
                     double drop_rate, const OptionalTensor& seed, int64_t layer, int64_t drop_rows) {
  const D at(defined(src, "src"));
  for_storage_type(src, "src", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t M = src.size(0), C = src.size(1);
    const int64_t* checked_seed = check_dropout(at, drop_rate, seed, layer, drop_rows);
    check_together(mean, var, "mean and var");
    const AppendFeatures<T> p = {M,
                                 C,
                                 rows<T>(at, src, "src", M, C),
                                 rows_out<T>(at, out, "out", M, C),
                                 dense_out<A>(at, mean, "mean", C),
                                 dense_out<A>(at, var, "var", C),
                                 drop_rate,
                                 checked_seed,
                                 layer,
                                 drop_rows};
    at.check_apart();
    if (C > 0) at.append_features(p, M * C);
  });
}

template <class D>
void bn_relu(const Tensor& x, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
             const OptionalTensor& bias, double eps, const Tensor& out) {
  const D at(defined(x, "x"));
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    const int64_t M = x.size(0), C = x.size(1);
    const BnRelu<T> p = {M, C, rows<T>(at, x, "x", M, C), norm<Acc<T>>(at, mean, var, weight, bias, eps, C),
                         rows_out<T>(at, out, "out", M, C)};
    at.check_apart({{"out", "x"}});
    if (C > 0) at.bn_relu(p, M * C);
  });
}

template <class D>
void feature_grad(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& grad_mean,
                  const Tensor& grad_var, double drop_rate, const OptionalTensor& seed, int64_t layer,
                  const Tensor& out, int64_t drop_rows) {
  const D at(defined(x, "x"));
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t M = x.size(0), C = x.size(1);
    const int64_t* checked_seed = check_dropout(at, drop_rate, seed, layer, drop_rows);
    const FeatureGrad<T> p = {M,
                              C,
                              rows<T>(at, grad, "grad", M, C),
                              rows<T>(at, x, "x", M, C),
                              dense<A>(at, mean, "mean", C),
                              dense<A>(at, grad_mean, "grad_mean", C),
                              dense<A>(at, grad_var, "grad_var", C),
                              drop_rate,
                              checked_seed,
                              layer,
                              drop_rows,
                              rows_out<T>(at, out, "out", M, C)};
    at.check_apart({{"out", "grad"}});
    if (C > 0) at.feature_grad(p, M * C);
  });
}

template <class D>
void bn_relu_backward_reduce(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var,
                             const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                             const Tensor& grad_weight, const Tensor& grad_bias, const OptionalTensor& out) {
  const D at(defined(x, "x"));
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t M = x.size(0), C = x.size(1);
    const BnReluBackwardReduce<T> p = {M,
                                       C,
                                       rows<T>(at, grad, "grad", M, C),
                                       rows<T>(at, x, "x", M, C),
                                       norm<A>(at, mean, var, weight, bias, eps, C),
                                       out ? rows_out<T>(at, *out, "out", M, C) : Rows<T>{},
                                       dense_out<A>(at, grad_weight, "grad_weight", C),
                                       dense_out<A>(at, grad_bias, "grad_bias", C)};
    at.check_apart();
    if (C > 0) at.bn_relu_backward_reduce(p, M * C);
  });
}

template <class D>
void bn_relu_backward(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                      const OptionalTensor& grad_weight, const OptionalTensor& grad_bias, const Tensor& grad_x) {
  const D at(defined(x, "x"));
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t M = x.size(0), C = x.size(1);
    check_together(grad_weight, grad_bias, "grad_weight and grad_bias");
    const BnReluBackward<T> p = {M,
                                 C,
                                 rows<T>(at, grad, "grad", M, C),
                                 rows<T>(at, x, "x", M, C),
                                 norm<A>(at, mean, var, weight, bias, eps, C),
                                 dense<A>(at, grad_weight, "grad_weight", C),
                                 dense<A>(at, grad_bias, "grad_bias", C),
                                 rows_out<T>(at, grad_x, "grad_x", M, C)};
    at.check_apart({{"grad_x", "grad"}});
    if (C > 0) at.bn_relu_backward(p, M * C);
  });
}

// The concatenation of several feature maps, normalised on the way into its storage.
template <class D>
void cat_bn_relu(const std::vector<Tensor>& features, const Tensor& mean, const Tensor& var,
                 const OptionalTensor& weight, const OptionalTensor& bias, double eps, const Tensor& out) {
  const D at(defined(out, "out"));
  for_storage_type(out, "out", [&](auto tag) {
    using T = decltype(tag);
    const int64_t M = out.size(0), C = out.size(1);
    const Norm<Acc<T>> whole = norm<Acc<T>>(at, mean, var, weight, bias, eps, C);
    const Rows<T> target = rows_out<T>(at, out, "out", M, C);
    std::vector<Rows<const T>> sources;
    sources.reserve(features.size());
    int64_t total = 0;
    for (const Tensor& feature : features) {
      check_two_dims(feature, "features");
      sources.push_back(rows<T>(at, feature, "features", M, feature.size(1)));
      total += feature.size(1);
    }
    STD_TORCH_CHECK(total == C, "densenet_ext: features: expected ", C, " channels in all, got ", total);
    at.check_apart();
    int64_t c = 0;
    for (size_t i = 0; i < features.size(); ++i) {
      const int64_t Ci = features[i].size(1);
      const BnRelu<T> p = {M,
                           Ci,
                           sources[i],
                           {whole.mean + c, whole.var + c, whole.weight ? whole.weight + c : nullptr,
                            whole.bias ? whole.bias + c : nullptr, eps},
                           {target.data + c, target.pitch}};
      if (Ci > 0) at.bn_relu(p, M * Ci);
      c += Ci;
    }
  });
}

template <class D>
void implement_elementwise(torch::stable::detail::StableLibrary& m) {
  m.impl("channel_stats", TORCH_BOX(&channel_stats<D>));
  m.impl("append_features", TORCH_BOX(&append_features<D>));
  m.impl("bn_relu", TORCH_BOX(&bn_relu<D>));
  m.impl("feature_grad", TORCH_BOX(&feature_grad<D>));
  m.impl("bn_relu_backward_reduce", TORCH_BOX(&bn_relu_backward_reduce<D>));
  m.impl("bn_relu_backward", TORCH_BOX(&bn_relu_backward<D>));
  m.impl("cat_bn_relu", TORCH_BOX(&cat_bn_relu<D>));
}

}  // namespace dx::ops
