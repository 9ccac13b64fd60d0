// channel_stats, append_features, bn_relu, feature_grad, bn_relu_backward(_reduce), cat_bn_relu
#include "../cpu/levels.h"
#include "tensors.h"

namespace dx::ops {
namespace {

void check_dropout(double rate, const OptionalTensor& seed) {
  STD_TORCH_CHECK(rate >= 0 && rate <= 1, "densenet_ext: drop_rate: expected a number in [0, 1], got ", rate);
  STD_TORCH_CHECK(rate == 0 || seed, "densenet_ext: seed: expected an int64 tensor of one element, got None");
  if (seed)
    STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && seed->is_cpu(),
                    "densenet_ext: seed: expected an int64 CPU tensor of one element, got shape ", shape_of(*seed));
}
const int64_t* seed_of(const OptionalTensor& seed) {
  return seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr;
}

void channel_stats(const Tensor& x, const Tensor& mean, const Tensor& var) {
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t M = x.size(0), C = x.size(1);
    cpu::kernels<T>().channel_stats(
        {M, C, rows<T>(x, "x", M, C), dense_out<A>(mean, "mean", C), dense_out<A>(var, "var", C)}, pool(M * C));
  });
}

void append_features(const Tensor& src, const Tensor& out, const OptionalTensor& mean, const OptionalTensor& var,
                     double drop_rate, const OptionalTensor& seed, int64_t layer) {
  for_storage_type(src, "src", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t M = src.size(0), C = src.size(1);
    check_dropout(drop_rate, seed);
    check_together(mean, var, "mean and var");
    cpu::kernels<T>().append_features(
        {M, C, rows<T>(src, "src", M, C), rows_out<T>(out, "out", M, C), dense_out<A>(mean, "mean", C),
         dense_out<A>(var, "var", C), drop_rate, seed_of(seed), layer},
        pool(M * C));
  });
}

void bn_relu(const Tensor& x, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
             const OptionalTensor& bias, double eps, const Tensor& out) {
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    const int64_t M = x.size(0), C = x.size(1);
    cpu::kernels<T>().bn_relu(
        {M, C, rows<T>(x, "x", M, C), norm<Acc<T>>(mean, var, weight, bias, eps, C), rows_out<T>(out, "out", M, C)},
        pool(M * C));
  });
}

void feature_grad(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& grad_mean,
                  const Tensor& grad_var, double drop_rate, const OptionalTensor& seed, int64_t layer,
                  const Tensor& out) {
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t M = x.size(0), C = x.size(1);
    check_dropout(drop_rate, seed);
    cpu::kernels<T>().feature_grad({M, C, rows<T>(grad, "grad", M, C), rows<T>(x, "x", M, C), dense<A>(mean, "mean", C),
                                    dense<A>(grad_mean, "grad_mean", C), dense<A>(grad_var, "grad_var", C), drop_rate,
                                    seed_of(seed), layer, rows_out<T>(out, "out", M, C)},
                                   pool(M * C));
  });
}

void bn_relu_backward_reduce(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var,
                             const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                             const Tensor& grad_weight, const Tensor& grad_bias) {
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t M = x.size(0), C = x.size(1);
    cpu::kernels<T>().bn_relu_backward_reduce(
        {M, C, rows<T>(grad, "grad", M, C), rows<T>(x, "x", M, C), norm<A>(mean, var, weight, bias, eps, C),
         dense_out<A>(grad_weight, "grad_weight", C), dense_out<A>(grad_bias, "grad_bias", C)},
        pool(M * C));
  });
}

void bn_relu_backward(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                      const OptionalTensor& grad_weight, const OptionalTensor& grad_bias, const Tensor& grad_x) {
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const int64_t M = x.size(0), C = x.size(1);
    check_together(grad_weight, grad_bias, "grad_weight and grad_bias");
    cpu::kernels<T>().bn_relu_backward(
        {M, C, rows<T>(grad, "grad", M, C), rows<T>(x, "x", M, C), norm<A>(mean, var, weight, bias, eps, C),
         dense<A>(grad_weight, "grad_weight", C), dense<A>(grad_bias, "grad_bias", C),
         rows_out<T>(grad_x, "grad_x", M, C)},
        pool(M * C));
  });
}

// The concatenation of several feature maps, normalised on the way into its storage.
void cat_bn_relu(const std::vector<Tensor>& features, const Tensor& mean, const Tensor& var,
                 const OptionalTensor& weight, const OptionalTensor& bias, double eps, const Tensor& out) {
  for_storage_type(out, "out", [&](auto tag) {
    using T = decltype(tag);
    const int64_t M = out.size(0), C = out.size(1);
    const Norm<Acc<T>> whole = norm<Acc<T>>(mean, var, weight, bias, eps, C);
    const Rows<T> target = rows_out<T>(out, "out", M, C);
    int64_t total = 0;
    for (const Tensor& feature : features) {
      check_two_dims(feature, "features");
      total += feature.size(1);
    }
    STD_TORCH_CHECK(total == C, "densenet_ext: features: expected ", C, " channels in all, got ", total);
    int64_t c = 0;
    for (const Tensor& feature : features) {
      const int64_t Ci = feature.size(1);
      cpu::kernels<T>().bn_relu({M,
                                 Ci,
                                 rows<T>(feature, "features", M, Ci),
                                 {whole.mean + c, whole.var + c, whole.weight ? whole.weight + c : nullptr,
                                  whole.bias ? whole.bias + c : nullptr, eps},
                                 {target.data + c, target.pitch}},
                                pool(M * Ci));
      c += Ci;
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  m.impl("channel_stats", TORCH_BOX(&channel_stats));
  m.impl("append_features", TORCH_BOX(&append_features));
  m.impl("bn_relu", TORCH_BOX(&bn_relu));
  m.impl("feature_grad", TORCH_BOX(&feature_grad));
  m.impl("bn_relu_backward_reduce", TORCH_BOX(&bn_relu_backward_reduce));
  m.impl("bn_relu_backward", TORCH_BOX(&bn_relu_backward));
  m.impl("cat_bn_relu", TORCH_BOX(&cat_bn_relu));
}

}  // namespace dx::ops
