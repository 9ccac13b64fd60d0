// dense_layers and its backward pass: one call for all layers.
#pragma once

#include "block_call.h"

namespace dx::ops {

constexpr int kDenseLayerTensors = 12;  // of step.py's Parameters
constexpr int64_t kBottlenecks = int64_t(1)
                                 << 20;  // dropout.py: the sites of bottleneck features lie behind the others

template <class D, class T>
class DenseBlockCall : public BlockCall<D, T> {
 public:
  using A = Acc<T>;
  using BlockCall<D, T>::BlockCall;

  void read_layers(const KeptLayers& kept, const OptionalTensor& z_mean, const OptionalTensor& z_var, bool written) {
    this->read_once(kept, layers, [&] { read_parameters(kept); });
    check_together(z_mean, z_var, "z_mean and z_var");
    const int64_t b_total = z_mean ? defined(*z_mean, "z_mean").numel() : 0;
    A *z_means = this->vector(z_mean, "z_mean", b_total, written),
      *z_vars = this->vector(z_var, "z_var", b_total, written);
    A *const mean = this->buffer.mean, *const var = this->buffer.var;
    for (size_t l = 0; l < layers.size(); ++l) {
      DenseLayer<T>& layer = layers[l];
      this->place_statistics(2 * l, layer.norm1, mean ? mean + layer.read : nullptr, var ? var + layer.read : nullptr);
      STD_TORCH_CHECK(!z_mean || layer.z + layer.b <= b_total, "densenet_ext: z_mean: expected at least ",
                      layer.z + layer.b, " elements, got ", b_total);
      layer.z_mean = z_mean ? z_means + layer.z : nullptr, layer.z_var = z_mean ? z_vars + layer.z : nullptr;
      this->place_statistics(2 * l + 1, layer.norm2, layer.z_mean, layer.z_var);
      const BlockOptions& options = this->options_;
      layer.inner =
          this->dropout(options.inner_drop_rates[l], options.inner_drop_channels[l], kBottlenecks + int64_t(l));
      layer.drop = this->dropout(options.drop_rates[l], options.drop_channels[l], int64_t(l));
    }
    bottlenecks = layers.back().z + layers.back().b;
  }

  T* kept(const OptionalTensor& z, bool written) const {
    if (!z) return nullptr;
    return checked_vector<T>(this->at_, *z, "z", this->buffer.M() * bottlenecks, written);
  }

  // Whether z is written twice: before its dropout into scratch.a.
  bool drops_inside() const {
    return std::any_of(layers.begin(), layers.end(), [](const auto& layer) { return layer.inner.rate > 0; });
  }

  std::vector<DenseLayer<T>> layers;
  int64_t bottlenecks = 0;  // of all layers

 private:
  void read_parameters(const KeptLayers& kept) {
    LayerTensors all(kept.tensors, kept.given, kDenseLayerTensors, "tensors");
    const size_t count = all.layers();
    this->options_.check(count, 2);
    BlockOptions::check_length(this->options_.inner_drop_rates.size(), count, "inner_drop_rates");
    BlockOptions::check_length(this->options_.inner_drop_channels.size(), count, "inner_drop_channels");
    int64_t C_next = -1, z = 0;
    layers.resize(count);
    for (size_t l = 0; l < count; ++l) {
      const Tensor* t[kDenseLayerTensors];
      all.next(t);
      STD_TORCH_CHECK(t[4] && t[10], "densenet_ext: tensors: expected the convolutions of layer ", l, ", got None");
      DenseLayer<T>& layer = layers[l];
      STD_TORCH_CHECK(t[4]->dim() >= 2, "densenet_ext: conv1: expected shape [b, C, 1, ...], got ", shape_of(*t[4]));
      const int64_t b = t[4]->size(0), C = t[4]->size(1);
      layer.C = C, layer.b = b;
      layer.conv2 = this->convolution(*t[10], t[11], "conv2", "conv2 bias");
      layer.k = layer.conv2.N;
      if (C_next >= 0) this->check_reads(l, C, C_next, "conv1");
      this->check_reads(l, layer.conv2.C, b, "conv2");
      C_next = C + layer.k;
      STD_TORCH_CHECK(C_next <= this->buffer.C, "densenet_ext: out: expected at least ", C_next, " columns, got ",
                      this->buffer.C);
      this->place(C, layer.k, layer.read, layer.added);
      layer.z = z;
      layer.batch1 = this->options_.batch_stats[2 * l], layer.batch2 = this->options_.batch_stats[2 * l + 1];
      layer.norm1 = this->norm(2 * l, t, C);
      layer.W1 = this->parameters_.template matrix<A>(*t[4], "conv1", b, C);
      layer.c1 = this->parameters_.template dense<A>(t[5], "conv1 bias", b);
      const bool folded = !layer.batch2 && !t[7] && !t[8] && !t[9];
      if (folded) layer.fold = this->parameters_.template dense<A>(t[6], "norm2 weight", b);
      if (!folded) layer.norm2 = this->norm(2 * l + 1, t + 6, b);
      z += b;
    }
    STD_TORCH_CHECK(count > 0, "densenet_ext: tensors: expected at least one layer");
    STD_TORCH_CHECK(C_next == this->buffer.C, "densenet_ext: out: expected ", C_next, " columns, got ", this->buffer.C);
  }
};

template <class D>
void dense_layers(const Tensor& x, int64_t layers, const std::vector<int64_t>& size, const OptionalTensor& seed,
                  const Tensor& out, const OptionalTensor& z, const OptionalTensor& mean, const OptionalTensor& var,
                  const OptionalTensor& z_mean, const OptionalTensor& z_var, const Tensor& scratch_memory, bool tf32,
                  bool bf16, bool packed_weights) {
  const D at(defined(x, "x"));
  at.use_packed(packed_weights);
  const auto kept = Kept::find<KeptLayers>(layers, "layers");
  for_features_type(x, "x", [&](auto tag) {
    using T = decltype(tag);
    DenseBlockCall<D, T> call(at, size, kept->options, seed, out, mean, var, true, tf32, bf16);
    call.read_layers(*kept, z_mean, z_var, true);
    const int64_t M = call.buffer.M();
    const Rows<const T> input = features<T>(at, x, "x", M, call.layers[0].C);
    T* z_all = call.kept(z, true);
    if (M == 0) return;
    StepScratch<T> scratch = {};
    int64_t wide = 0, widest_a = 0;
    for (const DenseLayer<T>& layer : call.layers) {
      wide = std::max(wide, layer.b);
      if (layer.inner.rate > 0 || !has_kernel(at, call.buffer.images, layer.conv2))
        widest_a = std::max(widest_a, layer.b);
    }
    Pieces<T> pieces;
    pieces.add(&scratch.z, z_all ? 0 : M * wide);
    pieces.add(&scratch.a, M * widest_a);
    pieces.place(at, scratch_memory);
    at.check_apart();
    WeightCopies<T> copies(at, x, 0);
    for (DenseLayer<T>& layer : call.layers)
      if (!has_kernel(at, call.buffer.images, layer.conv2)) copies.add(layer.conv2, nullptr);
    const DenseLayer<T>& last = call.layers.back();
    if (z_all)  // which the last layer writes
      copies.lend(z_all + M * last.z, M * last.b, 1);
    else if (!call.drops_inside())
      copies.lend(scratch.a, M * widest_a, 0);
    // relu(bn2(z)) is there from one kernel without a workspace to PyTorch's convolution
    if (z_all && !call.drops_inside()) at.lend(scratch.a, M * widest_a * int64_t(sizeof(T)));
    at.merge_later();
    call.run_forward(call.layers, input, z_all != nullptr, [&](const Buffer<T>& some, Rows<const T> x) {
      dx::dense_block(at, some, x, call.layers, z_all, scratch);
    });
    at.merge_rest();
  });
}

template <class D>
std::vector<Tensor> dense_layers_backward(const Tensor& grad, bool writable, int64_t layers,
                                          const std::vector<int64_t>& size, const OptionalTensor& seed,
                                          const Tensor& out, const OptionalTensor& z, const OptionalTensor& mean,
                                          const OptionalTensor& var, const OptionalTensor& z_mean,
                                          const OptionalTensor& z_var, const OptionalTensor& grad_x,
                                          const std::vector<int64_t>& asked, const Tensor& scratch_memory, bool tf32,
                                          bool bf16) {
  const D at(defined(out, "out"));
  const auto kept = Kept::find<KeptLayers>(layers, "layers");
  std::vector<Tensor> grads;
  for_features_type(out, "out", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    DenseBlockCall<D, T> call(at, size, kept->options, seed, out, mean, var, false, tf32, bf16);
    call.read_layers(*kept, z_mean, z_var, false);
    const Buffer<T>& buffer = call.buffer;
    const int64_t M = buffer.M();
    T* z_all = call.kept(z, false);
    grads = new_gradients<A>(*kept, asked);
    LayerTensors all(grads, asked, kDenseLayerTensors, "grads");
    std::vector<DenseLayerGrads<T>> own(call.layers.size());
    Asked ask = {grad_x.has_value(), std::vector<bool>(own.size())};
    StepScratch<T> scratch = {};
    int64_t wide = 0, growth = 0, sums = 0, widest_a = 0;
    bool kernels = false;
    for (size_t l = 0; l < own.size(); ++l) {
      const DenseLayer<T>& layer = call.layers[l];
      const Tensor* g[kDenseLayerTensors];
      all.next(g);
      own[l] = {{call.vector_grad(g[0], layer.C), call.vector_grad(g[1], layer.C)},
                call.matrix_grad(g[4], layer.b, layer.C),
                call.vector_grad(g[5], layer.b),
                {call.vector_grad(g[6], layer.b), call.vector_grad(g[7], layer.b)},
                call.convolution_grads(g[10], g[11], layer.conv2)};
      ask.layer[l] = own[l].any();
      wide = std::max(wide, layer.b);
      sums = std::max(sums, 2 * layer.b + 2 * layer.C);
      const bool kernel = has_kernel(at, buffer.images, layer.conv2);
      if (layer.inner.rate > 0 || !kernel) widest_a = std::max(widest_a, layer.b);
      if (!kernel) growth = std::max(growth, layer.k);
      kernels |= kernel;
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
    pieces.add(&scratch.z, z_all ? 0 : M * wide);
    pieces.add(&scratch.a, M * widest_a);
    pieces.add(&scratch.g, M * growth);
    pieces.add(&scratch.da, D::kChoosesConv3x3 ? 0 : M * wide);
    pieces.add(&scratch.G, writable ? 0 : M * call.layers.back().C);
    pieces.place(at, scratch_memory);
    at.check_apart();
    const OptionalTensor da = room_for_da<D>(out, kernels, M, wide, scratch);
    const auto statistics = statistics_grad<A>(out, buffer.C, sums);
    gradient.gm = statistics.gm, gradient.gv = statistics.gv, scratch.sums = statistics.sums;
    WeightCopies<T> copies(at, out, M * widest_a / 2);
    for (size_t l = 0; l < own.size(); ++l)
      if (!has_kernel(at, buffer.images, call.layers[l].conv2))
        copies.add(call.layers[l].conv2, own[l].conv2.weight.data);
    if (!call.drops_inside()) at.lend(scratch.a, M * widest_a * int64_t(sizeof(T)));
    at.merge_later();
    call.run(call.layers, [&] {
      dx::dense_block_backward(at, buffer, gradient, writable, call.layers, z_all, own, ask, dx, scratch);
    });
    at.merge_rest();
    copies.write();
  });
  return grads;
}

template <class D>
void implement_dense_layers(torch::stable::detail::StableLibrary& m) {
  m.impl("dense_layers", TORCH_BOX(&dense_layers<D>));
  m.impl("dense_layers_backward", TORCH_BOX(&dense_layers_backward<D>));
}

}  // namespace dx::ops
