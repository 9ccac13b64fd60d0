// The layers of a block as its operators take them, kept from call to call; and the gradients of their tensors.
#pragma once

#include <array>

#include "kept.h"

namespace dx::ops {

// What is no tensor of a block's layers, per norm and per layer.
struct BlockOptions {
  std::vector<bool> batch_stats;
  std::vector<double> eps;
  std::vector<double> drop_rates;
  std::vector<bool> drop_channels;
  std::vector<double> inner_drop_rates;  // of blocks with bottlenecks
  std::vector<bool> inner_drop_channels;
  bool new_first;

  void check(size_t layers, int norms) const {
    check_length(batch_stats.size(), layers * norms, "batch_stats");
    check_length(eps.size(), layers * norms, "eps");
    for (const double value : eps) check_eps(value, "eps");
    check_length(drop_rates.size(), layers, "drop_rates");
    check_length(drop_channels.size(), layers, "drop_channels");
  }
  static void check_length(size_t got, size_t expected, const char* name) {
    STD_TORCH_CHECK(got == expected, "densenet_ext: ", name, ": expected ", expected, " entries, got ", got);
  }
};

// The tensors of a block's layers as a list without the absent ones; `given` has a bit for each that is there, in the
// order of the fields of algorithm/step.py's Parameters (or basic_block.py's).
class LayerTensors {
 public:
  LayerTensors(const std::vector<Tensor>& tensors, const std::vector<int64_t>& given, int per_layer, const char* name)
      : tensors_(tensors), given_(given), per_layer_(per_layer) {
    size_t count = 0;
    for (const int64_t bits : given) {
      STD_TORCH_CHECK(bits >= 0 && bits < (int64_t(1) << per_layer), "densenet_ext: ", name, ": expected bits for ",
                      per_layer, " tensors of each layer, got ", bits);
      count += size_t(__builtin_popcountll(uint64_t(bits)));
    }
    STD_TORCH_CHECK(count == tensors.size(), "densenet_ext: ", name, ": expected ", count, " tensors, got ",
                    tensors.size());
  }
  size_t layers() const { return given_.size(); }
  // Pointers to the next layer's tensors, null for those that are absent.
  void next(const Tensor** out) {
    for (int i = 0; i < per_layer_; ++i) out[i] = given_[layer_] >> i & 1 ? &tensors_[at_++] : nullptr;
    ++layer_;
  }

 private:
  const std::vector<Tensor>& tensors_;
  const std::vector<int64_t>& given_;
  int per_layer_;
  size_t layer_ = 0, at_ = 0;
};

struct KeptLayers : KeptTensors {
  std::vector<int64_t> given;  // of LayerTensors, whose list `tensors` is
  BlockOptions options;

  KeptLayers(const std::vector<Tensor>& tensors, const std::vector<int64_t>& given_, BlockOptions options_)
      : KeptTensors(tensors), given(given_), options(std::move(options_)) {}

  // What the layers as step.h has them follow from besides: numbers of the call.
  using Call = std::array<int64_t, 5>;
  // The layers as the last call read and checked them, if it was one alike and nothing has changed since: to look takes
  // a quarter of the time that it takes to read them. False where they have to be read.
  template <class Layer>
  bool read_again(const Call& call, std::vector<Layer>& layers) const {
    std::shared_ptr<const Read> last;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      last = last_;
    }
    const auto* found = dynamic_cast<const ReadAs<Layer>*>(last.get());
    if (!found || found->call != call || !hold(found->addresses)) return false;
    layers = found->layers;
    return true;
  }
  template <class Layer>
  void remember(const Call& call, const std::vector<Layer>& layers) const {
    auto read = std::make_shared<const ReadAs<Layer>>(call, addresses(), layers);
    const std::lock_guard<std::mutex> lock(mutex_);
    last_ = std::move(read);
  }

 private:
  struct Read {
    Call call;
    std::vector<const void*> addresses;
    Read(const Call& call, std::vector<const void*> addresses) : call(call), addresses(std::move(addresses)) {}
    virtual ~Read() = default;
  };
  template <class Layer>
  struct ReadAs : Read {
    std::vector<Layer> layers;
    ReadAs(const Call& call, std::vector<const void*> addresses, const std::vector<Layer>& layers)
        : Read(call, std::move(addresses)), layers(layers) {}
  };

  mutable std::mutex mutex_;  // of who reads: threads may call at once
  mutable std::shared_ptr<const Read> last_;
};

inline int64_t keep_layers(const std::vector<Tensor>& tensors, const std::vector<int64_t>& given,
                           const std::vector<bool>& batch_stats, const std::vector<double>& eps,
                           const std::vector<double>& drop_rates, const std::vector<bool>& drop_channels,
                           const std::vector<double>& inner_drop_rates, const std::vector<bool>& inner_drop_channels,
                           bool new_first) {
  BlockOptions options = {batch_stats,         eps,      drop_rates, drop_channels, inner_drop_rates,
                          inner_drop_channels, new_first};
  return Kept::add(std::make_shared<const KeptLayers>(tensors, given, std::move(options)));
}

// Dimension number i of `dims`, from the fastest to the slowest in memory.
inline int64_t contiguous_order(int64_t i, int64_t dims) { return dims - 1 - i; }
inline int64_t channels_last_order(int64_t i, int64_t dims) {
  if (i == 0) return 1;
  return i < dims - 1 ? dims - i : 0;
}

// Whether elements lie without gaps in this order of the dimensions.
template <class Order>
bool dense(const Form& form, const Order& order) {
  int64_t step = 1;
  for (int64_t i = 0; i < form.dims; ++i) {
    const int64_t d = order(i, form.dims);
    if (form.sizes[d] != 1 && form.strides[d] != step) return false;
    step *= form.sizes[d];
  }
  return true;
}

// A gradient of a tensor of this form, uninitialised: its strides are the tensor's where that is contiguous or
// channels_last, else contiguous ones. There are hundreds, so that usually nothing else is allocated.
inline Tensor new_gradient(const Form& form, int32_t dtype) {
  const int64_t* strides = form.strides;
  std::vector<int64_t> contiguous;
  if (!dense(form, contiguous_order) && !(form.dims > 2 && dense(form, channels_last_order))) {
    contiguous.resize(form.dims);
    int64_t step = 1;
    for (int64_t d = form.dims - 1; d >= 0; --d) contiguous[d] = step, step *= form.sizes[d];
    strides = contiguous.data();
  }
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(form.dims, form.sizes, strides, dtype, form.device_type, form.device_index, &made));
  return Tensor(made);
}

// Uninitialised gradients of the layers' tensors that `asked` has bits for, in the dtype of sums.
template <class A>
std::vector<Tensor> new_gradients(const KeptLayers& layers, const std::vector<int64_t>& asked) {
  BlockOptions::check_length(asked.size(), layers.given.size(), "asked");
  std::vector<Tensor> grads;
  grads.reserve(layers.tensors.size());
  size_t at = 0;
  for (size_t l = 0; l < asked.size(); ++l) {
    STD_TORCH_CHECK((asked[l] & ~layers.given[l]) == 0, "densenet_ext: asked: expected bits of tensors of layer ", l,
                    " that are there, got ", asked[l]);
    for (int64_t bits = layers.given[l], wanted = asked[l]; bits; bits >>= 1, wanted >>= 1) {
      if (!(bits & 1)) continue;
      const Tensor& t = layers.tensors[at++];
      if (!(wanted & 1)) continue;
      grads.push_back(new_gradient(Form(t), int32_t(Storage<A>::type)));
    }
  }
  return grads;
}

}  // namespace dx::ops
