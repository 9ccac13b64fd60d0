// One block's tile in the forward pass of the 3x3 convolution (see conv3x3.cu): its shape, and how it leaves, with the
// statistics of its columns.
#pragma once

#include "conv3x3_common.h"
#include "partial_moments.h"
#include "pivot.h"

namespace dx::cuda {

// LARGE: 512 rows for 8 warps, each with products of 64 rows x all channels; else 128 rows for 4 warps.
template <class T, class Math, int CHANNELS, bool LARGE>
struct Forward3x3Shape {
  using A = Acc<T>;
  using S = typename Math::Operand;
  using Chunk = ChunkShape<S>;
  static constexpr bool kPlain = std::is_same_v<Math, PlainMath<A>>;
  static_assert(!(kPlain && LARGE), "so many sums of a thread's would not stay in registers");
  static constexpr int kThreads = LARGE || kPlain ? 256 : 128, kRows = LARGE ? 512 : 128;
  static constexpr int kChannels = CHANNELS;
  using Tile = typename RowsTileOf<Math, kRows, kChannels, kThreads, kThreads / 32>::type;

  // How threads carry the tile out: pieces of 8 bytes, a column of them each.
  static constexpr int kOutPiece = 8 / int(sizeof(T)), kOutAcross = kChannels / kOutPiece,
                       kOutDown = kThreads / kOutAcross;
  static constexpr int kOutPitch = kChannels + 16 / int(sizeof(T));
  static constexpr int kTileBytes = kRows * kOutPitch * int(sizeof(T));
  static_assert(kOutDown >= 1, "a thread for each column of pieces");

  // Shared memory: a row of zeros; pivots; constants of the norm; two buffers, each for a halo or the tile on its way
  // out; panels of weights.
  static constexpr int kPivotAt = 128;
  static_assert(Chunk::kInner * int(sizeof(S)) <= kPivotAt, "room for the zeros");
  static constexpr int kNormAt = kPivotAt + (kChannels * int(sizeof(T)) + 15) / 16 * 16;
  static int buffer_bytes(const Window& window) {
    const int halo = (kRows + 2 * window.reach) * Chunk::kPitch * int(sizeof(S));
    return halo > kTileBytes ? halo : kTileBytes;
  }
  static int panel_bytes(const Window& window) { return window.taps * kChannels * Chunk::kPitch * int(sizeof(S)); }
  static constexpr int kSumsBytes = kOutDown * 2 * kChannels * int(sizeof(A));
  static_assert(kSumsBytes <= kTileBytes, "the threads' sums fit the place of the tile");
};

template <class T, class S>
struct Forward3x3 {
  BnReluConv3x3<T> of;
  Window window;
  Prepared3x3<Acc<T>, S> prepared;
  PartialMoments<Acc<T>> partial;
  int x_alignment, out_alignment;
  int chunks, steps;          // of C; with those of all planes
  bool resident;              // the weights of all steps stay in shared memory
  int buffers_at, panels_at;  // in shared memory
  int buffer_bytes, panel_bytes;
};

// How a tile leaves, and the statistics of its columns: sums of distances from one of the column's values and of their
// squares, of the values as stored. A thread carries a few columns, always the same ones.
template <class T, class Shape>
class Output3x3 {
 public:
  using A = Acc<T>;
  static constexpr int E = Shape::kOutPiece;

  // The values to take distances from: the median of a column's first three, since one far from all others would cost
  // digits.
  static __device__ __forceinline__ void choose_pivots(const T* tile, int rows, T* pivots) {
    if (thread_x() >= Shape::kChannels) return;
    const auto value = [&](int row) { return A(widen(load_one(tile + row * Shape::kOutPitch + thread_x()))); };
    const A a = value(0), b = value(1), c = value(2), low = a < b ? a : b, high = a < b ? b : a;
    store_one(pivots + thread_x(), narrow<T>(pivot_of(rows < 3 ? a : c < low ? low : high < c ? high : c)));
  }

  // Writes the rows that exist of a tile that lies in shared memory, and adds them to the sums.
  template <class Params>
  __device__ __forceinline__ void write(const Params& p, int64_t m0, int rows, int n0, const T* tile, const T* pivots) {
    if (row() >= Shape::kOutDown) return;
    const int left = int(p.of.N) - n0 - column(), valid = left < 0 ? 0 : left < E ? left : E;
    A pivot[E] = {};
    if (p.partial.mean)
#pragma unroll
      for (int e = 0; e < E; ++e) pivot[e] = widen(load_one(pivots + column() + e));
    const int end = rows < Shape::kRows ? rows : Shape::kRows;
    for (int r = row(); r < end; r += Shape::kOutDown) {
      const Piece<T, E> piece = load_piece<E>(tile + r * Shape::kOutPitch + column());
      store_piece<false>(p.of.out.row(m0 + r) + n0 + column(), piece, valid, p.out_alignment);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const A distance = piece.get(e) - pivot[e];
        sums_[e] += distance;
        squares_[e] = std::fma(distance, distance, squares_[e]);
      }
    }
  }

  // The moments of the block's rows, thread n those of channel n. of_threads takes the place of the tile; all threads
  // of the block must come here.
  template <class Params>
  __device__ __forceinline__ void store_moments(const Params& p, int rows, int n0, const T* pivots,
                                                A* of_threads) const {
    constexpr int N = Shape::kChannels;
    sync_block();  // the tile is read no more
    if (row() < Shape::kOutDown)
#pragma unroll
      for (int e = 0; e < E; ++e) {
        store_one(of_threads + row() * 2 * N + column() + e, sums_[e]);
        store_one(of_threads + row() * 2 * N + N + column() + e, squares_[e]);
      }
    sync_block();
    if (thread_x() >= N) return;
    A sum = 0, squares = 0;
    for (int i = 0; i < Shape::kOutDown; ++i) {
      sum += load_one(of_threads + i * 2 * N + thread_x());
      squares += load_one(of_threads + i * 2 * N + N + thread_x());
    }
    const A mean = sum / A(rows);
    const int64_t at = int64_t(block_y()) * p.prepared.Np + n0 + thread_x();
    store_one(p.partial.center + at, A(widen(load_one(pivots + thread_x()))));
    store_one(p.partial.mean + at, mean);
    store_one(p.partial.m2 + at, positive_part(squares - sum * mean));
  }

 private:
  A sums_[E] = {}, squares_[E] = {};

  static __device__ __forceinline__ int column() { return thread_x() % Shape::kOutAcross * E; }
  static __device__ __forceinline__ int row() { return thread_x() / Shape::kOutAcross; }
};

}  // namespace dx::cuda
