// The backward pass of z = relu((x - m) * s + b) @ W^T in one pass over x and G, for up to 128 output channels, or 192
// where a block can have 227 KiB of shared memory:
//   dz    (through norm2 and its ReLU, when grad_out is the gradient behind them)
//   y   = relu((x - m) * s + b)                 recomputed
//   dW += dz^T @ y                              one sum per block
//   dy  = (dz @ W) masked by y > 0              never stored
//   G   = s * dy + (G | grad_in | 0),  sum(dy),  sum(dy (x - m))
//
// A block owns a slice of 128 (16-bit operands; else 64, double 32) columns of x and some rows, in tiles of 64 (where
// operands or channels are others 32, double 16). Its slice of W stays in shared memory, its dW and the two sums of
// each column stay in registers. Bytes: x once, G read and written once, grad_out and z once for each slice: the blocks
// of the same rows are neighbours in the grid, so all but the first find them in L2. dW and the sums leave once per
// block, and a second kernel adds them in the order of the blocks.
//
// With more output channels than a tile has (or no dW wanted), the kernel runs without dW, the channels in turns, and
// dW is a second run of it that has no dgrad, a block for each tile of channels: x and dz are then read twice (4C + 4N
// elements a row instead of 3C + 2N), since dW of more channels would not stay in registers.
//
// 256 threads, so that each may have 255 registers: 64 sums of dW, 32 of dy, 16 of columns, and the warps' parts of the
// products are large (64 x 32 and 32 x 32), which is what reads little of shared memory. Rows come by asynchronous
// copy: x, grad_out and z of the next tile are asked for as soon as this one's have become dz and y, and arrive while
// this one is multiplied; G is asked for when the last one has left, and is awaited behind the products. What a thread
// copies of grad_out, z and G it also reads, or writes out, itself, so that they need one place, without a barrier; x
// has two, since its tile is read again behind the products. dy goes from the sums' registers straight into G's tile,
// which leaves in pieces of 16 bytes. 128 channels of bf16: W 34 KiB, dz 17, y 17, grad_out and z 32, x 34, G 17 and
// constants of 4 KiB fit an A100.
#include "conv1x1_backward_tile.h"
#include "kernels.h"
#include "merge_blocks.h"

namespace dx::cuda {
namespace {

template <class T, class Math, int CHANNELS, bool ASYNC, bool DGRAD, bool WGRAD>
__global__ void __launch_bounds__(BackwardShape<T, Math, CHANNELS>::kThreads, BackwardShape<T, Math, CHANNELS>::kBlocks)
    bn_relu_conv1x1_backward_tiles(const __grid_constant__ Backward<T, typename Math::Operand> p) {
  using Shape = BackwardShape<T, Math, CHANNELS>;
  using A = Acc<T>;
  DX_SHARED_BYTES(shared);
  const int c0 = int(block_x()) * Shape::kColumns;
  const int64_t first = int64_t(block_y()) * p.rows;
  const int rows = rows_from(p.of.M, first, p.rows);
  const int n_first = DGRAD ? 0 : int(block_z()) * CHANNELS;
  const int turns = DGRAD && !WGRAD ? p.turns : 1;
  const bool resident = !(DGRAD && !WGRAD) || p.resident;
  const auto zero = [](int) { return A(0); };
  typename Shape::Wgrad wgrad;
  if constexpr (WGRAD) wgrad.begin(zero);
  Slice<T, Shape, Math, ASYNC> slice(shared, Shape::template kPanelsAt<WGRAD>, c0);
  if constexpr (DGRAD) slice.clear_sums();

  // Copies are waited for in groups: x, grad_out and z of a tile, then its G.
  slice.copy_norm(p);
  for (int turn = 0; turn < (resident ? turns : 0); ++turn) slice.copy_panel(p, n_first + turn * CHANNELS, turn, DGRAD);
  slice.copy_grad_out(p, first, rows, n_first);
  slice.copy_x(p, first, rows, 0);
  cp_async_commit();
  if constexpr (DGRAD) slice.copy_in(p, first, rows);
  cp_async_commit();
  cp_async_wait<1>();
  sync_block();  // the constants are there

  int side = 0;
  for (int done = 0; done < rows; done += Shape::kRows, side ^= 1) {
    typename Shape::Dgrad dgrad;
    if constexpr (DGRAD) dgrad.begin(zero);
    for (int turn = 0; turn < turns; ++turn) {
      if (turn > 0) sync_block();  // dz and the panel are read no more
      const int panel = resident ? turn : 0;
      if (DGRAD && resident && turn == 0) {
        cp_async_wait<1>();  // not yet for G
      } else {
        if (!resident) slice.copy_panel(p, turn * CHANNELS, 0, true);
        cp_async_commit();
        cp_async_wait<0>();
        if (!resident) sync_block();  // the panel is there
      }
      slice.fill_dz(p, panel);
      if constexpr (WGRAD) slice.fill_y(rows - done, side);
      if (turn + 1 < turns) {
        slice.copy_grad_out(p, first + done, rows - done, (turn + 1) * CHANNELS);
      } else if (done + Shape::kRows < rows) {
        const int next = done + Shape::kRows;
        slice.copy_grad_out(p, first + next, rows - next, n_first);
        slice.copy_x(p, first + next, rows - next, side ^ 1);
      }
      cp_async_commit();
      sync_block();  // dz and y are there
      if constexpr (DGRAD)
        dgrad.template multiply<CHANNELS, Inner::k, Inner::rows>(slice.dz(), Shape::kDzPitch, slice.weights(panel),
                                                                 Shape::kPitch);
    }
    if constexpr (WGRAD)
      wgrad.template multiply<Shape::kRows, Inner::rows, Inner::rows>(slice.dz(), Shape::kDzPitch, slice.y(),
                                                                      Shape::kPitch);
    if constexpr (DGRAD) {
      cp_async_wait<1>();
      sync_block();  // G is there; dz and y are read no more
      slice.add_tile(dgrad, rows - done, side);
      sync_block();  // G is complete, x is read no more
      slice.store_tile(p, first + done, rows - done);
      if (done + Shape::kRows < rows) slice.copy_in(p, first + done + Shape::kRows, rows - done - Shape::kRows);
      cp_async_commit();
    } else {
      sync_block();  // dz and y are read no more
    }
  }
  cp_async_wait<0>();  // where there are no rows, nobody waited
  if constexpr (DGRAD) slice.store_sums(p.sums + block_y() * 2 * p.prepared.Cp + c0, p.prepared.Cp);
  if constexpr (WGRAD)
    wgrad.store(p.wgrads + (block_y() * p.prepared.Np + n_first) * p.prepared.Cp + c0, p.prepared.Cp,
                [](A v) { return v; });
}

template <class A>
struct MergeBackward {
  int64_t C, Np, Cp, blocks;
  const A *sums, *wgrads;  // wgrads null: not wanted
  A* grad_conv_weight;     // [N, C]
  NormSums<A> norm;
};

// Columns of one row of dW; the last row of the grid has those of the norm's two sums.
template <class A>
__global__ void __launch_bounds__(kMergeThreads) merge_conv1x1_backward(const __grid_constant__ MergeBackward<A> p) {
  const int64_t c = merge_column(), n = block_y();
  if (n == int64_t(grid_y()) - 1) {
    double sums[2];
    if (merge_blocks(sums, p.sums + c, p.Cp, 2 * p.Cp, p.blocks, c < p.C)) p.norm.store(c, sums);
  } else {
    double sum[1];
    if (merge_blocks(sum, p.wgrads + n * p.Cp + c, 0, p.Np * p.Cp, p.blocks, c < p.C))
      store_one(p.grad_conv_weight + n * p.C + c, A(sum[0]));
  }
}

template <class T, class Shape>
struct BackwardPlan {
  Backward<T, typename Shape::S> p = {};
  int64_t blocks;
  size_t bytes;
  bool async;  // all rows are aligned to 16 bytes
  BackwardPlan(const BnReluConv1x1Backward<T>& of, void* workspace) {
    using A = Acc<T>;
    Carver carver(workspace);
    p.of = of;
    auto& to = p.prepared;
    to.Np = round_up(of.N, Shape::kChannels);
    to.Cp = round_up(of.C, Shape::kColumns);
    to.weight = carver.take<typename Shape::S>(to.Np * to.Cp);
    to.norm = carver.take<A>(3 * to.Cp);
    if (of.z) to.z_norm = carver.take<A>(5 * to.Np);
    const int64_t tiles = ceil_div(of.M, Shape::kRows);
    // a run for dW alone has a block for each tile of channels too
    const int64_t slices = to.Cp / Shape::kColumns;
    p.rows = int(tiles_of_a_block(tiles, slices, Shape::kBlocks * multiprocessors())) * Shape::kRows;
    blocks = at_least_one(ceil_div(of.M, p.rows));
    p.sums = carver.take<A>(blocks * 2 * to.Cp);
    if (of.grad_conv_weight) p.wgrads = carver.take<A>(blocks * to.Np * to.Cp);
    p.adds = of.grad_in || of.accumulate;
    p.in = of.grad_in ? of.grad_in : of.accumulate ? Rows<const T>{of.grad_x.data, of.grad_x.pitch} : of.x;
    p.x_alignment = alignment_of(of.x.data, of.x.pitch);
    p.grad_out_alignment = alignment_of(of.grad_out.data, of.grad_out.pitch);
    p.z_alignment = alignment_of(of.z.data, of.z.pitch);
    p.in_alignment = alignment_of(p.in.data, p.in.pitch);
    p.out_alignment = alignment_of(of.grad_x.data, of.grad_x.pitch);
    async = (p.x_alignment & p.grad_out_alignment & p.z_alignment & p.in_alignment & p.out_alignment) == 16;
    p.turns = int(to.Np / Shape::kChannels);
    p.resident = Shape::template shared_bytes<false>(p.turns) <= most_shared_bytes();
    bytes = carver.used();
  }
};

template <bool DGRAD, bool WGRAD, class T, class C, class Plan>
cudaError_t launch_tiles(const Plan& plan, Stream stream, C) {
  using Math = typename C::Math;
  using Shape = BackwardShape<T, Math, C::kChannels>;
  const auto& to = plan.p.prepared;
  const dim3 grid(unsigned(to.Cp / Shape::kColumns), unsigned(plan.blocks),
                  DGRAD ? 1u : unsigned(to.Np / C::kChannels));
  auto* kernel = bn_relu_conv1x1_backward_tiles<T, Math, C::kChannels, false, DGRAD, WGRAD>;
  if constexpr (sizeof(T) < 8)
    if (plan.async) kernel = bn_relu_conv1x1_backward_tiles<T, Math, C::kChannels, true, DGRAD, WGRAD>;
  const int panels = DGRAD && !WGRAD && plan.p.resident ? plan.p.turns : 1;
  return launch(kernel, grid, Shape::kThreads, Shape::template shared_bytes<WGRAD>(panels), stream, plan.p);
}

// Both results by one run of the kernel, or, of more channels than a tile has, each by one.
template <class T, class C, class Plan>
cudaError_t launch_runs(const Plan& plan, Stream stream, C choice) {
  const auto& p = plan.p.of;
  if (!p.grad_conv_weight) return launch_tiles<true, false, T>(plan, stream, choice);
  if (p.N <= C::kChannels) return launch_tiles<true, true, T>(plan, stream, choice);
  if constexpr (C::kChannels <= 128)  // more are chosen only where they are enough
    return launch_in_order([&] { return launch_tiles<false, true, T>(plan, stream, choice); },
                           [&] { return launch_tiles<true, false, T>(plan, stream, choice); });
  return cudaSuccess;
}

}  // namespace

template <class T>
size_t bn_relu_conv1x1_backward_workspace(const BnReluConv1x1Backward<T>& p) {
  return choose<T, true>(p.N, p.tf32, [&](auto choice) {
    using C = decltype(choice);
    return BackwardPlan<T, BackwardShape<T, typename C::Math, C::kChannels>>(p, nullptr).bytes;
  });
}

template <class T>
cudaError_t bn_relu_conv1x1_backward(const BnReluConv1x1Backward<T>& p, Stream stream, void* workspace,
                                     const UnmergedSums<Acc<T>>& left) {
  using A = Acc<T>;
  return choose<T, true>(p.N, p.tf32, [&](auto choice) {
    using C = decltype(choice);
    using Math = typename C::Math;
    const BackwardPlan<T, BackwardShape<T, Math, C::kChannels>> plan(p, workspace);
    const auto& to = plan.p.prepared;
    const Prepare<A, typename Math::Operand> prepare = {
        p.M, p.C, p.N, p.weight, p.norm, p.z_norm, p.z_grad_weight, p.z_grad_bias, to, {}, left};
    const MergeBackward<A> merging = {p.C,
                                      to.Np,
                                      to.Cp,
                                      plan.blocks,
                                      plan.p.sums,
                                      plan.p.wgrads,
                                      p.grad_conv_weight,
                                      {p.norm, p.grad_weight, p.grad_bias, p.grad_mean, p.grad_var}};
    const int64_t rows = p.grad_conv_weight ? p.N + 1 : 1;
    return launch_in_order([&] { return launch_prepare<Math>(prepare, stream); },
                           [&] { return launch_runs<T>(plan, stream, choice); },
                           [&] { return launch_merge(merge_conv1x1_backward<A>, p.C, rows, 1, stream, merging); });
  });
}

#define DX_INSTANTIATE(T)                                                                          \
  template size_t bn_relu_conv1x1_backward_workspace<T>(const BnReluConv1x1Backward<T>&);          \
  template cudaError_t bn_relu_conv1x1_backward<T>(const BnReluConv1x1Backward<T>&, Stream, void*, \
                                                   const UnmergedSums<Acc<T>>&);
DX_INSTANTIATE(float)
DX_INSTANTIATE(double)
DX_INSTANTIATE(bfloat16)
DX_INSTANTIATE(float16)
#undef DX_INSTANTIATE

}  // namespace dx::cuda
