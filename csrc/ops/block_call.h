// What the blocks' operators have in common: their arguments, checked and in the form of step.h; and their scratch.
#pragma once

#include <deque>

#include "../blocks.h"
#include "dropout.h"
#include "images.h"
#include "kept_layers.h"
#include "taps.h"
#include "tensors.h"

namespace dx::ops {

// Checks parameters as tensors.h does, without noting their memory: there are hundreds, and nothing is written where
// they are read.
template <class D>
class Parameters {
 public:
  explicit Parameters(const D& at) : at_(at) {}
  void check(const Tensor& t, const char* name) const { at_.check(t, name); }
  void uses(const Region&) const {}

  // In the dtype of sums and contiguous, converted if need be.
  template <class A>
  const Tensor& in_acc(const Tensor& t) {
    if (t.scalar_type() == Storage<A>::type) return t;
    kept_.push_back(torch::stable::to(t, Storage<A>::type));
    return kept_.back();
  }
  template <class A>
  const A* dense(const Tensor* t, const char* name, int64_t count) {
    if (!t) return nullptr;
    const Tensor& values = in_acc<A>(*t);
    if (count > 1 && values.dim() == 1 && values.stride(0) != 1) {
      kept_.push_back(torch::stable::contiguous(values));
      return ops::dense<A>(*this, kept_.back(), name, count);
    }
    return ops::dense<A>(*this, values, name, count);
  }
  template <class A>
  const A* matrix(const Tensor& t, const char* name, int64_t N, int64_t C) {
    const Tensor* values = &in_acc<A>(t);
    if (!values->is_contiguous()) kept_.push_back(torch::stable::contiguous(*values)), values = &kept_.back();
    return ops::matrix<A>(*this, *values, name, N, C);
  }
  // A convolution's weight [N, C, ...], contiguous or channels_last; its gradient has to be either.
  template <class A>
  Taps<const A> taps(const Tensor& t, const char* name, int64_t N, int64_t C) {
    const Tensor* values = &in_acc<A>(t);
    if (!tap_strides(*values)) kept_.push_back(torch::stable::contiguous(*values)), values = &kept_.back();
    const Taps<A> found = checked_taps<A>(*values, name, N, C, false);
    return {found.data, found.output, found.input, found.tap};
  }
  // Whether some of them are copies, which live as long as this.
  bool converted() const { return !kept_.empty(); }
  template <class A>
  Taps<A> taps_out(const Tensor* t, const char* name, int64_t N, int64_t C) const {
    if (!t) return {nullptr, 0, 0, 0};
    STD_TORCH_CHECK(tap_strides(*t), "densenet_ext: ", name,
                    ": expected a contiguous or channels_last weight, got shape ", shape_of(*t));
    return checked_taps<A>(*t, name, N, C, true);
  }

 private:
  template <class A>
  Taps<A> checked_taps(const Tensor& t, const char* name, int64_t N, int64_t C, bool written) const {
    check_dtype<A>(*this, t, name);
    const auto strides = tap_strides(t);
    STD_TORCH_CHECK(t.size(0) == N && t.size(1) == C, "densenet_ext: ", name, ": expected shape [", N, ", ", C,
                    ", ...], got ", shape_of(t));
    A* data = check_memory<A>(*this, t, name, 1, t.numel(), t.numel(), written);
    return {data, strides->output, strides->input, strides->tap};
  }

  const D& at_;
  std::deque<Tensor> kept_;  // whose elements stay where they are
};

inline Images images_of(const std::vector<int64_t>& size) {
  STD_TORCH_CHECK(size.size() >= 2 && size.size() <= 4,
                  "densenet_ext: size: expected [N, *spatial] of 1 to 3 dimensions, ", "got ", size.size(), " numbers");
  Images images = {size[0], {1, 1, 1}};
  int64_t rows = size[0];
  bool fits = size[0] >= 0;
  for (size_t i = 1; i < size.size(); ++i) {
    fits &= size[i] > 0 && !__builtin_mul_overflow(rows, size[i], &rows) && rows <= kMostPixels;
    images.size[3 - size.size() + i] = size[i];
  }
  STD_TORCH_CHECK(fits, "densenet_ext: size: expected images of at least one pixel, got ", text_of(size));
  return images;
}

template <class T>
const SameConvolution<T>& convolution_of(const DenseLayer<T>& layer) {
  return layer.conv2;
}
template <class T>
const SameConvolution<T>& convolution_of(const BasicLayer<T>& layer) {
  return layer.conv;
}

// What lies between a layer's two convolutions, in columns.
template <class T>
int64_t between(const DenseLayer<T>& layer) {
  return layer.b;
}
template <class T>
int64_t between(const BasicLayer<T>&) {
  return 0;
}

// Whether a weight is multiplied by something first, into memory of its own that is soon another one's.
template <class T>
bool has_scaled_weight(const DenseLayer<T>& layer) {
  return layer.fold != nullptr;
}
template <class T>
bool has_scaled_weight(const BasicLayer<T>&) {
  return false;
}

// What forward and backward pass read of their arguments alike.
template <class D, class T>
class BlockCall {
 public:
  using A = Acc<T>;

  BlockCall(const D& at, const std::vector<int64_t>& size, const BlockOptions& options, const OptionalTensor& seed,
            const Tensor& out, const OptionalTensor& mean, const OptionalTensor& var, bool written, bool tf32,
            bool bf16)
      : at_(at), parameters_(at), options_(options), window_dims_(int(size.size()) - 1) {
    check_is_features(out, "out");
    check_together(mean, var, "mean and var");
    const Images images = images_of(size);
    const int64_t C = out.size(1);
    buffer = {images,
              C,
              written ? features_out<T>(at, out, "out", images.rows(), C)
                      : unwritten(features<T>(at, out, "out", images.rows(), C)),
              vector(mean, "mean", C, written),
              vector(var, "var", C, written),
              check_dropout(at, 0, seed, 0, 1),
              tf32,
              bf16};
    has_seed_ = seed.has_value();
  }

  // Reads the next layer's convolution [N, C, taps], whose kernel has to be odd.
  SameConvolution<T> convolution(const Tensor& weight, const Tensor* bias, const char* weight_name,
                                 const char* bias_name) {
    STD_TORCH_CHECK(weight.dim() == window_dims_ + 2, "densenet_ext: ", weight_name, ": expected ", window_dims_ + 2,
                    " dimensions, got shape ", shape_of(weight));
    SameConvolution<T> conv = {weight.size(1), weight.size(0), {1, 1, 1}, {}, nullptr, nullptr, buffer.tf32};
    for (int i = 0; i < window_dims_; ++i) {
      conv.window[3 - window_dims_ + i] = weight.size(i + 2);
      STD_TORCH_CHECK(weight.size(i + 2) % 2 == 1, "densenet_ext: ", weight_name,
                      ": expected odd kernel sizes, got shape ", shape_of(weight));
    }
    conv.weight = parameters_.template taps<A>(weight, weight_name, conv.N, conv.C);
    conv.bias = parameters_.template dense<A>(bias, bias_name, conv.N);
    return conv;
  }
  SameConvolutionGrads<T> convolution_grads(const Tensor* weight, const Tensor* bias, const SameConvolution<T>& conv) {
    bool fits = !weight || weight->dim() == window_dims_ + 2;
    for (int i = 0; weight && fits && i < window_dims_; ++i)
      fits = weight->size(i + 2) == conv.window[3 - window_dims_ + i];
    STD_TORCH_CHECK(fits, "densenet_ext: grads: expected a convolution's gradient in the shape of its weight, got ",
                    weight ? shape_of(*weight) : "");
    return {parameters_.template taps_out<A>(weight, "grads", conv.N, conv.C), vector_grad(bias, conv.N)};
  }
  A* vector_grad(const Tensor* t, int64_t count) { return t ? dense_out<A>(parameters_, *t, "grads", count) : nullptr; }
  A* matrix_grad(const Tensor* t, int64_t N, int64_t C) {
    return t ? checked_matrix<A>(parameters_, *t, "grads", N, C, true) : nullptr;
  }

  // Norm number i over C channels, without statistics where it takes those of the batch.
  Norm<A> norm(size_t i, const Tensor* const* t, int64_t C) {
    Norm<A> n = {nullptr, nullptr, parameters_.template dense<A>(t[0], "norm weight", C),
                 parameters_.template dense<A>(t[1], "norm bias", C), options_.eps[i]};
    if (options_.batch_stats[i]) return n;
    STD_TORCH_CHECK(t[2] && t[3], "densenet_ext: running statistics: expected those of frozen norm ", i, ", got None");
    n.mean = parameters_.template dense<A>(t[2], "running_mean", C);
    n.var = parameters_.template dense<A>(t[3], "running_var", C);
    return n;
  }
  // Gives norm number i the statistics of the batch, where it takes those.
  void place_statistics(size_t i, Norm<A>& norm, A* mean, A* var) const {
    if (!options_.batch_stats[i]) return;
    STD_TORCH_CHECK(mean && var, "densenet_ext: mean and var: expected tensors for norms of the batch, got None");
    norm.mean = mean, norm.var = var;
  }
  // The layers' parameters: as read() finds them, or as an earlier call did.
  template <class Layer, class F>
  void read_once(const KeptLayers& kept, std::vector<Layer>& layers, const F& read) {
    const auto device = at_.device();
    const KeptLayers::Call call = {int64_t(device.type()), device.index(), buffer.C, window_dims_, buffer.tf32};
    if (kept.read_again(call, layers)) return;
    read();
    if (!parameters_.converted()) kept.remember(call, layers);
  }

  DropoutSite dropout(double rate, bool channels, int64_t site) const {
    STD_TORCH_CHECK(rate >= 0 && rate <= 1, "densenet_ext: drop_rates: expected numbers in [0, 1], got ", rate);
    STD_TORCH_CHECK(rate == 0 || has_seed_, "densenet_ext: seed: expected an int64 tensor of one element, got None");
    return {rate, site, channels ? buffer.images.pixels() : 1};
  }

  // Which columns a layer of C inputs and k outputs reads and writes: columns.py.
  void place(int64_t C, int64_t k, int64_t& read, int64_t& added) const {
    read = options_.new_first ? buffer.C - C : 0;
    added = options_.new_first ? buffer.C - C - k : C;
  }

  // Checks that layer l reads `expected` features.
  static void check_reads(size_t l, int64_t got, int64_t expected, const char* name) {
    STD_TORCH_CHECK(got == expected, "densenet_ext: ", name, ": expected ", expected, " input channels in layer ", l,
                    ", got ", got);
  }

  // Runs the layers. Where all their convolutions are kernels of ours, hardly anything else is called meanwhile:
  // torch's operations on vectors of channels, which need no threads.
  template <class Layers, class F>
  void run(const Layers& layers, const F& f) const {
    constexpr int64_t kProductsPerElement = 32, kPasses = 4;  // of the backward pass over the same
    bool ours = true;
    int64_t elements = 0;
    for (const auto& layer : layers) {
      const auto& conv = convolution_of(layer);
      ours &= has_kernel(at_, buffer.images, conv);
      elements +=
          buffer.M() * (conv.C + conv.N + layer.C + (layer.C + taps_of(conv) * conv.N) * conv.C / kProductsPerElement);
    }
    ours ? at_.together(kPasses * elements, f) : f();
  }

  // Runs f(buffer, x) forward: over all images at once, or, where nothing is taken of them together, over some after
  // the others. Their features then still lie in the caches when the next layer reads them. The numbers are the same.
  // keeps: whether f keeps more of each layer than its features.
  template <class Layers, class F>
  void run_forward(const Layers& layers, Rows<const T> x, bool keeps, const F& f) const {
    const int64_t parts = keeps || buffer.mean || buffer.seed ? 1 : parts_of(layers);
    if (parts > 1) at_.pack_once();
    run(layers, [&] {
      for (int64_t i = 0; i < parts; ++i) {
        Buffer<T> some = buffer;
        const int64_t first = buffer.images.batch * i / parts, row = first * buffer.images.pixels();
        some.images.batch = buffer.images.batch * (i + 1) / parts - first;
        some.X = {buffer.X.data + row * buffer.X.pitch, buffer.X.pitch};
        f(some, Rows<const T>{x.data + row * x.pitch, x.pitch});
      }
    });
  }

  A* vector(const OptionalTensor& t, const char* name, int64_t count, bool written) const {
    return t ? checked_vector<A>(at_, *t, name, count, written) : nullptr;
  }
  static Rows<T> unwritten(Rows<const T> rows) { return {const_cast<T*>(rows.data), rows.pitch}; }

  Buffer<T> buffer;

 protected:
  const D& at_;
  Parameters<D> parameters_;
  const BlockOptions& options_;

 private:
  // How many parts of the images run_forward takes. Few enough that features are more than the weights, which every
  // part reads again, and finds packed by their address.
  template <class Layers>
  int64_t parts_of(const Layers& layers) const {
    int64_t columns = 0, weights = 0;
    for (const auto& layer : layers) {
      const auto& conv = convolution_of(layer);
      if (!has_kernel(at_, buffer.images, conv) || has_scaled_weight(layer)) return 1;
      columns = std::max(columns, between(layer));
      weights += layer.C * between(layer) + conv.C * conv.N * taps_of(conv);
    }
    const int64_t bytes = buffer.M() * (buffer.C + columns) * int64_t(sizeof(T));
    const int64_t at_once = std::max(at_.cached_bytes(), 2 * weights * int64_t(sizeof(A)));
    if (at_.cached_bytes() == 0 || bytes <= 2 * at_once) return 1;
    return std::min(buffer.images.batch, (bytes + at_once - 1) / at_once);
  }

  int window_dims_;
  bool has_seed_ = false;
};

// Pieces of the call's scratch, each beginning on a cache line, null where nothing is needed; what `whole.py` counts.
template <class T>
class Pieces {
 public:
  void add(T** piece, int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(T);
    if (count > 0) pieces_.push_back({piece, total_});
    total_ += (count + kLine - 1) / kLine * kLine;
  }
  template <class D>
  void place(const D& at, const Tensor& scratch) const {
    STD_TORCH_CHECK(defined(scratch, "scratch").numel() >= total_, "densenet_ext: scratch: expected at least ", total_,
                    " elements, got ", scratch.numel());
    T* begin = checked_vector<T>(at, scratch, "scratch", scratch.numel(), true);
    for (const auto& [piece, offset] : pieces_) *piece = begin + offset;
  }

 private:
  std::vector<std::pair<T**, int64_t>> pieces_;
  int64_t total_ = 0;
};

// Room for da [M, C] of kernels of ours, where the backend chooses them by shape: whoever made the scratch did not
// know. What is returned has the memory; null, and nothing changed, where none is needed.
template <class D, class T>
OptionalTensor room_for_da(const Tensor& like, bool needed, int64_t M, int64_t C, StepScratch<T>& scratch) {
  if (!D::kChoosesConv3x3 || !needed) return std::nullopt;
  Tensor room = torch::stable::new_empty(like, {M * C}, Storage<T>::type);
  scratch.da = static_cast<T*>(room.mutable_data_ptr());
  return room;
}

// The gradients of the columns' statistics, zeros at first; and room for the sums of one layer.
template <class A>
struct StatisticsGrad {
  Tensor storage;  // of both, and of `sums`
  A *gm, *gv, *sums;
};
template <class A>
StatisticsGrad<A> statistics_grad(const Tensor& like, int64_t C, int64_t sums) {
  Tensor storage = torch::stable::new_zeros(like, {2 * C + sums}, Storage<A>::type);
  A* data = static_cast<A*>(storage.mutable_data_ptr());
  return {std::move(storage), data, data + C, data + 2 * C};
}

}  // namespace dx::ops
