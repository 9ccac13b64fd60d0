// Everything in the kernels that is not plain C++: built-in variables, barriers, operations of a warp, vector accesses,
// asynchronous copies, tensor cores. Compiled by nvcc it is the GPU's own; with DX_EMULATE it comes from
// tests/cuda/emulation/emulated_device.h, which checks each access. Kernels reach memory only through these functions:
//   load_one / store_one            one element of any type
//   load16/8/4/2, store16/8/4/2     as many bytes, aligned to their number
//   store_global16/8                the same, of global memory only
//   Shared<T>                       a pointer into shared memory, used like T* (shared_as<T>(bytes) makes one)
//   DX_SHARED_BYTES(name)           the dynamic shared memory, unsigned char*, aligned to 128
#pragma once

#include "../common.h"

#if defined(DX_EMULATE)
#include "emulated_device.h"
#else

#include <cuda_runtime.h>

#define DX_SHARED_BYTES(name) extern __shared__ __align__(128) unsigned char name[]

namespace dx::cuda {

__device__ __forceinline__ int thread_x() { return int(threadIdx.x); }
__device__ __forceinline__ int block_dim() { return int(blockDim.x); }
__device__ __forceinline__ unsigned block_x() { return blockIdx.x; }
__device__ __forceinline__ unsigned block_y() { return blockIdx.y; }
__device__ __forceinline__ unsigned block_z() { return blockIdx.z; }
__device__ __forceinline__ unsigned grid_y() { return gridDim.y; }

__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Of whole warps, all 32 lanes.
template <class V>
__device__ __forceinline__ V shuffle_xor(V v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class V>
__device__ __forceinline__ V shuffle_down(V v, int by) {
  return __shfl_down_sync(0xffffffffu, v, unsigned(by));
}

// ---- memory --------------------------------------------------------------------------------------------------------
template <class T>
using Shared = T*;
template <class T>
__device__ __forceinline__ Shared<T> shared_as(unsigned char* bytes) {
  return reinterpret_cast<T*>(bytes);
}

template <class T>
__device__ __forceinline__ T load_one(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ void store_one(T* p, T v) {
  *p = v;
}
__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ uint2 load8(const void* p) { return *static_cast<const uint2*>(p); }
__device__ __forceinline__ uint32_t load4(const void* p) { return *static_cast<const uint32_t*>(p); }
__device__ __forceinline__ uint16_t load2(const void* p) { return *static_cast<const uint16_t*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
__device__ __forceinline__ void store8(void* p, uint2 v) { *static_cast<uint2*>(p) = v; }
__device__ __forceinline__ void store4(void* p, uint32_t v) { *static_cast<uint32_t*>(p) = v; }
__device__ __forceinline__ void store2(void* p, uint16_t v) { *static_cast<uint16_t*>(p) = v; }
// The compiler takes vectors that it has put together from converted numbers apart again and stores four bytes at a
// time, a quarter of a sector each; it leaves these alone.
__device__ __forceinline__ void store_global16(void* p, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_global8(void* p, uint2 v) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// Copies 16 bytes to shared memory while the thread goes on: the first `valid` from global memory, zeros behind.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's groups are in flight. What others copied is there after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- numbers -------------------------------------------------------------------------------------------------------
__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float v) { return __float_as_uint(v); }

// Two numbers packed in 32 bits, the first in the lower half; to the nearest, ties to even.
template <class T>
__device__ __forceinline__ uint32_t pack2(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack2<bfloat16>(float first, float second) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack2<float16>(float first, float second) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}
// The same of max(v, 0), NaN for NaN.
template <class T>
__device__ __forceinline__ uint32_t pack2_relu(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack2_relu<bfloat16>(float first, float second) {
  uint32_t bits;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack2_relu<float16>(float first, float second) {
  uint32_t bits;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}
__device__ __forceinline__ float widen(bfloat16 v) { return as_float(uint32_t(v.bits) << 16); }
__device__ __forceinline__ float widen(float16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
template <class T>
__device__ __forceinline__ T narrow(Acc<T> v) {
  if constexpr (sizeof(T) == sizeof(Acc<T>))
    return v;
  else
    return T{uint16_t(pack2<T>(v, 0.0f))};
}
// To the 19 bits of TF32, ties away from zero, as the bits that mma_m16n8k8_tf32 takes.
__device__ __forceinline__ uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

// ---- tensor cores; fragments as the PTX ISA describes them ---------------------------------------------------------
// Four 8x8 matrices of 16-bit elements: lane 8 j + i gives the address of row i of matrix j.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
// d += a @ b
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace dx::cuda

#endif
