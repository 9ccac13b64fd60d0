// Weights of convolutions into another layout and type, and their gradients back: those of many layers by one launch,
// since each is a few thousand elements, and a launch takes longer than they do.
#include "kernels.h"
#include "launch.h"

namespace dx::cuda {
namespace {

constexpr int kThreads = 256;
// Elements of a thread, at a weight of 128 x 32 x 9, and weights of a launch: its arguments are 4 KB at most.
constexpr int kElements = 4, kMostCopies = 40;

template <class From, class To>
struct Copies {
  TapsCopy<From, To> of[kMostCopies];
};
static_assert(sizeof(Copies<float, bfloat16>) <= 4096, "arguments of a kernel");

// Neighbouring threads write neighbouring channels of channels_last, or taps of a contiguous weight.
template <class From, class To>
__global__ void __launch_bounds__(kThreads) copy_taps_kernel(const __grid_constant__ Copies<From, To> copies) {
  const TapsCopy<From, To>& p = copies.of[block_y()];
  const bool channels_last = p.to.input == 1;
  const int64_t inner = channels_last ? p.C : p.taps, count = p.N * p.C * p.taps;
  const int64_t first = int64_t(block_x()) * kThreads * kElements + thread_x();
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    const int64_t i = first + e * kThreads;
    if (i >= count) return;
    const int64_t outer = i / inner, within = i % inner;
    const int64_t n = outer / (count / p.N / inner), rest = outer % (count / p.N / inner);
    const int64_t c = channels_last ? within : rest, t = channels_last ? rest : within;
    const From value = load_one(p.from.data + n * p.from.output + c * p.from.input + t * p.from.tap);
    store_one(p.to.data + n * p.to.output + c * p.to.input + t * p.to.tap, narrow<To>(widen(value)));
  }
}

}  // namespace

template <class From, class To>
cudaError_t copy_taps(const TapsCopy<From, To>* copies, size_t count, Stream stream) {
  for (size_t done = 0; done < count; done += kMostCopies) {
    Copies<From, To> some = {};
    const size_t here = count - done < kMostCopies ? count - done : kMostCopies;
    int64_t most = 0;
    for (size_t i = 0; i < here; ++i) {
      some.of[i] = copies[done + i];
      const int64_t elements = some.of[i].N * some.of[i].C * some.of[i].taps;
      most = elements > most ? elements : most;
    }
    if (most == 0) continue;
    const int64_t step = kThreads * kElements;
    const dim3 grid(unsigned((most + step - 1) / step), unsigned(here));
    const cudaError_t error = launch(copy_taps_kernel<From, To>, grid, kThreads, 0, stream, some);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

#define DX_INSTANTIATE(From, To) template cudaError_t copy_taps<From, To>(const TapsCopy<From, To>*, size_t, Stream);
DX_INSTANTIATE(float, float)
DX_INSTANTIATE(double, double)
DX_INSTANTIATE(float, bfloat16)
DX_INSTANTIATE(float, float16)
DX_INSTANTIATE(bfloat16, float)
DX_INSTANTIATE(float16, float)
#undef DX_INSTANTIATE

}  // namespace dx::cuda
