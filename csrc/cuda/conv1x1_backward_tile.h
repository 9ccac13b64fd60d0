// One block's work on a tile of rows and a slice of C in the backward pass of the 1x1 convolution (see
// conv1x1_backward.cu): how rows come to shared memory, what becomes of them there, and what follows dz @ W.
#pragma once

#include "conv1x1_common.h"

namespace dx::cuda {

template <class T, class Math, int CHANNELS>
struct BackwardShape {
  using A = Acc<T>;
  using S = typename Math::Operand;
  static_assert(sizeof(S) == sizeof(T), "rows in shared memory become operands of the same size");
  static constexpr bool kHalf = sizeof(S) == 2, kDouble = sizeof(A) == 8;
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kBlocks = CHANNELS > 64 || kDouble ? 1 : 2;  // that a multiprocessor holds
  static constexpr int kRows = kDouble ? 16 : kHalf && CHANNELS > 64 ? 64 : 32;
  static constexpr int kColumns = kHalf ? 128 : kDouble ? 32 : 64;  // of C
  static constexpr int kChannels = CHANNELS;                        // of N
  static constexpr int kPiece = 16 / sizeof(T);                     // elements of 16 bytes
  // In TF32 dz is read both ways, and its pitch is the one of dgrad.
  static constexpr int kPitch = kColumns + kSkew<Math>, kDzPitch = kChannels + kPiece;
  static_assert(kPitch / kSkew<Math> % 2 == 1 && kDzPitch / kPiece % 2 == 1, "no bank conflicts");

  // A thread's pieces of x and G lie below one another; those of grad_out and z in kDzGroups columns of kDzPieces.
  static constexpr int kAcross = kColumns / kPiece, kDown = kThreads / kAcross, kPieces = kRows / kDown;
  static constexpr int kDzAcross = kChannels / kPiece & -(kChannels / kPiece),  // the power of two in it
      kDzGroups = kChannels / kPiece / kDzAcross;
  static constexpr int kDzDown = kThreads / kDzAcross, kDzPieces = kRows / kDzDown;
  // A channel has five constants; so many channels' are in registers at a time.
  static constexpr int kFew = kHalf && CHANNELS != 128 ? kPiece / 2 : kPiece;
  static_assert(kPieces * kDown == kRows && kDzPieces * kDzDown == kRows, "threads cover the tiles");
  static_assert(kChannels % kDown == 0, "threads cover the weights");

  // Shared memory: dz; grad_out and z, each thread's pieces where only it finds them; two tiles of x; G; the constants
  // of the columns; y, where dW is wanted; and panels of weights with the constants of their channels.
  static constexpr int kTileBytes = kRows * kPitch * int(sizeof(T));
  static constexpr int kRawBytes = kRows * kChannels * int(sizeof(T));
  static constexpr int kGradAt = kRows * kDzPitch * int(sizeof(S)), kZAt = kGradAt + kRawBytes;
  static constexpr int kXAt = kZAt + kRawBytes, kInAt = kXAt + 2 * kTileBytes, kNormAt = kInAt + kTileBytes;
  static constexpr int kYAt = kNormAt + 3 * kColumns * int(sizeof(A));
  static constexpr int kZNormAt = kChannels * kPitch * int(sizeof(S));  // in a panel
  static constexpr int kPanelBytes = kZNormAt + 5 * kChannels * int(sizeof(A));
  template <bool WGRAD>
  static constexpr int kPanelsAt = kYAt + (WGRAD ? kTileBytes : 0);
  template <bool WGRAD>
  static constexpr int shared_bytes(int panels) {
    return kPanelsAt<WGRAD> + panels * kPanelBytes;
  }
  static_assert(kGradAt % 16 == 0 && kTileBytes % 16 == 0 && kPanelBytes % 16 == 0, "vector accesses");
  static_assert(shared_bytes<true>(1) <= (CHANNELS > 128  ? kWidestShared
                                          : CHANNELS > 64 ? kWideShared
                                                          : kNarrowShared),
                "fits where it is chosen");

  using Dgrad = typename Math::template Tile<kRows, kColumns, kThreads, 2>;
  using Wgrad = typename Math::template Tile<kChannels, kColumns, kThreads, 2>;
  static_assert(Dgrad::kSharers * 2 * kColumns * int(sizeof(A)) <= 2 * kTileBytes, "the sums fit the place of x");
};

template <class T, class S>
struct Backward {
  BnReluConv1x1Backward<T> of;
  Prepared<Acc<T>, S> prepared;
  int rows;          // of each block but the last
  Acc<T>* sums;      // [blocks, 2, Cp]: sum dy, sum dy (x - mean)
  Acc<T>* wgrads;    // [blocks, Np, Cp]
  Rows<const T> in;  // what grad_x is added to
  bool adds;         // else to zeros
  int x_alignment, grad_out_alignment, z_alignment, in_alignment, out_alignment;
  int turns;      // tiles of channels that a block goes through for each tile of rows
  bool resident;  // the weights of all turns stay in shared memory
};

// Copies 16 bytes of a row to shared memory, the first `valid` elements and zeros behind. ASYNC: all rows of the launch
// are aligned to 16 bytes, and the thread goes on while they come.
template <bool ASYNC, class T>
__device__ __forceinline__ void copy_piece(T* shared, const T* from, int valid, int alignment) {
  if constexpr (ASYNC)
    cp_async16(shared, from, valid * int(sizeof(T)));
  else
    store_piece(shared, load_piece<16 / int(sizeof(T)), false>(from, valid, alignment));
}

// A block's slice of columns, from c0 on. The rows of a tile that exist are `rows` (or more than it has) in all that
// follows.
template <class T, class Shape, class Math, bool ASYNC>
class Slice {
 public:
  using A = Acc<T>;
  using S = typename Shape::S;
  using Dgrad = typename Shape::Dgrad;
  using Params = Backward<T, S>;

  __device__ __forceinline__ Slice(unsigned char* shared, int panels_at, int c0)
      : shared_(shared), panels_(shared + panels_at), c0_(c0) {}

  __device__ __forceinline__ S* dz() const { return reinterpret_cast<S*>(shared_); }
  __device__ __forceinline__ S* y() const { return reinterpret_cast<S*>(shared_ + Shape::kYAt); }
  __device__ __forceinline__ T* x(int side) const {
    return reinterpret_cast<T*>(shared_ + Shape::kXAt + side * Shape::kTileBytes);
  }
  __device__ __forceinline__ S* weights(int panel) const {
    return reinterpret_cast<S*>(panels_ + panel * Shape::kPanelBytes);
  }

  // ---- from global memory ----
  __device__ __forceinline__ void copy_norm(const Params& p) const {
    constexpr int P = 16 / sizeof(A), kNormAcross = Shape::kColumns / P;
    if (thread_x() < 3 * kNormAcross)
      cp_async16(norm() + thread_x() * P,
                 p.prepared.norm + thread_x() / kNormAcross * p.prepared.Cp + c0_ + thread_x() % kNormAcross * P, 16);
  }
  // W[n0 .. n0 + kChannels, c0 .. c0 + kColumns], where wanted, and what norm2 is there.
  __device__ __forceinline__ void copy_panel(const Params& p, int n0, int panel, bool with_weights) const {
    if (with_weights) {
      const S* from = p.prepared.weight + int64_t(n0 + row()) * p.prepared.Cp + c0_ + column();
#pragma unroll
      for (int i = 0; i < Shape::kChannels / D; ++i)
        cp_async16(weights(panel) + (row() + i * D) * Shape::kPitch + column(), from + i * D * p.prepared.Cp, 16);
    }
    if (!p.of.z) return;
    constexpr int P = 16 / sizeof(A), kNormAcross = Shape::kChannels / P;
    for (int i = thread_x(); i < 5 * kNormAcross; i += Shape::kThreads)
      cp_async16(z_norm(panel) + i * P, p.prepared.z_norm + i / kNormAcross * p.prepared.Np + n0 + i % kNormAcross * P,
                 16);
  }
  __device__ __forceinline__ void copy_x(const Params& p, int64_t m0, int rows, int side) const {
    copy_rows(p.of.x, p.x_alignment, int(p.of.C), m0, rows, x(side));
  }
  __device__ __forceinline__ void copy_in(const Params& p, int64_t m0, int rows) const {
    copy_rows(p.in, p.in_alignment, int(p.of.C), m0, p.adds ? rows : 0, in());
  }
  __device__ __forceinline__ void copy_grad_out(const Params& p, int64_t m0, int rows, int n0) const {
    const T *grads = p.of.grad_out.row(m0 + channel_row(0)) + n0, *zs = p.of.z.row(m0 + channel_row(0)) + n0;
#pragma unroll
    for (int g = 0; g < Shape::kDzGroups; ++g) {
      const int left = there(int(p.of.N) - n0 - channel(g));
#pragma unroll
      for (int i = 0; i < Shape::kDzPieces; ++i) {
        const int valid = channel_row(i) < rows ? left : 0, down = i * Shape::kDzDown;
        copy_piece<ASYNC>(grad_out(g, i), grads + down * p.of.grad_out.pitch + channel(g), valid, p.grad_out_alignment);
        if (p.of.z) copy_piece<ASYNC>(z(g, i), zs + down * p.of.z.pitch + channel(g), valid, p.z_alignment);
      }
    }
  }

  // ---- operands ----
  // dz for a tile: grad_out as it is, or through norm2 and its ReLU. Zero beyond N; beyond M it meets zeros of y, and
  // no dy is taken.
  __device__ __forceinline__ void fill_dz(const Params& p, int panel) const {
    constexpr int F = Shape::kFew, N = Shape::kChannels;
    const bool through_norm = bool(p.of.z);
#pragma unroll
    for (int f = 0; f < Shape::kDzGroups * E; f += F) {
      const int g = f / E, part = f % E, n = channel(g) + part;
      Piece<A, F> mean, scale, bias, center, slope;
      if (through_norm) {
        const A* at = z_norm(panel) + n;
        mean = load_piece<F>(at), scale = load_piece<F>(at + N), bias = load_piece<F>(at + 2 * N);
        center = load_piece<F>(at + 3 * N), slope = load_piece<F>(at + 4 * N);
      }
#pragma unroll
      for (int i = 0; i < Shape::kDzPieces; ++i) {
        const Piece<T, F> grads = load_piece<F>(grad_out(g, i) + part);
        Piece<A, F> values;
#pragma unroll
        for (int e = 0; e < F; ++e) values.v[e] = grads.get(e);
        if (through_norm) {
          const Piece<T, F> zs = load_piece<F>(z(g, i) + part);
#pragma unroll
          for (int e = 0; e < F; ++e) {
            const A zc = zs.get(e) - mean.v[e];
            const A dy = gradient_passes(of_centered(zc, scale.v[e], bias.v[e])) ? values.v[e] : A(0);
            // a frozen norm2 has no correction: its slope is 0, and times an infinite z that would be NaN
            values.v[e] = scale.v[e] * (dy - std::fma(slope.v[e], slope.v[e] == A(0) ? A(0) : zc, center.v[e]));
          }
        }
        store_piece(dz() + channel_row(i) * Shape::kDzPitch + n, Math::operands(values));
      }
    }
  }
  // y = relu((x - m) s + b), zero beyond M and C.
  __device__ __forceinline__ void fill_y(int rows, int side) const {
    const Piece<A, E> mean = load_piece<E>(norm() + column()),
                      scale = load_piece<E>(norm() + Shape::kColumns + column()),
                      bias = load_piece<E>(norm() + 2 * Shape::kColumns + column());
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i) {
      const int at = (row() + i * D) * Shape::kPitch + column();
      const Piece<T, E> xs = load_piece<E>(x(side) + at);
      Piece<A, E> values;
#pragma unroll
      for (int e = 0; e < E; ++e) values.v[e] = of_centered(xs.get(e) - mean.v[e], scale.v[e], bias.v[e]);
      Piece<S, E> operands = Math::relu_operands(values);
      operands.keep(row() + i * D < rows);
      store_piece(y() + at, operands);
    }
  }

  // ---- what follows dz @ W ----
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int j = 0; j < Dgrad::kOwnColumns; ++j) sum_[j] = sum_xc_[j] = A(0);
  }
  // dy = (dz W) masked; G = s dy + (G | grad_in | 0), where G lies; sum dy; sum dy (x - mean).
  __device__ __forceinline__ void add_tile(const Dgrad& dgrad, int rows, int side) {
    constexpr int R = Dgrad::kRun;
#pragma unroll
    for (int j = 0; j < Dgrad::kOwnColumns; j += R) {
      const int c = Dgrad::column(j);
      const Piece<A, R> mean = load_piece<R>(norm() + c), scale = load_piece<R>(norm() + Shape::kColumns + c),
                        bias = load_piece<R>(norm() + 2 * Shape::kColumns + c);
#pragma unroll
      for (int i = 0; i < Dgrad::kOwnRows; ++i) {
        const int at = Dgrad::row(i) * Shape::kPitch + c;
        const Piece<T, R> xs = load_piece<R>(x(side) + at);
        const Piece<T, R> old = load_piece<R>(in() + at);
        Piece<A, R> g;
#pragma unroll
        for (int e = 0; e < R; ++e) {
          const A xc = xs.get(e) - mean.v[e];
          const bool passes = Dgrad::row(i) < rows && gradient_passes(of_centered(xc, scale.v[e], bias.v[e]));
          const A dy = passes ? dgrad.own(i, j + e) : A(0);
          sum_[j + e] += dy;
          sum_xc_[j + e] += dy * xc;
          g.v[e] = scale.v[e] * dy + old.get(e);
        }
        store_piece(in() + at, Piece<T, R>::narrowed(g));
      }
    }
  }
  __device__ __forceinline__ void store_tile(const Params& p, int64_t m0, int rows) const {
    const int left = int(p.of.C) - (c0_ + column()), valid = left < E ? left : E;
    T* to = p.of.grad_x.row(m0 + row()) + c0_ + column();
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i) {
      const Piece<T, E> piece = load_piece<E>(in() + (row() + i * D) * Shape::kPitch + column());
      store_piece<false>(to + i * D * p.of.grad_x.pitch, piece, row() + i * D < rows ? valid : 0,
                         ASYNC ? 16 : p.out_alignment);
    }
  }
  // The block's sums of this slice, [2, kColumns], to `out` with a distance of Cp, of the threads in their order. They
  // take the place of x, which nobody reads any more. All threads of the block must come here.
  __device__ __forceinline__ void store_sums(A* out, int64_t Cp) const {
    constexpr int N = Shape::kColumns;
    A* const of_threads = reinterpret_cast<A*>(shared_ + Shape::kXAt);
    A* const mine = of_threads + Dgrad::sharer() * (2 * N);
#pragma unroll
    for (int j = 0; j < Dgrad::kOwnColumns; ++j) {
      store_one(mine + Dgrad::column(j), sum_[j]);
      store_one(mine + N + Dgrad::column(j), sum_xc_[j]);
    }
    sync_block();
    if (thread_x() < 2 * N) {
      A total = 0;
      for (int t = 0; t < Dgrad::kSharers; ++t) total += load_one(of_threads + t * (2 * N) + thread_x());
      store_one(out + thread_x() / N * Cp + thread_x() % N, total);
    }
  }

 private:
  static constexpr int E = Shape::kPiece, D = Shape::kDown;
  unsigned char *shared_, *panels_;
  int c0_;
  A sum_[Dgrad::kOwnColumns], sum_xc_[Dgrad::kOwnColumns];

  static __device__ __forceinline__ int column() { return thread_x() % Shape::kAcross * E; }
  static __device__ __forceinline__ int row() { return thread_x() / Shape::kAcross; }
  __device__ __forceinline__ T* in() const { return reinterpret_cast<T*>(shared_ + Shape::kInAt); }
  __device__ __forceinline__ A* norm() const { return reinterpret_cast<A*>(shared_ + Shape::kNormAt); }
  __device__ __forceinline__ A* z_norm(int panel) const {
    return reinterpret_cast<A*>(panels_ + panel * Shape::kPanelBytes + Shape::kZNormAt);
  }
  // The thread's own pieces of grad_out and z, which only it finds: neighbouring threads' lie side by side.
  static __device__ __forceinline__ int own(int group, int i) {
    return ((group * Shape::kDzPieces + i) * Shape::kThreads + thread_x()) * E;
  }
  __device__ __forceinline__ T* grad_out(int group, int i) const {
    return reinterpret_cast<T*>(shared_ + Shape::kGradAt) + own(group, i);
  }
  __device__ __forceinline__ T* z(int group, int i) const {
    return reinterpret_cast<T*>(shared_ + Shape::kZAt) + own(group, i);
  }
  static __device__ __forceinline__ int channel(int group) {
    return (group * Shape::kDzAcross + thread_x() % Shape::kDzAcross) * E;
  }
  static __device__ __forceinline__ int channel_row(int i) {
    return thread_x() / Shape::kDzAcross + i * Shape::kDzDown;
  }
  // Elements of a piece, of so many that are left of its row.
  static __device__ __forceinline__ int there(int left) { return left < 0 ? 0 : left < E ? left : E; }
  __device__ __forceinline__ void copy_rows(const Rows<const T>& from, int alignment, int C, int64_t m0, int rows,
                                            T* tile) const {
    const T* first = from.row(m0 + row()) + c0_ + column();
    const int left = there(C - (c0_ + column()));
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i)
      copy_piece<ASYNC>(tile + (row() + i * D) * Shape::kPitch + column(), first + i * D * from.pitch,
                        row() + i * D < rows ? left : 0, alignment);
  }
};

}  // namespace dx::cuda
