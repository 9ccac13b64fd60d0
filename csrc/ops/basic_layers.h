// basic_layers and its backward pass: one call for all layers.
#pragma once

#include <utility>

#include "block_call.h"

namespace dx::ops {

constexpr int kBasicLayerTensors = 6;  // of basic_block.py's

template <class D, class T>
class BasicBlockCall : public BlockCall<D, T> {
 public:
  using A = Acc<T>;
  using BlockCall<D, T>::BlockCall;

  void read_layers(const KeptLayers& kept) {
    this->read_once(kept, layers, [&] { read_parameters(kept); });
    A *const mean = this->buffer.mean, *const var = this->buffer.var;
    for (size_t l = 0; l < layers.size(); ++l) {
      BasicLayer<T>& layer = layers[l];
      this->place_statistics(l, layer.norm, mean ? mean + layer.read : nullptr, var ? var + layer.read : nullptr);
      layer.drop = this->dropout(this->options_.drop_rates[l], this->options_.drop_channels[l], int64_t(l));
    }
  }

  std::vector<BasicLayer<T>> layers;

 private:
  void read_parameters(const KeptLayers& kept) {
    LayerTensors all(kept.tensors, kept.given, kBasicLayerTensors, "tensors");
    const size_t count = all.layers();
    this->options_.check(count, 1);
    STD_TORCH_CHECK(count > 0, "densenet_ext: tensors: expected at least one layer");
    int64_t C_next = -1;
    layers.resize(count);
    for (size_t l = 0; l < count; ++l) {
      const Tensor* t[kBasicLayerTensors];
      all.next(t);
      STD_TORCH_CHECK(t[4], "densenet_ext: tensors: expected the convolution of layer ", l, ", got None");
      BasicLayer<T>& layer = layers[l];
      layer.conv = this->convolution(*t[4], t[5], "conv", "conv bias");
      const int64_t C = layer.C = layer.conv.C;
      layer.k = layer.conv.N;
      if (C_next >= 0) this->check_reads(l, C, C_next, "conv");
      C_next = C + layer.k;
      STD_TORCH_CHECK(C_next <= this->buffer.C, "densenet_ext: out: expected at least ", C_next, " columns, got ",
                      this->buffer.C);
      this->place(C, layer.k, layer.read, layer.added);
      layer.batch = this->options_.batch_stats[l];
      layer.norm = this->norm(l, t, C);
    }
    STD_TORCH_CHECK(C_next == this->buffer.C, "densenet_ext: out: expected ", C_next, " columns, got ", this->buffer.C);
  }
};

template <class D>
void basic_layers(const Tensor& x, int64_t layers, const std::vector<int64_t>& size, const OptionalTensor& seed,
                  const Tensor& out, const OptionalTensor& mean, const OptionalTensor& var,
                  const Tensor& scratch_memory, bool bf16, bool packed_weights) {
  const D at(defined(x, "x"));
  at.use_packed(packed_weights);
  const auto kept = Kept::find<KeptLayers>(layers, "layers");
  for_features_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    BasicBlockCall<D, T> call(at, size, kept->options, seed, out, mean, var, true, false, bf16);
    call.read_layers(*kept);
    const int64_t M = call.buffer.M();
    const Rows<const T> input = features<T>(at, x, "x", M, call.layers[0].C);
    if (M == 0) return;
    StepScratch<T> scratch = {};
    WeightCopies<T> copies(at, x, 0);
    int64_t widest_a = 0, before_last = 0;
    for (BasicLayer<T>& layer : call.layers) {
      if (has_kernel(at, call.buffer.images, layer.conv)) continue;
      copies.add(layer.conv, nullptr);
      before_last = std::exchange(widest_a, layer.C);
    }
    Pieces<T> pieces;
    pieces.add(&scratch.a, M * widest_a);
    pieces.place(at, scratch_memory);
    at.check_apart();
    // what the layers before the last do not take
    copies.lend(scratch.a + M * before_last, M * (widest_a - before_last), 1);
    call.run_forward(call.layers, input, false, [&](const Buffer<T>& some, Rows<const T> x) {
      dx::basic_block(at, some, x, call.layers, scratch);
    });
  });
}

template <class D>
std::vector<Tensor> basic_layers_backward(const Tensor& grad, bool writable, int64_t layers,
                                          const std::vector<int64_t>& size, const OptionalTensor& seed,
                                          const Tensor& out, const OptionalTensor& mean, const OptionalTensor& var,
                                          const OptionalTensor& grad_x, const std::vector<int64_t>& asked,
                                          const Tensor& scratch_memory, bool bf16) {
  const D at(defined(out, "out"));
  const auto kept = Kept::find<KeptLayers>(layers, "layers");
  std::vector<Tensor> grads;
  for_features_type(out, "out", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    BasicBlockCall<D, T> call(at, size, kept->options, seed, out, mean, var, false, false, bf16);
    call.read_layers(*kept);
    const Buffer<T>& buffer = call.buffer;
    const int64_t M = buffer.M();
    grads = new_gradients<A>(*kept, asked);
    LayerTensors all(grads, asked, kBasicLayerTensors, "grads");
    std::vector<BasicLayerGrads<T>> own(call.layers.size());
    Asked ask = {grad_x.has_value(), std::vector<bool>(own.size())};
    StepScratch<T> scratch = {};
    int64_t growth = 0, widest_a = 0;
    for (size_t l = 0; l < own.size(); ++l) {
      const BasicLayer<T>& layer = call.layers[l];
      const Tensor* g[kBasicLayerTensors];
      all.next(g);
      own[l] = {{call.vector_grad(g[0], layer.C), call.vector_grad(g[1], layer.C)},
                call.convolution_grads(g[4], g[5], layer.conv)};
      ask.layer[l] = own[l].any();
      if (has_kernel(at, buffer.images, layer.conv)) continue;
      growth = std::max(growth, layer.k), widest_a = std::max(widest_a, layer.C);
    }
    BufferGrad<T> gradient = {{nullptr, 0}, 0, {nullptr, 0}, nullptr, nullptr};
    if (writable) {
      const Rows<T> incoming = features_out<T>(at, grad, "grad", M, buffer.C);
      gradient.incoming = {incoming.data, incoming.pitch};
    } else {
      gradient.incoming = features<T>(at, grad, "grad", M, buffer.C);
    }
    const Rows<T> dx = grad_x ? features_out<T>(at, *grad_x, "grad_x", M, call.layers[0].C) : Rows<T>{nullptr, 0};
    Pieces<T> pieces;
    pieces.add(&scratch.a, M * widest_a);
    pieces.add(&scratch.g, M * growth);
    pieces.add(&scratch.G, writable ? 0 : M * call.layers.back().C);
    pieces.place(at, scratch_memory);
    at.check_apart();
    const auto statistics = statistics_grad<A>(out, buffer.C, 2 * buffer.C);
    gradient.gm = statistics.gm, gradient.gv = statistics.gv, scratch.sums = statistics.sums;
    WeightCopies<T> copies(at, out, M * widest_a / 2);
    for (size_t l = 0; l < own.size(); ++l)
      if (!has_kernel(at, buffer.images, call.layers[l].conv)) copies.add(call.layers[l].conv, own[l].conv.weight.data);
    call.run(call.layers,
             [&] { dx::basic_block_backward(at, buffer, gradient, writable, call.layers, own, ask, dx, scratch); });
    copies.write();
  });
  return grads;
}

template <class D>
void implement_basic_layers(torch::stable::detail::StableLibrary& m) {
  m.impl("basic_layers", TORCH_BOX(&basic_layers<D>));
  m.impl("basic_layers_backward", TORCH_BOX(&basic_layers_backward<D>));
}

}  // namespace dx::ops
