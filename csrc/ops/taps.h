// The weights of convolutions that are PyTorch's own, and their gradients, for all layers of a call at once: a copy for
// each would be a launch for each on a GPU.
#pragma once

#include "../step.h"
#include "tensors.h"

namespace dx::ops {

// How a convolution's weight [N, C, window...] lies in memory, contiguous or channels_last.
struct TapStrides {
  int64_t output, input, tap;
};
inline std::optional<TapStrides> tap_strides(const Tensor& t) {
  if (t.dim() < 3) return std::nullopt;
  int64_t taps = 1;
  for (int64_t i = 2; i < t.dim(); ++i) taps *= t.size(i);
  const auto has = [&](int64_t input, int64_t tap) {
    int64_t step = tap;
    for (int64_t i = t.dim() - 1; i >= 2; --i) {
      if (t.size(i) > 1 && t.stride(i) != step) return false;
      step *= t.size(i);
    }
    return (t.size(1) == 1 || t.stride(1) == input) && (t.size(0) == 1 || t.stride(0) == t.size(1) * taps);
  };
  if (has(taps, 1)) return TapStrides{t.size(1) * taps, taps, 1};
  if (has(1, t.size(1))) return TapStrides{t.size(1) * taps, 1, t.size(1)};
  return std::nullopt;
}

template <class T>
int64_t taps_of(const SameConvolution<T>& conv) {
  return conv.window[0] * conv.window[1] * conv.window[2];
}

// Gives each convolution that is PyTorch's own its weight as PyTorch takes it without a copy: in the dtype of feature
// maps, channels_last. What is returned has the memory, and is null where nothing had to be copied.
template <class D, class T>
OptionalTensor store_weights(const D& at, const Tensor& like, const Images& images,
                             const std::vector<SameConvolution<T>*>& convolutions) {
  using A = Acc<T>;
  std::vector<SameConvolution<T>*> copied;
  int64_t elements = 0;
  for (SameConvolution<T>* conv : convolutions) {
    if (has_kernel(at, images, *conv)) continue;
    if constexpr (std::is_same_v<A, T>) {
      if (conv->weight.input == 1) {
        conv->stored = conv->weight;
        continue;
      }
    }
    copied.push_back(conv);
    elements += conv->N * conv->C * taps_of(*conv);
  }
  if (copied.empty()) return std::nullopt;
  Tensor storage = torch::stable::new_empty(like, {elements}, Storage<T>::type);
  T* next = static_cast<T*>(storage.mutable_data_ptr());
  std::vector<TapsCopy<A, T>> copies;
  for (SameConvolution<T>* conv : copied) {
    const int64_t taps = taps_of(*conv);
    const Taps<T> to = {next, conv->C * taps, 1, conv->C};
    conv->stored = {to.data, to.output, to.input, to.tap};
    copies.push_back({conv->N, conv->C, taps, conv->weight, to});
    next += conv->N * conv->C * taps;
  }
  at.copy_taps(copies);
  return storage;
}

// The gradients of weights as they were found, until all of a call's are written where they belong.
class FoundWeightGradients {
 public:
  template <class T>
  void add(Tensor found, const SameConvolution<T>& conv, const Taps<Acc<T>>& target) {
    if (!tap_strides(found)) found = torch::stable::contiguous(found);
    const auto from = *tap_strides(found);
    all_.push_back({std::move(found),
                    from,
                    conv.N,
                    conv.C,
                    taps_of(conv),
                    target.data,
                    {target.output, target.input, target.tap}});
  }
  template <class T, class D>
  void write(const D& at) {
    using A = Acc<T>;
    std::vector<TapsCopy<T, A>> copies;
    for (const Found& f : all_)
      copies.push_back({f.N,
                        f.C,
                        f.taps,
                        {static_cast<const T*>(f.values.const_data_ptr()), f.from.output, f.from.input, f.from.tap},
                        {static_cast<A*>(f.target), f.to.output, f.to.input, f.to.tap}});
    if (!copies.empty()) at.copy_taps(copies);
    all_.clear();
  }

 private:
  struct Found {
    Tensor values;
    TapStrides from;
    int64_t N, C, taps;
    void* target;
    TapStrides to;
  };
  std::vector<Found> all_;
};

}  // namespace dx::ops
