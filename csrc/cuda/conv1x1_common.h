// What the 1x1 convolution's two directions share: the choice of arithmetic and the kernel that prepares a call.
//
// The prepared operands lie in the workspace: the weights in the product's own type, [Np, Cp] with zeros around, so
// that the products copy them to shared memory as they are and look at no edge; and per channel what the prologues
// need. It moves N C numbers once, against the M C of the product. The weights of a block's layers are not prepared
// together, as the 3x3's are: the constants need the statistics that the layer before makes, and with them a launch,
// beside which the weights take no time of their own. Where that layer has left its sums unmerged (unmerged.h), blocks
// behind the others merge them and make the constants of these columns.
#pragma once

#include "../params.h"
#include "gemm_fma.h"
#include "gemm_mma.h"
#include "limits.h"
#include "merge_slabs.h"

namespace dx::cuda {

// BatchNorm of xc = x - mean, which is taken first: exact where a channel is constant, at any mean, and an infinite x
// gives what (x - mean) * scale + bias gives. The product is fused whatever the compiler would make of it: what the
// backward pass computes again is what the forward pass had.
template <class A>
__device__ __forceinline__ A of_centered(A xc, A scale, A bias) {
  return std::fma(xc, scale, bias);
}

// max(u, 0) that propagates NaN; and whether the gradient passes, as PyTorch's threshold_backward has it.
template <class A>
__device__ __forceinline__ A positive_part(A u) {
  return A(0) > u ? A(0) : u;
}
template <class A>
__device__ __forceinline__ bool gradient_passes(A u) {
  return !(u <= A(0));
}

// ---- arithmetic: the type of the operands in shared memory, how values (and their positive parts) become operands,
// the tile that multiplies them
template <class A, int E>
__device__ __forceinline__ Piece<A, E> positive_part(const Piece<A, E>& values) {
  Piece<A, E> piece;
#pragma unroll
  for (int e = 0; e < E; ++e) piece.v[e] = positive_part(values.v[e]);
  return piece;
}
template <class A>
struct PlainMath {
  using Operand = A;
  template <int M, int N, int THREADS, int WARPS_DOWN>
  using Tile = FmaTile<A, M, N, THREADS>;
  template <int E>
  static __device__ __forceinline__ Piece<A, E> operands(const Piece<A, E>& values) {
    return values;
  }
  template <int E>
  static __device__ __forceinline__ Piece<A, E> relu_operands(const Piece<A, E>& values) {
    return positive_part(values);
  }
};
template <class T>
struct TensorMath {
  using Operand = T;
  template <int M, int N, int THREADS, int WARPS_DOWN>
  using Tile = MmaTile<T, M, N, THREADS, WARPS_DOWN>;
  template <int E>
  static __device__ __forceinline__ Piece<T, E> operands(const Piece<float, E>& values) {
    return Piece<T, E>::narrowed(values);
  }
  template <int E>
  static __device__ __forceinline__ Piece<T, E> relu_operands(const Piece<float, E>& values) {
    return Piece<T, E>::narrowed_relu(values);
  }
};
struct Tf32Math {
  using Operand = float;
  template <int M, int N, int THREADS, int WARPS_DOWN>
  using Tile = Tf32Tile<M, N, THREADS, WARPS_DOWN>;
  template <int E>
  static __device__ __forceinline__ Piece<float, E> operands(const Piece<float, E>& values) {
    Piece<float, E> piece;
#pragma unroll
    for (int e = 0; e < E; ++e) piece.v[e] = as_float(to_tf32(values.v[e]));
    return piece;
  }
  template <int E>
  static __device__ __forceinline__ Piece<float, E> relu_operands(const Piece<float, E>& values) {
    return operands(positive_part(values));
  }
};

// Elements that rows of an operand in shared memory have more than their columns, so that what a warp reads at a time
// lies in different banks: an odd number of pieces of 16 bytes, where it reads 8 rows of such pieces. Fragments of TF32
// are read element by element, 8 rows x 4 where k is the inner dimension, for which that holds too, else 4 rows x 8.
template <class Math>
constexpr int kSkew = 16 / int(sizeof(typename Math::Operand));
template <>
inline constexpr int kSkew<Tf32Math> = 8;  // where k is not the inner dimension

// How many of a tile's rows exist.
__device__ __forceinline__ int rows_from(int64_t M, int64_t m0, int tile) { return M - m0 < tile ? int(M - m0) : tile; }

// ---- workspace -----------------------------------------------------------------------------------------------------
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t at_least_one(int64_t n) { return n > 1 ? n : 1; }  // a grid of no blocks is an error
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Hands out pieces of a workspace, each aligned to 256 bytes; without one it only counts.
class Carver {
 public:
  explicit Carver(void* workspace) : begin_(static_cast<char*>(workspace)) {}
  template <class T>
  T* take(int64_t count) {
    char* at = begin_ ? begin_ + used_ : nullptr;
    used_ += static_cast<size_t>(round_up(count * int64_t(sizeof(T)), 256));
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }

 private:
  char* begin_;
  size_t used_ = 0;
};

// ---- preparation ---------------------------------------------------------------------------------------------------
template <class A, class S>
struct Prepared {
  int64_t Np, Cp;  // N and C rounded up to whole tiles
  S* weight;       // [Np, Cp]
  A* norm;         // [3, Cp]: mean, scale, bias of the norm in front
  A* z_norm;       // [5, Np]: mean, scale, bias, center, slope of the norm behind (backward), else null
};

template <class A, class S>
struct Prepare {
  int64_t M, C, N;
  const A* weight;  // [N, C]
  Norm<A> norm, z_norm;
  const A *z_grad_weight, *z_grad_bias;  // [N], or both null: the norm behind is frozen
  Prepared<A, S> to;
  UnmergedMoments<A> moments;  // of columns from moments_at on, of the norm in front
  UnmergedSums<A> z_sums;      // z_grad_weight and z_grad_bias, of all columns
  int64_t moments_at;
  unsigned blocks, moments_blocks;  // that merge nothing; and, behind them, those that merge moments

  __device__ __forceinline__ void norm_of(int64_t c, A mean, A var) const {
    const A scale = value(norm.weight, c, A(1)) * bn_rstd(var, norm.eps);
    store(to.norm, to.Cp, c, {mean, scale, value(norm.bias, c, A(0))});
  }
  // dz = s (dy - center - (z - m) slope), with center = sum(dy)/M and slope = r^2 sum(dy (z - m))/M
  __device__ __forceinline__ void z_norm_of(int64_t n, A grad_weight, A grad_bias) const {
    const A rstd = bn_rstd(load_one(z_norm.var + n), z_norm.eps), scale = value(z_norm.weight, n, A(1)) * rstd;
    store(to.z_norm, to.Np, n,
          {load_one(z_norm.mean + n), scale, value(z_norm.bias, n, A(0)), grad_bias / A(M), rstd * grad_weight / A(M)});
  }
  // One number of each of a constant's lines.
  template <size_t LINES>
  static __device__ __forceinline__ void store(A* lines, int64_t stride, int64_t at, const A (&values)[LINES]) {
#pragma unroll
    for (size_t v = 0; v < LINES; ++v) store_one(lines + v * stride + at, values[v]);
  }
  static __device__ __forceinline__ A value(const A* values, int64_t at, A without) {
    return values ? load_one(values + at) : without;
  }
};

// A kernel of each file that includes this: two files must not share one by its name.
namespace {

template <class A, class Math>
__global__ void __launch_bounds__(kFinishThreads)
    prepare_conv1x1(const __grid_constant__ Prepare<A, typename Math::Operand> p) {
  const auto& to = p.to;
  if (block_x() >= p.blocks) {
    DX_SHARED_BYTES(bytes);
    const Shared<double> shared = shared_as<double>(bytes);
    const unsigned block = block_x() - p.blocks;
    if (block < p.moments_blocks)
      finish_slabs(p.moments, block, shared, [&](int64_t c, A mean, A var) { p.norm_of(p.moments_at + c, mean, var); });
    else
      finish_slabs(p.z_sums, block - p.moments_blocks, shared,
                   [&](int64_t n, A grad_weight, A grad_bias) { p.z_norm_of(n, grad_weight, grad_bias); });
    return;
  }
  const int64_t i = int64_t(block_x()) * block_dim() + thread_x();
  if (i < to.Np * to.Cp / 2) {
    const int64_t n = 2 * i / to.Cp, c = 2 * i % to.Cp;
    Piece<A, 2> pair = {};
    if (n < p.N && c < p.C) pair.v[0] = load_one(p.weight + n * p.C + c);
    if (n < p.N && c + 1 < p.C) pair.v[1] = load_one(p.weight + n * p.C + c + 1);
    store_piece(to.weight + 2 * i, Math::operands(pair));
  }
  const bool unmerged = p.moments.any() && i >= p.moments_at && i < p.moments_at + p.moments.C;
  if (i < p.C && !unmerged) p.norm_of(i, load_one(p.norm.mean + i), load_one(p.norm.var + i));
  if (i >= p.C && i < to.Cp) p.store(to.norm, to.Cp, i, {A(0), A(0), A(0)});
  if (!to.z_norm) return;
  if (i < p.N && !p.z_sums.any()) p.z_norm_of(i, p.value(p.z_grad_weight, i, A(0)), p.value(p.z_grad_bias, i, A(0)));
  if (i >= p.N && i < to.Np) p.store(to.z_norm, to.Np, i, {A(0), A(0), A(0), A(0), A(0)});
}

template <class Math, class A>
cudaError_t launch_prepare(Prepare<A, typename Math::Operand> p, Stream stream) {
  const int64_t Np = p.to.Np, Cp = p.to.Cp, most = Np > Cp ? Np : Cp, pairs = Np * Cp / 2;
  p.blocks = unsigned(ceil_div(most > pairs ? most : pairs, kFinishThreads));
  p.moments_blocks = unsigned(finish_blocks(p.moments));
  p.moments_at = p.moments.any() ? p.moments.mean - p.norm.mean : 0;
  const unsigned merging = p.moments_blocks + unsigned(finish_blocks(p.z_sums));
  return launch(prepare_conv1x1<A, Math>, dim3(p.blocks + merging), kFinishThreads, merging > 0 ? kFinishShared : 0,
                stream, p);
}

}  // namespace

template <class Math_, int CHANNELS>
struct Choice {
  using Math = Math_;
  static constexpr int kChannels = CHANNELS;
};

// Tiles of 128 channels need more shared memory than GPUs of compute capability 8.6, 8.9 and 12.0 have (99 KiB); 8.0
// has 163 KiB, 9.0 and 10.0 have 227.
constexpr int kNarrowShared = 99 * 1024, kWideShared = 163 * 1024, kWidestShared = 227 * 1024;

// Calls f with the Choice for a call of N output channels: tiles of 128 or, where that leaves less of them empty, of 96
// channels (N = 192 of a growth rate of 48 is two of them); WIDEST: of 192 where a block can ask for so much memory.
template <class Math, bool WIDEST, class F>
auto choose_channels(int64_t N, const F& f) {
  const int shared = most_shared_bytes();
  if (N <= 64 || shared < kWideShared) return f(Choice<Math, 64>{});
  if constexpr (WIDEST)
    if (N > 128 && N <= 192 && shared >= kWidestShared) return f(Choice<Math, 192>{});
  if (round_up(N, 96) < round_up(N, 128)) return f(Choice<Math, 96>{});
  return f(Choice<Math, 128>{});
}

// The arithmetic too. For double, where speed is not the point, tiles have 64 channels. Every GPU that the kernels are
// built for (compute capability 8.0 and later) multiplies 16-bit and TF32 matrices.
template <class T, bool WIDEST, class F>
auto choose(int64_t N, bool tf32, const F& f) {
  if constexpr (sizeof(T) == 8)
    return f(Choice<PlainMath<double>, 64>{});
  else if constexpr (sizeof(T) == 4)
    return tf32 ? choose_channels<Tf32Math, WIDEST>(N, f) : choose_channels<PlainMath<float>, WIDEST>(N, f);
  else
    return choose_channels<TensorMath<T>, WIDEST>(N, f);
}

}  // namespace dx::cuda
