// The launchers of the CUDA kernels, one for each operator (params.h says what they take, schemas.cpp what they are).
// T: float, double, bfloat16, float16. They queue work on the stream and return the launch's error. A launcher that
// needs scratch memory takes a workspace of `<name>_workspace(p)` bytes, aligned to 256, of any content (null where
// that is none); sums of several blocks lie there until a second kernel merges them in a fixed order. A caller that
// passes `left` takes that over: what is to be merged is written there, the workspace has to stay until then, and the
// results are not there yet. Results must not overlap arguments, except that bn_relu's out may be x itself,
// bn_relu_backward's grad_x and feature_grad's out grad itself. Sums over no rows are zero; the statistics of no rows
// are left undefined.
#pragma once

#include <cstddef>

#include "../params.h"
#include "runtime.h"
#include "unmerged.h"

namespace dx::cuda {

// Whether this build has kernels for the current GPU (find_kernel.cu).
cudaError_t find_kernel();

// statistics.cu
template <class T>
size_t channel_stats_workspace(const ChannelStats<T>& p);
template <class T>
cudaError_t channel_stats(const ChannelStats<T>& p, Stream stream, void* workspace);
template <class T>
size_t append_features_workspace(const AppendFeatures<T>& p);  // 0 without statistics
template <class T>
cudaError_t append_features(const AppendFeatures<T>& p, Stream stream, void* workspace,
                            UnmergedMoments<Acc<T>>* left = nullptr);
template <class A>
cudaError_t merge_left(const UnmergedMoments<A>& p, Stream stream);

// bn_relu.cu; cat_bn_relu is bn_relu once for each feature, into its columns
template <class T>
cudaError_t bn_relu(const BnRelu<T>& p, Stream stream);
template <class T>
cudaError_t feature_grad(const FeatureGrad<T>& p, Stream stream);
template <class T>
size_t bn_relu_backward_reduce_workspace(const BnReluBackwardReduce<T>& p);
template <class T>
cudaError_t bn_relu_backward_reduce(const BnReluBackwardReduce<T>& p, Stream stream, void* workspace,
                                    UnmergedSums<Acc<T>>* left = nullptr);
template <class A>
cudaError_t merge_left(const UnmergedSums<A>& p, Stream stream);
template <class T>
cudaError_t bn_relu_backward(const BnReluBackward<T>& p, Stream stream);

// copy_taps.cu; any number of copies
template <class From, class To>
cudaError_t copy_taps(const TapsCopy<From, To>* copies, size_t count, Stream stream);

// avg_pool.cu
template <class T>
cudaError_t bn_relu_avg_pool(const BnReluPool<T>& p, Stream stream);
template <class T>
size_t bn_relu_avg_pool_backward_reduce_workspace(const BnReluPoolBackwardReduce<T>& p);
template <class T>
cudaError_t bn_relu_avg_pool_backward_reduce(const BnReluPoolBackwardReduce<T>& p, Stream stream, void* workspace);
template <class T>
cudaError_t bn_relu_avg_pool_backward(const BnReluPoolBackward<T>& p, Stream stream);

// max_pool.cu
template <class T>
cudaError_t bn_relu_max_pool(const BnReluPool<T>& p, Stream stream);
template <class T>
size_t bn_relu_max_pool_backward_reduce_workspace(const BnReluPoolBackwardReduce<T>& p);
template <class T>
cudaError_t bn_relu_max_pool_backward_reduce(const BnReluPoolBackwardReduce<T>& p, Stream stream, void* workspace);
template <class T>
cudaError_t bn_relu_max_pool_backward(const BnReluPoolBackward<T>& p, Stream stream);

// conv1x1.cu; left: statistics of some of the columns of x, which are merged first (their mean and var lie in norm's)
template <class T>
size_t bn_relu_conv1x1_workspace(const BnReluConv1x1<T>& p);
template <class T>
cudaError_t bn_relu_conv1x1(const BnReluConv1x1<T>& p, Stream stream, void* workspace,
                            const UnmergedMoments<Acc<T>>& left = {});

// conv1x1_backward.cu; left: z_grad_weight and z_grad_bias, which are merged first
template <class T>
size_t bn_relu_conv1x1_backward_workspace(const BnReluConv1x1Backward<T>& p);
template <class T>
cudaError_t bn_relu_conv1x1_backward(const BnReluConv1x1Backward<T>& p, Stream stream, void* workspace,
                                     const UnmergedSums<Acc<T>>& left = {});

// conv3x3_choice.cu: whether a block calls these kernels, not PyTorch's convolution, for images, window, channels and
// arithmetic of p
template <class T>
bool chooses_own_conv3x3(const BnReluConv3x3<T>& p);

// conv3x3.cu; has_room: lines are not too long for what shared memory a block can have
template <class T>
bool has_room_for_conv3x3(const BnReluConv3x3<T>& p);
template <class T>
size_t bn_relu_conv3x3_workspace(const BnReluConv3x3<T>& p);
template <class T>
cudaError_t bn_relu_conv3x3(const BnReluConv3x3<T>& p, Stream stream, void* workspace);

// conv3x3_backward.cu
template <class T>
bool has_room_for_conv3x3(const BnReluConv3x3Backward<T>& p);
template <class T>
size_t bn_relu_conv3x3_backward_workspace(const BnReluConv3x3Backward<T>& p);
template <class T>
cudaError_t bn_relu_conv3x3_backward(const BnReluConv3x3Backward<T>& p, Stream stream, void* workspace);

}  // namespace dx::cuda
