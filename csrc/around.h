// The units around the blocks, over a backend: transition, stem and head, line by line what algorithm/transition.py,
// stem.py and head.py say in plain PyTorch. A head is a transition without a convolution whose window is the image.
//
// Forward     pooled = pool(relu(bn(x)))        transition: out = pooled @ W^T + c, which commutes with averaging
// Backward    dW, dc, dpooled from the convolution; then from x, read twice, dgamma and dbeta, and dx
#pragma once

#include "step.h"

namespace dx {

// Norm, ReLU and pooling of x.
template <class T>
struct PooledNorm {
  using A = Acc<T>;
  int64_t C;
  Pooling pooling;
  Rows<const T> x;
  Norm<A> norm;
  A *mean, *var;  // [C], of x, taken first: the norm's; or both null

  int64_t elements() const { return pooling.in_rows() * C; }
  Images pooled() const { return {pooling.batch, {pooling.out[0], pooling.out[1], pooling.out[2]}}; }
};

// What the backward pass of such a unit gives.
template <class T>
struct PooledNormGrads {
  NormGrads<Acc<T>> norm;  // both, wherever `sums` is set
  bool sums;               // asked for, or read for grad_x
  bool batch;              // the norm is of the batch's statistics
  Rows<T> grad_x;          // or null
};

template <class B, class T>
void take_statistics(const B& at, const PooledNorm<T>& unit) {
  if (!unit.mean) return;
  const ChannelStats<T> p = {unit.pooling.in_rows(), unit.C, unit.x, unit.mean, unit.var};
  at.channel_stats(p, unit.elements());
}

template <class B, class T>
void average(const B& at, const PooledNorm<T>& unit, Rows<T> pooled) {
  const BnReluPool<T> p = {unit.C, unit.pooling, unit.x, unit.norm, pooled, {}};
  at.bn_relu_avg_pool(p, unit.elements());
}

// The gradient of x from that of the pooled; `index` is max pooling's.
template <class T>
BnReluPoolBackward<T> input_gradient(const PooledNorm<T>& unit, Rows<const T> dpooled, Rows<const uint8_t> index,
                                     const PooledNormGrads<T>& grads) {
  return {unit.C,
          unit.pooling,
          dpooled,
          index,
          unit.x,
          unit.norm,
          grads.batch ? grads.norm.weight : nullptr,
          grads.batch ? grads.norm.bias : nullptr,
          grads.grad_x};
}

// conv: one of window 1, or of no weight for a head, whose result is `pooled`.
template <class B, class T>
void transition(const B& at, const PooledNorm<T>& unit, const SameConvolution<T>& conv, Rows<T> pooled, Rows<T> out,
                bool tf32, bool bf16) {
  take_statistics(at, unit);
  average(at, unit, pooled);
  if (!conv.weight) return;
  const int64_t M = unit.pooling.out_rows();
  const auto identity = at.identity_norm(conv.weight.data, conv.C);  // averages of ReLU's are none below zero
  const BnReluConv1x1<T> p = {M,         conv.C, conv.N, read_only(pooled), identity.norm, conv.weight.data,
                              conv.bias, false,  out,    nullptr,           nullptr,       tf32,
                              bf16};
  at.bn_relu_conv1x1(p, M * (conv.C + conv.N));
}

// grad: of the result. pooled: memory for it, filled again where the convolution's weight asks for its gradient.
template <class B, class T>
void transition_backward(const B& at, const PooledNorm<T>& unit, const SameConvolution<T>& conv, Rows<const T> grad,
                         const SameConvolutionGrads<T>& conv_grads, const PooledNormGrads<T>& grads, Rows<T> pooled) {
  const Images images = unit.pooled();
  const Rows<const T> y = read_only(pooled);
  auto dpooled = at.borrowed(Rows<T>{const_cast<T*>(grad.data), grad.pitch});  // only read
  if (conv.weight && (grads.sums || grads.grad_x)) dpooled = at.convolution_input_gradient(images, grad, y, conv);
  if (grads.sums) {
    const BnReluPoolBackwardReduce<T> p = {unit.C,
                                           unit.pooling,
                                           read_only(dpooled.rows()),
                                           {},
                                           unit.x,
                                           unit.norm,
                                           conv_grads.weight ? pooled : Rows<T>{nullptr, 0},
                                           grads.norm.weight,
                                           grads.norm.bias};
    at.bn_relu_avg_pool_backward_reduce(p, unit.elements());
  } else if (conv_grads.weight) {
    average(at, unit, pooled);
  }
  if (conv_grads.weight) at.convolution_weight_gradient(images, grad, y, conv, conv_grads.weight);
  if (conv_grads.bias) at.sum_rows(grad, unit.pooling.out_rows(), conv.N, conv_grads.bias);
  if (!grads.grad_x) return;
  at.bn_relu_avg_pool_backward(input_gradient(unit, read_only(dpooled.rows()), {}, grads), unit.elements());
}

// index: the positions of the maxima, or null.
template <class B, class T>
void stem(const B& at, const PooledNorm<T>& unit, Rows<T> out, Rows<uint8_t> index) {
  take_statistics(at, unit);
  const BnReluPool<T> p = {unit.C, unit.pooling, unit.x, unit.norm, out, index};
  at.bn_relu_max_pool(p, unit.elements());
}

template <class B, class T>
void stem_backward(const B& at, const PooledNorm<T>& unit, Rows<const T> grad, Rows<const uint8_t> index,
                   const PooledNormGrads<T>& grads) {
  if (grads.sums) {
    const BnReluPoolBackwardReduce<T> p = {unit.C, unit.pooling,      grad,           index, unit.x, unit.norm,
                                           {},     grads.norm.weight, grads.norm.bias};
    at.bn_relu_max_pool_backward_reduce(p, unit.elements());
  }
  if (!grads.grad_x) return;
  at.bn_relu_max_pool_backward(input_gradient(unit, grad, index, grads), unit.elements());
}

}  // namespace dx
