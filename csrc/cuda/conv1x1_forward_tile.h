// One block's work on a tile of rows in the forward pass of the 1x1 convolution (see conv1x1.cu): filling shared memory
// with chunks of the operands, and how a tile leaves, with the statistics of its columns.
#pragma once

#include "conv1x1_common.h"
#include "partial_moments.h"
#include "pivot.h"

namespace dx::cuda {

// WHOLE: all rows consist of whole aligned pieces; everything else does not depend on it.
template <class T, class Math, int CHANNELS, bool WHOLE = false>
struct ForwardShape {
  using A = Acc<T>;
  using S = typename Math::Operand;
  static constexpr int kThreads = sizeof(A) == 8 ? 256 : 512, kWarps = kThreads / 32;
  static constexpr int kRows = sizeof(A) == 8 ? 64 : 128;
  static constexpr int kChannels = CHANNELS;
  static constexpr bool kWhole = WHOLE;
  static constexpr int kPiece = 16 / sizeof(S);   // operands of 16 bytes
  static constexpr int kInner = 8 * kPiece;       // a chunk of C: 128 bytes of operands
  static constexpr int kPitch = kInner + kPiece;  // an odd number of pieces
  static constexpr int kXPieces = kRows * 8 / kThreads;
  static constexpr int kDown = kThreads / 8;         // rows that the threads fill at once
  static constexpr int kPanel = kChannels * kPitch;  // operands of a chunk of the weights
  static constexpr int kBuffer = kRows * kPitch;     // operands of a chunk of x
  static_assert(kPitch / kPiece % 2 == 1, "no bank conflicts");
  static constexpr int kWeightPieces = (kChannels + kDown - 1) / kDown;
  static_assert(kXPieces * kDown == kRows, "threads fill whole chunks of x");

  // How a warp carries the tile out: 32 columns in pieces of 16 bytes, and as many rows as a piece has elements. Of a
  // tile of 96 columns 12 of the 16 warps do.
  static constexpr int kOutPiece = 16 / sizeof(T), kOutAcross = 32 / kOutPiece, kWarpsAcross = kChannels / 32;
  static constexpr int kWarpsDown = kChannels % 64 == 0 ? kWarps / kWarpsAcross : 4,
                       kCarriers = kWarpsDown * kWarpsAcross;
  static constexpr int kOutDown = kWarpsDown * kOutPiece, kOutPieces = kRows / kOutDown;
  static constexpr int kOutPitch = kChannels + kOutPiece;
  static_assert(kCarriers <= kWarps && kOutPieces * kOutDown == kRows, "warps cover the tile");

  // The output tile, and at the end the warps' sums, take the place of the chunks of x. Behind them lie the norm's
  // constants of two chunks, the block's pivots, and the weights.
  static constexpr int kNorm = 3 * kInner;  // mean, scale and bias of a chunk
  static constexpr int kBufferBytes = 2 * kBuffer * int(sizeof(S)), kTileBytes = kRows * kOutPitch * int(sizeof(T));
  static constexpr int kNormAt = kBufferBytes > kTileBytes ? kBufferBytes : kTileBytes;
  static constexpr int kPivotAt = kNormAt + 2 * kNorm * int(sizeof(A));
  static constexpr int kWeightsAt = (kPivotAt + kChannels * int(sizeof(T)) + 127) / 128 * 128;
  static constexpr int shared_bytes(int panels) { return kWeightsAt + panels * kPanel * int(sizeof(S)); }
  static_assert(kNormAt % 16 == 0 && kPivotAt % 16 == 0, "vector accesses");
  static_assert(kWarps * 2 * 32 * int(sizeof(A)) <= kNormAt, "the warps' sums fit the place of the chunks");
  static_assert(shared_bytes(2) <= (CHANNELS > 64 ? kWideShared : kNarrowShared), "fits where it is chosen");

  // The warps' parts are 32 x 32, 32 x 16, or 16 x 48.
  using Tile = typename Math::template Tile<kRows, kChannels, kThreads, kChannels % 64 == 0 ? 4 : 8>;
};

using Typical = ForwardShape<bfloat16, TensorMath<bfloat16>, 128>;
static_assert(Typical::shared_bytes(640 / 64) <= 227 * 1024 && Typical::shared_bytes(704 / 64) > 227 * 1024,
              "the weights of 640 channels stay in an H100's shared memory");

template <class T, class S>
struct Forward {
  BnReluConv1x1<T> of;
  Prepared<Acc<T>, S> prepared;
  PartialMoments<Acc<T>> partial;
  int x_alignment, out_alignment;
  int chunks;     // of C
  bool resident;  // all chunks of the weights stay in shared memory
};

// One chunk of a block's operands: x through registers, the weights and the norm's constants by asynchronous copy.
template <class T, class Shape, class Math>
struct Chunk {
  using A = Acc<T>;
  using S = typename Shape::S;
  static constexpr int E = Shape::kPiece;
  Piece<T, E> x[Shape::kXPieces];

  static __device__ __forceinline__ int column() { return thread_x() % 8 * E; }
  static __device__ __forceinline__ int row() { return thread_x() / 8; }

  __device__ __forceinline__ void load_x(const Forward<T, S>& p, int64_t m0, int rows, int c) {
    const int c0 = c * Shape::kInner + column(), left = int(p.of.C) - c0, valid = left < E ? left : E;
    const T* from = p.of.x.row(m0 + row()) + c0;
#pragma unroll
    for (int i = 0; i < Shape::kXPieces; ++i)
      x[i] = load_piece<E, Shape::kWhole>(from + i * Shape::kDown * p.of.x.pitch,
                                          row() + i * Shape::kDown < rows ? valid : 0, p.x_alignment);
  }
  __device__ __forceinline__ void store_y(const A* norm, S* y) const {
    const Piece<A, E> mean = load_piece<E>(norm + column());
    const Piece<A, E> scale = load_piece<E>(norm + Shape::kInner + column());
    const Piece<A, E> bias = load_piece<E>(norm + 2 * Shape::kInner + column());
#pragma unroll
    for (int i = 0; i < Shape::kXPieces; ++i) {
      Piece<A, E> v;
#pragma unroll
      for (int e = 0; e < E; ++e) v.v[e] = of_centered(x[i].get(e) - mean.v[e], scale.v[e], bias.v[e]);
      store_piece(y + (row() + i * Shape::kDown) * Shape::kPitch + column(), Math::relu_operands(v));
    }
  }
  static __device__ __forceinline__ void copy_norm(const Forward<T, S>& p, int c, A* norm) {
    constexpr int P = 16 / sizeof(A), kAcross = Shape::kInner / P;
    const int of_which = thread_x() / kAcross, at = thread_x() % kAcross * P;
    if (of_which < 3)
      cp_async16(norm + of_which * Shape::kInner + at,
                 p.prepared.norm + of_which * p.prepared.Cp + c * Shape::kInner + at, 16);
  }
  static __device__ __forceinline__ void copy_weights(const Forward<T, S>& p, int n0, int c, S* panel) {
    const S* from = p.prepared.weight + int64_t(n0 + row()) * p.prepared.Cp + c * Shape::kInner + column();
#pragma unroll
    for (int i = 0; i < Shape::kWeightPieces; ++i)
      if (Shape::kChannels % Shape::kDown == 0 || row() + i * Shape::kDown < Shape::kChannels)
        cp_async16(panel + (row() + i * Shape::kDown) * Shape::kPitch + column(),
                   from + i * Shape::kDown * p.prepared.Cp, 16);
  }
};

// How a tile leaves, and the statistics of its columns.
template <class T, class Shape>
class Output {
 public:
  using A = Acc<T>;
  using S = typename Shape::S;

  // The values to take distances from, [kChannels]: the median of a column's first three, since one value far from all
  // others would cost digits.
  static __device__ __forceinline__ void choose_pivots(const T* tile, int rows, T* pivots) {
    if (thread_x() >= Shape::kChannels) return;
    const auto value = [&](int row) { return A(widen(load_one(tile + row * Shape::kOutPitch + thread_x()))); };
    const A a = value(0), b = value(1), c = value(2), low = a < b ? a : b, high = a < b ? b : a;
    store_one(pivots + thread_x(), narrow<T>(pivot_of(rows < 3 ? a : c < low ? low : high < c ? high : c)));
  }
  // Writes the tile that lies in shared memory and adds its rows to the sums.
  __device__ __forceinline__ void write(const Forward<T, S>& p, int64_t m0, int rows, int n0, const T* tile,
                                        const T* pivots) {
    if (warp() >= Shape::kCarriers) return;
    const int left = int(p.of.N) - n0 - column(), valid = left < E ? left : E;
    T* to = p.of.out.row(m0 + row()) + n0 + column();
    Piece<T, E> pieces[Shape::kOutPieces];
#pragma unroll
    for (int i = 0; i < Shape::kOutPieces; ++i) {
      pieces[i] = load_piece<E>(tile + (row() + i * D) * Shape::kOutPitch + column());
      if (row() + i * D < rows)
        store_piece<Shape::kWhole>(to + i * D * p.of.out.pitch, pieces[i], valid, p.out_alignment);
    }
    if (!p.partial.mean) return;
    const Piece<T, E> pivot = load_piece<E>(pivots + column());
    A sums[E], squares[E];
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const A from = pivot.get(e);
      sums[e] = squares[e] = A(0);
#pragma unroll
      for (int i = 0; i < Shape::kOutPieces; ++i) {
        const A distance = row() + i * D < rows ? pieces[i].get(e) - from : A(0);
        sums[e] += distance;
        squares[e] = std::fma(distance, distance, squares[e]);
      }
    }
    sum_ += of_own_column(sums);
    squares_ += of_own_column(squares);
  }

  // The moments of the block's rows, thread n those of channel n. Takes the place of the tile (`of_warps`); all threads
  // of the block must come here.
  __device__ __forceinline__ void store_moments(const Forward<T, S>& p, int rows, int n0, const T* pivots,
                                                A* of_warps) const {
    sync_block();  // the tile is read no more
    A* mine = of_warps + warp() * 64 + lane() % Shape::kOutAcross * E + lane() / Shape::kOutAcross;
    store_one(mine, sum_);
    store_one(mine + 32, squares_);
    sync_block();
    if (thread_x() >= Shape::kChannels) return;
    A sum = 0, squares = 0;
    for (int w = thread_x() / 32; w < Shape::kCarriers; w += Shape::kWarpsAcross) {
      sum += load_one(of_warps + w * 64 + lane());
      squares += load_one(of_warps + w * 64 + 32 + lane());
    }
    const A mean = sum / A(rows);
    const int64_t at = int64_t(block_y()) * p.prepared.Np + n0 + thread_x();
    store_one(p.partial.center + at, A(widen(load_one(pivots + thread_x()))));
    store_one(p.partial.mean + at, mean);
    store_one(p.partial.m2 + at, positive_part(squares - sum * mean));
  }

 private:
  static constexpr int E = Shape::kOutPiece, D = Shape::kOutDown;
  A sum_ = 0, squares_ = 0;

  static __device__ __forceinline__ int lane() { return thread_x() % 32; }
  static __device__ __forceinline__ int warp() { return thread_x() / 32; }
  static __device__ __forceinline__ int column() {
    return warp() % Shape::kWarpsAcross * 32 + lane() % Shape::kOutAcross * E;
  }
  // Four lanes read a row where a piece has 8 elements; the next four read the row 4 further, whose banks are others.
  static __device__ __forceinline__ int row() {
    const int of_lane = lane() / Shape::kOutAcross;
    return warp() / Shape::kWarpsAcross * E + (E == 8 ? of_lane % 2 * 4 + of_lane / 2 : of_lane);
  }
  // Adds the E columns of each lane over the warp's rows: in each step a lane keeps half of its columns and takes over
  // what another has of them. What is left is the sum of column lane / kOutAcross of the lane's E columns.
  static __device__ __forceinline__ A of_own_column(A (&values)[E]) {
#pragma unroll
    for (int half = E / 2, mask = 16; half > 0; half /= 2, mask /= 2) {
      const bool upper = lane() & mask;
#pragma unroll
      for (int e = 0; e < half; ++e) {
        const A given = shuffle_xor(upper ? values[e] : values[half + e], mask);
        values[e] = (upper ? values[half + e] : values[e]) + given;
      }
    }
    return values[0];
  }
};

}  // namespace dx::cuda
