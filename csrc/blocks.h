// The dense blocks: the step of every layer, forward in order and backward in reverse, over one buffer. In plain
// PyTorch and for several processes the same stands in densenet_ext/algorithm/block.py and basic_block.py.
#pragma once

#include "step.h"

namespace dx {

// Whether every parameter, and the input, of the layers up to and including each asks for its gradient.
struct Asked {
  bool input;               // the block's own input
  std::vector<bool> layer;  // any parameter of layer l
  bool below(size_t l) const { return input || std::find(layer.begin(), layer.begin() + l, true) != layer.begin() + l; }
};

// ---- layers with a bottleneck ---------------------------------------------------------------------------------------

// z_all: every z, one after the other, or null: none is kept.
template <class B, class T>
void dense_block(const B& at, const Buffer<T>& buffer, Rows<const T> x, const std::vector<DenseLayer<T>>& layers,
                 T* z_all, const StepScratch<T>& scratch) {
  append(at, buffer, x, layers[0].C, layers[0].read, {});
  for (const DenseLayer<T>& layer : layers) {
    const Rows<T> z = dense_rows(z_all ? z_all + buffer.M() * layer.z : scratch.z, layer.b);
    first_half(at, buffer, layer, z, layer.batch2, scratch.a);
    T* a = z_all ? scratch.a : z.data;  // in place of z where nobody reads it again
    second_half(at, buffer, read_only(z), layer.norm2, layer.conv2, layer.added, layer.drop, a);
  }
}

// Makes G, in which the gradients of the columns read by a layer are collected: the incoming gradient where it may be
// written, else scratch that begins as a copy of it. Returns what the first contribution is to be added to.
template <class T>
Rows<const T> start(BufferGrad<T>& grad, bool writable, int64_t C, int64_t read, const StepScratch<T>& scratch) {
  if (grad.started()) return {};
  const Rows<const T> incoming = grad.incoming;
  if (writable) {
    grad.G = {const_cast<T*>(incoming.data), incoming.pitch};
    grad.origin = 0;
    return {};
  }
  grad.G = dense_rows(scratch.G, C);
  grad.origin = read;
  return {incoming.data + read, incoming.pitch};
}

// The gradient of the block's input, from G and what its statistics received.
template <class B, class T>
void input_gradient(const B& at, const Buffer<T>& buffer, const BufferGrad<T>& grad, int64_t C, int64_t read,
                    Rows<T> grad_x) {
  const int64_t M = buffer.M();
  if (!buffer.mean) {
    const AppendFeatures<T> copy = {M, C, grad.columns(read), grad_x, nullptr, nullptr, 0, nullptr, 0, 1};
    return at.append_features(copy, M * C);
  }
  const FeatureGrad<T> p = {M,
                            C,
                            grad.columns(read),
                            read_only(buffer.columns(read)),
                            buffer.mean + read,
                            grad.gm + read,
                            grad.gv + read,
                            0,
                            nullptr,
                            0,
                            1,
                            grad_x};
  at.feature_grad(p, M * C);
}

// grad: the incoming gradient, and gm, gv of zeros; `writable` says that G may take its place. grad_x: null where not
// asked.
template <class B, class T>
void dense_block_backward(const B& at, const Buffer<T>& buffer, BufferGrad<T> grad, bool writable,
                          const std::vector<DenseLayer<T>>& layers, T* z_all,
                          const std::vector<DenseLayerGrads<T>>& grads, const Asked& asked, Rows<T> grad_x,
                          const StepScratch<T>& scratch) {
  using A = Acc<T>;
  for (size_t l = layers.size(); l-- > 0;) {
    const DenseLayer<T>& layer = layers[l];
    const DenseLayerGrads<T>& own = grads[l];
    const bool below = asked.below(l);
    if (!below && !asked.layer[l]) break;
    const Rows<T> z = dense_rows(z_all ? z_all + buffer.M() * layer.z : scratch.z, layer.b);
    if (!z_all) first_half(at, buffer, layer, z, false, scratch.a);
    const Rows<const T> z_read = read_only(z);

    const bool want_da = below || own.any_before_conv2();
    const bool want_sums = layer.batch2 || own.norm2.weight || own.norm2.bias || own.bias1;
    NormGrads<A> sums = {nullptr, nullptr};
    if (want_sums) {
      sums.weight = own.norm2.weight ? own.norm2.weight : scratch.sums;
      sums.bias = own.norm2.bias ? own.norm2.bias : scratch.sums + layer.b;
    }
    const auto da = second_half_backward(at, buffer, incoming(buffer, grad, layer.added, layer.drop), z_read,
                                         layer.norm2, layer.conv2, own.conv2, want_da, sums, scratch);
    if (!below && !own.any_before_norm2()) break;
    const Rows<const T> grad_in = start(grad, writable, layer.C, layer.read, scratch);
    first_half_backward(at, buffer, grad, grad_in, layer, own, da.rows(), z_read, sums, scratch);
  }
  if (grad_x) input_gradient(at, buffer, grad, layers[0].C, layers[0].read, grad_x);
}

// ---- layers without a bottleneck ------------------------------------------------------------------------------------

template <class B, class T>
void basic_block(const B& at, const Buffer<T>& buffer, Rows<const T> x, const std::vector<BasicLayer<T>>& layers,
                 const StepScratch<T>& scratch) {
  append(at, buffer, x, layers[0].C, layers[0].read, {});
  for (const BasicLayer<T>& layer : layers) {
    second_half(at, buffer, read_only(buffer.columns(layer.read)), layer.norm, layer.conv, layer.added, layer.drop,
                scratch.a);
  }
}

// The same arguments as of dense_block_backward.
template <class B, class T>
void basic_block_backward(const B& at, const Buffer<T>& buffer, BufferGrad<T> grad, bool writable,
                          const std::vector<BasicLayer<T>>& layers, const std::vector<BasicLayerGrads<T>>& grads,
                          const Asked& asked, Rows<T> grad_x, const StepScratch<T>& scratch) {
  using A = Acc<T>;
  for (size_t l = layers.size(); l-- > 0;) {
    const BasicLayer<T>& layer = layers[l];
    const BasicLayerGrads<T>& own = grads[l];
    const bool below = asked.below(l);
    if (!below && !asked.layer[l]) break;
    const Rows<const T> x = read_only(buffer.columns(layer.read));
    NormGrads<A> sums = {nullptr, nullptr};
    if ((below && layer.batch) || own.norm.weight || own.norm.bias) {
      sums.weight = own.norm.weight ? own.norm.weight : scratch.sums;
      sums.bias = own.norm.bias ? own.norm.bias : scratch.sums + layer.C;
    }
    // Looked up before G takes what this layer gives to the columns that it read.
    const Incoming<T> come = incoming(buffer, grad, layer.added, layer.drop);
    Contribution<T> to = {};
    if (below) {
      to.grad_in = start(grad, writable, layer.C, layer.read, scratch);
      to.target = grad.target(layer.read);
      if (layer.batch) to.gm = grad.gm + layer.read, to.gv = grad.gv + layer.read;
    }
    basic_layer_backward(at, buffer, come, x, layer.norm, layer.conv, own.conv, sums, below, to, scratch);
  }
  if (grad_x) input_gradient(at, buffer, grad, layers[0].C, layers[0].read, grad_x);
}

}  // namespace dx
