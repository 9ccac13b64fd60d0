// The table of the CPU kernels, one for each SIMD level and storage type.
#pragma once

#include "../params.h"
#include "packed_weights.h"
#include "parallel.h"

namespace dx::cpu {

// packed: of the call's weight, or null.
template <class T>
struct Kernels {
  void (*channel_stats)(const ChannelStats<T>&, const Pool&);
  void (*append_features)(const AppendFeatures<T>&, const Pool&);
  void (*bn_relu)(const BnRelu<T>&, const Pool&);
  void (*feature_grad)(const FeatureGrad<T>&, const Pool&);
  void (*bn_relu_backward_reduce)(const BnReluBackwardReduce<T>&, const Pool&);
  void (*bn_relu_backward)(const BnReluBackward<T>&, const Pool&);
  void (*bn_relu_conv1x1)(const BnReluConv1x1<T>&, const Pool&, PackedWeights*);
  void (*bn_relu_conv1x1_backward)(const BnReluConv1x1Backward<T>&, const Pool&);
  void (*bn_relu_conv3x3)(const BnReluConv3x3<T>&, const Pool&, PackedWeights*);
  void (*bn_relu_conv3x3_backward)(const BnReluConv3x3Backward<T>&, const Pool&);
  void (*bn_relu_avg_pool)(const BnReluPool<T>&, const Pool&);
  void (*bn_relu_avg_pool_backward_reduce)(const BnReluPoolBackwardReduce<T>&, const Pool&);
  void (*bn_relu_avg_pool_backward)(const BnReluPoolBackward<T>&, const Pool&);
  void (*bn_relu_max_pool)(const BnReluPool<T>&, const Pool&);
  void (*bn_relu_max_pool_backward_reduce)(const BnReluPoolBackwardReduce<T>&, const Pool&);
  void (*bn_relu_max_pool_backward)(const BnReluPoolBackward<T>&, const Pool&);
  void (*first_conv)(const FirstConv<T>&, const Pool&);
};

struct Level {
  const char* name;
  const Kernels<float>* f32;
  const Kernels<double>* f64;
  const Kernels<bfloat16>* bf16;
  const Kernels<float16>* f16;
};

// One per translation unit level_*.cpp; null where the compiler or processor family has no such level.
const Level* level_portable();
const Level* level_avx2();
const Level* level_avx512();
const Level* level_avx512_bf16();

}  // namespace dx::cpu
