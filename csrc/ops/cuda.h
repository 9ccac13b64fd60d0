// A GPU as a backend of the operators: its kernels, on the current stream of the tensors' device. Nothing waits for the
// GPU, and all memory is torch's, so that the operators can be captured in a CUDA graph. A kernel's error is therefore
// found by whatever asks the GPU next; with DENSENET_EXT_SYNC=1 each operator waits for its kernels and names itself.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <variant>

#include "../cuda/kernels.h"
#include "../cuda/settings.h"
#include "out_of_memory.h"
#include "torch_calls.h"

namespace dx::ops {

class Cuda : public TorchCalls {
 public:
  explicit Cuda(const Tensor& first) : TorchCalls(first), first_(first), guard_(device().index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device().index(), &stream));
    stream_ = static_cast<cuda::Stream>(stream);
    cuda::settings().read();
  }

#define DX_RUN(name, Params)                     \
  template <class T>                             \
  void name(const Params<T>& p, int64_t) const { \
    merge_rest();                                \
    check_run(#name, cuda::name(p, stream_));    \
  }
#define DX_RUN_WITH_WORKSPACE(name, Params)                                               \
  template <class T>                                                                      \
  void name(const Params<T>& p, int64_t) const {                                          \
    merge_rest();                                                                         \
    const Workspace scratch = workspace(#name, cuda::name##_workspace(p), written_by(p)); \
    check_run(#name, cuda::name(p, stream_, scratch.data));                               \
  }
  DX_RUN_WITH_WORKSPACE(channel_stats, ChannelStats)
  DX_RUN(bn_relu, BnRelu)
  DX_RUN(feature_grad, FeatureGrad)
  DX_RUN(bn_relu_backward, BnReluBackward)
  DX_RUN(bn_relu_avg_pool, BnReluPool)
  DX_RUN_WITH_WORKSPACE(bn_relu_avg_pool_backward_reduce, BnReluPoolBackwardReduce)
  DX_RUN(bn_relu_avg_pool_backward, BnReluPoolBackward)
  DX_RUN(bn_relu_max_pool, BnReluPool)
  DX_RUN_WITH_WORKSPACE(bn_relu_max_pool_backward_reduce, BnReluPoolBackwardReduce)
  DX_RUN(bn_relu_max_pool_backward, BnReluPoolBackward)
#define DX_RUN_CONV3X3(name, Params)                                                                      \
  template <class T>                                                                                      \
  void name(const Params<T>& p, int64_t) const {                                                          \
    merge_rest();                                                                                         \
    STD_TORCH_CHECK(cuda::has_room_for_conv3x3(p),                                                        \
                    "densenet_ext: " #name                                                                \
                    ": size: expected lines for which a GPU's block has the shared memory, got ones of ", \
                    p.images.size[2], " pixels");                                                         \
    const Workspace scratch = workspace(#name, cuda::name##_workspace(p), written_by(p));                 \
    check_run(#name, cuda::name(p, stream_, scratch.data));                                               \
  }
  DX_RUN_CONV3X3(bn_relu_conv3x3, BnReluConv3x3)
  DX_RUN_CONV3X3(bn_relu_conv3x3_backward, BnReluConv3x3Backward)
#define DX_RUN_AND_LEAVE(name, Params, Unmerged)                                             \
  template <class T>                                                                         \
  void name(const Params<T>& p, int64_t) const {                                             \
    merge_rest();                                                                            \
    const size_t bytes = cuda::name##_workspace(p);                                          \
    Workspace scratch = workspace(#name, bytes, written_by(p));                              \
    cuda::Unmerged<Acc<T>> left;                                                             \
    check_run(#name, cuda::name(p, stream_, scratch.data, merges_later_ ? &left : nullptr)); \
    if (left.any()) leave(left, std::move(scratch), bytes);                                  \
  }
  DX_RUN_AND_LEAVE(append_features, AppendFeatures, UnmergedMoments)
  DX_RUN_AND_LEAVE(bn_relu_backward_reduce, BnReluBackwardReduce, UnmergedSums)
#define DX_RUN_AND_MERGE(name, Params, Unmerged)                                          \
  template <class T>                                                                      \
  void name(const Params<T>& p, int64_t) const {                                          \
    const auto left = taken<cuda::Unmerged<Acc<T>>>(p);                                   \
    const Workspace scratch = workspace(#name, cuda::name##_workspace(p), written_by(p)); \
    check_run(#name, cuda::name(p, stream_, scratch.data, left));                         \
    left_ = {};                                                                           \
  }
  DX_RUN_AND_MERGE(bn_relu_conv1x1, BnReluConv1x1, UnmergedMoments)
  DX_RUN_AND_MERGE(bn_relu_conv1x1_backward, BnReluConv1x1Backward, UnmergedSums)
#undef DX_RUN_AND_MERGE
#undef DX_RUN_AND_LEAVE
#undef DX_RUN_CONV3X3
#undef DX_RUN
#undef DX_RUN_WITH_WORKSPACE

  void merge_later() const { merges_later_ = true; }
  void merge_rest() const {
    if (left_.sums.index() == 0) return;
    check_run("merge_slabs", std::visit([&](const auto& sums) { return merge_left(sums); }, left_.sums));
    left_ = {};
  }
  // PyTorch's operations that read such sums.
  template <class A>
  void statistics_gradient(const Norm<A>& norm, const NormGrads<A>& sums, int64_t C, A* gm, A* gv) const {
    merge_rest();
    TorchCalls::statistics_gradient(norm, sums, C, gm, gv);
  }
  template <class A>
  void bias_gradient(const Norm<A>& norm, bool batch, const A* dbeta, int64_t C, A* out) const {
    merge_rest();
    TorchCalls::bias_gradient(norm, batch, dbeta, C, out);
  }

  template <class From, class To>
  void copy_taps(const std::vector<TapsCopy<From, To>>& copies) const {
    check_run("copy_taps", cuda::copy_taps(copies.data(), copies.size(), stream_));
  }

  // A 3x3 convolution is ours where that is faster, which only the GPU's kernels know.
  static constexpr bool kHasConv3x3 = true, kChoosesConv3x3 = true;
  template <class T>
  bool has_conv3x3(const Images& images, const SameConvolution<T>& conv) const {
    if (!has_window_of_3(images, conv)) return false;
    BnReluConv3x3<T> p = {};
    p.C = conv.C, p.N = conv.N, p.images = images, p.tf32 = conv.tf32;
    std::copy_n(conv.window, 3, p.window);
    return cuda::chooses_own_conv3x3(p);
  }

  // Memory of the call that workspaces may take for as long as this lives: nobody else uses it while a kernel runs that
  // has one, unless it is that kernel's own result.
  void lend(void* memory, int64_t bytes) const {
    constexpr uintptr_t kAlignment = 256;
    const uintptr_t skipped = (kAlignment - reinterpret_cast<uintptr_t>(memory) % kAlignment) % kAlignment;
    if (bytes <= int64_t(skipped)) return;
    lent_ = static_cast<char*>(memory) + skipped, lent_bytes_ = size_t(bytes) - skipped, lender_ = memory;
  }

 private:
  struct Workspace {
    void* data;  // or null
    OptionalTensor owner;
  };
  template <class P>
  static const void* written_by(const P&) {
    return nullptr;
  }
  template <class T>
  static const void* written_by(const BnReluBackwardReduce<T>& p) {
    return p.out.data;
  }
  // What a kernel has left to be merged, and the memory that it lies in.
  struct Left {
    std::variant<std::monostate, cuda::UnmergedMoments<float>, cuda::UnmergedMoments<double>, cuda::UnmergedSums<float>,
                 cuda::UnmergedSums<double>>
        sums;
    Workspace memory;
    size_t lent_bytes;  // of the lent memory, from its beginning
  };
  template <class Unmerged>
  void leave(const Unmerged& sums, Workspace memory, size_t bytes) const {
    const bool lent = !memory.owner;
    left_ = {sums, std::move(memory), lent ? (bytes + 255) / 256 * 256 : 0};
  }
  cudaError_t merge_left(std::monostate) const { return cudaSuccess; }
  template <class Unmerged>
  cudaError_t merge_left(const Unmerged& sums) const {
    return cuda::merge_left(sums, stream_);
  }
  // What is left, if it is what the call reads; anything else is merged at once. It stays in memory until left_ goes.
  template <class Unmerged, class P>
  Unmerged taken(const P& p) const {
    const auto* left = std::get_if<Unmerged>(&left_.sums);
    if (left && reads(p, *left)) return *left;
    merge_rest();
    return {};
  }
  template <class T>
  static bool reads(const BnReluConv1x1<T>& p, const cuda::UnmergedMoments<Acc<T>>& of) {
    return of.mean >= p.norm.mean && of.mean + of.C <= p.norm.mean + p.C &&
           of.var == p.norm.var + (of.mean - p.norm.mean);
  }
  template <class T>
  static bool reads(const BnReluConv1x1Backward<T>& p, const cuda::UnmergedSums<Acc<T>>& of) {
    return p.z && of.grad_weight == p.z_grad_weight && of.grad_bias == p.z_grad_bias && of.C == p.N;
  }
  // Bytes that belong to the current stream: freed at the end of the call, torch's allocator gives them out again only
  // behind the kernels that were launched by then. written: the kernel's result that may lie in lent memory.
  Workspace workspace(const char* name, size_t bytes, const void* written) const {
    if (bytes == 0) return {nullptr, std::nullopt};
    if (bytes + left_.lent_bytes <= lent_bytes_ && written != lender_) return {lent_ + left_.lent_bytes, std::nullopt};
    try {
      Tensor memory = torch::stable::new_empty(first_, {int64_t(bytes)}, ScalarType::Byte);
      return {memory.mutable_data_ptr(), std::move(memory)};
    } catch (const std::exception&) {
      report_no_workspace(name, bytes);  // the stable ABI drops the kind of the exception
    }
  }
  // The allocator asks the driver, which answers with the error of any kernel that ran before.
  [[noreturn]] static void report_no_workspace(const char* name, size_t bytes) {
    size_t unused = 0, total = 0;
    const cudaError_t error = cudaMemGetInfo(&unused, &total);
    STD_TORCH_CHECK(error == cudaSuccess || error == cudaErrorMemoryAllocation, "densenet_ext: ", name,
                    ": no workspace, since a kernel before it failed: ", cudaGetErrorString(error),
                    " (DENSENET_EXT_SYNC=1 names the operator)");
    throw_out_of_memory("CUDA out of memory. densenet_ext: " + std::string(name) + " tried to allocate " +
                        std::to_string(bytes) + " bytes; " + std::to_string(unused) + " of the GPU's " +
                        std::to_string(total) + " bytes are free");
  }
  void check_run(const char* name, cudaError_t error) const {
    if (error == cudaSuccess && waits()) error = cudaStreamSynchronize(stream_);
    STD_TORCH_CHECK(error == cudaSuccess, "densenet_ext: ", name, ": CUDA error: ", cudaGetErrorString(error));
  }
  bool waits() const {
    if (!cuda::settings().waits) return false;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(stream_, &status) == cudaSuccess && status == cudaStreamCaptureStatusNone;
  }

  const Tensor& first_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_;
  mutable bool merges_later_ = false;
  mutable Left left_ = {};
  mutable char* lent_ = nullptr;
  mutable size_t lent_bytes_ = 0;
  mutable const void* lender_ = nullptr;  // where the lent memory begins, before it is aligned
};

}  // namespace dx::ops
