// The backward pass of z = relu((x - m) * s + b) @ W^T in one pass over x and G, for up to 128 output channels:
//   dz    (through norm2 and its ReLU, when grad_out is the gradient behind them)
//   y   = relu((x - m) * s + b)                 recomputed
//   dW += dz^T @ y                              one sum per block
//   dy  = (dz @ W) masked by y > 0              never stored
//   G   = s * dy + (G | grad_in | 0),  sum(dy),  sum(dy (x - m))
//
// A block owns a slice of 128 (16-bit operands; else 64, double 32) columns of x and some rows, in tiles of 64. Its
// slice of W stays in shared memory, its dW and the two sums of each column stay in registers. Bytes: x once, G read
// and written once, grad_out and z once for each slice: the blocks of the same rows are neighbours in the grid, so all
// but the first find them in L2. dW and the sums leave once per block, and a second kernel adds them in the order of
// the blocks.
//
// With more output channels than a tile has (or no dW wanted), the kernel runs without dW, the channels in turns, and
// dW is a second run of it that has no dgrad, a block for each 128 channels: x and dz are then read twice (4C + 4N
// elements a row instead of 3C + 2N), since dW of more channels would not stay in registers.
//
// 512 threads x (32 sums of dW + 16 of dy + 16 of columns + 16 of x and G) fit 128 registers; W 34 KiB, dz 17, y 17 and
// dy 34 KiB fit an A100, a block for each multiprocessor. G is asked for while dW is multiplied.
#include "conv1x1_backward_tile.h"
#include "kernels.h"

namespace dx::cuda {
namespace {

template <class T, class Math, int CHANNELS, bool WHOLE, bool DGRAD, bool WGRAD>
__global__ void __launch_bounds__(BackwardShape<T, Math, CHANNELS>::kThreads, 1)
    bn_relu_conv1x1_backward_tiles(const __grid_constant__ Backward<T, typename Math::Operand> p) {
  using Shape = BackwardShape<T, Math, CHANNELS, WHOLE>;
  using A = Acc<T>;
  using S = typename Math::Operand;
  DX_SHARED_BYTES(shared);
  S* const weights = reinterpret_cast<S*>(shared);
  S* const dz = reinterpret_cast<S*>(shared + Shape::kDzAt);
  S* const y = reinterpret_cast<S*>(shared + Shape::kYAt);
  A* const tile = reinterpret_cast<A*>(shared + Shape::kTileAt);
  A* const norm = reinterpret_cast<A*>(shared + Shape::kNormAt);
  A* const z_norm = norm + 3 * Shape::kColumns;

  const int c0 = int(block_x()) * Shape::kColumns;
  const int64_t first = int64_t(block_y()) * p.rows;
  const int all_rows = rows_from(p.of.M, first, p.rows);
  const int n_first = DGRAD ? 0 : int(block_z()) * CHANNELS;
  const int n_end = DGRAD && !WGRAD ? int(p.prepared.Np) : n_first + CHANNELS;
  const auto zero = [](int) { return A(0); };
  typename Shape::Wgrad wgrad;
  if constexpr (WGRAD) wgrad.begin(zero);
  Columns<T, Shape, Math> columns;
  if constexpr (DGRAD) columns.clear();
  const auto copy_channels = [&](int n0) {
    if constexpr (DGRAD) copy_weights<T, Shape>(p, n0, c0, weights);
    if (p.of.z) copy_constants<Shape, 5, CHANNELS>(p.prepared.z_norm + n0, p.prepared.Np, z_norm);
  };
  const bool turns = DGRAD && !WGRAD && n_end > CHANNELS;  // channels take turns in shared memory
  copy_constants<Shape, 3, Shape::kColumns>(p.prepared.norm + c0, p.prepared.Cp, norm);
  if (!turns) copy_channels(n_first);
  sync_block();

  for (int done = 0; done < all_rows; done += Shape::kRows) {
    const int64_t m0 = first + done;
    const int rows = all_rows - done;
    if (!DGRAD && done > 0) sync_block();  // dz and y are read no more
    columns.load_x(p, m0, rows, c0);
    typename Shape::Dgrad dgrad;
    if constexpr (DGRAD) dgrad.begin(zero);
    for (int n0 = n_first; n0 < n_end; n0 += CHANNELS) {
      if (n0 > n_first) sync_block();  // dz and the weights are read no more
      if (turns) {
        copy_channels(n0);
        sync_block();
      }
      fill_dz<T, Shape, Math>(p, m0, rows, n0, z_norm, dz);
      if constexpr (WGRAD) columns.store_y(rows, norm, y);
      if constexpr (DGRAD) cp_async_wait<0>();
      sync_block();
      if constexpr (DGRAD)
        dgrad.template multiply<CHANNELS, Inner::k, Inner::rows>(dz, Shape::kDzPitch, weights, Shape::kPitch);
    }
    if constexpr (DGRAD) {
      dgrad.store(tile, Shape::kTilePitch, [](A v) { return v; });
      columns.load_in(p, m0, rows, c0);
    }
    if constexpr (WGRAD)
      wgrad.template multiply<Shape::kRows, Inner::rows, Inner::rows>(dz, Shape::kDzPitch, y, Shape::kPitch);
    if constexpr (DGRAD) {
      sync_block();  // dy is there; dz, y and (where they change) the weights are read no more
      columns.add_tile(p, m0, rows, c0, norm, tile);
    }
  }
  if constexpr (DGRAD) {
    cp_async_wait<0>();  // where there are no rows, nobody waited
    sync_block();
    columns.store_sums(tile, p.sums + block_y() * 2 * p.prepared.Cp + c0, p.prepared.Cp);
  }
  if constexpr (WGRAD)
    wgrad.store(p.wgrads + (block_y() * p.prepared.Np + n_first) * p.prepared.Cp + c0, p.prepared.Cp,
                [](A v) { return v; });
}

template <class A>
struct MergeBackward {
  int64_t C, N, Np, Cp, blocks;
  const A *sums, *wgrads;  // wgrads null: not wanted
  Norm<A> norm;
  A *grad_conv_weight, *grad_weight, *grad_bias, *grad_mean, *grad_var;
};

// 32 columns of one row of dW (the last row of the grid: of the two sums), 8 threads for each, each adding every eighth
// block. grad_mean and grad_var receive -s sum(dy) and -s r^2/2 sum(dy (x - mean)).
template <class A>
__global__ void __launch_bounds__(256) merge_conv1x1_backward(const __grid_constant__ MergeBackward<A> p) {
  DX_SHARED_BYTES(shared);
  double* const parts = reinterpret_cast<double*>(shared);  // [2, 8, 32]
  const int lane = thread_x() % 32, group = thread_x() / 32;
  const int64_t c = int64_t(block_x()) * 32 + lane, n = block_y();
  const bool of_sums = n == int64_t(grid_y()) - 1;
  const A* from = of_sums ? p.sums + c : p.wgrads + n * p.Cp + c;
  const int64_t distance = of_sums ? 2 * p.Cp : p.Np * p.Cp;
  double first = 0, second = 0;
  if (c < p.C)
#pragma unroll 4
    for (int64_t b = group; b < p.blocks; b += 8) {
      first += double(load_one(from + b * distance));
      if (of_sums) second += double(load_one(from + b * distance + p.Cp));
    }
  store_one(parts + group * 32 + lane, first);
  store_one(parts + 256 + group * 32 + lane, second);
  sync_block();
  if (group > 0 || c >= p.C) return;
  first = second = 0;
  for (int g = 0; g < 8; ++g) {
    first += load_one(parts + g * 32 + lane);
    second += load_one(parts + 256 + g * 32 + lane);
  }
  if (!of_sums) return store_one(p.grad_conv_weight + n * p.C + c, A(first));
  const A rstd = bn_rstd(load_one(p.norm.var + c), p.norm.eps);
  store_one(p.grad_bias + c, A(first));
  store_one(p.grad_weight + c, A(double(rstd) * second));
  if (p.grad_mean) {
    const A scale = (p.norm.weight ? load_one(p.norm.weight + c) : A(1)) * rstd;
    const auto d = bn_statistics_grad<A>(scale, rstd, A(first), A(second));
    store_one(p.grad_mean + c, load_one(p.grad_mean + c) + d.mean);
    store_one(p.grad_var + c, load_one(p.grad_var + c) + d.var);
  }
}

template <class T, class Shape>
struct BackwardPlan {
  Backward<T, typename Shape::S> p = {};
  int64_t blocks;
  size_t bytes;
  bool whole;  // all rows consist of whole aligned pieces
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
    p.rows = int(tiles_of_a_block(tiles, slices, multiprocessors())) * Shape::kRows;
    blocks = at_least_one(ceil_div(of.M, p.rows));
    p.sums = carver.take<A>(blocks * 2 * to.Cp);
    if (of.grad_conv_weight) p.wgrads = carver.take<A>(blocks * to.Np * to.Cp);
    p.in = of.grad_in ? of.grad_in : of.accumulate ? Rows<const T>{of.grad_x.data, of.grad_x.pitch} : Rows<const T>{};
    p.x_alignment = alignment_of(of.x.data, of.x.pitch);
    p.grad_out_alignment = alignment_of(of.grad_out.data, of.grad_out.pitch);
    p.z_alignment = alignment_of(of.z.data, of.z.pitch);
    p.in_alignment = alignment_of(p.in.data, p.in.pitch);
    p.out_alignment = alignment_of(of.grad_x.data, of.grad_x.pitch);
    constexpr int E = Shape::kRun;
    whole = whole_pieces<E, T>(of.C, p.x_alignment) && whole_pieces<E, T>(of.N, p.grad_out_alignment) &&
            whole_pieces<E, T>(of.N, p.z_alignment) && whole_pieces<E, T>(of.C, p.in_alignment) &&
            whole_pieces<E, T>(of.C, p.out_alignment);
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
    if (plan.whole) kernel = bn_relu_conv1x1_backward_tiles<T, Math, C::kChannels, true, DGRAD, WGRAD>;
  return launch(kernel, grid, Shape::kThreads, Shape::kSharedBytes, stream, plan.p);
}

}  // namespace

template <class T>
size_t bn_relu_conv1x1_backward_workspace(const BnReluConv1x1Backward<T>& p) {
  return choose<T>(p.N, p.tf32, [&](auto choice) {
    using C = decltype(choice);
    return BackwardPlan<T, BackwardShape<T, typename C::Math, C::kChannels>>(p, nullptr).bytes;
  });
}

template <class T>
cudaError_t bn_relu_conv1x1_backward(const BnReluConv1x1Backward<T>& p, Stream stream, void* workspace) {
  using A = Acc<T>;
  return choose<T>(p.N, p.tf32, [&](auto choice) {
    using C = decltype(choice);
    using Math = typename C::Math;
    const BackwardPlan<T, BackwardShape<T, Math, C::kChannels>> plan(p, workspace);
    const auto& to = plan.p.prepared;
    Prepare<A, typename Math::Operand> prepare = {p.M,           p.C, p.N, p.weight, p.norm, p.z_norm, p.z_grad_weight,
                                                  p.z_grad_bias, to};
    cudaError_t error = launch_prepare<Math>(prepare, stream);
    if (error != cudaSuccess) return error;
    if (!p.grad_conv_weight) {
      error = launch_tiles<true, false, T>(plan, stream, choice);
    } else if (p.N <= C::kChannels) {
      error = launch_tiles<true, true, T>(plan, stream, choice);
    } else {
      error = launch_tiles<false, true, T>(plan, stream, choice);
      if (error == cudaSuccess) error = launch_tiles<true, false, T>(plan, stream, choice);
    }
    if (error != cudaSuccess) return error;
    const MergeBackward<A> merging = {p.C,           p.N,         to.Np,
                                      to.Cp,         plan.blocks, plan.p.sums,
                                      plan.p.wgrads, p.norm,      p.grad_conv_weight,
                                      p.grad_weight, p.grad_bias, p.grad_mean,
                                      p.grad_var};
    const dim3 grid(unsigned(ceil_div(p.C, 32)), unsigned(p.grad_conv_weight ? p.N + 1 : 1));
    return launch(merge_conv1x1_backward<A>, grid, 256, 2 * 256 * sizeof(double), stream, merging);
  });
}

#define DX_INSTANTIATE(T)                                                                 \
  template size_t bn_relu_conv1x1_backward_workspace<T>(const BnReluConv1x1Backward<T>&); \
  template cudaError_t bn_relu_conv1x1_backward<T>(const BnReluConv1x1Backward<T>&, Stream, void*);
DX_INSTANTIATE(float)
DX_INSTANTIATE(double)
DX_INSTANTIATE(bfloat16)
DX_INSTANTIATE(float16)
#undef DX_INSTANTIATE

}  // namespace dx::cuda
