// The layers of a block as its operators take them, kept from call to call; and the gradients of their tensors.
#pragma once

#include <algorithm>

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

// Whether elements lie without gaps, `order` being the dimensions from the fastest to the slowest.
inline bool dense(const Form& form, const std::vector<int64_t>& order) {
  int64_t step = 1;
  for (const int64_t d : order) {
    if (form.sizes[d] != 1 && form.strides[d] != step) return false;
    step *= form.sizes[d];
  }
  return true;
}

// Strides of a gradient: its tensor's where that is contiguous or channels_last, else contiguous ones.
inline std::vector<int64_t> gradient_strides(const Form& form) {
  std::vector<int64_t> order;
  for (int64_t d = form.dims - 1; d >= 0; --d) order.push_back(d);
  std::vector<int64_t> strides(form.strides, form.strides + form.dims);
  if (dense(form, order)) return strides;
  if (form.dims > 2) {
    std::vector<int64_t> channels_last = order;
    std::rotate(channels_last.begin(), channels_last.end() - 2, channels_last.end() - 1);
    if (dense(form, channels_last)) return strides;
  }
  int64_t step = 1;
  for (const int64_t d : order) strides[d] = step, step *= form.sizes[d];
  return strides;
}

// Uninitialised gradients of the layers' tensors that `asked` has bits for, in the dtype of sums.
template <class A>
std::vector<Tensor> new_gradients(const KeptLayers& layers, const std::vector<int64_t>& asked) {
  BlockOptions::check_length(asked.size(), layers.given.size(), "asked");
  std::vector<Tensor> grads;
  size_t at = 0;
  for (size_t l = 0; l < asked.size(); ++l) {
    STD_TORCH_CHECK((asked[l] & ~layers.given[l]) == 0, "densenet_ext: asked: expected bits of tensors of layer ", l,
                    " that are there, got ", asked[l]);
    for (int64_t bits = layers.given[l], wanted = asked[l]; bits; bits >>= 1, wanted >>= 1) {
      if (!(bits & 1)) continue;
      const Tensor& t = layers.tensors[at++];
      if (!(wanted & 1)) continue;
      const Form form(t);
      const std::vector<int64_t> strides = gradient_strides(form);
      AtenTensorHandle made = nullptr;
      TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(form.dims, form.sizes, strides.data(), int32_t(Storage<A>::type),
                                                      form.device_type, form.device_index, &made));
      grads.emplace_back(made);
    }
  }
  return grads;
}

}  // namespace dx::ops
