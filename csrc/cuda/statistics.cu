// channel_stats and append_features: each value is read once (and written once, when features are appended); what else
// moves is two numbers a slab and column. Statistics are those of the values as stored.
//
// A thread keeps kRows rows of its columns in registers, as they lie in memory (kRows * 16 bytes: 32 registers, and as
// much in flight), takes their mean, then the deviations from it, and merges that into its own by Chan's formula. All
// numbers are taken relative to the column's first value (the pivot): a mean that is large beside the deviation costs
// no digits on the way.
#include "kernels.h"
#include "pivot.h"
#include "sums.h"

namespace dx::cuda {
namespace {

constexpr int kRows = 8;
static_assert(kRows * 16 / 4 == 32, "registers of the rows in flight");
// Two blocks on a processor (128 registers a thread) have as much in flight as memory needs.
constexpr int kResident = 2;
static_assert(kResident * kThreads * kRows * 16 == 64 * 1024, "bytes in flight on a processor");

template <class T>
struct MomentsJob {
  int64_t M, C;
  Rows<const T> x;
  Rows<T> out;  // null: statistics of x itself
  double drop_rate;
  const int64_t* seed;
  int64_t layer, drop_rows;
  Tiling tiling;
  void* partials;     // of several slabs
  Acc<T>*mean, *var;  // [C], or null: no statistics
};

// [C], behind what several slabs leave.
template <class T>
__host__ __device__ __forceinline__ Acc<T>* pivots_of(const MomentsJob<T>& p) {
  return static_cast<Acc<T>*>(p.partials) + 2 * p.tiling.slabs * p.C;
}
template <class T>
size_t workspace_of(const MomentsJob<T>& p) {
  return p.tiling.slabs > 1 ? Partials<Acc<T>>::bytes(p.tiling.slabs, p.C) + size_t(p.C) * sizeof(Acc<T>) : 0;
}

template <class T, int V>
class Dropped {
 public:
  using A = Acc<T>;
  template <class Job>
  __device__ __forceinline__ explicit Dropped(const Job& p)
      : any_(p.drop_rate > 0),
        dropout_(any_ ? make_dropout(load_one(p.seed), p.layer, p.drop_rate) : Dropout{}),
        rows_(p.drop_rows) {}
  // As stored: what lies in `bits` of row m, after dropout.
  __device__ __forceinline__ Bits<T, V> operator()(const Bits<T, V>& bits, int64_t m, int64_t c) const {
    if (!any_) return bits;
    const uint32_t key = dropout_row_key(dropout_, rows_ == 1 ? m : m / rows_);
    A kept[V];
#pragma unroll
    for (int v = 0; v < V; ++v) kept[v] = element<T, V>(bits, v) * dropout_factor<A>(dropout_, key, c + v);
    return to_bits<T, V>(kept);
  }

 private:
  bool any_;
  Dropout dropout_;
  int64_t rows_;  // after each other that share their factors
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kResident) moments(const __grid_constant__ MomentsJob<T> p) {
  using A = Acc<T>;
  DX_SHARED_BYTES(bytes);
  const Patch patch(p.tiling, p.M, p.C, V);
  const int64_t c = patch.column;
  const Dropped<T, V> drop(p);
  MomentSums<A, V> sums;
  Bits<T, V> pivot = {};  // every block must take the same one
  if (patch.any && p.M > 0) pivot = drop(load_bits<V>(p.x.row(0) + c), 0, c);

  patch.for_rows<kRows>([&](int64_t m, int rows) {
    Bits<T, V> x[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) x[r] = load_bits<V>(p.x.row(m + r * patch.step) + c);
    if (p.out) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (r < rows) {
          x[r] = drop(x[r], m + r * patch.step, c);
          store_bits<V>(p.out.row(m + r * patch.step) + c, x[r]);
        }
    }
    if (!p.mean) return;
    const auto share = sums.add_count(A(rows));
    const A per_row = A(1) / A(rows);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A base = pivot_of(element<T, V>(pivot, v));
      A mean = 0, m2 = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (r < rows) mean += element<T, V>(x[r], v) - base;
      mean *= per_row;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (r < rows) {
          const A d = (element<T, V>(x[r], v) - base) - mean;
          m2 = std::fma(d, d, m2);
        }
      sums.merge(v, share, mean, m2);
    }
  });
  if (!p.mean || !merge_block<A>(sums, patch, bytes)) return;
  if (p.tiling.slabs > 1) {
    if (block_x() == 0)
      for (int v = 0; v < V; ++v) store_one(pivots_of(p) + c + v, pivot_of(element<T, V>(pivot, v)));
    return store_partials<A>(sums, patch, p.C, {p.partials, p.tiling.slabs, p.C});
  }
  for (int v = 0; v < V; ++v) {
    store_one(p.mean + c + v, A(double(pivot_of(element<T, V>(pivot, v))) + double(sums.a[v])));
    store_one(p.var + c + v, A(double(sums.b[v]) / double(p.M)));
  }
}

// What there is to merge of a job's statistics; behind the slabs' lie the pivots.
template <class T>
__host__ __device__ __forceinline__ UnmergedMoments<Acc<T>> unmerged_of(const MomentsJob<T>& p) {
  const Partials<Acc<T>> partials(p.partials, p.tiling.slabs, p.C);
  return {p.C, p.M, p.tiling.slab, p.tiling.slabs, partials.a, partials.b, pivots_of(p), p.mean, p.var};
}

template <class T>
Width<T> width(const MomentsJob<T>& p) {
  return Width<T>(p.C).with(p.x).with(p.out);
}
template <class T>
MomentsJob<T> job(const ChannelStats<T>& p, void* workspace) {
  MomentsJob<T> job = {p.M, p.C, p.x, {}, 0.0, nullptr, 0, 1, Tiling(0, 1, 1, 1), workspace, p.mean, p.var};
  job.tiling = Tiling(p.M, p.C, width(job).elements(), kRows);
  return job;
}
template <class T>
MomentsJob<T> job(const AppendFeatures<T>& p, void* workspace) {
  MomentsJob<T> job = {p.M,       p.C,    p.src, p.out, p.drop_rate, p.seed, p.layer, p.drop_rows, Tiling(0, 1, 1, 1),
                       workspace, p.mean, p.var};
  job.tiling = Tiling(p.M, p.C, width(job).elements(), kRows);
  return job;
}

template <class T>
cudaError_t run(const MomentsJob<T>& p, Stream stream, UnmergedMoments<Acc<T>>* left = nullptr) {
  const cudaError_t error = width(p).run([&](auto vector) {
    constexpr int V = decltype(vector)::value;
    return launch(moments<T, V>, p.tiling.grid(), kThreads, sums_shared_bytes<Acc<T>, V>(), stream, p);
  });
  if (error != cudaSuccess || !p.mean) return error;
  if (!left) return launch_merge_slabs(unmerged_of(p), stream);
  *left = unmerged_of(p);
  return cudaSuccess;
}

}  // namespace

template <class T>
size_t channel_stats_workspace(const ChannelStats<T>& p) {
  return p.C > 0 ? workspace_of(job(p, nullptr)) : 0;
}
template <class T>
cudaError_t channel_stats(const ChannelStats<T>& p, Stream stream, void* workspace) {
  return p.C > 0 ? run(job(p, workspace), stream) : cudaSuccess;
}
template <class T>
size_t append_features_workspace(const AppendFeatures<T>& p) {
  return p.mean && p.C > 0 ? workspace_of(job(p, nullptr)) : 0;
}
template <class T>
cudaError_t append_features(const AppendFeatures<T>& p, Stream stream, void* workspace, UnmergedMoments<Acc<T>>* left) {
  return p.C > 0 ? run(job(p, workspace), stream, left) : cudaSuccess;
}
template <class A>
cudaError_t merge_left(const UnmergedMoments<A>& p, Stream stream) {
  return launch_merge_slabs(p, stream);
}

#define DX_INSTANTIATE(T)                                                       \
  template size_t channel_stats_workspace<T>(const ChannelStats<T>&);           \
  template cudaError_t channel_stats<T>(const ChannelStats<T>&, Stream, void*); \
  template size_t append_features_workspace<T>(const AppendFeatures<T>&);       \
  template cudaError_t append_features<T>(const AppendFeatures<T>&, Stream, void*, UnmergedMoments<Acc<T>>*);
DX_FOR_STORAGE_TYPES(DX_INSTANTIATE)
template cudaError_t merge_left(const UnmergedMoments<float>&, Stream);
template cudaError_t merge_left(const UnmergedMoments<double>&, Stream);

}  // namespace dx::cuda
