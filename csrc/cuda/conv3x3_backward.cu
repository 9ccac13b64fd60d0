// The backward pass of out = dropout(conv3x3(relu((x - m) s + b)) + c):
//   g        = dropout'(grad + (gm + 2 (features - mean) gv) / M), and dc = sum(g)      complete_gradient, below
//   grad_x, sum(dy), sum(dy (x - m))                                                    conv3x3_dgrad.h
//   dW                                                                                  conv3x3_wgrad.h
// What blocks leave is added by further kernels in the order of the blocks.
//
// Bytes, of 16-bit types: 6 N a row for g, which is written once, dense, for the two others; C and N once for dgrad,
// with C for what it writes; C and N for wgrad: 6 C + 10 N. PyTorch's way moves 10 C + 10 N: da is written and read
// again for its sums, relu(bn(x)) is written for dW and read.
#include "conv3x3_dgrad.h"
#include "conv3x3_wgrad.h"
#include "kernels.h"
#include "merge_blocks.h"
#include "sums.h"

namespace dx::cuda {
namespace {

// ---- g --------------------------------------------------------------------------------------------------------------
template <class T>
struct CompleteGradient {
  BnReluConv3x3Backward<T> of;
  int64_t M;
  Rows<T> g;  // [M, N]
  Tiling tiling;
  Acc<T>* sums;  // two times [slabs, N], of which the first are used; or null
};

constexpr int kRowsAtOnce = 4;

template <class T, int V>
__global__ void __launch_bounds__(kThreads) complete_gradient(const __grid_constant__ CompleteGradient<T> p) {
  using A = Acc<T>;
  DX_SHARED_BYTES(bytes);
  const Patch patch(p.tiling, p.M, p.of.N, V);
  const int64_t c = patch.column;
  Sums<A, V> sums;
  if (patch.any) {
    const bool drop = p.of.drop_rate > 0, through_stats = bool(p.of.features);
    const Dropout dropout = drop ? make_dropout(load_one(p.of.seed), p.of.layer, p.of.drop_rate) : Dropout{};
    A mean[V], offset[V], slope[V];
    load_channels(mean, through_stats ? p.of.features_mean : nullptr, c);
    load_channels(offset, through_stats ? p.of.features_grad_mean : nullptr, c);
    load_channels(slope, through_stats ? p.of.features_grad_var : nullptr, c);
    const A per_row = A(1) / A(p.M);
#pragma unroll
    for (int v = 0; v < V; ++v) offset[v] *= per_row, slope[v] *= A(2) * per_row;
    patch.for_rows<kRowsAtOnce>([&](int64_t m, int rows) {
      Bits<T, V> x[kRowsAtOnce] = {}, grad[kRowsAtOnce];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r)
        if (r < rows) {
          grad[r] = load_bits<V>(p.of.grad.row(m + r * patch.step) + c);
          if (through_stats) x[r] = load_bits<V>(p.of.features.row(m + r * patch.step) + c);
        }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r)
        if (r < rows) {
          const int64_t row = m + r * patch.step;
          const uint32_t key = drop ? dropout_row_key(dropout, p.of.drop_rows == 1 ? row : row / p.of.drop_rows) : 0;
          A g[V];
#pragma unroll
          for (int v = 0; v < V; ++v) {
            g[v] = element<T, V>(grad[r], v) + (offset[v] + times_or_zero(slope[v], element<T, V>(x[r], v) - mean[v]));
            if (drop) g[v] *= dropout_factor<A>(dropout, key, c + v);
            sums.add(v, g[v], A(0));
          }
          store_bits<V>(p.g.row(row) + c, to_bits<T, V>(g));
        }
    });
  }
  if (!p.sums || !merge_block<A>(sums, patch, bytes)) return;
  store_partials<A>(sums, patch, p.of.N, {p.sums, p.tiling.slabs, p.of.N});
}

// ---- what blocks leave ----------------------------------------------------------------------------------------------
// The sum over blocks of what they left for a weight, [taps, Np, Cp] each; of one channel and tap: for a vector.
template <class A>
struct MergeTaps {
  int64_t C, Np, Cp, blocks;
  int64_t distance;  // from a block to the next
  const A* from;
  Taps<A> to;
};

// Inputs of an output and a tap.
template <class A>
__global__ void __launch_bounds__(kMergeThreads) merge_taps(const __grid_constant__ MergeTaps<A> p) {
  const int64_t c = merge_column(), n = block_y(), t = block_z();
  double sum[1];
  if (merge_blocks(sum, p.from + (t * p.Np + n) * p.Cp + c, 0, p.distance, p.blocks, c < p.C))
    store_one(p.to.data + n * p.to.output + c * p.to.input + t * p.to.tap, A(sum[0]));
}

template <class A>
struct MergeNormSums {
  int64_t C, Cp, blocks;
  const A* sums;  // [blocks, 2, Cp]: sum dy, sum dy (x - mean)
  NormSums<A> norm;
};

template <class A>
__global__ void __launch_bounds__(kMergeThreads) merge_norm_sums(const __grid_constant__ MergeNormSums<A> p) {
  const int64_t c = merge_column();
  double sums[2];
  if (merge_blocks(sums, p.sums + c, p.Cp, 2 * p.Cp, p.blocks, c < p.C)) p.norm.store(c, sums);
}

// ---- the whole ------------------------------------------------------------------------------------------------------
template <class T>
bool wants_sums(const BnReluConv3x3Backward<T>& p) {
  return p.grad_weight || p.grad_mean;
}

// Which kernels a call runs, and where they leave what in the workspace.
template <class T, class Math>
struct Backward3x3Plan {
  using A = Acc<T>;
  using S = typename Math::Operand;
  using Small = Dgrad3x3Shape<T, Math, false>;
  using Large = Dgrad3x3Shape<T, Math, !Small::kPlain>;
  CompleteGradient<T> complete = {{}, 0, {}, Tiling(0, 1, 1, 1), nullptr};
  Dgrad3x3<T, S> dgrad = {};
  Wgrad3x3<T, S> wgrad = {};
  bool large;    // tiles of dgrad
  int channels;  // of wgrad's
  int64_t dgrad_blocks = 0, slabs = 0;
  int dgrad_shared, wgrad_shared;
  size_t bytes;

  Backward3x3Plan(const BnReluConv3x3Backward<T>& of, void* workspace) {
    Carver carver(workspace);
    const int64_t M = of.images.rows();
    constexpr int64_t kPiece = 16 / sizeof(T);
    const int64_t pitch = round_up(of.N, kPiece);
    const Window window(of.images, of.window);
    complete = {of, M, {carver.take<T>(M * pitch), pitch}, complete.tiling, nullptr};
    if (of.N > 0) complete.tiling = Tiling(M, of.N, width(of), kRowsAtOnce);
    if (of.grad_conv_bias) complete.sums = carver.take<A>(2 * complete.tiling.slabs * of.N);
    dgrad.of = wgrad.of = of;
    dgrad.window = wgrad.window = window;
    dgrad.g = wgrad.g = {complete.g.data, pitch};
    dgrad.x_alignment = wgrad.x_alignment = alignment_of(of.x.data, of.x.pitch);
    plan_dgrad(carver, M);
    plan_wgrad(carver, M);
    bytes = carver.used();
  }

 private:
  static int width(const BnReluConv3x3Backward<T>& of) {
    return Width<T>(of.N).with(of.grad).with(of.features).elements();
  }
  void plan_dgrad(Carver& carver, int64_t M) {
    const BnReluConv3x3Backward<T>& of = dgrad.of;
    const Window& window = dgrad.window;
    using Chunk = typename Small::Chunk;
    auto& to = dgrad.prepared;
    to.Np = round_up(of.C, Small::kColumns);
    to.Cp = round_up(of.N, Chunk::kInner);
    to.norm_stride = round_up(of.C, 128);  // whole tiles of wgrad too
    to.weight = carver.take<S>(window.planes * window.taps * to.Np * to.Cp);
    if (of.norm.mean) to.norm = carver.take<A>(3 * to.norm_stride);
    dgrad.chunks = int(to.Cp / Chunk::kInner);
    dgrad.steps = dgrad.chunks * window.planes;
    const int64_t slices = to.Np / Small::kColumns;
    large = Large::kLarge && 2 * slices * ceil_div(M, Large::kRows) >= multiprocessors();
    if (large) {
      place_dgrad<Large>();
      large = dgrad_shared <= most_shared_bytes();
    }
    if (!large) place_dgrad<Small>();
    const int64_t each = large ? Large::kRows : Small::kRows;
    dgrad.rows = int(tiles_of_a_block(ceil_div(M, each), at_least_one(slices), multiprocessors()) * each);
    dgrad_blocks = ceil_div(M, dgrad.rows);
    if (wants_sums(of)) dgrad.sums = carver.take<A>(dgrad_blocks * 2 * to.Np);
    if (of.scaled && (of.grad_in || of.accumulate))
      dgrad.in = of.grad_in ? of.grad_in : Rows<const T>{of.grad_x.data, of.grad_x.pitch};
    dgrad.in_alignment = alignment_of(dgrad.in.data, dgrad.in.pitch);
    dgrad.out_alignment = alignment_of(of.grad_x.data, of.grad_x.pitch);
  }
  template <class Shape>
  void place_dgrad() {
    dgrad.buffer_bytes = Shape::buffer_bytes(dgrad.window), dgrad.panel_bytes = Shape::panel_bytes(dgrad.window);
    dgrad.panels_at = Shape::kBuffersAt + 2 * dgrad.buffer_bytes;
    dgrad.resident = dgrad.panels_at + int64_t(dgrad.steps) * dgrad.panel_bytes <= most_shared_bytes();
    dgrad_shared = dgrad.panels_at + (dgrad.resident ? dgrad.steps : 2) * dgrad.panel_bytes;
  }
  void plan_wgrad(Carver& carver, int64_t M) {
    const BnReluConv3x3Backward<T>& of = wgrad.of;
    using Shape = Wgrad3x3Shape<T, Math, 32>;  // rows and columns are those of 16 channels too
    channels = of.N <= 16 ? 16 : 32;
    wgrad_shared =
        channels == 16 ? Wgrad3x3Shape<T, Math, 16>::shared_bytes(wgrad.window) : Shape::shared_bytes(wgrad.window);
    wgrad.prepared = dgrad.prepared;
    wgrad.Np = round_up(of.N, channels), wgrad.Cp = round_up(of.C, Shape::kColumns);
    wgrad.slices = int(wgrad.Np / channels);
    const int64_t side_by_side = wgrad.slices * (wgrad.Cp / Shape::kColumns) * wgrad.window.planes;
    const int64_t tiles = ceil_div(M, Shape::kRows);
    wgrad.rows = int(tiles_of_a_block(tiles, at_least_one(side_by_side), multiprocessors())) * Shape::kRows;
    slabs = ceil_div(M, wgrad.rows);
    if (of.grad_conv_weight) wgrad.wgrads = carver.take<A>(slabs * of_slab());
  }

 public:
  int64_t of_slab() const { return int64_t(wgrad.window.planes) * wgrad.window.taps * wgrad.Np * wgrad.Cp; }
};

template <class T, class F>
auto choose_backward(const BnReluConv3x3Backward<T>& p, const F& f) {
  if constexpr (sizeof(T) == 2)
    return f(TensorMath<T>{});
  else if constexpr (sizeof(T) == 4)
    return p.tf32 ? f(Tf32Math{}) : f(PlainMath<float>{});
  else
    return f(PlainMath<double>{});
}

template <class T>
cudaError_t launch_complete(const CompleteGradient<T>& p, Stream stream) {
  return Width<T>(p.of.N).with(p.of.grad).with(p.of.features).run([&](auto vector) {
    constexpr int V = decltype(vector)::value;
    return launch(complete_gradient<T, V>, p.tiling.grid(), kThreads, sums_shared_bytes<Acc<T>, V>(), stream, p);
  });
}

template <class T, class Math, class Plan>
cudaError_t launch_dgrad(const Plan& plan, Stream stream) {
  const dim3 grid(unsigned(plan.dgrad.prepared.Np / Plan::Small::kColumns), unsigned(plan.dgrad_blocks));
  auto* kernel = conv3x3_dgrad_tiles<T, Math, false>;
  if (Plan::Large::kLarge && plan.large) kernel = conv3x3_dgrad_tiles<T, Math, Plan::Large::kLarge>;
  return launch(kernel, grid, plan.large ? Plan::Large::kThreads : Plan::Small::kThreads, size_t(plan.dgrad_shared),
                stream, plan.dgrad);
}

template <class T, class Math, class Plan>
cudaError_t launch_wgrad(const Plan& plan, Stream stream) {
  using Shape = Wgrad3x3Shape<T, Math, 32>;
  const dim3 grid(unsigned(plan.wgrad.slices * (plan.wgrad.Cp / Shape::kColumns)), unsigned(plan.slabs),
                  unsigned(plan.wgrad.window.planes));
  auto* kernel = plan.channels == 16 ? conv3x3_wgrad_tiles<T, Math, 16> : conv3x3_wgrad_tiles<T, Math, 32>;
  return launch(kernel, grid, Shape::kThreads, size_t(plan.wgrad_shared), stream, plan.wgrad);
}

}  // namespace

template <class T>
bool has_room_for_conv3x3(const BnReluConv3x3Backward<T>& p) {
  if (!has_usable_sides(p.images, p.window)) return false;
  return choose_backward(p, [&](auto math) {
    const Backward3x3Plan<T, decltype(math)> plan(p, nullptr);
    return plan.dgrad_shared <= most_shared_bytes() && plan.wgrad_shared <= most_shared_bytes();
  });
}

template <class T>
size_t bn_relu_conv3x3_backward_workspace(const BnReluConv3x3Backward<T>& p) {
  return choose_backward(p, [&](auto math) { return Backward3x3Plan<T, decltype(math)>(p, nullptr).bytes; });
}

template <class T>
cudaError_t bn_relu_conv3x3_backward(const BnReluConv3x3Backward<T>& p, Stream stream, void* workspace) {
  using A = Acc<T>;
  return choose_backward(p, [&](auto math) {
    using Math = decltype(math);
    const Backward3x3Plan<T, Math> plan(p, workspace);
    const Window& window = plan.dgrad.window;
    const int64_t M = p.images.rows(), taps = window.planes * window.taps;
    const bool any_rows = M > 0 && p.C > 0;
    const bool sums = p.C > 0 && wants_sums(p), wgrad = p.grad_conv_weight && p.C > 0 && p.N > 0;
    const auto& to = plan.dgrad.prepared;
    return launch_in_order(
        [&] { return M > 0 && p.N > 0 ? launch_complete(plan.complete, stream) : cudaSuccess; },
        [&] {
          if (!p.grad_conv_bias || p.N == 0) return cudaSuccess;
          const int64_t slabs = M > 0 ? plan.complete.tiling.slabs : 0;
          const MergeTaps<A> merging = {p.N, 1, p.N, slabs, p.N, plan.complete.sums, {p.grad_conv_bias, 0, 1, 0}};
          return launch_merge(merge_taps<A>, p.N, 1, 1, stream, merging);
        },
        [&] {
          if (!any_rows) return cudaSuccess;
          return launch_prepare<Math, A>(
              {p.C, p.N, reversed(p.weight, taps), window.planes, window.taps, p.C, p.norm, to}, stream);
        },
        [&] { return any_rows && (p.grad_x || sums) ? launch_dgrad<T, Math>(plan, stream) : cudaSuccess; },
        [&] {
          if (!sums) return cudaSuccess;
          const MergeNormSums<A> merging = {p.C,
                                            to.Np,
                                            plan.dgrad_blocks,
                                            plan.dgrad.sums,
                                            {p.norm, p.grad_weight, p.grad_bias, p.grad_mean, p.grad_var}};
          return launch_merge(merge_norm_sums<A>, p.C, 1, 1, stream, merging);
        },
        [&] { return wgrad && any_rows ? launch_wgrad<T, Math>(plan, stream) : cudaSuccess; },
        [&] {
          if (!wgrad) return cudaSuccess;
          const MergeTaps<A> merging = {
              p.C, plan.wgrad.Np, plan.wgrad.Cp, plan.slabs, plan.of_slab(), plan.wgrad.wgrads, p.grad_conv_weight};
          return launch_merge(merge_taps<A>, p.C, p.N, taps, stream, merging);
        });
  });
}

#define DX_INSTANTIATE(T)                                                                 \
  template bool has_room_for_conv3x3<T>(const BnReluConv3x3Backward<T>&);                 \
  template size_t bn_relu_conv3x3_backward_workspace<T>(const BnReluConv3x3Backward<T>&); \
  template cudaError_t bn_relu_conv3x3_backward<T>(const BnReluConv3x3Backward<T>&, Stream, void*);
DX_FOR_STORAGE_TYPES(DX_INSTANTIATE)

}  // namespace dx::cuda
