// SIMD level "avx512_bf16": AVX-512 with dot products of bf16 numbers. It differs from "avx512" in bf16 only, whose
// products are taken in pairs (kernels/operands.h). Standard headers come before the pragma, see level.h.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "kernels.h"
#include "task_memory.h"
#include "winograd_use.h"

#if defined(__x86_64__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 10)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif
#define DX_F16C_512
#define DX_MASKED
#define DX_BF16_DOT
#define DX_LEVEL avx512_bf16
#define DX_VECTOR_BYTES 64
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace dx::cpu {
const Level* level_avx512_bf16() {
  static const Level* other = level_avx512();
  static const Kernels<float> f32 = avx512_bf16::lowered_kernels();
  static const Level level = {"avx512_bf16", &f32, other->f64, &avx512_bf16::kKernels<bfloat16>, other->f16};
  return &level;
}
}  // namespace dx::cpu

#else
namespace dx::cpu {
const Level* level_avx512_bf16() { return nullptr; }
}  // namespace dx::cpu
#endif
