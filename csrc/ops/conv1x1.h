// bn_relu_conv1x1, bn_relu_conv1x1_backward
#pragma once

#include "tensors.h"

namespace dx::ops {

template <class D>
void bn_relu_conv1x1(const Tensor& x, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                     const OptionalTensor& bias, double eps, const Tensor& conv_weight, const OptionalTensor& out_bias,
                     bool out_relu, const Tensor& out, const OptionalTensor& out_mean, const OptionalTensor& out_var,
                     bool tf32, bool bf16) {
  const D at(defined(x, "x"));
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    check_two_dims(out, "out");
    check_together(out_mean, out_var, "out_mean and out_var");
    const int64_t M = x.size(0), C = x.size(1), N = out.size(1);
    const BnReluConv1x1<T> p = {M,
                                C,
                                N,
                                rows<T>(at, x, "x", M, C),
                                norm<A>(at, mean, var, weight, bias, eps, C),
                                matrix<A>(at, conv_weight, "conv_weight", N, C),
                                dense<A>(at, out_bias, "out_bias", N),
                                out_relu,
                                rows_out<T>(at, out, "out", M, N),
                                dense_out<A>(at, out_mean, "out_mean", N),
                                dense_out<A>(at, out_var, "out_var", N),
                                tf32,
                                bf16};
    at.check_apart();
    if (C + N > 0) at.bn_relu_conv1x1(p, M * (C + N));
  });
}

inline void check_belongs_to_z(const OptionalTensor& z, const OptionalTensor& t, const char* name, bool needed) {
  STD_TORCH_CHECK(!t || z, "densenet_ext: ", name, ": expected None, as z is, got a tensor");
  STD_TORCH_CHECK(t || !z || !needed, "densenet_ext: ", name, ": expected a tensor with z, got None");
}

template <class D>
void bn_relu_conv1x1_backward(const Tensor& x, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                              const OptionalTensor& bias, double eps, const Tensor& conv_weight, const Tensor& grad_out,
                              const OptionalTensor& z, const OptionalTensor& z_mean, const OptionalTensor& z_var,
                              const OptionalTensor& z_weight, const OptionalTensor& z_bias, double z_eps,
                              const OptionalTensor& z_grad_weight, const OptionalTensor& z_grad_bias,
                              const OptionalTensor& grad_in, bool accumulate, const Tensor& grad_x,
                              const OptionalTensor& grad_conv_weight, const Tensor& grad_weight,
                              const Tensor& grad_bias, const OptionalTensor& grad_mean, const OptionalTensor& grad_var,
                              bool tf32, bool bf16) {
  const D at(defined(x, "x"));
  for_storage_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    check_two_dims(grad_out, "grad_out");
    check_together(z_grad_weight, z_grad_bias, "z_grad_weight and z_grad_bias");
    check_together(grad_mean, grad_var, "grad_mean and grad_var");
    check_belongs_to_z(z, z_mean, "z_mean", true);
    check_belongs_to_z(z, z_var, "z_var", true);
    check_belongs_to_z(z, z_weight, "z_weight", false);
    check_belongs_to_z(z, z_bias, "z_bias", false);
    check_belongs_to_z(z, z_grad_weight, "z_grad_weight", false);
    const int64_t M = x.size(0), C = x.size(1), N = grad_out.size(1);
    BnReluConv1x1Backward<T> p = {};
    p.M = M, p.C = C, p.N = N;
    p.x = rows<T>(at, x, "x", M, C);
    p.norm = norm<A>(at, mean, var, weight, bias, eps, C);
    p.weight = matrix<A>(at, conv_weight, "conv_weight", N, C);
    p.grad_out = rows<T>(at, grad_out, "grad_out", M, N);
    if (z) {
      check_eps(z_eps, "z_eps");
      p.z = rows<T>(at, *z, "z", M, N);
      p.z_norm = {dense<A>(at, z_mean, "z_mean", N), dense<A>(at, z_var, "z_var", N),
                  dense<A>(at, z_weight, "z_weight", N), dense<A>(at, z_bias, "z_bias", N), z_eps};
      p.z_grad_weight = dense<A>(at, z_grad_weight, "z_grad_weight", N);
      p.z_grad_bias = dense<A>(at, z_grad_bias, "z_grad_bias", N);
    }
    if (grad_in) p.grad_in = rows<T>(at, *grad_in, "grad_in", M, C);
    p.accumulate = accumulate;
    p.grad_x = rows_out<T>(at, grad_x, "grad_x", M, C);
    p.grad_conv_weight = matrix_out<A>(at, grad_conv_weight, "grad_conv_weight", N, C);
    p.grad_weight = dense_out<A>(at, grad_weight, "grad_weight", C);
    p.grad_bias = dense_out<A>(at, grad_bias, "grad_bias", C);
    p.grad_mean = dense_out<A>(at, grad_mean, "grad_mean", C);
    p.grad_var = dense_out<A>(at, grad_var, "grad_var", C);
    p.tf32 = tf32;
    p.bf16 = bf16;
    at.check_apart({{"grad_x", "grad_in"}});
    if (C + N > 0) at.bn_relu_conv1x1_backward(p, M * (C + N));
  });
}

template <class D>
void implement_conv1x1(torch::stable::detail::StableLibrary& m) {
  m.impl("bn_relu_conv1x1", TORCH_BOX(&bn_relu_conv1x1<D>));
  m.impl("bn_relu_conv1x1_backward", TORCH_BOX(&bn_relu_conv1x1_backward<D>));
}

}  // namespace dx::ops
