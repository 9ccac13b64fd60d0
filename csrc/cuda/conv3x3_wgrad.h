// The gradient of the 3x3 convolution's weights, dW[t] = g^T y under tap t, with y = relu((x - m) s + b) recomputed as
// its prologue.
//
// A block owns 128 columns of x (256 bytes), 16 or 32 channels of g, a plane of taps, and a slab of rows, in tiles of
// 64. Its dW stays in registers: 32 channels x 16 columns x 9 taps a warp are 144 of each thread's. For 16 rows a warp
// then reads 512 bytes of g twice and of y nine times for 36 products of the tensor cores.
//
// Tiles follow one another, so that each of a block's rows comes and is normalised once: y lies in a ring of rows, from
// the first under a tile's taps to the last, and room for the next tile's 64 (with lines of 56 pixels 242 rows of 272
// bytes, 65 KiB). Those come by asynchronous copy while the present ones are multiplied; a thread normalises, in place,
// what it has copied itself. dW leaves once per block, and a second kernel adds the blocks in their order.
#pragma once

#include "conv3x3_common.h"
#include "gemm_window.h"

namespace dx::cuda {

template <class T, class Math, int CHANNELS>
struct Wgrad3x3Shape {
  using A = Acc<T>;
  using S = typename Math::Operand;
  static constexpr int kThreads = 256, kRows = 64, kChannels = CHANNELS;
  static constexpr int kPiece = 16 / int(sizeof(S)), kColumns = 16 * kPiece, kDown = kThreads / 16;
  static constexpr int kPitch = kColumns + kSkew<Math>, kGradPitch = CHANNELS + kSkew<Math>;
  static_assert(kPitch / kSkew<Math> % 2 == 1 && kGradPitch / kSkew<Math> % 2 == 1, "no bank conflicts");
  static constexpr int kGradPieces = CHANNELS / kPiece;  // of a row
  using Tile = WindowTile<Math, CHANNELS, kColumns>;

  // Shared memory: a row of zeros; the columns' constants; which taps are inside, and g, of two tiles; the ring.
  static constexpr int kNormAt = 256, kInsideAt = kNormAt + 3 * kColumns * int(sizeof(A));
  static constexpr int kGradAt = kInsideAt + 2 * kRows * int(sizeof(uint32_t));
  static constexpr int kRingAt = kGradAt + 2 * kRows * kGradPitch * int(sizeof(S));
  static_assert(kColumns * int(sizeof(S)) == 256 && kRingAt % 16 == 0, "vector accesses");
  static DX_HOST_DEVICE int ring_rows(const Window& window) { return 2 * (kRows + window.reach); }
  static int shared_bytes(const Window& window) { return kRingAt + ring_rows(window) * kPitch * int(sizeof(S)); }
};

template <class T, class S>
struct Wgrad3x3 {
  BnReluConv3x3Backward<T> of;
  Window window;
  Rows<const T> g;                  // [M, N], complete, aligned to 16 bytes
  Prepared3x3<Acc<T>, S> prepared;  // of which the norm's constants are used
  int rows;                         // of each slab but the last
  int64_t Np, Cp;
  Acc<T>* wgrads;  // [slabs, planes, taps, Np, Cp]
  int x_alignment;
  int slices;  // of Np
};

// Rows under the taps of a tile's, in the ring.
template <class Shape>
struct RingRows {
  using S = typename Shape::S;
  const Window& window;
  const uint32_t* taps_inside;  // of the tile's rows
  const S *ring, *zeros;
  int size, start;  // rows of the ring; where the first under the tile's taps lies

  __device__ __forceinline__ uint32_t inside(int r) const { return load_one(taps_inside + r); }
  __device__ __forceinline__ const S* row(int r, uint32_t inside, int t) const {
    int at = start + window.reach + r + window.distance(t);
    if (at >= size) at -= size;
    return inside >> t & 1 ? ring + at * Shape::kPitch : zeros;
  }
};

template <class T, class Math, int CHANNELS>
__global__ void __launch_bounds__(Wgrad3x3Shape<T, Math, CHANNELS>::kThreads, 1)
    conv3x3_wgrad_tiles(const __grid_constant__ Wgrad3x3<T, typename Math::Operand> p) {
  using Shape = Wgrad3x3Shape<T, Math, CHANNELS>;
  using A = Acc<T>;
  using S = typename Math::Operand;
  constexpr int E = Shape::kPiece;
  DX_SHARED_BYTES(shared);
  S* const zeros = reinterpret_cast<S*>(shared);
  A* const norm = reinterpret_cast<A*>(shared + Shape::kNormAt);
  T* const ring = reinterpret_cast<T*>(shared + Shape::kRingAt);
  const auto inside = [&](int side) {
    return reinterpret_cast<uint32_t*>(shared + Shape::kInsideAt) + side * Shape::kRows;
  };
  const auto grad = [&](int side) {
    return reinterpret_cast<T*>(shared + Shape::kGradAt) + side * Shape::kRows * Shape::kGradPitch;
  };
  const int c0 = int(block_x()) / p.slices * Shape::kColumns, n0 = int(block_x()) % p.slices * CHANNELS;
  const int plane = int(block_z()), size = Shape::ring_rows(p.window);
  const int64_t M = p.window.rows(), first = int64_t(block_y()) * p.rows;
  const int rows = rows_from(M, first, p.rows);
  const int64_t halo = p.window.first_of_halo(first, plane);
  const int column = thread_x() % 16 * E;
  const int x_left = int(p.of.C) - (c0 + column), valid = x_left < 0 ? 0 : x_left < E ? x_left : E;

  // Calls f(place, row of x) for the thread's among `count` rows of the ring, from the block's row `begin` on.
  const auto for_ring = [&](int begin, int count, const auto& f) {
    for (int i = begin + thread_x() / 16; i < begin + count; i += Shape::kDown)
      if (halo + i >= 0 && halo + i < M) f(ring + i % size * Shape::kPitch + column, halo + i);
  };
  const auto copy_x = [&](int begin, int count) {
    for_ring(begin, count, [&](T* to, int64_t m) {
      const T* const from = p.of.x.row(m) + (valid > 0 ? c0 + column : 0);
      if (p.x_alignment == 16)
        cp_async16(to, from, valid * int(sizeof(T)));
      else
        store_piece(to, load_piece<E, false>(from, valid, p.x_alignment));
    });
  };
  const auto normalise = [&](int begin, int count) {
    if (!p.prepared.norm && !std::is_same_v<Math, Tf32Math>) return;  // operands already
    Piece<A, E> mean = {}, scale = {}, bias = {};
    if (p.prepared.norm)
      mean = load_piece<E>(norm + column), scale = load_piece<E>(norm + Shape::kColumns + column),
      bias = load_piece<E>(norm + 2 * Shape::kColumns + column);
    for_ring(begin, count, [&](T* at, int64_t) {
      const Piece<T, E> x = load_piece<E>(at);
      Piece<A, E> y;
#pragma unroll
      for (int e = 0; e < E; ++e)
        y.v[e] = p.prepared.norm ? of_centered(x.get(e) - mean.v[e], scale.v[e], bias.v[e]) : x.get(e);
      store_piece(at, p.prepared.norm ? Math::relu_operands(y) : Math::operands(y));
    });
  };
  // The thread's pieces of a tile of g: f(place, row of the tile, channel).
  const auto for_grad = [&](int side, const auto& f) {
    for (int i = thread_x(); i < Shape::kRows * Shape::kGradPieces; i += Shape::kThreads) {
      const int r = i / Shape::kGradPieces, n = i % Shape::kGradPieces * E;
      f(grad(side) + r * Shape::kGradPitch + n, r, n0 + n);
    }
  };
  const auto copy_grad = [&](int done, int side) {  // zeros behind the last row and channel
    for_grad(side, [&](T* to, int r, int n) {
      const int left = done + r < rows ? int(p.of.N) - n : 0, here = left < 0 ? 0 : left < E ? left : E;
      cp_async16(to, here > 0 ? p.g.row(first + done + r) + n : p.g.data, here * int(sizeof(T)));
    });
  };
  const auto round_grad = [&](int side) {
    if constexpr (std::is_same_v<Math, Tf32Math>)
      for_grad(side, [&](T* at, int, int) { store_piece(at, Math::operands(load_piece<E>(at))); });
  };
  const auto rows_of_tile = [&](int done) { return rows - done < Shape::kRows ? rows - done : Shape::kRows; };

  copy_x(0, rows_of_tile(0) + 2 * p.window.reach);
  copy_grad(0, 0);
  cp_async_commit();
  if (thread_x() < 16) store_piece(zeros + thread_x() * E, Piece<S, E>{});
  if (p.prepared.norm)
    for (int i = thread_x(); i < 3 * Shape::kColumns; i += Shape::kThreads)
      store_one(norm + i,
                load_one(p.prepared.norm + i / Shape::kColumns * p.prepared.norm_stride + c0 + i % Shape::kColumns));
  sync_block();  // the constants are there

  typename Shape::Tile dW;
  dW.clear();
  int arrived = rows_of_tile(0) + 2 * p.window.reach, begin = 0, side = 0;  // rows that came, and their first
  for (int done = 0; done < rows; done += Shape::kRows, side ^= 1) {
    cp_async_wait<0>();
    normalise(begin, arrived);
    round_grad(side);
    for (int r = thread_x(); r < Shape::kRows; r += Shape::kThreads)
      store_one(inside(side) + r,
                r < rows - done ? Window::of_plane(p.window.taps_inside(first + done + r), plane) : 0u);
    sync_block();  // this tile is there, and nobody reads the one before any more
    const int next = done + Shape::kRows;
    if (next < rows) {
      begin = next + 2 * p.window.reach, arrived = rows_of_tile(next);
      copy_x(begin, arrived);
      copy_grad(next, side ^ 1);
    }
    cp_async_commit();
    const RingRows<Shape> under = {p.window, inside(side), ring, zeros, size, done % size};
    dW.template multiply<Shape::kRows>(p.window.taps, grad(side), Shape::kGradPitch, under);
  }
  cp_async_wait<0>();
  const int64_t of_tap = p.Np * p.Cp, taps = p.window.planes * p.window.taps;
  dW.store(p.window.taps, p.wgrads + (block_y() * taps + plane * p.window.taps) * of_tap + n0 * p.Cp + c0, of_tap,
           p.Cp);
}

}  // namespace dx::cuda
