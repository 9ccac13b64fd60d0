// BatchNorm, ReLU and max pooling in one read (the stem), and their backward passes. Forward: an output pixel reads its
// window (neighbouring windows share pixels, which come from the cache). Backward: an input pixel gathers from the
// windows that cover it, asking each whether it was the maximum (a byte for each output): nothing is scattered, nothing
// depends on an order. At stride 2 a 3x3 window covers a pixel at most four times: one step of kWindows.
#include "boxes.h"
#include "kernels.h"
#include "sums.h"

namespace dx::cuda {
namespace {

constexpr int kPixels = 3;   // of a window, in flight
constexpr int kWindows = 4;  // over a pixel, in flight
static_assert(kPixels == 3, "a line of the stem's window is one step");
static_assert(kWindows == ((3 + 1) / 2) * ((3 + 1) / 2), "the stem's windows over a pixel are one step");

template <class T, int V>
__global__ void __launch_bounds__(kThreads) forward(const __grid_constant__ PoolingJob<BnReluPool<T>> job) {
  using A = Acc<T>;
  const BnReluPool<T>& p = job.p;
  const PoolingOnDevice& g = job.pooling;
  const Patch patch(job.tiling, g.out_rows(), p.C, V);
  if (!patch.any) return;
  const int64_t c = patch.column;
  const Affine<A, V> affine(p.norm, c);
  patch.for_rows<1>([&](int64_t m, int) {
    const Pixel out = out_pixel(m, g);
    int origin[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) origin[i] = out.at[i] * int(g.stride[i]) - int(g.padding[i]);
    const auto position_of = [&](int d, int h, int w) {
      return ((d - origin[0]) * int(g.window[1]) + (h - origin[1])) * int(g.window[2]) + (w - origin[2]);
    };
    const Box box = window_of(g, out);
    // PyTorch's rule: the first maximum in scan order, and NaN always wins.
    A best[V];
    int where[V];
#pragma unroll
    for (int v = 0; v < V; ++v) best[v] = -A(INFINITY), where[v] = position_of(box.lo[0], box.lo[1], box.lo[2]);
    Bits<T, V> x[kPixels];
    int position[kPixels];
    for_pixels<kPixels>(
        box, g.size,
        [&](int i, int64_t row, int d, int h, int w) {
          x[i] = load_bits<V>(p.x.row(row) + c);
          position[i] = position_of(d, h, w);
        },
        [&](int i) {
          A y[V];
#pragma unroll
          for (int v = 0; v < V; ++v) y[v] = relu(affine(element<T, V>(x[i], v), v));
          const Bits<T, V> stored = to_bits<T, V>(y);  // maxima are those of the activation as eager stores it
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A a = element<T, V>(stored, v);
            const bool better = a > best[v] || a != a;
            best[v] = better ? a : best[v];
            where[v] = better ? position[i] : where[v];
          }
        });
    store_bits<V>(p.out.row(m) + c, to_bits<T, V>(best));
    if (p.index) {
      BitsOf<V> bytes;
      uint8_t all[V];
#pragma unroll
      for (int v = 0; v < V; ++v) all[v] = uint8_t(where[v]);
      memcpy(&bytes, all, sizeof all);
      store_bits<V>(p.index.row(m) + c, bytes);
    }
  });
}

// The gradient that reaches an input pixel from the windows over it, before the ReLU's mask.
template <class T, int V, class A = Acc<T>>
__device__ __forceinline__ void gather(A (&sum)[V], const PoolingOnDevice& g, const Rows<const T>& grad_out,
                                       const Rows<const uint8_t>& index, int64_t m, int64_t c) {
  const Pixel in = in_pixel(m, g);
  Bits<T, V> grad[kWindows];
  BitsOf<V> maximum[kWindows];
  int position[kWindows];
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] = 0;
  for_pixels<kWindows>(
      windows_over(g, in), g.out,
      [&](int i, int64_t row, int d, int h, int w) {
        grad[i] = load_bits<V>(grad_out.row(row) + c);
        maximum[i] = load_bits<V>(index.row(row) + c);
        const int id = in.at[0] + int(g.padding[0]) - d * int(g.stride[0]);
        const int ih = in.at[1] + int(g.padding[1]) - h * int(g.stride[1]);
        const int iw = in.at[2] + int(g.padding[2]) - w * int(g.stride[2]);
        position[i] = (id * int(g.window[1]) + ih) * int(g.window[2]) + iw;
      },
      [&](int i) {
        uint8_t where[V];
        memcpy(where, &maximum[i], sizeof where);
#pragma unroll
        for (int v = 0; v < V; ++v)
          if (where[v] == position[i]) sum[v] += element<T, V>(grad[i], v);
      });
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    backward_reduce(const __grid_constant__ PoolingJob<BnReluPoolBackwardReduce<T>> job) {
  using A = Acc<T>;
  DX_SHARED_BYTES(bytes);
  const BnReluPoolBackwardReduce<T>& p = job.p;
  const Patch patch(job.tiling, p.pooling.in_rows(), p.C, V);
  const int64_t c = patch.column;
  Sums<A, V> sums;
  if (patch.any) {
    const Affine<A, V> affine(p.norm, c);
    patch.for_rows<1>([&](int64_t m, int) {
      const Bits<T, V> x = load_bits<V>(p.x.row(m) + c);
      A grad[V];
      gather<T, V>(grad, job.pooling, p.grad_out, p.index, m, c);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A xc = element<T, V>(x, v) - affine.mean[v];
        sums.add(v, relu_mask(affine.of_centered(xc, v), grad[v]), xc);
      }
    });
  }
  store_sums(sums, patch, bytes, job);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) backward(const __grid_constant__ PoolingJob<BnReluPoolBackward<T>> job) {
  using A = Acc<T>;
  const BnReluPoolBackward<T>& p = job.p;
  const int64_t M = p.pooling.in_rows();
  const Patch patch(job.tiling, M, p.C, V);
  if (!patch.any) return;
  const int64_t c = patch.column;
  const NormBackward<A, V> norm(p.norm, p.grad_weight, p.grad_bias, M, c);
  patch.for_rows<1>([&](int64_t m, int) {
    const Bits<T, V> x = load_bits<V>(p.x.row(m) + c);
    A grad[V], dx[V];
    gather<T, V>(grad, job.pooling, p.grad_out, p.index, m, c);
#pragma unroll
    for (int v = 0; v < V; ++v) dx[v] = norm(element<T, V>(x, v), grad[v], v);
    store_bits<V>(p.grad_x.row(m) + c, to_bits<T, V>(dx));
  });
}

template <class T>
Width<T> width(const BnReluPoolBackwardReduce<T>& p) {
  return Width<T>(p.C).with(p.x).with(p.grad_out).with(p.index);
}

}  // namespace

template <class T>
cudaError_t bn_relu_max_pool(const BnReluPool<T>& p, Stream stream) {
  const int64_t M = p.pooling.out_rows();
  if (M == 0 || p.C == 0) return cudaSuccess;
  return Width<T>(p.C).with(p.x).with(p.out).with(p.index).run([&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const PoolingJob<BnReluPool<T>> job = {p, PoolingOnDevice(p.pooling), Tiling(M, p.C, V, 1), nullptr};
    return launch(forward<T, V>, job.tiling.grid(), kThreads, 0, stream, job);
  });
}

template <class T>
size_t bn_relu_max_pool_backward_reduce_workspace(const BnReluPoolBackwardReduce<T>& p) {
  if (p.C == 0) return 0;
  return Partials<Acc<T>>::bytes(Tiling(p.pooling.in_rows(), p.C, width(p).elements(), 1).slabs, p.C);
}
template <class T>
cudaError_t bn_relu_max_pool_backward_reduce(const BnReluPoolBackwardReduce<T>& p, Stream stream, void* workspace) {
  using A = Acc<T>;
  if (p.C == 0) return cudaSuccess;
  return width(p).run([&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const PoolingJob<BnReluPoolBackwardReduce<T>> job = {p, PoolingOnDevice(p.pooling),
                                                         Tiling(p.pooling.in_rows(), p.C, V, 1), workspace};
    const cudaError_t error =
        launch(backward_reduce<T, V>, job.tiling.grid(), kThreads, sums_shared_bytes<A, V>(), stream, job);
    if (error != cudaSuccess) return error;
    return launch_merge_slabs(unmerged_of(job), stream);
  });
}

template <class T>
cudaError_t bn_relu_max_pool_backward(const BnReluPoolBackward<T>& p, Stream stream) {
  const int64_t M = p.pooling.in_rows();
  if (M == 0 || p.C == 0) return cudaSuccess;
  return Width<T>(p.C).with(p.x).with(p.grad_out).with(p.grad_x).with(p.index).run([&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const PoolingJob<BnReluPoolBackward<T>> job = {p, PoolingOnDevice(p.pooling), Tiling(M, p.C, V, 1), nullptr};
    return launch(backward<T, V>, job.tiling.grid(), kThreads, 0, stream, job);
  });
}

#define DX_INSTANTIATE(T)                                                                                      \
  template cudaError_t bn_relu_max_pool<T>(const BnReluPool<T>&, Stream);                                      \
  template size_t bn_relu_max_pool_backward_reduce_workspace<T>(const BnReluPoolBackwardReduce<T>&);           \
  template cudaError_t bn_relu_max_pool_backward_reduce<T>(const BnReluPoolBackwardReduce<T>&, Stream, void*); \
  template cudaError_t bn_relu_max_pool_backward<T>(const BnReluPoolBackward<T>&, Stream);
DX_FOR_STORAGE_TYPES(DX_INSTANTIATE)

}  // namespace dx::cuda
