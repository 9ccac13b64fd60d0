// z = relu(x * s + t) @ W^T: BatchNorm and ReLU as the prologue of the 1x1 convolution, statistics as its epilogue.
//
// Bytes: x is read once for up to 128 output channels (again, from L2, for each further 128), z written once; the
// normalised x exists only in shared memory, a chunk of 128 bytes of a row at a time. The weights come prepared (see
// conv1x1_common.h) out of L2: once per block where all of them fit the shared memory beside the rest (C up to 640 of
// 128 channels in 16 bits on an H100), since reading them for each tile would double the traffic through L2; else a
// chunk at a time.
//
// A block computes 128 rows x 128 (64) channels; 512 threads hold 32 (16) sums each. Chunks of x are double-buffered:
// while one is multiplied, the next one, be it of the next tile, is on its way to registers (32 bytes a thread, 16 KiB
// a block), where it is normalised, by constants that came to shared memory a chunk earlier. 2 x 128 rows x (128 + 16)
// bytes = 36 KiB, and as much for weights that come in chunks.
//
// The tile leaves through shared memory, so that rows are written in pieces of 16 bytes; the threads that carry them
// also take the statistics, of the values as stored: sums of the distances from one of the column's values,
// and of their squares. A warp carries 32 columns, and each of its lanes keeps the two sums of one of them for the
// whole block; at its end they become mean and squared deviations, which a second kernel merges (Chan) across blocks,
// always in the same order. Tiles and blocks differ by GPU, and with them the last digits of the statistics; on one GPU
// they are always the same.
#include "conv1x1_common.h"
#include "kernels.h"
#include "pivot.h"

namespace dx::cuda {
namespace {

template <class T, class Math, int CHANNELS>
struct ForwardShape {
  using A = Acc<T>;
  using S = typename Math::Operand;
  static constexpr int kThreads = sizeof(A) == 8 ? 256 : 512, kWarps = kThreads / 32;
  static constexpr int kRows = sizeof(A) == 8 ? 64 : 128;
  static constexpr int kChannels = CHANNELS;
  static constexpr int kPiece = 16 / sizeof(S);   // operands of 16 bytes
  static constexpr int kInner = 8 * kPiece;       // a chunk of C: 128 bytes of operands
  static constexpr int kPitch = kInner + kPiece;  // an odd number of pieces
  static constexpr int kXPieces = kRows * 8 / kThreads, kWeightPieces = kChannels * 8 / kThreads;
  static constexpr int kDown = kThreads / 8;         // rows that the threads fill at once
  static constexpr int kPanel = kChannels * kPitch;  // operands of a chunk of the weights
  static constexpr int kBuffer = kRows * kPitch;     // operands of a chunk of x
  static_assert(kPitch / kPiece % 2 == 1, "no bank conflicts");
  static_assert(kXPieces * kDown == kRows && kWeightPieces * kDown == kChannels, "threads fill whole chunks");

  // How a warp carries the tile out: 32 columns in pieces of 16 bytes, and as many rows as a piece has elements.
  static constexpr int kOutPiece = 16 / sizeof(T), kOutAcross = 32 / kOutPiece, kWarpsAcross = kChannels / 32;
  static constexpr int kOutDown = kWarps / kWarpsAcross * kOutPiece, kOutPieces = kRows / kOutDown;
  static constexpr int kOutPitch = kChannels + kOutPiece;
  static_assert(kWarps % kWarpsAcross == 0 && kOutPieces * kOutDown == kRows, "warps cover the tile");

  // The output tile, and at the end the warps' sums, take the place of the chunks of x. Behind them lie the norm's
  // constants of two chunks, the block's pivots, and the weights.
  static constexpr int kNorm = 2 * kInner;  // scale and shift of a chunk
  static constexpr int kBufferBytes = 2 * kBuffer * int(sizeof(S)), kTileBytes = kRows * kOutPitch * int(sizeof(T));
  static constexpr int kNormAt = kBufferBytes > kTileBytes ? kBufferBytes : kTileBytes;
  static constexpr int kPivotAt = kNormAt + 2 * kNorm * int(sizeof(A));
  static constexpr int kWeightsAt = (kPivotAt + kChannels * int(sizeof(T)) + 127) / 128 * 128;
  static constexpr int shared_bytes(int panels) { return kWeightsAt + panels * kPanel * int(sizeof(S)); }
  static_assert(kNormAt % 16 == 0 && kPivotAt % 16 == 0, "vector accesses");
  static_assert(kWarps * 2 * 32 * int(sizeof(A)) <= kNormAt, "the warps' sums fit the place of the chunks");
  static_assert(shared_bytes(2) <= (CHANNELS > 64 ? kWideShared : kNarrowShared), "fits where it is chosen");

  using Tile = typename Math::template Tile<kRows, kChannels, kThreads, 4>;
};

using Typical = ForwardShape<bfloat16, TensorMath<bfloat16>, 128>;
static_assert(Typical::shared_bytes(640 / 64) <= 227 * 1024 && Typical::shared_bytes(704 / 64) > 227 * 1024,
              "the weights of 640 channels stay in an H100's shared memory");

template <class A>
struct PartialMoments {
  int rows;               // of each block but the last
  A *center, *mean, *m2;  // [blocks, Np], the mean as a distance from the center; or null: no statistics wanted
};

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
      x[i] = load_piece<E>(from + i * Shape::kDown * p.of.x.pitch, row() + i * Shape::kDown < rows ? valid : 0,
                           p.x_alignment);
  }
  __device__ __forceinline__ void store_y(const A* norm, S* y) const {
    const Piece<A, E> scale = load_piece<E>(norm + column());
    const Piece<A, E> shift = load_piece<E>(norm + Shape::kInner + column());
#pragma unroll
    for (int i = 0; i < Shape::kXPieces; ++i) {
      Piece<A, E> v;
#pragma unroll
      for (int e = 0; e < E; ++e) v.v[e] = affine(A(x[i].get(e)), scale.v[e], shift.v[e]);
      store_piece(y + (row() + i * Shape::kDown) * Shape::kPitch + column(), Math::relu_operands(v));
    }
  }
  static __device__ __forceinline__ void copy_norm(const Forward<T, S>& p, int c, A* norm) {
    constexpr int P = 16 / sizeof(A), kAcross = Shape::kInner / P;
    const int of_which = thread_x() / kAcross, at = thread_x() % kAcross * P;
    if (of_which < 2)
      cp_async16(norm + of_which * Shape::kInner + at,
                 p.prepared.norm + of_which * p.prepared.Cp + c * Shape::kInner + at, 16);
  }
  static __device__ __forceinline__ void copy_weights(const Forward<T, S>& p, int n0, int c, S* panel) {
    const S* from = p.prepared.weight + int64_t(n0 + row()) * p.prepared.Cp + c * Shape::kInner + column();
#pragma unroll
    for (int i = 0; i < Shape::kWeightPieces; ++i)
      cp_async16(panel + (row() + i * Shape::kDown) * Shape::kPitch + column(), from + i * Shape::kDown * p.prepared.Cp,
                 16);
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
    const int left = int(p.of.N) - n0 - column(), valid = left < E ? left : E;
    T* to = p.of.out.row(m0 + row()) + n0 + column();
    Piece<T, E> pieces[Shape::kOutPieces];
#pragma unroll
    for (int i = 0; i < Shape::kOutPieces; ++i) {
      pieces[i] = load_piece<E>(tile + (row() + i * D) * Shape::kOutPitch + column());
      if (row() + i * D < rows) store_piece(to + i * D * p.of.out.pitch, pieces[i], valid, p.out_alignment);
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
    for (int w = thread_x() / 32; w < Shape::kWarps; w += Shape::kWarpsAcross) {
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

template <class T, class Math, int CHANNELS>
__global__ void __launch_bounds__(ForwardShape<T, Math, CHANNELS>::kThreads, 1)
    bn_relu_conv1x1_tiles(const __grid_constant__ Forward<T, typename Math::Operand> p) {
  using Shape = ForwardShape<T, Math, CHANNELS>;
  using A = Acc<T>;
  using S = typename Math::Operand;
  DX_SHARED_BYTES(shared);
  S* const buffers = reinterpret_cast<S*>(shared);
  S* const panels = reinterpret_cast<S*>(shared + Shape::kWeightsAt);
  T* const tile = reinterpret_cast<T*>(shared);
  A* const norm = reinterpret_cast<A*>(shared + Shape::kNormAt);
  T* const pivots = reinterpret_cast<T*>(shared + Shape::kPivotAt);
  const int n0 = int(block_x()) * CHANNELS;
  const int64_t first = int64_t(block_y()) * p.partial.rows;
  const int rows = rows_from(p.of.M, first, p.partial.rows);

  // A step is a chunk of a tile; its buffers are those of its parity.
  int steps = (rows + Shape::kRows - 1) / Shape::kRows * p.chunks;  // left, with the present one
  int ahead = 2 % p.chunks;                                         // the chunk two steps further
  int side = 0;
  Output<T, Shape> output;
  Chunk<T, Shape, Math> chunk;
  chunk.load_x(p, first, rows, 0);
  chunk.copy_norm(p, 0, norm);
  chunk.copy_norm(p, 1 % p.chunks, norm + Shape::kNorm);
  cp_async_commit();
  for (int c = 0; c < (p.resident ? p.chunks : 1); ++c) chunk.copy_weights(p, n0, c, panels + c * Shape::kPanel);
  cp_async_commit();
  cp_async_wait<1>();  // for the constants alone
  for (int done = 0; done < rows; done += Shape::kRows) {
    sync_block();  // the tile before is out of shared memory, the first constants are there
    chunk.store_y(norm + side * Shape::kNorm, buffers + side * Shape::kBuffer);
    typename Shape::Tile sums;
    sums.begin([&](int n) { return p.of.out_bias && n0 + n < p.of.N ? load_one(p.of.out_bias + n0 + n) : A(0); });
    for (int c = 0; c < p.chunks; ++c, --steps, side ^= 1) {
      cp_async_wait<0>();
      sync_block();  // this chunk is there, and nobody reads the one before any more
      const bool last = c + 1 == p.chunks;
      if (steps > 1) {
        const int next = last ? 0 : c + 1, at = last ? done + Shape::kRows : done;
        if (!p.resident) chunk.copy_weights(p, n0, next, panels + (side ^ 1) * Shape::kPanel);
        if (steps > 2) chunk.copy_norm(p, ahead, norm + side * Shape::kNorm);
        cp_async_commit();
        chunk.load_x(p, first + at, rows - at, next);
        ahead = ahead + 1 == p.chunks ? 0 : ahead + 1;
      }
      sums.template multiply<Shape::kInner, Inner::k, Inner::k>(buffers + side * Shape::kBuffer, Shape::kPitch,
                                                                panels + (p.resident ? c : side) * Shape::kPanel,
                                                                Shape::kPitch);
      if (!last) chunk.store_y(norm + (side ^ 1) * Shape::kNorm, buffers + (side ^ 1) * Shape::kBuffer);
    }
    sync_block();
    const bool relu = p.of.out_relu;
    sums.store(tile, Shape::kOutPitch, [&](A v) { return relu ? positive_part(v) : v; });
    sync_block();
    if (done == 0 && p.partial.mean) {
      output.choose_pivots(tile, rows, pivots);
      sync_block();
    }
    output.write(p, first + done, rows - done, n0, tile, pivots);
  }
  if (p.partial.mean) output.store_moments(p, rows, n0, pivots, reinterpret_cast<A*>(shared));
}

template <class A>
struct MergeMoments {
  int64_t M, N, Np, blocks;
  PartialMoments<A> partial;
  A *mean, *var;  // [N]
};

// A warp for each channel: lane i merges the blocks i, i + 32, ..., then the lanes are merged pairwise.
template <class A>
__global__ void __launch_bounds__(256) merge_moments(const __grid_constant__ MergeMoments<A> p) {
  const int64_t n = int64_t(block_x()) * 8 + thread_x() / 32;
  Moments<double> all = {0, 0, 0};
  if (n < p.N)
#pragma unroll 2
    for (int64_t b = thread_x() % 32; b < p.blocks; b += 32) {
      const int rows = rows_from(p.M, b * p.partial.rows, p.partial.rows);
      all = merge(all, Moments<double>{double(rows),
                                       double(load_one(p.partial.center + b * p.Np + n)) +
                                           double(load_one(p.partial.mean + b * p.Np + n)),
                                       double(load_one(p.partial.m2 + b * p.Np + n))});
    }
  for (int by = 16; by > 0; by /= 2)
    all =
        merge(all, Moments<double>{shuffle_down(all.count, by), shuffle_down(all.mean, by), shuffle_down(all.m2, by)});
  if (n < p.N && thread_x() % 32 == 0) {
    store_one(p.mean + n, A(all.mean));
    store_one(p.var + n, A(all.m2 / all.count));
  }
}

template <class T, class Shape>
struct ForwardPlan {
  Forward<T, typename Shape::S> p = {};
  int64_t blocks;
  size_t bytes;
  ForwardPlan(const BnReluConv1x1<T>& of, void* workspace) {
    using A = Acc<T>;
    Carver carver(workspace);
    p.of = of;
    auto& to = p.prepared;
    to.Np = round_up(of.N, Shape::kChannels);
    to.Cp = round_up(of.C, Shape::kInner);
    to.weight = carver.take<typename Shape::S>(to.Np * to.Cp);
    to.norm = carver.take<A>(3 * to.Cp);
    const int64_t tiles = ceil_div(of.M, Shape::kRows);
    p.partial.rows = int(tiles_of_a_block(tiles, to.Np / Shape::kChannels, multiprocessors())) * Shape::kRows;
    blocks = at_least_one(ceil_div(of.M, p.partial.rows));
    if (of.out_mean) {
      p.partial.center = carver.take<A>(blocks * to.Np);
      p.partial.mean = carver.take<A>(blocks * to.Np);
      p.partial.m2 = carver.take<A>(blocks * to.Np);
    }
    p.chunks = int(to.Cp / Shape::kInner);
    p.resident = Shape::shared_bytes(p.chunks) <= most_shared_bytes();
    p.x_alignment = alignment_of(of.x.data, of.x.pitch);
    p.out_alignment = alignment_of(of.out.data, of.out.pitch);
    bytes = carver.used();
  }
};

}  // namespace

template <class T>
size_t bn_relu_conv1x1_workspace(const BnReluConv1x1<T>& p) {
  return choose<T>(p.N, p.tf32, [&](auto choice) {
    using C = decltype(choice);
    return ForwardPlan<T, ForwardShape<T, typename C::Math, C::kChannels>>(p, nullptr).bytes;
  });
}

template <class T>
cudaError_t bn_relu_conv1x1(const BnReluConv1x1<T>& p, Stream stream, void* workspace) {
  using A = Acc<T>;
  if (p.M == 0) return cudaSuccess;
  return choose<T>(p.N, p.tf32, [&](auto choice) {
    using C = decltype(choice);
    using Math = typename C::Math;
    using S = typename Math::Operand;
    using Shape = ForwardShape<T, Math, C::kChannels>;
    const ForwardPlan<T, Shape> plan(p, workspace);
    Prepare<A, S> prepare = {};
    prepare.M = p.M, prepare.C = p.C, prepare.N = p.N;
    prepare.weight = p.weight;
    prepare.norm = p.norm;
    prepare.to = plan.p.prepared;
    cudaError_t error = launch_prepare<Math>(prepare, stream);
    if (error != cudaSuccess) return error;
    const dim3 grid(unsigned(plan.p.prepared.Np / C::kChannels), unsigned(plan.blocks));
    error = launch(bn_relu_conv1x1_tiles<T, Math, C::kChannels>, grid, Shape::kThreads,
                   Shape::shared_bytes(plan.p.resident ? plan.p.chunks : 2), stream, plan.p);
    if (error != cudaSuccess || !p.out_mean) return error;
    const MergeMoments<A> merging = {p.M, p.N, plan.p.prepared.Np, plan.blocks, plan.p.partial, p.out_mean, p.out_var};
    return launch(merge_moments<A>, dim3(unsigned(ceil_div(p.N, 8))), 256, 0, stream, merging);
  });
}

#define DX_INSTANTIATE(T)                                                \
  template size_t bn_relu_conv1x1_workspace<T>(const BnReluConv1x1<T>&); \
  template cudaError_t bn_relu_conv1x1<T>(const BnReluConv1x1<T>&, Stream, void*);
DX_INSTANTIATE(float)
DX_INSTANTIATE(double)
DX_INSTANTIATE(bfloat16)
DX_INSTANTIATE(float16)
#undef DX_INSTANTIATE

}  // namespace dx::cuda
