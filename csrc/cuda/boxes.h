// Pixels of a pooled image and the windows over it.
#pragma once

#include "rows.h"

namespace dx::cuda {

// Division of numbers below 2^31 by a number known at the launch: a multiplication and a shift (Granlund & Montgomery
// 1994). magic = ceil(2^(31 + shift) / by) exceeds 2^(31 + shift) / by by less than 1, so n magic / 2^(31 + shift)
// exceeds n / by by less than n / 2^(31 + shift) < 2^-shift <= 1 / by: the quotient's whole part is right.
struct Divisor {
  uint32_t magic;
  int shift;

  Divisor() = default;
  explicit Divisor(int64_t by) : shift(0) {
    while ((int64_t(1) << shift) < by) ++shift;
    magic = by > 0 ? uint32_t(((uint64_t(1) << (31 + shift)) + uint64_t(by) - 1) / uint64_t(by)) : 0;
  }
  __device__ __forceinline__ int divide(int n) const {
    return int(uint32_t((uint64_t(uint32_t(n)) * magic) >> 31) >> shift);
  }
};

// A pooling with what its kernels divide by.
struct PoolingOnDevice : Pooling {
  Divisor by_size[3], by_out[3], by_stride[3];

  explicit PoolingOnDevice(const Pooling& g) : Pooling(g) {
    for (int i = 0; i < 3; ++i)
      by_size[i] = Divisor(g.size[i]), by_out[i] = Divisor(g.out[i]), by_stride[i] = Divisor(g.stride[i]);
  }
};

template <class P>
struct PoolingJob {
  P p;
  PoolingOnDevice pooling;
  Tiling tiling;
  void* partials;
};

struct Pixel {
  int64_t image;
  int at[3];  // d, h, w

  // Of row `row` of images of size [D, H, W].
  __device__ __forceinline__ Pixel(int64_t row, const int64_t (&size)[3], const Divisor (&by)[3]) {
    int64_t line, plane;
    if (row < (int64_t(1) << 31)) {
      line = by[2].divide(int(row));
      plane = by[1].divide(int(line));
      image = by[0].divide(int(plane));
    } else {
      line = row / size[2];
      plane = line / size[1];
      image = plane / size[0];
    }
    at[0] = int(plane - image * size[0]);
    at[1] = int(line - plane * size[1]);
    at[2] = int(row - line * size[2]);
  }
};
// Of a row of the input, of a row of the output.
__device__ __forceinline__ Pixel in_pixel(int64_t row, const PoolingOnDevice& g) { return {row, g.size, g.by_size}; }
__device__ __forceinline__ Pixel out_pixel(int64_t row, const PoolingOnDevice& g) { return {row, g.out, g.by_out}; }

// The pixels [lo, hi) of one image, in scan order.
struct Box {
  int64_t image;
  int lo[3], hi[3];

  __device__ __forceinline__ int pixels() const { return (hi[0] - lo[0]) * (hi[1] - lo[1]) * (hi[2] - lo[2]); }
};

// Calls load(i, row, d, h, w) for U pixels of the box (those that it still has), i < U, then use(i) for the same: U
// loads are in flight whatever the box's shape. Rows are those of images of size [D, H, W].
template <int U, class Load, class Use>
__device__ __forceinline__ void for_pixels(const Box& box, const int64_t (&size)[3], const Load& load, const Use& use) {
  int d = box.lo[0], h = box.lo[1], w = box.lo[2];
  int64_t row = ((box.image * size[0] + d) * size[1] + h) * size[2] + w;
  // What lies between the end of a line (a plane) of the box and the beginning of its next one.
  const int64_t line_gap = size[2] - (box.hi[2] - box.lo[2]), plane_gap = (size[1] - (box.hi[1] - box.lo[1])) * size[2];
  for (int left = box.pixels(); left > 0; left -= U) {
#pragma unroll
    for (int i = 0; i < U; ++i)
      if (i < left) {
        load(i, row, d, h, w);
        ++row;
        if (++w == box.hi[2]) {
          w = box.lo[2];
          row += line_gap;
          if (++h == box.hi[1]) {
            h = box.lo[1];
            row += plane_gap;
            ++d;
          }
        }
      }
#pragma unroll
    for (int i = 0; i < U; ++i)
      if (i < left) use(i);
  }
}

// The input pixels under the window of an output pixel.
__device__ __forceinline__ Box window_of(const Pooling& g, const Pixel& out) {
  Box box;
  box.image = out.image;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int begin = out.at[i] * int(g.stride[i]) - int(g.padding[i]), end = begin + int(g.window[i]);
    box.lo[i] = begin > 0 ? begin : 0;
    box.hi[i] = end < int(g.size[i]) ? end : int(g.size[i]);
  }
  return box;
}
// The output pixels whose windows cover an input pixel: none (hi = lo) between windows whose stride is larger, and
// right of the last one, where less than a stride is left.
__device__ __forceinline__ Box windows_over(const PoolingOnDevice& g, const Pixel& in) {
  Box box;
  box.image = in.image;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int at = in.at[i] + int(g.padding[i]), window = int(g.window[i]);
    const int last = g.by_stride[i].divide(at) + 1;
    box.lo[i] = at < window ? 0 : g.by_stride[i].divide(at - window) + 1;
    box.hi[i] = last < int(g.out[i]) ? last : int(g.out[i]);
  }
  return box;
}

}  // namespace dx::cuda
