// z = relu(x * s + t) @ W^T: BatchNorm and ReLU as the prologue of the 1x1 convolution, statistics as its epilogue.
//
// Bytes: x is read once for up to 128 output channels (again, from L2, for each further 128), z written once; the
// normalised x exists only in shared memory, a chunk of 128 bytes of a row at a time. The weights come prepared (see
// conv1x1_common.h) out of L2: once per block where all of them fit the shared memory beside the rest (C up to 576 of
// 128 channels in 16 bits on an H100), since reading them for each tile would double the traffic through L2; else a
// chunk at a time.
//
// A block computes 128 rows x 128 (64) channels; 512 threads hold 32 (16) sums each. Chunks of x are double-buffered:
// while one is multiplied, the next one, be it of the next tile, is on its way to registers (32 bytes a thread, 16 KiB
// a block), where it is normalised. 2 x 128 rows x (128 + 16) bytes = 36 KiB, and as much for weights that come in
// chunks.
//
// The tile leaves through shared memory, so that rows are written in pieces of 16 bytes; the threads that carry them
// also take the statistics, of the values as stored: mean and squared deviations over a thread's rows, merged (Chan)
// across threads, warps, the block's tiles, and by a second kernel across blocks, always in the same order. Means are
// kept as distances from a value of the column, so that a mean much larger than the deviation costs no digits. Tiles
// and blocks differ by GPU, and with them the last digits of the statistics; on one GPU they are always the same.
#include "conv1x1_common.h"
#include "kernels.h"

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

  static constexpr int kOutPiece = 16 / sizeof(T), kOutAcross = kChannels / kOutPiece;
  static constexpr int kOutDown = kThreads / kOutAcross, kOutPieces = kRows / kOutDown;
  static constexpr int kOutPitch = kChannels + kOutPiece;
  static_assert(kOutAcross <= 32 && 32 % kOutAcross == 0, "a warp holds whole rows");
  static_assert(kOutPieces * kOutDown == kRows, "threads cover the tile");

  // The output tile and the warps' moments take the place of the chunks of x; behind them lie the weights.
  static constexpr int kMomentsAt = kRows * kOutPitch * int(sizeof(T));
  static constexpr int kEpilogueBytes = kMomentsAt + kWarps * (2 * kChannels + 1) * int(sizeof(A));
  static constexpr int kBufferBytes = 2 * kBuffer * int(sizeof(S));
  static constexpr int kWeightsAt = ((kBufferBytes > kEpilogueBytes ? kBufferBytes : kEpilogueBytes) + 127) / 128 * 128;
  static constexpr int shared_bytes(int panels) { return kWeightsAt + panels * kPanel * int(sizeof(S)); }
  static_assert(shared_bytes(2) <= (CHANNELS > 64 ? kWideShared : kNarrowShared), "fits where it is chosen");

  using Tile = typename Math::template Tile<kRows, kChannels, kThreads, 4>;
};

using Typical = ForwardShape<bfloat16, TensorMath<bfloat16>, 128>;
static_assert(Typical::shared_bytes(576 / 64) <= 227 * 1024 && Typical::shared_bytes(640 / 64) > 227 * 1024,
              "the weights of 576 channels stay in an H100's shared memory");

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

// One chunk of a block's operands: x through registers, the weights by asynchronous copy.
template <class T, class Shape, class Math>
struct Chunk {
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
  __device__ __forceinline__ void store_y(const Forward<T, S>& p, int c, S* y) const {
    const int c0 = c * Shape::kInner + column();
    const Piece<Acc<T>, E> scale = load_piece<E>(p.prepared.norm + c0);
    const Piece<Acc<T>, E> shift = load_piece<E>(p.prepared.norm + p.prepared.Cp + c0);
#pragma unroll
    for (int i = 0; i < Shape::kXPieces; ++i) {
      Piece<Acc<T>, E> v;
#pragma unroll
      for (int e = 0; e < E; ++e) v.v[e] = positive_part(affine(Acc<T>(x[i].get(e)), scale.v[e], shift.v[e]));
      store_piece(y + (row() + i * Shape::kDown) * Shape::kPitch + column(), Math::operands(v));
    }
  }
  static __device__ __forceinline__ void copy_weights(const Forward<T, S>& p, int n0, int c, S* panel) {
    const S* from = p.prepared.weight + int64_t(n0 + row()) * p.prepared.Cp + c * Shape::kInner + column();
#pragma unroll
    for (int i = 0; i < Shape::kWeightPieces; ++i)
      cp_async16(panel + (row() + i * Shape::kDown) * Shape::kPitch + column(), from + i * Shape::kDown * p.prepared.Cp,
                 16);
    cp_async_commit();
  }
};

// Writes the tile that lies in shared memory; merges the statistics of its rows into `moments`, which thread n keeps
// for channel n of the tile.
template <class T, class Shape, class S>
__device__ __forceinline__ void write_tile(const Forward<T, S>& p, int64_t m0, int rows, int n0, const T* tile,
                                           Acc<T>* of_warps, bool first_tile, Acc<T>& center,
                                           Moments<Acc<T>>& moments) {
  using A = Acc<T>;
  constexpr int E = Shape::kOutPiece, N = Shape::kChannels;
  const int column = thread_x() % Shape::kOutAcross * E, row = thread_x() / Shape::kOutAcross, warp = thread_x() / 32;
  const int left = int(p.of.N) - n0 - column, valid = left < E ? left : E;
  T* to = p.of.out.row(m0 + row) + n0 + column;
  A count = 0;
  Piece<T, E> pieces[Shape::kOutPieces];
#pragma unroll
  for (int i = 0; i < Shape::kOutPieces; ++i) {
    pieces[i] = load_piece<E>(tile + (row + i * Shape::kOutDown) * Shape::kOutPitch + column);
    if (row + i * Shape::kOutDown >= rows) continue;
    count += A(1);
    store_piece(to + i * Shape::kOutDown * p.of.out.pitch, pieces[i], valid, p.out_alignment);
  }
  if (!p.partial.mean) return;

  const A share = count > A(0) ? A(1) / count : A(0);
  const Piece<T, E> firsts = load_piece<E>(tile + column);  // the tile's first row
  A *means = of_warps + warp * (2 * N + 1), *m2s = means + N;
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const A here = firsts.get(e);
    A sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < Shape::kOutPieces; ++i)
      if (row + i * Shape::kOutDown < rows) sum += pieces[i].get(e) - here;
    const A mean = sum * share;
#pragma unroll
    for (int i = 0; i < Shape::kOutPieces; ++i) {
      const A deviation = pieces[i].get(e) - here - mean;
      if (row + i * Shape::kOutDown < rows) squares += deviation * deviation;
    }
    Moments<A> mine = {count, mean, squares};
#pragma unroll
    for (int across = Shape::kOutAcross; across < 32; across *= 2)
      mine = merge(mine, Moments<A>{shuffle_xor(mine.count, across), shuffle_xor(mine.mean, across),
                                    shuffle_xor(mine.m2, across)});
    if (thread_x() % 32 < Shape::kOutAcross) {
      store_one(means + column + e, mine.mean);
      store_one(m2s + column + e, mine.m2);
      if (e == 0 && column == 0) store_one(m2s + N, mine.count);
    }
  }
  sync_block();
  if (thread_x() < N) {
    const A here = widen(load_one(tile + thread_x()));
    if (first_tile) center = here;
    for (int w = 0; w < Shape::kWarps; ++w) {
      const A* of_warp = of_warps + w * (2 * N + 1);
      const A mean = load_one(of_warp + thread_x()) + (here - center);
      moments = merge(moments, Moments<A>{load_one(of_warp + 2 * N), mean, load_one(of_warp + N + thread_x())});
    }
  }
}

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
  const int n0 = int(block_x()) * CHANNELS;
  const int64_t first = int64_t(block_y()) * p.partial.rows;
  const int rows = rows_from(p.of.M, first, p.partial.rows);
  A center = 0;
  Moments<A> moments = {0, 0, 0};

  Chunk<T, Shape, Math> chunk;
  chunk.load_x(p, first, rows, 0);
  for (int c = 0; c < (p.resident ? p.chunks : 1); ++c) chunk.copy_weights(p, n0, c, panels + c * Shape::kPanel);
  int side = 0;
  for (int done = 0; done < rows; done += Shape::kRows) {
    if (done > 0) sync_block();  // the tile before is out of shared memory
    chunk.store_y(p, 0, buffers + side * Shape::kBuffer);
    typename Shape::Tile sums;
    sums.begin([&](int n) { return p.of.out_bias && n0 + n < p.of.N ? load_one(p.of.out_bias + n0 + n) : A(0); });
    for (int c = 0; c < p.chunks; ++c, side ^= 1) {
      cp_async_wait<0>();
      sync_block();  // this chunk is there, and nobody reads the one before any more
      const bool last = c + 1 == p.chunks;
      if (!last || done + Shape::kRows < rows) {
        const int next = last ? 0 : c + 1, at = last ? done + Shape::kRows : done;
        if (!p.resident) chunk.copy_weights(p, n0, next, panels + (side ^ 1) * Shape::kPanel);
        chunk.load_x(p, first + at, rows - at, next);
      }
      sums.template multiply<Shape::kInner, Inner::k, Inner::k>(buffers + side * Shape::kBuffer, Shape::kPitch,
                                                                panels + (p.resident ? c : side) * Shape::kPanel,
                                                                Shape::kPitch);
      if (!last) chunk.store_y(p, c + 1, buffers + (side ^ 1) * Shape::kBuffer);
    }
    sync_block();
    const bool relu = p.of.out_relu;
    sums.store(tile, Shape::kOutPitch, [&](A v) { return relu ? positive_part(v) : v; });
    sync_block();
    write_tile<T, Shape>(p, first + done, rows - done, n0, tile, reinterpret_cast<A*>(shared + Shape::kMomentsAt),
                         done == 0, center, moments);
  }
  if (p.partial.mean && thread_x() < CHANNELS) {
    const int64_t at = int64_t(block_y()) * p.prepared.Np + n0 + thread_x();
    store_one(p.partial.center + at, center);
    store_one(p.partial.mean + at, moments.mean);
    store_one(p.partial.m2 + at, moments.m2);
  }
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
