// PyTorch's own operations over the raw memory that the step works on: convolutions for shapes without a kernel of
// ours, and small vectors where speed does not matter. Called through the dispatcher, for every device alike.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "../step.h"
#include "taps.h"
#include "tensors.h"

namespace dx::ops {

// Rows in memory of their own, or in somebody else's.
template <class T>
class MaybeOwned {
 public:
  explicit MaybeOwned(Rows<T> rows) : rows_(rows) {}
  MaybeOwned(Rows<T> rows, Tensor owner) : rows_(rows), owner_(std::move(owner)) {}
  Rows<T> rows() const { return rows_; }

 private:
  Rows<T> rows_;
  OptionalTensor owner_;
};

class TorchCalls : public Place {
 public:
  explicit TorchCalls(const Tensor& first) : Place(first) {}

  template <class T>
  MaybeOwned<T> borrowed(Rows<T> rows) const {
    return MaybeOwned<T>(rows);
  }

  // Memory that kernels may take for their workspaces: where a backend has such kernels, it does.
  void lend(void*, int64_t) const {}

  // From now on what append_features and bn_relu_backward_reduce sum up is read through the backend alone, until
  // merge_rest: where they leave sums of blocks, the kernel that reads them may merge these.
  void merge_later() const {}
  void merge_rest() const {}

  // Whether kernels may read weights as they were packed by an earlier call: where a backend packs them, it does.
  void use_packed(bool) const {}

  // Bytes of features that a call had better have in work at a time, as they lie in caches then; 0: as many as there
  // are. And that it will call kernels with the same weights several times.
  int64_t cached_bytes() const { return 0; }
  void pack_once() const {}

  // Runs f, which calls nothing but kernels: where a backend can make ready for many of them, it does.
  template <class F>
  void together(int64_t, const F& f) const {
    f();
  }

  // ---- convolutions that keep the size of their images --------------------------------------------------------------

  // Rows [M, N] of the convolution of x [M, C].
  template <class T>
  MaybeOwned<T> convolution(const Images& images, Rows<const T> x, const SameConvolution<T>& conv) const {
    const Geometry g(images, conv.window);
    OptionalTensor bias;
    if (conv.bias) bias = stored<T>(vector(conv.bias, conv.N));
    Tensor out = call<Tensor>("aten::convolution", "", image(g, x, conv.C), weight(g, conv.copies->of(conv), conv),
                              bias, g.ones(), g.padding(), g.ones(), false, g.zeros(), int64_t(1));
    return as_rows<T>(g, images, std::move(out), conv.N);
  }

  // The gradient of x [M, C], whose values are not read.
  template <class T>
  MaybeOwned<T> convolution_input_gradient(const Images& images, Rows<const T> grad, Rows<const T> x,
                                           const SameConvolution<T>& conv) const {
    const Geometry g(images, conv.window);
    return as_rows<T>(g, images, convolution_gradient(g, grad, x, conv, 0), conv.C);
  }
  // The gradient of the weight, which is written with others.
  template <class T>
  void convolution_weight_gradient(const Images& images, Rows<const T> grad, Rows<const T> x,
                                   const SameConvolution<T>& conv, const Taps<Acc<T>>& grad_weight) const {
    conv.copies->write_later(convolution_gradient(Geometry(images, conv.window), grad, x, conv, 1), conv, grad_weight);
  }

  template <class From, class To>
  void copy_taps(const std::vector<TapsCopy<From, To>>& copies) const {
    for (const TapsCopy<From, To>& copy : copies) {
      Tensor to = taps(copy.to, copy);
      torch::stable::copy_(to, taps(copy.from, copy));
    }
  }

  // Rows [N, C], row n times scale[n].
  template <class A>
  MaybeOwned<A> scaled_rows(const A* rows, const A* scale, int64_t N, int64_t C) const {
    Tensor product = times(matrix(Rows<const A>{rows, C}, N, C), from_memory(scale, {N, 1}, {1, 1}));
    A* data = static_cast<A*>(product.mutable_data_ptr());
    return MaybeOwned<A>({data, C}, std::move(product));
  }

  // A norm of C channels that changes nothing, with the memory of its statistics beside `like`.
  template <class A>
  struct Identity {
    Norm<A> norm;
    OptionalTensor owner;
  };
  template <class A>
  Identity<A> identity_norm(const A* like, int64_t C) const {
    Tensor storage = torch::stable::new_zeros(vector(like, C), {2 * C});
    A* data = static_cast<A*>(storage.mutable_data_ptr());
    Tensor variance = vector(data + C, C);
    torch::stable::fill_(variance, 1.0);
    return {{data, data + C, nullptr, nullptr, 0}, std::move(storage)};
  }

  // ---- vectors ------------------------------------------------------------------------------------------------------

  template <class A>
  void zero(A* values, int64_t count) const {
    Tensor t = vector(values, count);
    torch::stable::zero_(t);
  }

  // out [N] = the sum over the rows [M, N].
  template <class T>
  void sum_rows(Rows<const T> rows, int64_t M, int64_t N, Acc<T>* out) const {
    const std::vector<int64_t> over = {0};
    Tensor target = vector(out, N);
    torch::stable::sum_out(target, matrix(rows, M, N), over, false, Storage<Acc<T>>::type);
  }

  // target [M, C] = a + b.
  template <class T>
  void add(Rows<T> a, Rows<const T> b, int64_t M, int64_t C, Rows<T> target) const {
    const Rows<const T> read = {a.data, a.pitch}, written = {target.data, target.pitch};
    Tensor out = matrix(written, M, C);
    torch::stable::copy_(out, plus(matrix(b, M, C), matrix(read, M, C)));
  }

  // What the statistics behind a norm receive: gm -= s dbeta, gv -= s r / 2 dgamma.
  template <class A>
  void statistics_gradient(const Norm<A>& norm, const NormGrads<A>& sums, int64_t C, A* gm, A* gv) const {
    const Tensor r = rstd(norm, C), s = norm.weight ? times(vector(norm.weight, C), r) : r;
    subtract(gm, times(s, vector(sums.bias, C)), 1.0);
    subtract(gv, times(times(s, r), vector(sums.weight, C)), 0.5);
  }

  // The gradient of what a convolution adds before a norm, its bias: dbeta is the norm's. A batch's mean takes away
  // whatever is added (times zero and not zero, so that NaN stays); a frozen norm scales it.
  template <class A>
  void bias_gradient(const Norm<A>& norm, bool batch, const A* dbeta, int64_t C, A* out) const {
    Tensor target = vector(out, C);
    if (batch) {
      torch::stable::copy_(target, times(vector(dbeta, C), torch::stable::new_zeros(target, {C})));
      return;
    }
    const Tensor r = rstd(norm, C), s = norm.weight ? times(vector(norm.weight, C), r) : r;
    torch::stable::copy_(target, times(s, vector(dbeta, C)));
  }

 private:
  // Sizes as PyTorch's convolutions take them: 1-D runs as 2-D of height 1, for only then channels_last is kept.
  struct Geometry {
    int dims, first;  // first of Images' three entries
    int64_t window[3], size[3], batch;
    Geometry(const Images& images, const int64_t (&window_)[3]) : batch(images.batch) {
      dims = images.size[0] > 1 || window_[0] > 1 ? 3 : 2;
      first = 3 - dims;
      std::copy_n(window_, 3, window);
      std::copy_n(images.size, 3, size);
    }
    std::vector<int64_t> ones() const { return std::vector<int64_t>(dims, 1); }
    std::vector<int64_t> zeros() const { return std::vector<int64_t>(dims, 0); }
    std::vector<int64_t> padding() const {
      std::vector<int64_t> p;
      for (int i = first; i < 3; ++i) p.push_back(window[i] / 2);
      return p;
    }
    std::vector<int64_t> image_sizes(int64_t C) const {
      std::vector<int64_t> s = {batch, C};
      s.insert(s.end(), size + first, size + 3);
      return s;
    }
    std::vector<int64_t> image_strides(int64_t pitch) const {
      std::vector<int64_t> s(dims + 2);
      s[1] = 1;
      int64_t step = pitch;
      for (int i = dims - 1; i >= 0; --i) s[i + 2] = step, step *= size[first + i];
      s[0] = step;
      return s;
    }
  };

  // Of a convolution's input (which = 0) or weight (1).
  template <class T>
  Tensor convolution_gradient(const Geometry& g, Rows<const T> grad, Rows<const T> x, const SameConvolution<T>& conv,
                              size_t which) const {
    const std::array<bool, 3> mask = {which == 0, which == 1, false};
    const std::optional<std::vector<int64_t>> no_bias;
    std::array<StableIValue, 11> stack =
        boxed(image(g, grad, conv.N), image(g, x, conv.C), weight(g, conv.copies->of(conv), conv), no_bias, g.ones(),
              g.padding(), g.ones(), false, g.zeros(), int64_t(1),
              torch::headeronly::HeaderOnlyArrayRef<bool>(mask.data(), mask.size()));
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
    std::array<Tensor, 3> gradients = {unboxed<Tensor>(stack[0]), unboxed<Tensor>(stack[1]), unboxed<Tensor>(stack[2])};
    return std::move(gradients[which]);
  }

  template <class T>
  Tensor from_memory(const T* data, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) const {
    return torch::stable::from_blob(const_cast<T*>(data), sizes, strides, device(), Storage<T>::type);
  }
  template <class T>
  Tensor image(const Geometry& g, Rows<const T> x, int64_t C) const {
    return from_memory(x.data, g.image_sizes(C), g.image_strides(x.pitch));
  }
  template <class A, class T>
  Tensor weight(const Geometry& g, const Taps<A>& taps, const SameConvolution<T>& conv) const {
    std::vector<int64_t> sizes = {conv.N, conv.C}, strides(g.dims + 2);
    sizes.insert(sizes.end(), g.window + g.first, g.window + 3);
    strides[0] = taps.output, strides[1] = taps.input;
    int64_t step = taps.tap;
    for (int i = g.dims - 1; i >= 0; --i) strides[i + 2] = step, step *= g.window[g.first + i];
    return from_memory<std::remove_const_t<A>>(taps.data, sizes, strides);
  }
  template <class A, class Copy>
  Tensor taps(const Taps<A>& taps, const Copy& copy) const {
    return from_memory<std::remove_const_t<A>>(taps.data, {copy.N, copy.C, copy.taps},
                                               {taps.output, taps.input, taps.tap});
  }
  template <class A>
  Tensor vector(const A* data, int64_t count) const {
    return from_memory(data, {count}, {1});
  }
  template <class T>
  Tensor matrix(Rows<const T> rows, int64_t M, int64_t C) const {
    return from_memory(rows.data, {M, C}, {rows.pitch, 1});
  }
  // In the dtype of the feature maps.
  template <class T>
  static Tensor stored(const Tensor& t) {
    return t.scalar_type() == Storage<T>::type ? t : torch::stable::to(t, Storage<T>::type);
  }
  // An image as rows: as it lies in memory if that is channels_last, else copied.
  template <class T>
  MaybeOwned<T> as_rows(const Geometry& g, const Images& images, Tensor out, int64_t C) const {
    const std::vector<int64_t> strides = g.image_strides(C);
    bool fits = true;
    for (size_t i = 0; i < strides.size(); ++i) fits &= out.size(i) == 1 || out.stride(i) == strides[i];
    if (!fits) {
      Tensor storage = torch::stable::new_empty(out, {images.rows() * C});
      Tensor channels_last = from_memory(static_cast<const T*>(storage.const_data_ptr()), g.image_sizes(C), strides);
      torch::stable::copy_(channels_last, out);
      out = storage;
    }
    T* data = static_cast<T*>(out.mutable_data_ptr());
    return MaybeOwned<T>({data, C}, std::move(out));
  }

  template <class A>
  Tensor rstd(const Norm<A>& norm, int64_t C) const {
    Tensor eps = torch::stable::new_empty(vector(norm.var, C), {C});
    torch::stable::fill_(eps, norm.eps);
    return call<Tensor>("aten::rsqrt", "", plus(vector(norm.var, C), eps));
  }
  // Of operations that take a number, the stable ABI has this one.
  static Tensor plus(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }
  static Tensor times(const Tensor& a, const Tensor& b) { return call<Tensor>("aten::mul", "Tensor", a, b); }
  template <class A>
  void subtract(A* from, const Tensor& t, double factor) const {
    Tensor target = vector(from, t.size(0));
    torch::stable::copy_(target, torch::stable::subtract(target, t, factor));
  }

  template <class T>
  static T unboxed(StableIValue value) {
    return torch::stable::detail::to<T>(value);
  }
  template <class... Args>
  static std::array<StableIValue, sizeof...(Args)> boxed(const Args&... args) {
    return {torch::stable::detail::from(args)...};
  }
  template <class R, class... Args>
  static R call(const char* name, const char* overload, const Args&... args) {
    std::array<StableIValue, sizeof...(Args)> stack = boxed(args...);
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
    return unboxed<R>(stack[0]);
  }
};

}  // namespace dx::ops
