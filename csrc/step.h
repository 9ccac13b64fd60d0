// One dense layer in two halves each way, over a backend: line by line what densenet_ext/algorithm/step.py says in
// plain PyTorch. No torch here: a backend (B) has the kernels of params.h under their names, and PyTorch's own
// convolution for shapes without a kernel (ops/torch_calls.h).
//
// First half      z   = dropout(relu(bn1(x)) @ W1^T + c1)            and z's statistics
// Second half     new = dropout(conv3x3(relu(bn2(z)), W2) + c2)      and their statistics, in the buffer's columns
//
// Backward, layers in reverse; G is the gradient of the buffer X, and gm, gv collect those of its columns' statistics:
//
//     g  = dropout'(G[:, new] + (gm + 2 (x - m) gv) / M)                 every consumer has contributed
//     da, dW2, dc2 = sum g     from conv3x3      dbeta2 = sum dy2      dgamma2 = r2 sum dy2 (z - m2)
//     dz = s2 (dy2 - dbeta2 / M - (z - m2) r2 dgamma2 / M)               dy2 = da where bn2(z) > 0
//     dW1, dgamma1, dbeta1 and G[:, read] += s1 dy1, gm, gv from dz      dy1 = dz @ W1 where bn1(x) > 0
#pragma once

#include <algorithm>
#include <vector>

#include "params.h"

namespace dx {

// Dropout in one place of one layer: of single values (rows = 1), or of whole channels of a sample (rows = its pixels).
struct DropoutSite {
  double rate;  // 0: none
  int64_t site, rows;
};

namespace ops {
template <class T>
class WeightCopies;
}

// A convolution that keeps the size of its images, of C channels to N.
template <class T>
struct SameConvolution {
  using A = Acc<T>;
  int64_t C, N;
  int64_t window[3];             // ones in front
  Taps<const A> weight;          // [N, C, taps]
  const A* bias;                 // [N] or null
  ops::WeightCopies<T>* copies;  // has the weight as PyTorch's own convolution reads it; null for kernels of ours
  bool tf32 = false;             // as in BnReluConv3x3
};

// The gradients of a convolution's parameters; null where not asked.
template <class T>
struct SameConvolutionGrads {
  Taps<Acc<T>> weight;
  Acc<T>* bias;
};

// The gradients of a norm's parameters, [C] each; null where not asked.
template <class A>
struct NormGrads {
  A *weight, *bias;
};

// What the layers of a block share.
template <class T>
struct Buffer {
  using A = Acc<T>;
  Images images;
  int64_t C;            // of all features
  Rows<T> X;            // [M, C]
  A *mean, *var;        // [C] of X's columns; or both null: no norm takes the batch's statistics
  const int64_t* seed;  // of all dropouts, or null
  bool tf32, bf16;      // as in BnReluConv1x1

  int64_t M() const { return images.rows(); }
  Rows<T> columns(int64_t first) const { return {X.data + first, X.pitch}; }
};

// The gradient of a buffer's columns from `origin` on, and those of their statistics.
template <class T>
struct BufferGrad {
  using A = Acc<T>;
  Rows<T> G;
  int64_t origin;
  Rows<const T> incoming;  // of all columns, which is only read; null: G began as a copy of it
  A *gm, *gv;              // [C]

  // Whether a consumer has contributed to G; until then it is `incoming`, which has all that G would hold.
  bool started() const { return G.data != nullptr; }
  Rows<const T> columns(int64_t first) const {
    if (!started()) return {incoming.data + first, incoming.pitch};
    return {G.data + (first - origin), G.pitch};
  }
  Rows<T> target(int64_t first) const { return {G.data + (first - origin), G.pitch}; }
};

template <class T>
struct DenseLayer {
  using A = Acc<T>;
  int64_t C, b, k;         // features read, bottleneck features, new features
  int64_t read, added, z;  // first column read, first new one, first of its bottleneck features among all
  Norm<A> norm1;           // of the columns read, by their statistics or the running ones
  bool batch1;             // by their statistics
  const A *W1, *c1;        // [b, C]; [b] or null
  Norm<A> norm2;           // of z; mean null: folded, c1 and `fold` [b] being its shift and its scale
  const A* fold;           // or null
  bool batch2;
  SameConvolution<T> conv2;
  DropoutSite inner, drop;  // of z, of the new features
  A *z_mean, *z_var;        // [b], written with z; or both null

  bool folded() const { return norm2.mean == nullptr; }
};

template <class T>
struct DenseLayerGrads {
  using A = Acc<T>;
  NormGrads<A> norm1;
  A *conv1, *bias1;  // [b, C]; [b]
  NormGrads<A> norm2;
  SameConvolutionGrads<T> conv2;

  bool any_before_conv2() const { return any_before_norm2() || norm2.weight || norm2.bias; }
  bool any_before_norm2() const { return norm1.weight || norm1.bias || conv1 || bias1; }
  bool any() const { return any_before_conv2() || conv2.weight || conv2.bias; }
};

template <class T>
struct BasicLayer {
  using A = Acc<T>;
  int64_t C, k;
  int64_t read, added;
  Norm<A> norm;
  bool batch;
  SameConvolution<T> conv;
  DropoutSite drop;
};

template <class T>
struct BasicLayerGrads {
  NormGrads<Acc<T>> norm;
  SameConvolutionGrads<T> conv;

  bool any() const { return norm.weight || norm.bias || conv.weight || conv.bias; }
};

// Storage of a call, [M, ...] each, as large as the largest layer needs; null where it isn't used.
template <class T>
struct StepScratch {
  T* z;  // where z is not kept
  T* a;  // relu(norm(...)), for PyTorch's own convolution; or z before its dropout
  T* g;  // the complete gradient of a layer's new features, for the same
  T* da;
  T* G;          // where the incoming gradient may not be written
  Acc<T>* sums;  // 4 * (the most columns that a layer reads or makes)
};

template <class T>
Rows<const T> read_only(Rows<T> rows) {
  return {rows.data, rows.pitch};
}
template <class T>
Rows<T> dense_rows(T* data, int64_t columns) {
  return {data, columns};
}

// Whether the window is of 3 along every dimension that the convolution has.
template <class T>
bool has_window_of_3(const Images& images, const SameConvolution<T>& conv) {
  for (int i = 0; i < 3; ++i)
    if (conv.window[i] != 3 && (conv.window[i] != 1 || images.size[i] != 1)) return false;
  return conv.window[2] == 3;
}

// Whether the backend has a kernel of ours for the convolution.
template <class B, class T>
bool has_kernel(const B& at, const Images& images, const SameConvolution<T>& conv) {
  if constexpr (B::kHasConv3x3)
    return at.has_conv3x3(images, conv);
  else
    return false;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Columns of the buffer from `first` on = dropout(src), and their statistics.
template <class B, class T>
void append(const B& at, const Buffer<T>& buffer, Rows<const T> src, int64_t k, int64_t first,
            const DropoutSite& drop) {
  const bool stats = buffer.mean != nullptr;
  const AppendFeatures<T> p = {buffer.M(),
                               k,
                               src,
                               buffer.columns(first),
                               stats ? buffer.mean + first : nullptr,
                               stats ? buffer.var + first : nullptr,
                               drop.rate,
                               buffer.seed,
                               drop.site,
                               drop.rows};
  at.append_features(p, buffer.M() * k);
}

// z [M, b], and its statistics where `stats`; it is relu(norm2(z)) where norm2 is folded.
template <class B, class T>
void first_half(const B& at, const Buffer<T>& buffer, const DenseLayer<T>& layer, Rows<T> z, bool stats, T* scratch) {
  const int64_t M = buffer.M();
  Acc<T>*z_mean = stats ? layer.z_mean : nullptr, *z_var = stats ? layer.z_var : nullptr;
  const bool drop = layer.inner.rate > 0;
  const Rows<T> out = drop ? dense_rows(scratch, layer.b) : z;
  const Rows<const T> x = read_only(buffer.columns(layer.read));
  const auto W1 = layer.fold ? at.scaled_rows(layer.W1, layer.fold, layer.b, layer.C)
                             : at.borrowed(Rows<Acc<T>>{const_cast<Acc<T>*>(layer.W1), layer.C});
  const BnReluConv1x1<T> product = {M,
                                    layer.C,
                                    layer.b,
                                    x,
                                    layer.norm1,
                                    W1.rows().data,
                                    layer.c1,
                                    layer.folded(),
                                    out,
                                    drop ? nullptr : z_mean,
                                    drop ? nullptr : z_var,
                                    buffer.tf32,
                                    buffer.bf16};
  at.bn_relu_conv1x1(product, M * (layer.C + layer.b));
  if (!drop) return;
  const AppendFeatures<T> dropped = {M,           layer.b,          read_only(out),  z, z_mean, z_var, layer.inner.rate,
                                     buffer.seed, layer.inner.site, layer.inner.rows};
  at.append_features(dropped, M * layer.b);
}

// The new features = dropout(conv(relu(norm(x))) + bias), and their statistics. norm.mean null: x is that already.
template <class B, class T>
void second_half(const B& at, const Buffer<T>& buffer, Rows<const T> x, const Norm<Acc<T>>& norm,
                 const SameConvolution<T>& conv, int64_t added, const DropoutSite& drop, T* scratch) {
  const int64_t M = buffer.M();
  if constexpr (B::kHasConv3x3) {
    if (has_kernel(at, buffer.images, conv)) {
      const bool stats = buffer.mean != nullptr;
      BnReluConv3x3<T> p = {};
      p.C = conv.C, p.N = conv.N, p.images = buffer.images;
      std::copy_n(conv.window, 3, p.window);
      p.x = x, p.norm = norm, p.weight = conv.weight, p.bias = conv.bias;
      p.drop_rate = drop.rate, p.seed = buffer.seed, p.layer = drop.site, p.drop_rows = drop.rows;
      p.out = buffer.columns(added), p.tf32 = buffer.tf32, p.bf16 = buffer.bf16;
      p.out_mean = stats ? buffer.mean + added : nullptr, p.out_var = stats ? buffer.var + added : nullptr;
      at.bn_relu_conv3x3(p, M * (conv.C + conv.N));
      return;
    }
  }
  if (norm.mean) {
    const BnRelu<T> p = {M, conv.C, x, norm, dense_rows(scratch, conv.C)};
    at.bn_relu(p, M * conv.C);
    x = {scratch, conv.C};
  }
  const auto y = at.convolution(buffer.images, x, conv);
  append(at, buffer, read_only(y.rows()), conv.N, added, drop);
}

// ---- backward -------------------------------------------------------------------------------------------------------

// What has come for a layer's new features, of which their complete gradient is made.
template <class T>
struct Incoming {
  Rows<const T> grad, features;
  bool through_stats;           // something has come for their statistics, too
  const Acc<T>*mean, *gm, *gv;  // [k]
  DropoutSite drop;
};

template <class T>
Incoming<T> incoming(const Buffer<T>& buffer, const BufferGrad<T>& grad, int64_t added, const DropoutSite& drop) {
  // Without statistics gm and gv stay zero, and so may the mean be.
  return {grad.columns(added),
          read_only(buffer.columns(added)),
          buffer.mean && grad.started(),
          (buffer.mean ? buffer.mean : grad.gm) + added,
          grad.gm + added,
          grad.gv + added,
          drop};
}

// The complete gradient, written out where it isn't what has come: for PyTorch's own convolution.
template <class B, class T>
Rows<const T> completed(const B& at, const Buffer<T>& buffer, const Incoming<T>& come, int64_t k, T* scratch) {
  if (!come.through_stats && come.drop.rate == 0) return come.grad;
  const int64_t M = buffer.M();
  const FeatureGrad<T> p = {M,
                            k,
                            come.grad,
                            come.features,
                            come.mean,
                            come.gm,
                            come.gv,
                            come.drop.rate,
                            buffer.seed,
                            come.drop.site,
                            come.drop.rows,
                            dense_rows(scratch, k)};
  at.feature_grad(p, M * k);
  return {scratch, k};
}

template <class B, class T>
BnReluConv3x3Backward<T> conv3x3_backward(const Buffer<T>& buffer, const Incoming<T>& come, Rows<const T> x,
                                          const Norm<Acc<T>>& norm, const SameConvolution<T>& conv,
                                          const SameConvolutionGrads<T>& grads) {
  BnReluConv3x3Backward<T> p = {};
  p.C = conv.C, p.N = conv.N, p.images = buffer.images;
  std::copy_n(conv.window, 3, p.window);
  p.x = x, p.norm = norm, p.weight = conv.weight;
  p.grad = come.grad;
  if (come.through_stats)
    p.features = come.features, p.features_mean = come.mean, p.features_grad_mean = come.gm,
    p.features_grad_var = come.gv;
  p.drop_rate = come.drop.rate, p.seed = buffer.seed, p.layer = come.drop.site, p.drop_rows = come.drop.rows;
  p.grad_conv_weight = grads.weight, p.grad_conv_bias = grads.bias;
  p.tf32 = buffer.tf32, p.bf16 = buffer.bf16;
  return p;
}

// The gradients of the convolution by PyTorch's own, da [M, C] where asked for, and the norm's two sums behind it where
// `sums` has room. These need da, and the convolution's gradient relu(norm(x)), which scratch.a holds then: both come
// from one reading of x.
template <class B, class T>
auto convolution_backward(const B& at, const Buffer<T>& buffer, const Incoming<T>& come, Rows<const T> x,
                          const Norm<Acc<T>>& norm, const SameConvolution<T>& conv,
                          const SameConvolutionGrads<T>& grads, bool want_da, NormGrads<Acc<T>> sums,
                          const StepScratch<T>& scratch) {
  const int64_t M = buffer.M();
  const Rows<const T> g = completed(at, buffer, come, conv.N, scratch.g);
  const Rows<T> a = dense_rows(scratch.a, conv.C);
  if (grads.bias) at.sum_rows(g, M, conv.N, grads.bias);
  auto da = want_da ? at.convolution_input_gradient(buffer.images, g, read_only(a), conv) : at.borrowed(Rows<T>{});
  if (want_da && sums.weight) {
    const BnReluBackwardReduce<T> p = {
        M, conv.C, read_only(da.rows()), x, norm, grads.weight ? a : Rows<T>{}, sums.weight, sums.bias};
    at.bn_relu_backward_reduce(p, M * conv.C);
  } else if (grads.weight) {
    const BnRelu<T> p = {M, conv.C, x, norm, a};
    at.bn_relu(p, M * conv.C);
  }
  if (grads.weight) at.convolution_weight_gradient(buffer.images, g, read_only(a), conv, grads.weight);
  return da;
}

// The same by the backend's kernel where it has one.
template <class B, class T>
auto second_half_backward(const B& at, const Buffer<T>& buffer, const Incoming<T>& come, Rows<const T> x,
                          const Norm<Acc<T>>& norm, const SameConvolution<T>& conv,
                          const SameConvolutionGrads<T>& grads, bool want_da, NormGrads<Acc<T>> sums,
                          const StepScratch<T>& scratch) {
  const int64_t M = buffer.M();
  if constexpr (B::kHasConv3x3) {
    if (has_kernel(at, buffer.images, conv)) {
      auto p = conv3x3_backward<B>(buffer, come, x, norm, conv, grads);
      if (want_da) {
        p.grad_x = dense_rows(scratch.da, conv.C);
        p.grad_weight = sums.weight, p.grad_bias = sums.bias;
      }
      at.bn_relu_conv3x3_backward(p, M * (conv.C + conv.N));
      return at.borrowed(p.grad_x);
    }
  }
  return convolution_backward(at, buffer, come, x, norm, conv, grads, want_da, sums, scratch);
}

// What a layer gives to the columns that it read: target = s dy + (grad_in, or itself), and through their statistics.
template <class T>
struct Contribution {
  Rows<const T> grad_in;  // or null: target has what came before
  Rows<T> target;
  Acc<T>*gm, *gv;  // [C], subtracted from; both null: the norm is frozen
};

// A layer without a bottleneck. `below`: its contribution is asked for, too.
template <class B, class T>
void basic_layer_backward(const B& at, const Buffer<T>& buffer, const Incoming<T>& come, Rows<const T> x,
                          const Norm<Acc<T>>& norm, const SameConvolution<T>& conv,
                          const SameConvolutionGrads<T>& grads, NormGrads<Acc<T>> sums, bool below,
                          const Contribution<T>& to, const StepScratch<T>& scratch) {
  const int64_t M = buffer.M();
  if constexpr (B::kHasConv3x3) {
    if (has_kernel(at, buffer.images, conv)) {
      auto p = conv3x3_backward<B>(buffer, come, x, norm, conv, grads);
      p.grad_weight = sums.weight, p.grad_bias = sums.bias;
      if (below) {
        p.scaled = true;
        p.grad_in = to.grad_in, p.accumulate = !to.grad_in, p.grad_x = to.target;
        p.grad_mean = to.gm, p.grad_var = to.gv;
      }
      return at.bn_relu_conv3x3_backward(p, M * (conv.C + conv.N));
    }
  }
  auto da = convolution_backward(at, buffer, come, x, norm, conv, grads, below || sums.weight, sums, scratch);
  if (!below) return;
  const Rows<T> rows = da.rows();
  const BnReluBackward<T> p = {M, conv.C, read_only(rows), x, norm, nullptr, nullptr, rows};  // s dy
  at.bn_relu_backward(p, M * conv.C);
  at.add(rows, to.grad_in ? to.grad_in : read_only(to.target), M, conv.C, to.target);
  if (to.gm) at.statistics_gradient(norm, sums, conv.C, to.gm, to.gv);
}

// The gradients of norm1 and conv1, and what the columns read receive. sums: dgamma2 and dbeta2.
template <class B, class T>
void first_half_backward(const B& at, const Buffer<T>& buffer, const BufferGrad<T>& grad, Rows<const T> grad_in,
                         const DenseLayer<T>& layer, const DenseLayerGrads<T>& grads, Rows<T> da, Rows<const T> z,
                         NormGrads<Acc<T>> sums, const StepScratch<T>& scratch) {
  using A = Acc<T>;
  const int64_t M = buffer.M();
  const NormGrads<A> of_batch = layer.batch2 ? sums : NormGrads<A>{nullptr, nullptr};
  BnReluConv1x1Backward<T> p = {};
  p.M = M, p.C = layer.C, p.N = layer.b;
  p.x = read_only(buffer.columns(layer.read));
  p.norm = layer.norm1, p.weight = layer.W1;
  if (layer.inner.rate == 0) {
    if (grads.bias1) at.bias_gradient(layer.norm2, layer.batch2, sums.bias, layer.b, grads.bias1);
    p.grad_out = read_only(da);
    p.z = z, p.z_norm = layer.norm2;
    p.z_grad_weight = of_batch.weight, p.z_grad_bias = of_batch.bias;
  } else {
    const BnReluBackward<T> through_norm = {M,           layer.b,         read_only(da), z,
                                            layer.norm2, of_batch.weight, of_batch.bias, da};
    at.bn_relu_backward(through_norm, M * layer.b);
    FeatureGrad<T> through_dropout = {};  // what z's statistics receive is in it already
    A* nothing = scratch.sums;
    at.zero(nothing, layer.b);
    through_dropout.M = M, through_dropout.C = layer.b, through_dropout.grad = read_only(da);
    through_dropout.x = z, through_dropout.mean = nothing, through_dropout.grad_mean = nothing;
    through_dropout.grad_var = nothing, through_dropout.drop_rate = layer.inner.rate;
    through_dropout.seed = buffer.seed, through_dropout.layer = layer.inner.site;
    through_dropout.drop_rows = layer.inner.rows, through_dropout.out = dense_rows(scratch.a, layer.b);
    at.feature_grad(through_dropout, M * layer.b);
    p.grad_out = {scratch.a, layer.b};
    if (grads.bias1) at.sum_rows(p.grad_out, M, layer.b, grads.bias1);
  }
  p.grad_in = grad_in;
  p.accumulate = !grad_in;
  p.grad_x = grad.target(layer.read);
  p.grad_conv_weight = grads.conv1;
  A* spare = scratch.sums + 2 * layer.b;
  p.grad_weight = grads.norm1.weight ? grads.norm1.weight : spare;
  p.grad_bias = grads.norm1.bias ? grads.norm1.bias : spare + layer.C;
  if (layer.batch1) p.grad_mean = grad.gm + layer.read, p.grad_var = grad.gv + layer.read;
  p.tf32 = buffer.tf32, p.bf16 = buffer.bf16;
  at.bn_relu_conv1x1_backward(p, M * (layer.C + layer.b));
}

}  // namespace dx
