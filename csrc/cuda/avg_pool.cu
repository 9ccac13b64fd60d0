// BatchNorm, ReLU and average pooling (transition: 2x2; head: the whole image), and their backward passes. Windows do
// not overlap (stride = window, no padding), so every pass reads a pixel of x once: the forward pass and the sums from
// the side of the output pixel, four pixels of its window in flight (a 2x2 window is one such step), the input gradient
// from the side of the input pixel.
#include "boxes.h"
#include "kernels.h"
#include "sums.h"

namespace dx::cuda {
namespace {

constexpr int kPixels = 4;  // of a window, in flight
constexpr int kRows = 2;    // input rows in flight in the last pass, of two tensors
static_assert(kPixels == 2 * 2, "a transition's window is one step");
static_assert(2 * kRows == kPixels, "the same bytes in flight in all passes");

template <class A>
__device__ __forceinline__ A share_of(const Pooling& g) {
  return A(1.0 / double(g.window[0] * g.window[1] * g.window[2]));
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) forward(const __grid_constant__ PoolingJob<BnReluPool<T>> job) {
  using A = Acc<T>;
  const BnReluPool<T>& p = job.p;
  const Patch patch(job.tiling, p.pooling.out_rows(), p.C, V);
  if (!patch.any) return;
  const int64_t c = patch.column;
  const Affine<A, V> affine(p.norm, c);
  const A share = share_of<A>(p.pooling);
  patch.for_rows<1>([&](int64_t m, int) {
    A sum[V] = {};
    Bits<T, V> x[kPixels];
    for_pixels<kPixels>(
        window_of(job.pooling, out_pixel(m, job.pooling)), p.pooling.size,
        [&](int i, int64_t row, int, int, int) { x[i] = load_bits<V>(p.x.row(row) + c); },
        [&](int i) {
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += relu(affine(element<T, V>(x[i], v), v));
        });
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] *= share;
    store_bits<V>(p.out.row(m) + c, to_bits<T, V>(sum));
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    backward_reduce(const __grid_constant__ PoolingJob<BnReluPoolBackwardReduce<T>> job) {
  using A = Acc<T>;
  DX_SHARED_BYTES(bytes);
  const BnReluPoolBackwardReduce<T>& p = job.p;
  const Patch patch(job.tiling, p.pooling.out_rows(), p.C, V);
  const int64_t c = patch.column;
  Sums<A, V> sums;
  if (patch.any) {
    const Affine<A, V> affine(p.norm, c);
    const A share = share_of<A>(p.pooling);
    patch.for_rows<1>([&](int64_t m, int) {
      const Bits<T, V> bits = load_bits<V>(p.grad_out.row(m) + c);
      A grad[V], pooled[V] = {};
#pragma unroll
      for (int v = 0; v < V; ++v) grad[v] = element<T, V>(bits, v) * share;
      Bits<T, V> x[kPixels];
      for_pixels<kPixels>(
          window_of(job.pooling, out_pixel(m, job.pooling)), p.pooling.size,
          [&](int i, int64_t row, int, int, int) { x[i] = load_bits<V>(p.x.row(row) + c); },
          [&](int i) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const A xc = element<T, V>(x[i], v) - affine.mean[v], u = affine.of_centered(xc, v);
              sums.add(v, relu_mask(u, grad[v]), xc);
              pooled[v] += relu(u);
            }
          });
      if (!p.pooled) return;
#pragma unroll
      for (int v = 0; v < V; ++v) pooled[v] *= share;
      store_bits<V>(p.pooled.row(m) + c, to_bits<T, V>(pooled));
    });
  }
  store_sums(sums, patch, bytes, job);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) backward(const __grid_constant__ PoolingJob<BnReluPoolBackward<T>> job) {
  using A = Acc<T>;
  const BnReluPoolBackward<T>& p = job.p;
  const PoolingOnDevice& g = job.pooling;
  const Patch patch(job.tiling, g.in_rows(), p.C, V);
  if (!patch.any) return;
  const int64_t c = patch.column;
  const NormBackward<A, V> norm(p.norm, p.grad_weight, p.grad_bias, g.in_rows(), c);
  const A share = share_of<A>(g);
  patch.for_rows<kRows>([&](int64_t m, int rows) {
    Bits<T, V> x[kRows], grad[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) {
        x[r] = load_bits<V>(p.x.row(m + r * patch.step) + c);
        const Box box = windows_over(g, in_pixel(m + r * patch.step, g));
        // Floor mode: what no window covers gets the statistics' share only.
        grad[r] = {};
        if (box.pixels() > 0)
          grad[r] = load_bits<V>(
              p.grad_out.row(((box.image * g.out[0] + box.lo[0]) * g.out[1] + box.lo[1]) * g.out[2] + box.lo[2]) + c);
      }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) {
        A dx[V];
#pragma unroll
        for (int v = 0; v < V; ++v) dx[v] = norm(element<T, V>(x[r], v), element<T, V>(grad[r], v) * share, v);
        store_bits<V>(p.grad_x.row(m + r * patch.step) + c, to_bits<T, V>(dx));
      }
  });
}

template <class T>
Width<T> width(const BnReluPoolBackwardReduce<T>& p) {
  return Width<T>(p.C).with(p.x).with(p.grad_out).with(p.pooled);
}

}  // namespace

template <class T>
cudaError_t bn_relu_avg_pool(const BnReluPool<T>& p, Stream stream) {
  const int64_t M = p.pooling.out_rows();
  if (M == 0 || p.C == 0) return cudaSuccess;
  return Width<T>(p.C).with(p.x).with(p.out).run([&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const PoolingJob<BnReluPool<T>> job = {p, PoolingOnDevice(p.pooling), Tiling(M, p.C, V, 1), nullptr};
    return launch(forward<T, V>, job.tiling.grid(), kThreads, 0, stream, job);
  });
}

template <class T>
size_t bn_relu_avg_pool_backward_reduce_workspace(const BnReluPoolBackwardReduce<T>& p) {
  if (p.C == 0) return 0;
  return Partials<Acc<T>>::bytes(Tiling(p.pooling.out_rows(), p.C, width(p).elements(), 1).slabs, p.C);
}
template <class T>
cudaError_t bn_relu_avg_pool_backward_reduce(const BnReluPoolBackwardReduce<T>& p, Stream stream, void* workspace) {
  using A = Acc<T>;
  if (p.C == 0) return cudaSuccess;
  return width(p).run([&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const PoolingJob<BnReluPoolBackwardReduce<T>> job = {p, PoolingOnDevice(p.pooling),
                                                         Tiling(p.pooling.out_rows(), p.C, V, 1), workspace};
    const cudaError_t error =
        launch(backward_reduce<T, V>, job.tiling.grid(), kThreads, sums_shared_bytes<A, V>(), stream, job);
    if (error != cudaSuccess) return error;
    return launch_merge_slabs(unmerged_of(job), stream);
  });
}

template <class T>
cudaError_t bn_relu_avg_pool_backward(const BnReluPoolBackward<T>& p, Stream stream) {
  const int64_t M = p.pooling.in_rows();
  if (M == 0 || p.C == 0) return cudaSuccess;
  return Width<T>(p.C).with(p.x).with(p.grad_out).with(p.grad_x).run([&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const PoolingJob<BnReluPoolBackward<T>> job = {p, PoolingOnDevice(p.pooling), Tiling(M, p.C, V, kRows), nullptr};
    return launch(backward<T, V>, job.tiling.grid(), kThreads, 0, stream, job);
  });
}

#define DX_INSTANTIATE(T)                                                                                      \
  template cudaError_t bn_relu_avg_pool<T>(const BnReluPool<T>&, Stream);                                      \
  template size_t bn_relu_avg_pool_backward_reduce_workspace<T>(const BnReluPoolBackwardReduce<T>&);           \
  template cudaError_t bn_relu_avg_pool_backward_reduce<T>(const BnReluPoolBackwardReduce<T>&, Stream, void*); \
  template cudaError_t bn_relu_avg_pool_backward<T>(const BnReluPoolBackward<T>&, Stream);
DX_FOR_STORAGE_TYPES(DX_INSTANTIATE)

}  // namespace dx::cuda
