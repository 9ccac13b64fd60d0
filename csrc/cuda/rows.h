// How the kernels of this folder that go over rows once lay their threads.
//
// A thread owns V columns (16 bytes of a row if all pitches and addresses allow) and walks over rows; what belongs to a
// column stays in its registers. Columns are fastest across threads: a block is `across` threads wide, up to
// kMostAcross (512 bytes of a row, four times a cache line, so that a pitch that is no multiple of one costs little),
// and as many rows high as its threads give. A block's slab of rows follows from the sizes alone.
#pragma once

#include "columns.h"
#include "launch.h"

namespace dx::cuda {

constexpr int kThreads = 256;
constexpr int kMostAcross = 32;
// Two waves of four blocks on each of an H100's 132 processors.
constexpr int64_t kBlocks = 2 * 4 * 132;
static_assert(kMostAcross * 16 == 4 * 128, "512 bytes of a row");
static_assert(kThreads % kMostAcross == 0 && kThreads / kMostAcross >= 8, "several rows at a time, no thread idle");

struct Tiling {
  int across;     // threads side by side
  int high;       // rows at a time
  int tiles;      // blocks side by side
  int64_t slab;   // rows of a block
  int64_t slabs;  // blocks one below the other; at least one, also without rows

  // A slab is a multiple of `rows` for each thread (the rows it has in flight at a time).
  Tiling(int64_t M, int64_t C, int vector, int rows) {
    const int64_t groups = C / vector;
    tiles = int((groups + kMostAcross - 1) / kMostAcross);
    across = int((groups + tiles - 1) / tiles);
    high = kThreads / across;
    const int64_t step = int64_t(high) * rows, steps = (M + step - 1) / step;
    const int64_t wanted = tiles < kBlocks ? kBlocks / tiles : 1;
    slab = step * (steps > wanted ? (steps + wanted - 1) / wanted : 1);
    slabs = M > 0 ? (M + slab - 1) / slab : 1;
  }
  dim3 grid() const { return dim3(unsigned(slabs), unsigned(tiles)); }
};

// What a kernel gets: an operator's arguments, the tiling, and where a block leaves its sums.
template <class P>
struct Job {
  P p;
  Tiling tiling;
  void* partials;
};

// The running thread's part of a slab. Threads beyond the last column have none but take part in barriers.
struct Patch {
  int64_t column, begin, end;
  int step, across, x, y;
  bool any;

  __device__ __forceinline__ Patch(const Tiling& tiling, int64_t M, int64_t C, int vector)
      : step(tiling.high), across(tiling.across), x(thread_x() % across), y(thread_x() / across) {
    const int64_t first = int64_t(block_x()) * tiling.slab;
    column = (int64_t(block_y()) * across + x) * vector;
    begin = first + y;
    end = first + tiling.slab < M ? first + tiling.slab : M;
    any = y < step && column < C;
  }
  // Calls f(first row, how many) for at most R rows at a time, each `step` below the other.
  template <int R, class F>
  __device__ __forceinline__ void for_rows(const F& f) const {
    if (!any) return;
    for (int64_t m = begin; m < end; m += int64_t(R) * step) {
      const int64_t left = end - m;
      const int within = left < R * step ? int(left) : R * step;
      int rows = 1;
#pragma unroll
      for (int r = 1; r < R; ++r) rows += r * step < within;  // a division would take longer
      f(m, rows);
    }
  }
};

// The widest vector, in elements, for rows that are all multiples of it: 16 bytes, else 8 for the short types, else 1.
template <class T>
class Width {
 public:
  explicit Width(int64_t C) : bits_(static_cast<uint64_t>(C)) {}
  template <class E>
  Width& with(const Rows<E>& rows) {
    if (rows) bits_ |= reinterpret_cast<uintptr_t>(rows.data) / sizeof(E) | static_cast<uint64_t>(rows.pitch);
    return *this;
  }
  int elements() const {
    constexpr uint64_t whole = 16 / sizeof(T), half = 8 / sizeof(T);
    if (bits_ % whole == 0) return int(whole);
    return sizeof(T) == 2 && bits_ % half == 0 ? int(half) : 1;
  }
  // Calls f(constant) with the width as a type.
  template <class F>
  auto run(const F& f) const {
    constexpr int whole = 16 / int(sizeof(T));
    const int n = elements();
    if (n == whole) return f(std::integral_constant<int, whole>());
    if constexpr (sizeof(T) == 2)
      if (n > 1) return f(std::integral_constant<int, whole / 2>());
    return f(std::integral_constant<int, 1>());
  }

 private:
  uint64_t bits_;
};

// Explicit instantiations: DX_FOR_STORAGE_TYPES(M) expands M(T) for the four of them.
#define DX_FOR_STORAGE_TYPES(M) M(float) M(double) M(bfloat16) M(float16)

}  // namespace dx::cuda
