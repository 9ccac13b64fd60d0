// One block's work on a tile of rows and a slice of C in the backward pass of the 1x1 convolution (see
// conv1x1_backward.cu): filling shared memory with dz and y, and what follows dz @ W.
#pragma once

#include "conv1x1_common.h"

namespace dx::cuda {

// WHOLE: all rows consist of whole aligned pieces; everything else does not depend on it.
template <class T, class Math, int CHANNELS, bool WHOLE = false>
struct BackwardShape {
  using A = Acc<T>;
  using S = typename Math::Operand;
  static constexpr bool kHalf = sizeof(S) == 2, kWhole = WHOLE;
  static constexpr int kThreads = sizeof(A) == 8 ? 256 : 512, kWarps = kThreads / 32;
  static constexpr int kRows = sizeof(A) == 8 ? 32 : 64;
  static constexpr int kColumns = kHalf ? 128 : sizeof(A) == 8 ? 32 : 64;  // of C
  static constexpr int kChannels = CHANNELS;                               // of N
  static constexpr int kPiece = 16 / sizeof(S);
  static constexpr int kPitch = kColumns + kPiece, kDzPitch = kChannels + kPiece;  // odd numbers of pieces
  static_assert(kPitch / kPiece % 2 == 1 && kDzPitch / kPiece % 2 == 1, "no bank conflicts");

  // A thread's part of a row: 8 bytes of 16-bit elements, not 16, since its two sums of each column and the constants
  // of each channel cost more registers than twice the accesses cost time.
  static constexpr int kRun = sizeof(A) == 8 ? 2 : 4;
  static constexpr int kAcross = kColumns / kRun, kDown = kThreads / kAcross, kPieces = kRows / kDown;
  static constexpr int kDzAcross = kChannels / kRun, kDzDown = kThreads / kDzAcross, kDzPieces = kRows / kDzDown;
  static constexpr int kWeightAcross = kColumns / kPiece, kWeightDown = kThreads / kWeightAcross;
  static_assert(kPieces * kDown == kRows && kDzPieces * kDzDown == kRows, "threads cover the tiles");
  static_assert(kChannels % kWeightDown == 0, "threads cover the weights");
  static_assert(32 % kAcross == 0, "a warp holds whole rows");

  // Shared memory: the weights, dz, y, and dy, whose place the warps' sums take at the end, and
  // constants per channel (read from where the compiler needs one address for all of them).
  static constexpr int kTilePitch = kColumns + 8;
  static constexpr int kDzAt = kChannels * kPitch * int(sizeof(S));
  static constexpr int kYAt = kDzAt + kRows * kDzPitch * int(sizeof(S));
  static constexpr int kTileAt = kYAt + kRows * kPitch * int(sizeof(S));
  static constexpr int kTileBytes = kRows * kTilePitch * int(sizeof(A));
  static constexpr int kNormAt = kTileAt + kTileBytes;  // the constants of the columns, then of the channels
  static constexpr int kSharedBytes = kNormAt + (3 * kColumns + 5 * kChannels) * int(sizeof(A));
  static_assert(kWarps * 2 * kColumns * int(sizeof(A)) <= kTileBytes, "the sums fit the place of dy");
  static_assert(kDzAt % 16 == 0 && kYAt % 16 == 0 && kTileAt % 16 == 0, "vector accesses");
  static_assert(kSharedBytes <= (CHANNELS > 64 ? kWideShared : kNarrowShared), "fits where it is chosen");

  using Dgrad = typename Math::template Tile<kRows, kColumns, kThreads, 4>;
  using Wgrad = typename Math::template Tile<kChannels, kColumns, kThreads, 4>;
};

template <class T, class S>
struct Backward {
  BnReluConv1x1Backward<T> of;
  Prepared<Acc<T>, S> prepared;
  int rows;          // of each block but the last
  Acc<T>* sums;      // [blocks, 2, Cp]: sum dy, sum dy (x - mean)
  Acc<T>* wgrads;    // [blocks, Np, Cp]
  Rows<const T> in;  // what grad_x is added to, or null
  int x_alignment, grad_out_alignment, z_alignment, in_alignment, out_alignment;
};

// Per-channel constants are loaded for this many columns at a time: those of a whole piece would not leave registers
// enough.
constexpr int kFew = 2;

// The rows of a tile that exist are `rows` (or more than it has) in all that follows.
//
// dz for a tile: grad_out as it is, or through norm2 and its ReLU. Zero beyond M and N.
template <class T, class Shape, class Math>
__device__ __forceinline__ void fill_dz(const Backward<T, typename Shape::S>& p, int64_t m0, int rows, int n0,
                                        const Acc<T>* constants, typename Shape::S* dz) {
  using A = Acc<T>;
  constexpr int E = Shape::kRun, F = kFew, D = Shape::kDzDown, N = Shape::kChannels;
  const int column = thread_x() % Shape::kDzAcross * E, row = thread_x() / Shape::kDzAcross, n = n0 + column;
  const int left = int(p.of.N) - n, valid = left < E ? left : E;
  const T *grad = p.of.grad_out.row(m0 + row) + n, *z = p.of.z.row(m0 + row) + n;
  Piece<T, E> grads[Shape::kDzPieces], zs[Shape::kDzPieces];
#pragma unroll
  for (int i = 0; i < Shape::kDzPieces; ++i) {
    const int there = row + i * D < rows ? valid : 0;
    grads[i] = load_piece<E, Shape::kWhole>(grad + i * D * p.of.grad_out.pitch, there, p.grad_out_alignment);
    if (p.of.z) zs[i] = load_piece<E, Shape::kWhole>(z + i * D * p.of.z.pitch, there, p.z_alignment);
  }
#pragma unroll
  for (int f = 0; f < E; f += F) {
    Piece<A, F> mean, scale, bias, center, slope;
    if (p.of.z) {
      const A* at = constants + column + f;
      mean = load_piece<F>(at), scale = load_piece<F>(at + N), bias = load_piece<F>(at + 2 * N);
      center = load_piece<F>(at + 3 * N), slope = load_piece<F>(at + 4 * N);
    }
#pragma unroll
    for (int i = 0; i < Shape::kDzPieces; ++i) {
      Piece<A, F> values;
#pragma unroll
      for (int e = 0; e < F; ++e) {
        A value = grads[i].get(f + e);
        if (p.of.z) {
          const A zc = zs[i].get(f + e) - mean.v[e];
          const A dy = gradient_passes(of_centered(zc, scale.v[e], bias.v[e])) ? value : A(0);
          // a frozen norm2 has no correction: its slope is 0, and times an infinite z that would be NaN
          value = scale.v[e] * (dy - (center.v[e] + (slope.v[e] == A(0) ? A(0) : slope.v[e] * zc)));
        }
        values.v[e] = row + i * D < rows ? value : A(0);
      }
      store_piece(dz + (row + i * D) * Shape::kDzPitch + column + f, Math::operands(values));
    }
  }
}

// [COUNT, WIDTH] constants to shared memory, out of rows `pitch` apart.
template <class Shape, int COUNT, int WIDTH, class A>
__device__ __forceinline__ void copy_constants(const A* from, int64_t pitch, A* to) {
  for (int i = thread_x(); i < COUNT * WIDTH; i += Shape::kThreads)
    store_one(to + i, load_one(from + i / WIDTH * pitch + i % WIDTH));
}

// W[n0 .. n0 + kChannels, c0 .. c0 + kColumns] by asynchronous copy.
template <class T, class Shape>
__device__ __forceinline__ void copy_weights(const Backward<T, typename Shape::S>& p, int n0, int c0,
                                             typename Shape::S* weights) {
  constexpr int D = Shape::kWeightDown;
  const int column = thread_x() % Shape::kWeightAcross * Shape::kPiece, row = thread_x() / Shape::kWeightAcross;
  const auto* from = p.prepared.weight + int64_t(n0 + row) * p.prepared.Cp + c0 + column;
#pragma unroll
  for (int i = 0; i < Shape::kChannels / D; ++i)
    cp_async16(weights + (row + i * D) * Shape::kPitch + column, from + i * D * p.prepared.Cp, 16);
  cp_async_commit();
}

// A thread's share of the rows of x and of G: the same few columns in every tile, so that the two sums of dy stay in
// registers for the whole block.
template <class T, class Shape, class Math>
struct Columns {
  using A = Acc<T>;
  using S = typename Shape::S;
  static constexpr int E = Shape::kRun, F = kFew;
  Piece<T, E> x[Shape::kPieces], in[Shape::kPieces];
  Piece<A, E> sum, sum_xc;

  static __device__ __forceinline__ int column() { return thread_x() % Shape::kAcross * E; }
  static __device__ __forceinline__ int row() { return thread_x() / Shape::kAcross; }
  static __device__ __forceinline__ int columns_left(const Backward<T, S>& p, int c0) {
    const int left = int(p.of.C) - (c0 + column());
    return left < E ? left : E;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int e = 0; e < E; ++e) sum.v[e] = sum_xc.v[e] = A(0);
  }
  static __device__ __forceinline__ void load(Rows<const T> from, int valid, int rows, int alignment,
                                              Piece<T, E> (&pieces)[Shape::kPieces]) {
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i)
      pieces[i] = load_piece<E, Shape::kWhole>(from.data + i * Shape::kDown * from.pitch,
                                               row() + i * Shape::kDown < rows ? valid : 0, alignment);
  }
  __device__ __forceinline__ void load_x(const Backward<T, S>& p, int64_t m0, int rows, int c0) {
    load({p.of.x.row(m0 + row()) + c0 + column(), p.of.x.pitch}, columns_left(p, c0), rows, p.x_alignment, x);
  }
  __device__ __forceinline__ void load_in(const Backward<T, S>& p, int64_t m0, int rows, int c0) {
    if (p.in) load({p.in.row(m0 + row()) + c0 + column(), p.in.pitch}, columns_left(p, c0), rows, p.in_alignment, in);
  }
  // y = relu((x - m) s + b), zero beyond M and C
  __device__ __forceinline__ void store_y(int rows, const A* constants, S* y) const {
#pragma unroll
    for (int f = 0; f < E; f += F) {
      const Piece<A, F> mean = load_piece<F>(constants + column() + f);
      const Piece<A, F> scale = load_piece<F>(constants + Shape::kColumns + column() + f);
      const Piece<A, F> bias = load_piece<F>(constants + 2 * Shape::kColumns + column() + f);
#pragma unroll
      for (int i = 0; i < Shape::kPieces; ++i) {
        Piece<A, F> v;
#pragma unroll
        for (int e = 0; e < F; ++e) {
          const A u = of_centered(x[i].get(f + e) - mean.v[e], scale.v[e], bias.v[e]);
          v.v[e] = row() + i * Shape::kDown < rows ? u : A(0);
        }
        store_piece(y + (row() + i * Shape::kDown) * Shape::kPitch + column() + f, Math::relu_operands(v));
      }
    }
  }
  // dy = (dz W) masked; G = s dy + (G | grad_in | 0); sum dy; sum dy (x - mean)
  __device__ __forceinline__ void add_tile(const Backward<T, S>& p, int64_t m0, int rows, int c0, const A* constants,
                                           const A* tile) {
    const int valid = columns_left(p, c0);
    T* to = p.of.grad_x.row(m0 + row()) + c0 + column();
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i) {
      const bool exists = row() + i * Shape::kDown < rows;
      Piece<T, E> out;
#pragma unroll
      for (int f = 0; f < E; f += F) {
        const Piece<A, F> mean = load_piece<F>(constants + column() + f);
        const Piece<A, F> scale = load_piece<F>(constants + Shape::kColumns + column() + f);
        const Piece<A, F> bias = load_piece<F>(constants + 2 * Shape::kColumns + column() + f);
        const Piece<A, F> dy = load_piece<F>(tile + (row() + i * Shape::kDown) * Shape::kTilePitch + column() + f);
        Piece<A, F> g;
#pragma unroll
        for (int e = 0; e < F; ++e) {
          const A xc = x[i].get(f + e) - mean.v[e];
          const A masked = exists && gradient_passes(of_centered(xc, scale.v[e], bias.v[e])) ? dy.v[e] : A(0);
          sum.v[f + e] += masked;
          sum_xc.v[f + e] += masked * xc;
          g.v[e] = scale.v[e] * masked + (p.in ? in[i].get(f + e) : A(0));
        }
        out.insert(f, Piece<T, F>::narrowed(g));
      }
      store_piece<Shape::kWhole>(to + i * Shape::kDown * p.of.grad_x.pitch, out, exists ? valid : 0, p.out_alignment);
    }
  }
  // The block's sums of this slice, [2, kColumns], to `out` with a distance of Cp; across threads by the warp, across
  // warps through shared memory, in their order.
  __device__ __forceinline__ void store_sums(A* of_warps, A* out, int64_t Cp) {
    constexpr int N = Shape::kColumns;
    A* mine = of_warps + thread_x() / 32 * (2 * N);
#pragma unroll
    for (int e = 0; e < E; ++e) {
#pragma unroll
      for (int across = Shape::kAcross; across < 32; across *= 2) {
        sum.v[e] += shuffle_xor(sum.v[e], across);
        sum_xc.v[e] += shuffle_xor(sum_xc.v[e], across);
      }
    }
    if (thread_x() % 32 < Shape::kAcross) {
      store_piece(mine + column(), sum);
      store_piece(mine + N + column(), sum_xc);
    }
    sync_block();
    if (thread_x() < 2 * N) {
      A total = 0;
      for (int w = 0; w < Shape::kWarps; ++w) total += load_one(of_warps + w * (2 * N) + thread_x());
      store_one(out + thread_x() / N * Cp + thread_x() % N, total);
    }
  }
};

}  // namespace dx::cuda
