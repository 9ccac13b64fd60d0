// out = dropout(conv3x3(relu((x - m) * s + b)) + c): BatchNorm and ReLU as the prologue of the 3x3 convolution;
// dropout, the buffer's columns and their statistics as its epilogue.
//
// Bytes: x is read once for each tile of up to 48 output channels, its halo from L2; out is written once. What the
// convolution reads, relu(bn(x)), exists only in shared memory, where each row is normalised once for all nine taps,
// and the weights stay there for the whole block where all of them fit (128 x 32: 90 KiB with what lies between the
// rows). cuDNN reads each of its inputs nine times out of L2, at 32 output channels 32 products a byte.
//
// A block of 256 threads computes tiles of 512 rows x 16, 32 or 48 channels, chunk by chunk of 32 input channels (16 in
// TF32): 64 rows x all channels a warp, which for 32 channels are 6 reads of 512 bytes of shared memory for 16 products
// of the tensor cores, in balance with them on an H100. The rows of the next chunk, be it of the next tile, come by
// asynchronous copy while this one is multiplied; a thread normalises, in place, the pieces that it has copied itself.
// With lines of 56 pixels: two halos of 626 rows x 80 bytes and weights are 190 KiB; where a block has less, weights
// come chunk by chunk too (143 KiB). Where there are too few rows for half the multiprocessors, tiles have 128 rows.
//
// Statistics are, as those of the 1x1 convolution, sums of distances from one of the column's values, one pair a block,
// merged by a second kernel in the order of the blocks: the same bits in every run on one GPU.
#include "conv3x3_forward_tile.h"
#include "kernels.h"

namespace dx::cuda {
namespace {

template <class T, class Math, int CHANNELS, bool LARGE>
__global__ void __launch_bounds__(Forward3x3Shape<T, Math, CHANNELS, LARGE>::kThreads, 1)
    bn_relu_conv3x3_tiles(const __grid_constant__ Forward3x3<T, typename Math::Operand> p) {
  using Shape = Forward3x3Shape<T, Math, CHANNELS, LARGE>;
  using Copies = ChunkCopies<T, Math, Shape::kThreads>;
  using Tile = typename Shape::Tile;
  using A = Acc<T>;
  using S = typename Math::Operand;
  DX_SHARED_BYTES(shared);
  S* const zeros = reinterpret_cast<S*>(shared);
  T* const pivots = reinterpret_cast<T*>(shared + Shape::kPivotAt);
  A* const norm = reinterpret_cast<A*>(shared + Shape::kNormAt);
  const auto buffer = [&](int side) { return reinterpret_cast<T*>(shared + p.buffers_at + side * p.buffer_bytes); };
  const auto panel = [&](int i) { return reinterpret_cast<S*>(shared + p.panels_at + i * p.panel_bytes); };
  const int n0 = int(block_x()) * CHANNELS;
  const int64_t M = p.window.rows(), first = int64_t(block_y()) * p.partial.rows;
  const int rows = rows_from(M, first, p.partial.rows);

  // The halo of a step: its first row, and how many rows it has.
  const auto halo_begin = [&](int done, int step) { return p.window.first_of_halo(first + done, step / p.chunks); };
  const auto halo_rows = [&](int done) {
    return (rows - done < Shape::kRows ? rows - done : Shape::kRows) + 2 * p.window.reach;
  };
  const auto copy_rows = [&](int done, int step, int side) {
    Copies::copy_rows(p.of.x, p.x_alignment, p.of.C, M, step % p.chunks * Shape::Chunk::kInner, halo_begin(done, step),
                      halo_rows(done), buffer(side));
  };
  if (p.prepared.norm) Copies::copy_norm(p.prepared.norm, p.prepared.norm_stride, norm);
  cp_async_commit();
  for (int i = 0; i < (p.resident ? p.steps : 1); ++i)
    Copies::template copy_panel<CHANNELS>(p.prepared, p.window.taps, i, n0, panel(i));
  copy_rows(0, 0, 0);
  cp_async_commit();
  if (thread_x() < 4) store_piece(zeros + thread_x() * Copies::E, Piece<S, Copies::E>{});
  cp_async_wait<1>();
  sync_block();  // the constants are there

  const bool drops = p.of.drop_rate > 0;
  const Dropout dropout = drops ? make_dropout(load_one(p.of.seed), p.of.layer, p.of.drop_rate) : Dropout{};
  Output3x3<T, Shape> output;
  int side = 0;
  for (int done = 0; done < rows; done += Shape::kRows) {
    uint32_t inside[Tile::kLeft];
#pragma unroll
    for (int i = 0; i < Tile::kLeft; ++i)
      inside[i] = Tile::left(i) < rows - done ? p.window.taps_inside(first + done + Tile::left(i)) : 0;
    Tile sums;
    sums.begin([&](int n) { return p.of.bias && n0 + n < p.of.N ? load_one(p.of.bias + n0 + n) : A(0); });
    for (int step = 0; step < p.steps; ++step, side ^= 1) {
      cp_async_wait<0>();
      Copies::normalise(p.prepared.norm ? norm + step % p.chunks * Shape::Chunk::kInner : nullptr,
                        p.prepared.norm_stride, halo_begin(done, step), halo_rows(done), M, buffer(side));
      sync_block();  // this step is there, and nobody reads the one before any more
      const bool last = step + 1 == p.steps;
      const int next = last ? 0 : step + 1, at = last ? done + Shape::kRows : done;
      if (at < rows) {
        if (!p.resident) Copies::template copy_panel<CHANNELS>(p.prepared, p.window.taps, next, n0, panel(side ^ 1));
        copy_rows(at, next, side ^ 1);
      }
      cp_async_commit();  // nothing behind the last step
      uint32_t in_plane[Tile::kLeft];
#pragma unroll
      for (int i = 0; i < Tile::kLeft; ++i) in_plane[i] = Window::of_plane(inside[i], step / p.chunks);
      multiply_taps<typename Shape::Chunk, CHANNELS>(sums, p.window, in_plane, buffer(side), zeros,
                                                     panel(p.resident ? step : side));
    }
    T* const tile = buffer(side ^ 1);  // of the last step
    sync_block();                      // which nobody reads any more
    uint32_t key = 0;
    store_own<T, Tile>(tile, Shape::kOutPitch, [&](int i, int j) {
      if (!drops) return sums.own(i, j);
      const int64_t m = first + done + Tile::row(i);
      if (j == 0) key = dropout_row_key(dropout, p.of.drop_rows == 1 ? m : m / p.of.drop_rows);
      return sums.own(i, j) * dropout_factor<A>(dropout, key, n0 + Tile::column(j));
    });
    sync_block();
    if (done == 0 && p.partial.mean) {
      output.choose_pivots(tile, rows, pivots);
      sync_block();
    }
    output.write(p, first + done, rows - done, n0, tile, pivots);
  }
  cp_async_wait<0>();
  if (p.partial.mean) output.store_moments(p, rows, n0, pivots, reinterpret_cast<A*>(buffer(0)));
}

template <class T, class Math_, int CHANNELS, bool LARGE>
struct Choice3x3 {
  using Math = Math_;
  using Shape = Forward3x3Shape<T, Math, CHANNELS, LARGE>;
};

template <class T, class Shape>
struct Forward3x3Plan {
  Forward3x3<T, typename Shape::S> p = {};
  int64_t blocks;
  size_t bytes;
  int shared;

  Forward3x3Plan(const BnReluConv3x3<T>& of, void* workspace) {
    using A = Acc<T>;
    Carver carver(workspace);
    p.of = of;
    p.window = Window(of.images, of.window);
    auto& to = p.prepared;
    to.Np = round_up(of.N, Shape::kChannels);
    to.Cp = at_least_one(ceil_div(of.C, Shape::Chunk::kInner)) * Shape::Chunk::kInner;
    p.chunks = int(to.Cp / Shape::Chunk::kInner);
    p.steps = p.chunks * p.window.planes;
    to.weight = carver.take<typename Shape::S>(p.window.planes * p.window.taps * to.Np * to.Cp);
    to.norm_stride = to.Cp;
    to.norm = carver.take<A>(of.norm.mean ? 3 * to.Cp : 0);
    if (!of.norm.mean) to.norm = nullptr;
    const int64_t M = of.images.rows(), tiles = ceil_div(M, Shape::kRows);
    p.partial.rows = int(tiles_of_a_block(tiles, to.Np / Shape::kChannels, multiprocessors())) * Shape::kRows;
    blocks = at_least_one(ceil_div(M, p.partial.rows));
    if (of.out_mean) p.partial.take(carver, blocks * to.Np);
    p.x_alignment = alignment_of(of.x.data, of.x.pitch);
    p.out_alignment = alignment_of(of.out.data, of.out.pitch);
    p.buffer_bytes = Shape::buffer_bytes(p.window), p.panel_bytes = Shape::panel_bytes(p.window);
    p.buffers_at = Shape::kNormAt + int(3 * to.Cp * int64_t(sizeof(A)));
    p.panels_at = p.buffers_at + 2 * p.buffer_bytes;
    p.resident = p.panels_at + int64_t(p.steps) * p.panel_bytes <= most_shared_bytes();
    shared = p.panels_at + (p.resident ? p.steps : 2) * p.panel_bytes;
    bytes = carver.used();
  }
};

// Calls f with the Choice3x3 for a call: tiles of as many channels as leave fewest of them empty, and of 512 rows where
// these keep half of the multiprocessors busy and there is room for their halos.
template <class T, class Math, int CHANNELS, class F>
auto choose_rows(const BnReluConv3x3<T>& p, const F& f) {
  if constexpr (!std::is_same_v<Math, PlainMath<Acc<T>>>) {
    using Large = Choice3x3<T, Math, CHANNELS, true>;
    if (2 * ceil_div(p.images.rows(), Large::Shape::kRows) >= multiprocessors() &&
        Forward3x3Plan<T, typename Large::Shape>(p, nullptr).shared <= most_shared_bytes())
      return f(Large{});
  }
  return f(Choice3x3<T, Math, CHANNELS, false>{});
}
template <class T, class Math, class F>
auto choose_channels(const BnReluConv3x3<T>& p, const F& f) {
  if (p.N <= 16) return choose_rows<T, Math, 16>(p, f);
  if (round_up(p.N, 48) < round_up(p.N, 32)) return choose_rows<T, Math, 48>(p, f);
  return choose_rows<T, Math, 32>(p, f);
}
template <class T, class F>
auto choose_forward(const BnReluConv3x3<T>& p, const F& f) {
  if constexpr (sizeof(T) == 2)
    return choose_channels<T, TensorMath<T>>(p, f);
  else if constexpr (sizeof(T) == 4)
    return p.tf32 ? choose_channels<T, Tf32Math>(p, f) : choose_channels<T, PlainMath<float>>(p, f);
  else
    return choose_channels<T, PlainMath<double>>(p, f);
}

}  // namespace

template <class T>
bool has_room_for_conv3x3(const BnReluConv3x3<T>& p) {
  if (!has_usable_sides(p.images, p.window)) return false;
  return choose_forward(p, [&](auto choice) {
    return Forward3x3Plan<T, typename decltype(choice)::Shape>(p, nullptr).shared <= most_shared_bytes();
  });
}

template <class T>
size_t bn_relu_conv3x3_workspace(const BnReluConv3x3<T>& p) {
  return choose_forward(
      p, [&](auto choice) { return Forward3x3Plan<T, typename decltype(choice)::Shape>(p, nullptr).bytes; });
}

template <class T>
cudaError_t bn_relu_conv3x3(const BnReluConv3x3<T>& p, Stream stream, void* workspace) {
  using A = Acc<T>;
  const int64_t M = p.images.rows();
  if (M == 0 || p.N == 0) return cudaSuccess;
  return choose_forward(p, [&](auto choice) {
    using Shape = typename decltype(choice)::Shape;
    using Math = typename decltype(choice)::Math;
    const Forward3x3Plan<T, Shape> plan(p, workspace);
    const Window& window = plan.p.window;
    const auto prepare = [&] {
      return launch_prepare<Math, A>({p.N, p.C, p.weight, window.planes, window.taps, p.C, p.norm, plan.p.prepared},
                                     stream);
    };
    auto* kernel = bn_relu_conv3x3_tiles<T, Math, Shape::kChannels, Shape::kRows == 512>;
    return launch_convolution<Shape>(plan, prepare, kernel, size_t(plan.shared), M, stream);
  });
}

#define DX_INSTANTIATE(T)                                                \
  template bool has_room_for_conv3x3<T>(const BnReluConv3x3<T>&);        \
  template size_t bn_relu_conv3x3_workspace<T>(const BnReluConv3x3<T>&); \
  template cudaError_t bn_relu_conv3x3<T>(const BnReluConv3x3<T>&, Stream, void*);
DX_INSTANTIATE(float)
DX_INSTANTIATE(double)
DX_INSTANTIATE(bfloat16)
DX_INSTANTIATE(float16)
#undef DX_INSTANTIATE

}  // namespace dx::cuda
