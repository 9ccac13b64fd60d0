// bn_relu, feature_grad, bn_relu_backward_reduce, bn_relu_backward: each element of each tensor is read or written
// once. A thread has kRows rows of its columns in flight before it uses the first: kRows * 16 bytes of each tensor.
#include "kernels.h"
#include "sums.h"

namespace dx::cuda {
namespace {

constexpr int kRows = 4;
static_assert(kRows * 16 * kThreads == 16 * 1024, "what a block has in flight of each tensor, in bytes");

template <class T, int V>
__global__ void __launch_bounds__(kThreads) bn_relu_kernel(const __grid_constant__ Job<BnRelu<T>> job) {
  const BnRelu<T>& p = job.p;
  const Patch patch(job.tiling, p.M, p.C, V);
  if (!patch.any) return;
  const int64_t c = patch.column;
  const Affine<Acc<T>, V> affine(p.norm, c);
  patch.for_rows<kRows>([&](int64_t m, int rows) {
    Bits<T, V> x[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) x[r] = load_bits<V>(p.x.row(m + r * patch.step) + c);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) {
        Acc<T> y[V];
#pragma unroll
        for (int v = 0; v < V; ++v) y[v] = relu(affine(element<T, V>(x[r], v), v));
        store_bits<V>(p.out.row(m + r * patch.step) + c, to_bits<T, V>(y));
      }
  });
}

// g = dropout'(grad + (gm + 2 (x - m) gv) / M): every consumer has contributed, so this gradient is complete.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) feature_grad_kernel(const __grid_constant__ Job<FeatureGrad<T>> job) {
  using A = Acc<T>;
  const FeatureGrad<T>& p = job.p;
  const Patch patch(job.tiling, p.M, p.C, V);
  if (!patch.any) return;
  const int64_t c = patch.column;
  const bool drop = p.drop_rate > 0;
  const Dropout dropout = drop ? make_dropout(load_one(p.seed), p.layer, p.drop_rate) : Dropout{};
  A mean[V], offset[V], slope[V];
  load_channels(mean, p.mean, c);
  load_channels(offset, p.grad_mean, c);
  load_channels(slope, p.grad_var, c);
  const A per_row = A(1) / A(p.M);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    offset[v] *= per_row;
    slope[v] *= A(2) * per_row;
  }
  patch.for_rows<kRows>([&](int64_t m, int rows) {
    Bits<T, V> x[kRows], grad[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) {
        x[r] = load_bits<V>(p.x.row(m + r * patch.step) + c);
        grad[r] = load_bits<V>(p.grad.row(m + r * patch.step) + c);
      }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) {
        const int64_t row = m + r * patch.step;
        const uint32_t key = drop ? dropout_row_key(dropout, p.drop_rows == 1 ? row : row / p.drop_rows) : 0;
        A g[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A share = offset[v] + times_or_zero(slope[v], element<T, V>(x[r], v) - mean[v]);
          g[v] = element<T, V>(grad[r], v) + share;
          if (drop) g[v] *= dropout_factor<A>(dropout, key, c + v);
        }
        store_bits<V>(p.out.row(m + r * patch.step) + c, to_bits<T, V>(g));
      }
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    bn_relu_backward_reduce_kernel(const __grid_constant__ Job<BnReluBackwardReduce<T>> job) {
  using A = Acc<T>;
  DX_SHARED_BYTES(bytes);
  const BnReluBackwardReduce<T>& p = job.p;
  const Patch patch(job.tiling, p.M, p.C, V);
  const int64_t c = patch.column;
  Sums<A, V> sums;
  if (patch.any) {
    const Affine<A, V> affine(p.norm, c);
    patch.for_rows<kRows>([&](int64_t m, int rows) {
      Bits<T, V> x[kRows], grad[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (r < rows) {
          x[r] = load_bits<V>(p.x.row(m + r * patch.step) + c);
          grad[r] = load_bits<V>(p.grad.row(m + r * patch.step) + c);
        }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (r < rows) {
          A y[V];
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A xc = element<T, V>(x[r], v) - affine.mean[v], u = affine.of_centered(xc, v);
            sums.add(v, relu_mask(u, element<T, V>(grad[r], v)), xc);
            y[v] = relu(u);
          }
          if (p.out) store_bits<V>(p.out.row(m + r * patch.step) + c, to_bits<T, V>(y));
        }
    });
  }
  store_sums(sums, patch, bytes, job);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    bn_relu_backward_kernel(const __grid_constant__ Job<BnReluBackward<T>> job) {
  const BnReluBackward<T>& p = job.p;
  const Patch patch(job.tiling, p.M, p.C, V);
  if (!patch.any) return;
  const int64_t c = patch.column;
  const NormBackward<Acc<T>, V> backward(p.norm, p.grad_weight, p.grad_bias, p.M, c);
  patch.for_rows<kRows>([&](int64_t m, int rows) {
    Bits<T, V> x[kRows], grad[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) {
        x[r] = load_bits<V>(p.x.row(m + r * patch.step) + c);
        grad[r] = load_bits<V>(p.grad.row(m + r * patch.step) + c);
      }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) {
        Acc<T> dx[V];
#pragma unroll
        for (int v = 0; v < V; ++v) dx[v] = backward(element<T, V>(x[r], v), element<T, V>(grad[r], v), v);
        store_bits<V>(p.grad_x.row(m + r * patch.step) + c, to_bits<T, V>(dx));
      }
  });
}

template <class T>
Width<T> width(const BnReluBackwardReduce<T>& p) {
  return Width<T>(p.C).with(p.x).with(p.grad).with(p.out);
}

}  // namespace

template <class T>
cudaError_t bn_relu(const BnRelu<T>& p, Stream stream) {
  if (p.M == 0 || p.C == 0) return cudaSuccess;
  return Width<T>(p.C).with(p.x).with(p.out).run([&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const Job<BnRelu<T>> job = {p, Tiling(p.M, p.C, V, kRows), nullptr};
    return launch(bn_relu_kernel<T, V>, job.tiling.grid(), kThreads, 0, stream, job);
  });
}

template <class T>
cudaError_t feature_grad(const FeatureGrad<T>& p, Stream stream) {
  if (p.M == 0 || p.C == 0) return cudaSuccess;
  return Width<T>(p.C).with(p.x).with(p.grad).with(p.out).run([&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const Job<FeatureGrad<T>> job = {p, Tiling(p.M, p.C, V, kRows), nullptr};
    return launch(feature_grad_kernel<T, V>, job.tiling.grid(), kThreads, 0, stream, job);
  });
}

template <class T>
size_t bn_relu_backward_reduce_workspace(const BnReluBackwardReduce<T>& p) {
  return p.C == 0 ? 0 : Partials<Acc<T>>::bytes(Tiling(p.M, p.C, width(p).elements(), kRows).slabs, p.C);
}
template <class T>
cudaError_t bn_relu_backward_reduce(const BnReluBackwardReduce<T>& p, Stream stream, void* workspace,
                                    UnmergedSums<Acc<T>>* left) {
  using A = Acc<T>;
  if (p.C == 0) return cudaSuccess;
  return width(p).run([&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const Job<BnReluBackwardReduce<T>> job = {p, Tiling(p.M, p.C, V, kRows), workspace};
    const cudaError_t error = launch(bn_relu_backward_reduce_kernel<T, V>, job.tiling.grid(), kThreads,
                                     sums_shared_bytes<A, V>(), stream, job);
    if (error != cudaSuccess) return error;
    if (!left) return launch_merge_slabs(unmerged_of(job), stream);
    *left = unmerged_of(job);
    return cudaSuccess;
  });
}
template <class A>
cudaError_t merge_left(const UnmergedSums<A>& p, Stream stream) {
  return launch_merge_slabs(p, stream);
}

template <class T>
cudaError_t bn_relu_backward(const BnReluBackward<T>& p, Stream stream) {
  if (p.M == 0 || p.C == 0) return cudaSuccess;
  return Width<T>(p.C).with(p.x).with(p.grad).with(p.grad_x).run([&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const Job<BnReluBackward<T>> job = {p, Tiling(p.M, p.C, V, kRows), nullptr};
    return launch(bn_relu_backward_kernel<T, V>, job.tiling.grid(), kThreads, 0, stream, job);
  });
}

#define DX_INSTANTIATE(T)                                                                        \
  template cudaError_t bn_relu<T>(const BnRelu<T>&, Stream);                                     \
  template cudaError_t feature_grad<T>(const FeatureGrad<T>&, Stream);                           \
  template size_t bn_relu_backward_reduce_workspace<T>(const BnReluBackwardReduce<T>&);          \
  template cudaError_t bn_relu_backward_reduce<T>(const BnReluBackwardReduce<T>&, Stream, void*, \
                                                  UnmergedSums<Acc<T>>*);                        \
  template cudaError_t bn_relu_backward<T>(const BnReluBackward<T>&, Stream);
DX_FOR_STORAGE_TYPES(DX_INSTANTIATE)
template cudaError_t merge_left(const UnmergedSums<float>&, Stream);
template cudaError_t merge_left(const UnmergedSums<double>&, Stream);

}  // namespace dx::cuda
