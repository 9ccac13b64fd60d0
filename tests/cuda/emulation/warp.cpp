// Operations of a warp, each in the way that kernels use them, so that the emulation's meaning of fragments and lanes
// can be held against plain matrix products. One warp; A [16, 16], B [16, 16], D [16, 16], row-major.
#include <cstring>

#include "../../../csrc/cuda/launch.h"

namespace dx::cuda {
namespace {

struct Product {
  const void *a, *b;
  float* d;
};

__device__ void store_tile(float* d, const float (&sums)[4], int column0) {
  const int group = thread_x() / 4, pair = thread_x() % 4 * 2;
  for (int i = 0; i < 4; ++i) store_one(d + (group + i / 2 * 8) * 16 + column0 + pair + i % 2, sums[i]);
}

// Both operands come to shared memory by cp.async, A to registers by ldmatrix, B (rows are k) by its transposing form.
template <class T>
__global__ void product16(const Product p) {
  DX_SHARED_BYTES(bytes);
  const int lane = thread_x();
  unsigned char *a_tile = bytes, *b_tile = bytes + 512;
  cp_async16(a_tile + 16 * lane, static_cast<const unsigned char*>(p.a) + 16 * lane, 16);
  cp_async_commit();
  cp_async16(b_tile + 16 * lane, static_cast<const unsigned char*>(p.b) + 16 * lane, 16);
  cp_async_commit();
  cp_async_wait<0>();
  sync_warp();
  uint32_t a[4], b[4];
  ldmatrix_x4(a, a_tile + lane % 16 * 32 + lane / 16 * 16);
  ldmatrix_x4_trans(b, b_tile + lane % 16 * 32 + lane / 16 * 16);
  for (int half = 0; half < 2; ++half) {
    float sums[4] = {};
    mma_m16n8k16<T>(sums, a, {b[2 * half], b[2 * half + 1]});
    store_tile(p.d, sums, 8 * half);
  }
}

__global__ void product_tf32(const Product p) {
  const auto a_at = [&](int row, int k) { return to_tf32(load_one(static_cast<const float*>(p.a) + row * 16 + k)); };
  const auto b_at = [&](int k, int n) { return to_tf32(load_one(static_cast<const float*>(p.b) + k * 16 + n)); };
  const int group = thread_x() / 4, t = thread_x() % 4;
  for (int half = 0; half < 2; ++half) {
    float sums[4] = {};
    for (int k = 0; k < 16; k += 8)
      mma_m16n8k8_tf32(sums,
                       {a_at(group, k + t), a_at(group + 8, k + t), a_at(group, k + t + 4), a_at(group + 8, k + t + 4)},
                       {b_at(k + t, 8 * half + group), b_at(k + t + 4, 8 * half + group)});
    store_tile(p.d, sums, 8 * half);
  }
}

// d[lane] = the sum of a over the lanes; d[32 + lane] = a of the lane 3 further.
__global__ void exchanges(const Product p) {
  const int lane = thread_x();
  const float mine = load_one(static_cast<const float*>(p.a) + lane);
  float sum = mine;
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  store_one(p.d + lane, sum);
  store_one(p.d + 32 + lane, shuffle_down(mine, 3));
}

}  // namespace

extern "C" int dx_warp(const char* name, const void* a, const void* b, float* d) {
  const struct {
    const char* name;
    void (*kernel)(Product);
  } kernels[] = {{"bfloat16", product16<bfloat16>},
                 {"float16", product16<float16>},
                 {"tf32", product_tf32},
                 {"exchanges", exchanges}};
  for (const auto& k : kernels)
    if (std::strcmp(k.name, name) == 0) return launch(k.kernel, dim3(1), 32, 1024, nullptr, Product{a, b, d});
  return -1;
}

}  // namespace dx::cuda
