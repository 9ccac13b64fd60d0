// The gradient of what the 3x3 convolution reads: da = g convolved with the weights, inputs and outputs exchanged and
// the taps reversed, with BatchNorm and ReLU behind it as its epilogue:
//   dy = da masked by bn(x) > 0,   sum(dy),   sum(dy (x - m)),   grad_x = da | s dy + (grad_in | grad_x | 0)
//
// A block owns 64 columns of x and some rows, in tiles of 256 or, where there are few, of 128 rows (half as many of
// 32-bit types), whose halo of g, usually of 12 to 48 channels, is small: chunks of 64 bytes of a row, two of them
// where there are more than 32 channels. A warp's part is 64 rows x 32 columns. x comes by asynchronous copy during the
// product, each thread's pieces where only it finds them. da is rounded to the type of feature maps, as PyTorch's own
// is, and goes through shared memory, so that a thread has pieces of 16 bytes of the same columns in all rows, and adds
// up their sums in its registers.
#pragma once

#include "conv3x3_common.h"

namespace dx::cuda {

template <class T, class Math, bool LARGE>
struct Dgrad3x3Shape {
  using A = Acc<T>;
  using S = typename Math::Operand;
  using Chunk = ChunkShape<S>;
  static constexpr bool kPlain = std::is_same_v<Math, PlainMath<A>>, kLarge = LARGE;
  static_assert(!(kPlain && LARGE), "so many sums of a thread's would not stay in registers");
  static constexpr int kThreads = LARGE || kPlain ? 256 : 128, kColumns = 64;
  static constexpr int kRows = (LARGE ? 512 : 256) / int(sizeof(T));
  using Tile = typename RowsTileOf<Math, kRows, kColumns, kThreads, kThreads / 64>::type;

  static constexpr int kPiece = 16 / int(sizeof(T)), kAcross = kColumns / kPiece, kDown = kThreads / kAcross,
                       kPieces = kRows / kDown;
  static_assert(kPieces * kDown == kRows, "threads cover the tile");
  static constexpr int kOutPitch = kColumns + kPiece;
  static constexpr int kTileBytes = kRows * kOutPitch * int(sizeof(T));

  // Shared memory: a row of zeros; constants of the columns; x; two buffers, each for a halo or the tile on its way
  // out; panels of weights.
  static constexpr int kNormAt = 128, kXAt = kNormAt + 3 * kColumns * int(sizeof(A));
  static constexpr int kBuffersAt = kXAt + kRows * kColumns * int(sizeof(T));
  static int buffer_bytes(const Window& window) {
    const int halo = (kRows + 2 * window.reach) * Chunk::kPitch * int(sizeof(S));
    return halo > kTileBytes ? halo : kTileBytes;
  }
  static int panel_bytes(const Window& window) { return window.taps * kColumns * Chunk::kPitch * int(sizeof(S)); }
  static_assert(kDown * 2 * kColumns * int(sizeof(A)) <= kTileBytes, "the threads' sums fit the place of the tile");
};

template <class T, class S>
struct Dgrad3x3 {
  BnReluConv3x3Backward<T> of;
  Window window;
  Rows<const T> g;                  // [M, N], complete, aligned to 16 bytes
  Prepared3x3<Acc<T>, S> prepared;  // of the product N -> C; the norm's constants are those of x's channels
  int rows;                         // of each block but the last
  Acc<T>* sums;                     // [blocks, 2, Np]: sum dy, sum dy (x - mean); or null: no norm
  Rows<const T> in;                 // what s dy is added to, or null
  int x_alignment, in_alignment, out_alignment;
  int chunks, steps;  // of N; with those of all planes
  bool resident;
  int panels_at, buffer_bytes, panel_bytes;
};

// What follows the product, for the thread's pieces of a tile.
template <class T, class Shape>
class DgradOutput {
 public:
  using A = Acc<T>;
  static constexpr int E = Shape::kPiece;

  __device__ __forceinline__ DgradOutput(unsigned char* shared, int c0)
      : norm_(reinterpret_cast<A*>(shared + Shape::kNormAt)), x_(reinterpret_cast<T*>(shared + Shape::kXAt)), c0_(c0) {}

  template <class Params>
  __device__ __forceinline__ void load_norm(const Params& p) const {
    for (int i = thread_x(); i < 3 * Shape::kColumns; i += Shape::kThreads)
      store_one(norm_ + i,
                load_one(p.prepared.norm + i / Shape::kColumns * p.prepared.norm_stride + c0_ + i % Shape::kColumns));
  }
  template <class Params>
  __device__ __forceinline__ void copy_x(const Params& p, int64_t m0, int rows) const {
    const int valid = valid_of(p);
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i) {
      if (row(i) >= rows) return;
      const T* const from = p.of.x.row(m0 + row(i)) + (valid > 0 ? c0_ + column() : 0);
      if (p.x_alignment == 16)
        cp_async16(own_x(i), from, valid * int(sizeof(T)));
      else
        store_piece(own_x(i), load_piece<E, false>(from, valid, p.x_alignment));
    }
  }
  template <class Params>
  __device__ __forceinline__ void write(const Params& p, int64_t m0, int rows, const T* tile) {
    const int valid = valid_of(p);
    Piece<A, E> mean = {}, scale = {}, bias = {};
    if (p.prepared.norm) {
      mean = load_piece<E>(norm_ + column());
      scale = load_piece<E>(norm_ + Shape::kColumns + column());
      bias = load_piece<E>(norm_ + 2 * Shape::kColumns + column());
    }
#pragma unroll 2
    for (int i = 0; i < Shape::kPieces; ++i) {
      if (row(i) >= rows) return;
      const int64_t m = m0 + row(i);
      Piece<T, E> piece = load_piece<E>(tile + row(i) * Shape::kOutPitch + column());
      if (p.prepared.norm) {
        const Piece<T, E> x = load_piece<E>(own_x(i));
        Piece<T, E> in = {};
        if (p.in) in = load_piece<E, false>(p.in.row(m) + c0_ + column(), valid, p.in_alignment);
        Piece<A, E> g;
#pragma unroll
        for (int e = 0; e < E; ++e) {
          const A xc = x.get(e) - mean.v[e];
          const A dy = gradient_passes(of_centered(xc, scale.v[e], bias.v[e])) ? piece.get(e) : A(0);
          sum_[e] += dy;
          sum_xc_[e] += dy * xc;
          g.v[e] = scale.v[e] * dy + in.get(e);
        }
        if (p.of.scaled) piece = Piece<T, E>::narrowed(g);
      }
      if (p.of.grad_x) store_piece<false>(p.of.grad_x.row(m) + c0_ + column(), piece, valid, p.out_alignment);
    }
  }
  // The block's sums, [2, kColumns], to `out` with a distance of `stride`, of the threads in their order. of_threads
  // takes the place of the tile; all threads of the block must come here.
  __device__ __forceinline__ void store_sums(A* out, int64_t stride, A* of_threads) const {
    constexpr int N = Shape::kColumns;
    sync_block();  // the tile is read no more
#pragma unroll
    for (int e = 0; e < E; ++e) {
      store_one(of_threads + row(0) * 2 * N + column() + e, sum_[e]);
      store_one(of_threads + row(0) * 2 * N + N + column() + e, sum_xc_[e]);
    }
    sync_block();
    if (thread_x() >= 2 * N) return;
    A total = 0;
    for (int i = 0; i < Shape::kDown; ++i) total += load_one(of_threads + i * 2 * N + thread_x());
    store_one(out + thread_x() / N * stride + thread_x() % N, total);
  }

 private:
  A* norm_;
  T* x_;
  int c0_;
  A sum_[E] = {}, sum_xc_[E] = {};

  static __device__ __forceinline__ int column() { return thread_x() % Shape::kAcross * E; }
  static __device__ __forceinline__ int row(int i) { return thread_x() / Shape::kAcross + i * Shape::kDown; }
  __device__ __forceinline__ T* own_x(int i) const { return x_ + (i * Shape::kThreads + thread_x()) * E; }
  template <class Params>
  __device__ __forceinline__ int valid_of(const Params& p) const {
    const int left = int(p.of.C) - (c0_ + column());
    return left < 0 ? 0 : left < E ? left : E;
  }
};

template <class T, class Math, bool LARGE>
__global__ void __launch_bounds__(Dgrad3x3Shape<T, Math, LARGE>::kThreads, 1)
    conv3x3_dgrad_tiles(const __grid_constant__ Dgrad3x3<T, typename Math::Operand> p) {
  using Shape = Dgrad3x3Shape<T, Math, LARGE>;
  using Copies = ChunkCopies<T, Math, Shape::kThreads>;
  using Tile = typename Shape::Tile;
  using A = Acc<T>;
  using S = typename Math::Operand;
  DX_SHARED_BYTES(shared);
  S* const zeros = reinterpret_cast<S*>(shared);
  const auto buffer = [&](int side) {
    return reinterpret_cast<T*>(shared + Shape::kBuffersAt + side * p.buffer_bytes);
  };
  const auto panel = [&](int i) { return reinterpret_cast<S*>(shared + p.panels_at + i * p.panel_bytes); };
  const int c0 = int(block_x()) * Shape::kColumns;
  const int64_t M = p.window.rows(), first = int64_t(block_y()) * p.rows;
  const int rows = rows_from(M, first, p.rows);

  const auto halo_begin = [&](int done, int step) { return p.window.first_of_halo(first + done, step / p.chunks); };
  const auto halo_rows = [&](int done) {
    return (rows - done < Shape::kRows ? rows - done : Shape::kRows) + 2 * p.window.reach;
  };
  const auto copy_rows = [&](int done, int step, int side) {
    Copies::copy_rows(p.g, 16, p.of.N, M, step % p.chunks * Shape::Chunk::kInner, halo_begin(done, step),
                      halo_rows(done), buffer(side));
  };
  DgradOutput<T, Shape> output(shared, c0);
  for (int i = 0; i < (p.resident ? p.steps : 1); ++i)
    Copies::template copy_panel<Shape::kColumns>(p.prepared, p.window.taps, i, c0, panel(i));
  copy_rows(0, 0, 0);
  cp_async_commit();
  if (thread_x() < 4) store_piece(zeros + thread_x() * Copies::E, Piece<S, Copies::E>{});
  if (p.prepared.norm) output.load_norm(p);

  int side = 0;
  for (int done = 0; done < rows; done += Shape::kRows) {
    uint32_t inside[Tile::kLeft];
#pragma unroll
    for (int i = 0; i < Tile::kLeft; ++i)
      inside[i] = Tile::left(i) < rows - done ? p.window.taps_inside(first + done + Tile::left(i)) : 0;
    Tile da;
    da.begin([](int) { return A(0); });
    for (int step = 0; step < p.steps; ++step, side ^= 1) {
      cp_async_wait<0>();
      Copies::normalise(nullptr, 0, halo_begin(done, step), halo_rows(done), M, buffer(side));
      sync_block();  // this step is there, and nobody reads the one before any more
      const bool last = step + 1 == p.steps;
      const int next = last ? 0 : step + 1, at = last ? done + Shape::kRows : done;
      if (step == 0 && p.prepared.norm) output.copy_x(p, first + done, rows - done);
      cp_async_commit();
      if (at < rows) {
        if (!p.resident)
          Copies::template copy_panel<Shape::kColumns>(p.prepared, p.window.taps, next, c0, panel(side ^ 1));
        copy_rows(at, next, side ^ 1);
      }
      cp_async_commit();
      uint32_t in_plane[Tile::kLeft];
#pragma unroll
      for (int i = 0; i < Tile::kLeft; ++i) in_plane[i] = Window::of_plane(inside[i], step / p.chunks);
      multiply_taps<typename Shape::Chunk, Shape::kColumns>(da, p.window, in_plane, buffer(side), zeros,
                                                            panel(p.resident ? step : side));
    }
    T* const tile = buffer(side ^ 1);  // of the last step
    cp_async_wait<1>();                // for x
    sync_block();                      // nobody reads that buffer any more
    store_own<T, Tile>(tile, Shape::kOutPitch, [&](int i, int j) { return da.own(i, j); });
    sync_block();
    output.write(p, first + done, rows - done, tile);
  }
  cp_async_wait<0>();
  if (p.sums)
    output.store_sums(p.sums + block_y() * 2 * p.prepared.Np + c0, p.prepared.Np, reinterpret_cast<A*>(buffer(0)));
}

}  // namespace dx::cuda
