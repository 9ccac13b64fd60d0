// What the kernels of the 3x3 convolution share: windows over rows, the choice of a tile, the prepared operands, and
// how rows come to shared memory.
//
// A tile is a run of rows, that is of pixels in scan order, whatever the images' sizes: it may begin in the middle of a
// line and reach over several images. A tap of the window is then a distance in rows, the same for all pixels, and the
// rows under all taps are one run too, the tile's halo: with lines of W pixels W + 1 rows before the tile and behind
// it. Where a tap leaves a pixel's image the product takes a row of zeros instead. Windows over one dimension have
// three taps in a line. Those over three have three planes of nine, whose halos lie a plane of rows apart; they come to
// shared memory after each other.
//
// The inner dimension of the product comes in chunks of 64 bytes of operands. A step is a chunk of a plane: it has
// its halo and its panel of weights, [taps of the plane, output channels, chunk].
#pragma once

#include "boxes.h"
#include "conv1x1_common.h"
#include "gemm_rows.h"

namespace dx::cuda {

struct Window : Images {
  Divisor by_size[3];
  int planes, taps;  // of a plane
  int line;          // rows that the next line's tap lies further, if there is one
  int reach;         // rows that a plane's taps reach before a row, and behind it
  int64_t plane;     // rows that the next plane lies further

  Window() = default;
  Window(const Images& images, const int64_t (&window)[3]) : Images(images) {
    for (int i = 0; i < 3; ++i) by_size[i] = Divisor(size[i]);
    planes = int(window[0]), taps = int(window[1] * window[2]);
    line = int(size[2]);
    reach = (taps > 3 ? line : 0) + 1;
    plane = size[1] * size[2];
  }
  __device__ __forceinline__ int before() const { return taps > 3; }  // lines of the window
  // Rows from a pixel to the one under tap t of its plane.
  __device__ __forceinline__ int distance(int t) const { return (t / 3 - before()) * line + t % 3 - 1; }
  // The first of the rows under all taps of a plane, for a tile that begins with row m0.
  __device__ __forceinline__ int64_t first_of_halo(int64_t m0, int of_plane) const {
    return m0 + (of_plane - planes / 2) * plane - reach;
  }

  // Of row m: bit t for each tap that lies in the image, and bit 9 + i for plane i.
  static constexpr int kPlaneBits = 9;
  __device__ __forceinline__ uint32_t taps_inside(int64_t m) const {
    const Pixel pixel(m, size, by_size);
    uint32_t bits = 0;
    for (int t = 0; t < taps; ++t) {
      const int h = pixel.at[1] + t / 3 - before(), w = pixel.at[2] + t % 3 - 1;
      bits |= uint32_t(h >= 0 && h < size[1] && w >= 0 && w < size[2]) << t;
    }
    for (int i = 0; i < planes; ++i) {
      const int d = pixel.at[0] + i - planes / 2;
      bits |= uint32_t(d >= 0 && d < size[0]) << (kPlaneBits + i);
    }
    return bits;
  }
  // The same for one plane: no tap where that lies outside.
  static __device__ __forceinline__ uint32_t of_plane(uint32_t bits, int i) {
    return bits >> (kPlaneBits + i) & 1 ? bits & ((1u << kPlaneBits) - 1) : 0;
  }
};

// Whether the images' sides fit the kernels' 32-bit numbers, and those of a plan: where a window reaches over lines,
// one of more pixels than a block has bytes of shared memory has no room in any case.
inline bool has_usable_sides(const Images& images, const int64_t (&window)[3]) {
  constexpr int64_t kMost = INT32_MAX;
  return images.size[0] <= kMost && images.size[1] <= kMost &&
         images.size[2] <= (window[1] > 1 ? int64_t(most_shared_bytes()) : kMost);
}

// ---- operands in shared memory -------------------------------------------------------------------------------------
template <class S>
struct ChunkShape {
  static constexpr int kPiece = 16 / int(sizeof(S)), kPieces = 4;
  static constexpr int kInner = kPieces * kPiece;  // 64 bytes
  static constexpr int kPitch = kInner + kPiece;
  static_assert(kPitch / kPiece % 2 == 1, "no bank conflicts");
};

// The weights as the product takes them, and the constants of a norm.
template <class A, class S>
struct Prepared3x3 {
  int64_t Np, Cp;       // output and input channels of the product, rounded up to whole tiles and chunks
  S* weight;            // [steps, taps, Np, kInner]
  int64_t norm_stride;  // the norm's channels, rounded up
  A* norm;              // [3, norm_stride]: mean, scale, bias; or null
};

template <class A, class S>
struct Prepare3x3 {
  int64_t N, C;          // of the product
  Taps<const A> weight;  // `output` and `input` are the product's
  int64_t planes, taps;  // of a plane
  int64_t normed;        // channels of the norm
  Norm<A> norm;          // mean null: none
  Prepared3x3<A, S> to;
};

// Of a product that goes the other way: from outputs to inputs, under the taps in reverse.
template <class A>
Taps<const A> reversed(const Taps<const A>& weight, int64_t taps) {
  return {weight.data + (taps - 1) * weight.tap, weight.input, weight.output, -weight.tap};
}

// A kernel of each file that includes this: two files must not share one by its name.
namespace {

// Pairs of weights, and constants.
template <class A, class Math>
__global__ void __launch_bounds__(256)
    prepare_conv3x3(const __grid_constant__ Prepare3x3<A, typename Math::Operand> p) {
  using S = typename Math::Operand;
  constexpr int kPairs = ChunkShape<S>::kInner / 2;
  const auto& to = p.to;
  const int64_t i = int64_t(block_x()) * block_dim() + thread_x();
  const int64_t chunks = to.Cp / ChunkShape<S>::kInner;
  if (i < p.planes * chunks * p.taps * to.Np * kPairs) {
    const int64_t n = i / kPairs % to.Np, of_step = i / kPairs / to.Np;  // step, tap
    const int64_t step = of_step / p.taps, t = step / chunks * p.taps + of_step % p.taps;
    const int64_t c = (step % chunks * kPairs + i % kPairs) * 2;
    Piece<A, 2> pair = {A(0), A(0)};
    if (n < p.N)
      for (int e = 0; e < 2; ++e)
        if (c + e < p.C)
          pair.v[e] = load_one(p.weight.data + n * p.weight.output + (c + e) * p.weight.input + t * p.weight.tap);
    store_piece(to.weight + 2 * i, Math::operands(pair));
  }
  if (to.norm && i < to.norm_stride) {
    A values[3] = {A(0), A(0), A(0)};
    if (i < p.normed) {
      values[0] = load_one(p.norm.mean + i);
      values[1] = (p.norm.weight ? load_one(p.norm.weight + i) : A(1)) * bn_rstd(load_one(p.norm.var + i), p.norm.eps);
      if (p.norm.bias) values[2] = load_one(p.norm.bias + i);
    }
    for (int v = 0; v < 3; ++v) store_one(to.norm + v * to.norm_stride + i, values[v]);
  }
}

template <class Math, class A>
cudaError_t launch_prepare(const Prepare3x3<A, typename Math::Operand>& p, Stream stream) {
  const int64_t pairs = p.planes * p.taps * p.to.Np * p.to.Cp / 2;
  const int64_t threads = pairs > p.to.norm_stride ? pairs : p.to.norm_stride;
  return launch(prepare_conv3x3<A, Math>, dim3(unsigned(ceil_div(threads, 256))), 256, 0, stream, p);
}

}  // namespace

// Chunks of rows and of weights on their way to shared memory, of a block of THREADS. Each thread copies, awaits and
// normalises its own pieces.
template <class T, class Math, int THREADS>
struct ChunkCopies : ChunkShape<typename Math::Operand> {
  using A = Acc<T>;
  using S = typename Math::Operand;
  using Chunk = ChunkShape<S>;
  static_assert(sizeof(S) == sizeof(T), "rows become operands where they lie");
  static constexpr int E = Chunk::kPiece, kDown = THREADS / Chunk::kPieces;
  static __device__ __forceinline__ int column() { return thread_x() % Chunk::kPieces * E; }

  // Calls f(row of the buffer, row of the images) for the thread's rows among `count` from row `first` on, where there
  // are any.
  template <class F>
  static __device__ __forceinline__ void for_rows(int64_t first, int count, int64_t M, const F& f) {
    for (int i = thread_x() / Chunk::kPieces; i < count; i += kDown)
      if (first + i >= 0 && first + i < M) f(i, first + i);
  }
  // Columns c0 and on of the rows, zeros behind the last one.
  static __device__ __forceinline__ void copy_rows(const Rows<const T>& x, int alignment, int64_t C, int64_t M, int c0,
                                                   int64_t first, int count, T* buffer) {
    const int64_t left = C - (c0 + column());
    const int valid = left < 0 ? 0 : left < E ? int(left) : E;
    for_rows(first, count, M, [&](int i, int64_t m) {
      T* const to = buffer + i * Chunk::kPitch + column();
      const T* const from = x.row(m) + (valid > 0 ? c0 + column() : 0);
      if (alignment == 16)
        cp_async16(to, from, valid * int(sizeof(T)));
      else
        store_piece(to, load_piece<E, false>(from, valid, alignment));
    });
  }
  // relu((x - m) s + b) of the same rows, where they lie, as operands; norm: [3, stride] from c0 on, or null: x itself.
  static __device__ __forceinline__ void normalise(const A* norm, int64_t stride, int64_t first, int count, int64_t M,
                                                   T* buffer) {
    Piece<A, E> mean = {}, scale = {}, bias = {};
    if (norm) {
      mean = load_piece<E>(norm + column());
      scale = load_piece<E>(norm + stride + column());
      bias = load_piece<E>(norm + 2 * stride + column());
    } else if (std::is_same_v<Math, TensorMath<T>> || std::is_same_v<Math, PlainMath<T>>) {
      return;  // they are operands already
    }
    for_rows(first, count, M, [&](int i, int64_t) {
      T* const at = buffer + i * Chunk::kPitch + column();
      const Piece<T, E> x = load_piece<E>(at);
      Piece<A, E> values;
#pragma unroll
      for (int e = 0; e < E; ++e) values.v[e] = x.get(e);
      if (norm) {
#pragma unroll
        for (int e = 0; e < E; ++e) values.v[e] = of_centered(values.v[e] - mean.v[e], scale.v[e], bias.v[e]);
        store_piece(at, Math::relu_operands(values));
      } else {
        store_piece(at, Math::operands(values));
      }
    });
  }
  // The weights of a step for channels n0 and on, [taps, CHANNELS, kInner].
  template <int CHANNELS>
  static __device__ __forceinline__ void copy_panel(const Prepared3x3<A, S>& prepared, int taps, int step, int64_t n0,
                                                    S* panel) {
    for (int i = thread_x() / Chunk::kPieces; i < taps * CHANNELS; i += kDown)
      cp_async16(panel + i * Chunk::kPitch + column(),
                 prepared.weight +
                     ((int64_t(step) * taps + i / CHANNELS) * prepared.Np + n0 + i % CHANNELS) * Chunk::kInner +
                     column(),
                 16);
  }
  static __device__ __forceinline__ void copy_norm(const A* norm, int64_t stride, A* shared) {
    constexpr int P = 16 / int(sizeof(A));
    for (int64_t i = thread_x(); i < 3 * stride / P; i += THREADS) cp_async16(shared + i * P, norm + i * P, 16);
  }
};

// sums += the rows under all taps of a step times its panel. inside: of the rows that the thread addresses, those of
// the plane. zeros: a row of them.
template <class Chunk, int CHANNELS, class Tile, class S>
__device__ __forceinline__ void multiply_taps(Tile& sums, const Window& window, const uint32_t (&inside)[Tile::kLeft],
                                              const S* halo, const S* zeros, const S* panel) {
#pragma unroll 1
  for (int t = 0; t < window.taps; ++t) {
    const S* const under = halo + (window.reach + window.distance(t)) * Chunk::kPitch;
    const S* rows[Tile::kLeft];
#pragma unroll
    for (int i = 0; i < Tile::kLeft; ++i) rows[i] = inside[i] >> t & 1 ? under + Tile::left(i) * Chunk::kPitch : zeros;
    sums.template multiply<Chunk::kInner>(rows, panel + t * CHANNELS * Chunk::kPitch, Chunk::kPitch);
  }
}

// The product's tile with rows anywhere.
template <class Math, int M, int N, int THREADS, int WARPS_DOWN>
struct RowsTileOf;
template <class A, int M, int N, int THREADS, int WARPS_DOWN>
struct RowsTileOf<PlainMath<A>, M, N, THREADS, WARPS_DOWN> {
  using type = FmaRowsTile<A, M, N, THREADS>;
};
template <class T, int M, int N, int THREADS, int WARPS_DOWN>
struct RowsTileOf<TensorMath<T>, M, N, THREADS, WARPS_DOWN> {
  using type = MmaRowsTile<T, M, N, THREADS, WARPS_DOWN>;
};
template <int M, int N, int THREADS, int WARPS_DOWN>
struct RowsTileOf<Tf32Math, M, N, THREADS, WARPS_DOWN> {
  using type = Tf32RowsTile<M, N, THREADS, WARPS_DOWN>;
};

// Stores v for the thread's share of a tile, in the type of feature maps: v(i, j) of its row i and column j.
template <class T, class Tile, class F>
__device__ __forceinline__ void store_own(T* tile, int pitch, const F& v) {
  using A = Acc<T>;
  constexpr int R = Tile::kRun;
#pragma unroll
  for (int i = 0; i < Tile::kOwnRows; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kOwnColumns; j += R) {
      Piece<A, R> values;
#pragma unroll
      for (int e = 0; e < R; ++e) values.v[e] = v(i, j + e);
      store_piece(tile + Tile::row(i) * pitch + Tile::column(j), Piece<T, R>::narrowed(values));
    }
}

}  // namespace dx::cuda
