// The CPU as a backend of the operators: its kernels, on torch's own threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <exception>
#include <thread>
#include <unordered_map>

#include "../cpu/levels.h"
#include "../cpu/packed_weights.h"
#include "../cpu/team.h"
#include "torch_calls.h"

namespace dx::ops {

class Cpu : public TorchCalls {
 public:
  explicit Cpu(const Tensor& first) : TorchCalls(first) {}

// `elements`: of all feature maps, the measure of the work
#define DX_RUN(name, Params)                              \
  template <class T>                                      \
  void name(const Params<T>& p, int64_t elements) const { \
    cpu::kernels<T>().name(p, pool(elements));            \
  }
#define DX_RUN_PRODUCT(name, Params)                         \
  template <class T>                                         \
  void name(const Params<T>& p, int64_t elements) const {    \
    cpu::kernels<T>().name(p, pool_of_product(p, elements)); \
  }
// whose weights may be kept packed
#define DX_RUN_PACKED(name, Params)                                        \
  template <class T>                                                       \
  void name(const Params<T>& p, int64_t elements) const {                  \
    const auto packed = packed_of(address(p.weight));                      \
    cpu::kernels<T>().name(p, pool_of_product(p, elements), packed.get()); \
  }
  DX_RUN(channel_stats, ChannelStats)
  DX_RUN(append_features, AppendFeatures)
  DX_RUN(bn_relu, BnRelu)
  DX_RUN(feature_grad, FeatureGrad)
  DX_RUN(bn_relu_backward_reduce, BnReluBackwardReduce)
  DX_RUN(bn_relu_backward, BnReluBackward)
  DX_RUN_PACKED(bn_relu_conv1x1, BnReluConv1x1)
  DX_RUN_PRODUCT(bn_relu_conv1x1_backward, BnReluConv1x1Backward)
  DX_RUN_PACKED(bn_relu_conv3x3, BnReluConv3x3)
  DX_RUN_PRODUCT(bn_relu_conv3x3_backward, BnReluConv3x3Backward)
  DX_RUN(bn_relu_avg_pool, BnReluPool)
  DX_RUN(bn_relu_avg_pool_backward_reduce, BnReluPoolBackwardReduce)
  DX_RUN(bn_relu_avg_pool_backward, BnReluPoolBackward)
  DX_RUN(bn_relu_max_pool, BnReluPool)
  DX_RUN(bn_relu_max_pool_backward_reduce, BnReluPoolBackwardReduce)
  DX_RUN(bn_relu_max_pool_backward, BnReluPoolBackward)
  DX_RUN_PRODUCT(first_conv, FirstConv)
#undef DX_RUN
#undef DX_RUN_PRODUCT
#undef DX_RUN_PACKED

  void use_packed(bool use) const { uses_packed_ = use; }

  // About what a core has of caches on processors of these years, a part of the shared one included.
  int64_t cached_bytes() const { return int64_t(2) * 1024 * 1024 * torch::stable::get_num_threads(); }
  void pack_once() const { packs_once_ = true; }

  template <class A>
  Identity<A> identity_norm(const A*, int64_t) const {
    return {{}, {}};
  }

  static constexpr bool kHasConv3x3 = true, kChoosesConv3x3 = false;
  // Where the convolution is ours: whenever its kernel is of 3 in every dimension.
  template <class T>
  bool has_conv3x3(const Images& images, const SameConvolution<T>& conv) const {
    return has_window_of_3(images, conv);
  }

  // Runs f, which calls nothing but the kernels above, with threads that stay together for all of them. `elements`: of
  // the whole work, as the kernels measure it.
  template <class F>
  void together(int64_t elements, const F& f) const {
    const int threads = pool(elements).tasks;
    if (threads == 1 || cpu::Team::led()) return f();
    const Together together;
    cpu::Team team(threads);
    const std::thread::id leader = std::this_thread::get_id();
    bool ran = false;
    std::exception_ptr error;  // torch's pool would hand on its words only
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const bool leads = std::this_thread::get_id() == leader;
      if (!team.gather(end - begin == 1 && leads == (begin == 0))) return;
      if (!leads) return team.serve(int(begin));
      ran = true;
      cpu::Team::led() = &team;
      try {
        f();
      } catch (...) {
        error = std::current_exception();
      }
      cpu::Team::led() = nullptr;
      team.dismiss();
    });
    if (error) std::rethrow_exception(error);
    if (!ran) f();
  }

 private:
  // Work is split as for a team, whether its threads have come or not: the same sums in the same order.
  struct Together {
    static bool& on() {
      static thread_local bool is = false;
      return is;
    }
    Together() { on() = true; }
    ~Together() { on() = false; }
    Together(const Together&) = delete;
    Together& operator=(const Together&) = delete;
  };
  // Rows that a product takes of its inputs: a window of every row.
  template <class Params>
  static auto rows_of(const Params& p) -> decltype(p.M) {
    return p.M;
  }
  template <class Params>
  static auto rows_of(const Params& p) -> decltype(p.images.rows()) {
    return p.images.rows() * p.window[0] * p.window[1] * p.window[2];
  }
  template <class Params>
  static auto rows_of(const Params& p) -> decltype(p.geometry.out_rows()) {
    return p.geometry.out_rows() * p.geometry.window[0] * p.geometry.window[1] * p.geometry.window[2];
  }
  template <class A>
  static const void* address(const A* weight) {
    return weight;
  }
  template <class A>
  static const void* address(const Taps<A>& weight) {
    return weight.data;
  }
  // A product's work is in its multiplications, of which a vector register does about this many while an element moves.
  template <class Params>
  static cpu::Pool pool_of_product(const Params& p, int64_t elements) {
    constexpr int64_t kProductsPerElement = 32;
    return pool(elements + rows_of(p) * p.C * p.N / kProductsPerElement);
  }
  // As many of torch's threads as the work is worth. To call one more of a team takes as long as some elements: small
  // work is split until each task's share is as long as all calls.
  static cpu::Pool pool(int64_t elements) {
    constexpr int64_t kElementsPerTask = 16384, kElementsPerCall = 2048;
    const cpu::Team* team = cpu::Team::led();
    const int64_t of_team = Together::on() ? int64_t(std::sqrt(double(elements / kElementsPerCall))) : 1;
    const int64_t worth = std::max({int64_t(1), elements / kElementsPerTask, of_team});
    const int64_t threads = team ? team->size() : int64_t(torch::stable::get_num_threads());
    return {int(std::min(threads, worth)), [](int tasks, void (*body)(void*, int), void* context) {
              if (cpu::Team* led = cpu::Team::led()) return led->run(tasks, body, context);
              torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) body(context, int(i));
              });
            }};
  }

  std::shared_ptr<cpu::PackedWeights> packed_of(const void* weight) const {
    if (uses_packed_)
      if (auto kept = cpu::PackedWeights::find(weight)) return kept;
    if (!packs_once_) return nullptr;
    auto& own = of_this_call_[weight];
    if (!own) own = std::make_shared<cpu::PackedWeights>();
    return own;
  }

  mutable bool uses_packed_ = false, packs_once_ = false;
  mutable std::unordered_map<const void*, std::shared_ptr<cpu::PackedWeights>> of_this_call_;
};

}  // namespace dx::ops
