// The kernels of one SIMD level, compiled once for each: level_*.cpp sets DX_LEVEL (a namespace), DX_VECTOR_BYTES and
// the target pragma, then includes this once. Everything below lives in the level's own namespace, so no symbol
// compiled for a wider instruction set can be picked by the linker for a narrower one.
#if !defined(DX_LEVEL) || !defined(DX_VECTOR_BYTES)
#error "level.h is included by level_*.cpp, which set DX_LEVEL and DX_VECTOR_BYTES"
#endif

namespace dx::cpu::DX_LEVEL {

// clang-format off: in the order in which they lean on each other
#include "kernels/simd.h"
#include "kernels/scratch.h"
#include "kernels/dropout.h"
#include "kernels/moments.h"
#include "kernels/elementwise.h"
#include "kernels/operands.h"
#include "kernels/read_ahead.h"
#include "kernels/gemm.h"
#include "kernels/transpose.h"
#include "kernels/packing.h"
#include "kernels/panels.h"
#include "kernels/panel_ahead.h"
#include "kernels/conv1x1.h"
#include "kernels/conv1x1_backward.h"
#include "kernels/lines.h"
#include "kernels/conv3x3_tile.h"
#include "kernels/conv3x3_lanes.h"
#include "kernels/conv3x3.h"
#include "kernels/winograd_transforms.h"
#include "kernels/winograd.h"
#include "kernels/winograd_products.h"
#include "kernels/winograd_lanes.h"
#include "kernels/winograd_forward.h"
#include "kernels/conv3x3_wgrad.h"
#include "kernels/conv3x3_backward.h"
#include "kernels/winograd_backward.h"
#include "kernels/avg_pool.h"
#include "kernels/positions.h"
#include "kernels/max_pool.h"
#include "kernels/first_conv.h"
// clang-format on

template <class T>
constexpr Kernels<T> kKernels = {
    channel_stats<T>,
    append_features<T>,
    bn_relu<T>,
    feature_grad<T>,
    bn_relu_backward_reduce<T>,
    bn_relu_backward<T>,
    bn_relu_conv1x1<T>,
    bn_relu_conv1x1_backward<T>,
    bn_relu_conv3x3<T>,
    bn_relu_conv3x3_backward<T>,
    bn_relu_avg_pool<T>,
    bn_relu_avg_pool_backward_reduce<T>,
    bn_relu_avg_pool_backward<T>,
    bn_relu_max_pool<T>,
    bn_relu_max_pool_backward_reduce<T>,
    bn_relu_max_pool_backward<T>,
    first_conv<T>,
};

#if defined(DX_BF16_DOT)
// Float feature maps whose convolutions autocast lowers: products of bf16 numbers, summed and stored in float.
#define DX_LOWERED(name, Params)                                                    \
  template <class... Packed>                                                        \
  void name##_lowered(const Params<float>& p, const Pool& pool, Packed... packed) { \
    if (p.bf16)                                                                     \
      name<float, DotBf16>(p, pool, packed...);                                     \
    else                                                                            \
      level_avx512()->f32->name(p, pool, packed...);                                \
  }
DX_LOWERED(bn_relu_conv1x1, BnReluConv1x1)
DX_LOWERED(bn_relu_conv1x1_backward, BnReluConv1x1Backward)
DX_LOWERED(bn_relu_conv3x3, BnReluConv3x3)
DX_LOWERED(bn_relu_conv3x3_backward, BnReluConv3x3Backward)
#undef DX_LOWERED

inline Kernels<float> lowered_kernels() {
  Kernels<float> kernels = *level_avx512()->f32;
  kernels.bn_relu_conv1x1 = bn_relu_conv1x1_lowered;
  kernels.bn_relu_conv1x1_backward = bn_relu_conv1x1_backward_lowered;
  kernels.bn_relu_conv3x3 = bn_relu_conv3x3_lowered;
  kernels.bn_relu_conv3x3_backward = bn_relu_conv3x3_backward_lowered;
  return kernels;
}
#endif

}  // namespace dx::cpu::DX_LEVEL
