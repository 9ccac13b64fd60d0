// The launchers of csrc/cuda/kernels.h with C linkage, for ctypes: dx_<name>(dtype, params, workspace) and
// dx_<name>_workspace(dtype, params). The layout of a params struct does not depend on the storage type.
#include "../../../csrc/cuda/kernels.h"
#include "../../../csrc/cuda/limits.h"

namespace dx::cuda {
namespace {

template <class F>
auto for_type(int dtype, const F& f) {
  settings().read();
  return dtype == 0 ? f(float{}) : dtype == 1 ? f(double{}) : dtype == 2 ? f(bfloat16{}) : f(float16{});
}

}  // namespace

#define DX_LAUNCHER(name, Params)                                                              \
  extern "C" int dx_##name(int dtype, const void* params, void*) {                             \
    return for_type(dtype, [&](auto tag) {                                                     \
      return name<decltype(tag)>(*static_cast<const Params<decltype(tag)>*>(params), nullptr); \
    });                                                                                        \
  }
#define DX_LAUNCHER_WITH_WORKSPACE(name, Params)                                                          \
  extern "C" size_t dx_##name##_workspace(int dtype, const void* params) {                                \
    return for_type(dtype, [&](auto tag) {                                                                \
      return name##_workspace<decltype(tag)>(*static_cast<const Params<decltype(tag)>*>(params));         \
    });                                                                                                   \
  }                                                                                                       \
  extern "C" int dx_##name(int dtype, const void* params, void* workspace) {                              \
    return for_type(dtype, [&](auto tag) {                                                                \
      return name<decltype(tag)>(*static_cast<const Params<decltype(tag)>*>(params), nullptr, workspace); \
    });                                                                                                   \
  }
// The first without merging what its blocks leave, which the second then does: dx_<first>_then_<second>(dtype, the
// first's params, its workspace, the second's params, its workspace).
#define DX_LAUNCHERS_OF_UNMERGED(first, First, second, Second, Unmerged)                                               \
  extern "C" int dx_##first##_then_##second(int dtype, const void* a, void* left_in, const void* b, void* workspace) { \
    return for_type(dtype, [&](auto tag) {                                                                             \
      using T = decltype(tag);                                                                                         \
      Unmerged<Acc<T>> left;                                                                                           \
      const cudaError_t error = first<T>(*static_cast<const First<T>*>(a), nullptr, left_in, &left);                   \
      return error ? error : second<T>(*static_cast<const Second<T>*>(b), nullptr, workspace, left);                   \
    });                                                                                                                \
  }
extern "C" int64_t dx_tiles_of_a_block(int64_t tiles, int64_t slices, int64_t multiprocessors) {
  return tiles_of_a_block(tiles, slices, multiprocessors);
}
// So that the mirror of a struct in Python can be held against it.
#define DX_SIZE(Params) \
  extern "C" size_t dx_size_##Params() { return sizeof(Params<float>); }

#if defined(DX_CONV1X1)
DX_LAUNCHER_WITH_WORKSPACE(bn_relu_conv1x1, BnReluConv1x1)
DX_LAUNCHER_WITH_WORKSPACE(bn_relu_conv1x1_backward, BnReluConv1x1Backward)
DX_SIZE(BnReluConv1x1)
DX_SIZE(BnReluConv1x1Backward)
#endif
#if defined(DX_CONV3X3)
DX_LAUNCHER_WITH_WORKSPACE(bn_relu_conv3x3, BnReluConv3x3)
DX_LAUNCHER_WITH_WORKSPACE(bn_relu_conv3x3_backward, BnReluConv3x3Backward)
DX_SIZE(BnReluConv3x3)
DX_SIZE(BnReluConv3x3Backward)
extern "C" bool dx_has_room_for_conv3x3(int dtype, const void* params) {
  return for_type(
      dtype, [&](auto tag) { return has_room_for_conv3x3(*static_cast<const BnReluConv3x3<decltype(tag)>*>(params)); });
}
#endif
#if defined(DX_STATISTICS)
DX_LAUNCHER_WITH_WORKSPACE(channel_stats, ChannelStats)
DX_LAUNCHER_WITH_WORKSPACE(append_features, AppendFeatures)
DX_SIZE(ChannelStats)
DX_SIZE(AppendFeatures)
#endif
#if defined(DX_BN_RELU)
DX_LAUNCHER(bn_relu, BnRelu)
DX_LAUNCHER(feature_grad, FeatureGrad)
DX_LAUNCHER_WITH_WORKSPACE(bn_relu_backward_reduce, BnReluBackwardReduce)
DX_LAUNCHER(bn_relu_backward, BnReluBackward)
DX_SIZE(BnRelu)
DX_SIZE(FeatureGrad)
DX_SIZE(BnReluBackwardReduce)
DX_SIZE(BnReluBackward)
#endif
#if defined(DX_STATISTICS) && defined(DX_CONV1X1)
DX_LAUNCHERS_OF_UNMERGED(append_features, AppendFeatures, bn_relu_conv1x1, BnReluConv1x1, UnmergedMoments)
#endif
#if defined(DX_BN_RELU) && defined(DX_CONV1X1)
DX_LAUNCHERS_OF_UNMERGED(bn_relu_backward_reduce, BnReluBackwardReduce, bn_relu_conv1x1_backward, BnReluConv1x1Backward,
                         UnmergedSums)
#endif
#if defined(DX_COPY_TAPS)
// From the acc type of `dtype` to that, or back.
extern "C" int dx_copy_taps(int dtype, bool back, const void* copies, size_t count) {
  return for_type(dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    if (back) return copy_taps(static_cast<const TapsCopy<T, A>*>(copies), count, nullptr);
    return copy_taps(static_cast<const TapsCopy<A, T>*>(copies), count, nullptr);
  });
}
#endif
#if defined(DX_AVG_POOL)
DX_LAUNCHER(bn_relu_avg_pool, BnReluPool)
DX_LAUNCHER_WITH_WORKSPACE(bn_relu_avg_pool_backward_reduce, BnReluPoolBackwardReduce)
DX_LAUNCHER(bn_relu_avg_pool_backward, BnReluPoolBackward)
#endif
#if defined(DX_MAX_POOL)
DX_LAUNCHER(bn_relu_max_pool, BnReluPool)
DX_LAUNCHER_WITH_WORKSPACE(bn_relu_max_pool_backward_reduce, BnReluPoolBackwardReduce)
DX_LAUNCHER(bn_relu_max_pool_backward, BnReluPoolBackward)
#endif
DX_SIZE(BnReluPool)
DX_SIZE(BnReluPoolBackwardReduce)
DX_SIZE(BnReluPoolBackward)

}  // namespace dx::cuda
