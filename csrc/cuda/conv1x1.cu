// z = relu((x - m) * s + b) @ W^T: BatchNorm and ReLU as the prologue of the 1x1 convolution, statistics as its
// epilogue.
//
// Bytes: x is read once for each tile of up to 128 output channels (but the first time from L2), z written once; the
// normalised x exists only in shared memory, a chunk of 128 bytes of a row at a time. The weights come prepared (see
// conv1x1_common.h) out of L2: once per block where all of them fit the shared memory beside the rest (C up to 640 of
// 128 channels in 16 bits on an H100), since reading them for each tile would double the traffic through L2; else a
// chunk at a time.
//
// A block computes 128 rows x 128 (96, 64) channels; 512 threads hold 32 (24, 16) sums each. Chunks of x are
// double-buffered: while one is multiplied, the next one, be it of the next tile, is on its way to registers (32 bytes
// a thread, 16 KiB a block), where it is normalised, by constants that came to shared memory a chunk earlier. 2 x 128
// rows x (128 + 16) bytes = 36 KiB, and as much for weights that come in chunks.
//
// The tile leaves through shared memory, so that rows are written in pieces of 16 bytes; the threads that carry them
// also take the statistics, of the values as stored: sums of the distances from one of the column's values,
// and of their squares. A warp carries 32 columns, and each of its lanes keeps the two sums of one of them for the
// whole block; at its end they become mean and squared deviations, which a second kernel merges (Chan) across blocks,
// always in the same order. Tiles and blocks differ by GPU, and with them the last digits of the statistics; on one GPU
// they are always the same.
#include "conv1x1_forward_tile.h"
#include "kernels.h"

namespace dx::cuda {
namespace {

template <class T, class Math, int CHANNELS, bool WHOLE>
__global__ void __launch_bounds__(ForwardShape<T, Math, CHANNELS>::kThreads, 1)
    bn_relu_conv1x1_tiles(const __grid_constant__ Forward<T, typename Math::Operand> p) {
  using Shape = ForwardShape<T, Math, CHANNELS, WHOLE>;
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
    if (p.of.out_relu)  // asked once, not of each value
      sums.store(tile, Shape::kOutPitch, [](A v) { return positive_part(v); });
    else
      sums.store(tile, Shape::kOutPitch, [](A v) { return v; });
    sync_block();
    if (done == 0 && p.partial.mean) {
      output.choose_pivots(tile, rows, pivots);
      sync_block();
    }
    output.write(p, first + done, rows - done, n0, tile, pivots);
  }
  if (p.partial.mean) output.store_moments(p, rows, n0, pivots, reinterpret_cast<A*>(shared));
}

template <class T, class Shape>
struct ForwardPlan {
  Forward<T, typename Shape::S> p = {};
  int64_t blocks;
  size_t bytes;
  bool whole;  // all rows consist of whole aligned pieces
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
    if (of.out_mean) p.partial.take(carver, blocks * to.Np);
    p.chunks = int(to.Cp / Shape::kInner);
    p.resident = Shape::shared_bytes(p.chunks) <= most_shared_bytes();
    p.x_alignment = alignment_of(of.x.data, of.x.pitch);
    p.out_alignment = alignment_of(of.out.data, of.out.pitch);
    whole =
        whole_pieces<Shape::kPiece, T>(of.C, p.x_alignment) && whole_pieces<Shape::kOutPiece, T>(of.N, p.out_alignment);
    bytes = carver.used();
  }
};

}  // namespace

template <class T>
size_t bn_relu_conv1x1_workspace(const BnReluConv1x1<T>& p) {
  return choose<T, false>(p.N, p.tf32, [&](auto choice) {
    using C = decltype(choice);
    return ForwardPlan<T, ForwardShape<T, typename C::Math, C::kChannels>>(p, nullptr).bytes;
  });
}

template <class T>
cudaError_t bn_relu_conv1x1(const BnReluConv1x1<T>& p, Stream stream, void* workspace,
                            const UnmergedMoments<Acc<T>>& left) {
  using A = Acc<T>;
  if (p.M == 0) return cudaSuccess;
  return choose<T, false>(p.N, p.tf32, [&](auto choice) {
    using C = decltype(choice);
    using Math = typename C::Math;
    using Shape = ForwardShape<T, Math, C::kChannels>;
    const ForwardPlan<T, Shape> plan(p, workspace);
    auto* kernel = bn_relu_conv1x1_tiles<T, Math, C::kChannels, false>;
    if constexpr (sizeof(T) < 8)
      if (plan.whole) kernel = bn_relu_conv1x1_tiles<T, Math, C::kChannels, true>;
    const int shared = Shape::shared_bytes(plan.p.resident ? plan.p.chunks : 2);
    const auto prepare = [&] {
      return launch_prepare<Math, A>({p.M, p.C, p.N, p.weight, p.norm, {}, nullptr, nullptr, plan.p.prepared, left},
                                     stream);
    };
    return launch_convolution<Shape>(plan, prepare, kernel, size_t(shared), p.M, stream);
  });
}

#define DX_INSTANTIATE(T)                                                \
  template size_t bn_relu_conv1x1_workspace<T>(const BnReluConv1x1<T>&); \
  template cudaError_t bn_relu_conv1x1<T>(const BnReluConv1x1<T>&, Stream, void*, const UnmergedMoments<Acc<T>>&);
DX_INSTANTIATE(float)
DX_INSTANTIATE(double)
DX_INSTANTIATE(bfloat16)
DX_INSTANTIATE(float16)
#undef DX_INSTANTIATE

}  // namespace dx::cuda
