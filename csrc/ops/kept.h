// Tensors that operators are given once and keep, named by a number from then on: to hand hundreds of them over takes
// longer than a small unit computes. Which tensors they are is kept, not what they hold; where their memory is, every
// call looks up.
#pragma once

#include <memory>
#include <mutex>
#include <unordered_map>

#include "tensors.h"

namespace dx::ops {

// Dtype, device, sizes and strides of a tensor, without an allocation.
struct Form {
  int32_t dtype = 0, device_type = 0, device_index = 0;
  int64_t dims = 0;
  int64_t *sizes = nullptr, *strides = nullptr;  // the tensor's own

  explicit Form(const Tensor& t) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device_index));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dims));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
  }
  // Calls f(number) with all of it, until f returns false; returns whether it never did.
  template <class F>
  bool each(const F& f) const {
    bool go_on = f(dtype) && f(device_type) && f(device_index) && f(dims);
    for (int64_t i = 0; go_on && i < dims; ++i) go_on = f(sizes[i]) && f(strides[i]);
    return go_on;
  }
};

struct KeptTensors {
  std::vector<Tensor> tensors;

  explicit KeptTensors(const std::vector<Tensor>& tensors_) : tensors(tensors_) {
    for (const Tensor& t : tensors)
      Form(defined(t, "tensors")).each([&](int64_t number) { return forms_.push_back(number), true; });
  }
  virtual ~KeptTensors() = default;
  // Asks for what `hold` looks at first.
  void ask_ahead() const {
    for (const Tensor& t : tensors) __builtin_prefetch(t.get());
  }
  // Whether all have the dtype, the device, the sizes and the strides that they had when they were given.
  bool hold() const {
    return hold([](const Tensor&) { return true; });
  }
  // And whether their memory is where it was, by `addresses`.
  bool hold(const std::vector<const void*>& addresses) const {
    size_t i = 0;
    return addresses.size() == tensors.size() &&
           hold([&](const Tensor& t) { return t.const_data_ptr() == addresses[i++]; });
  }
  std::vector<const void*> addresses() const {
    std::vector<const void*> found;
    for (const Tensor& t : tensors) found.push_back(t.const_data_ptr());
    return found;
  }

 private:
  template <class F>
  bool hold(const F& more) const {
    size_t at = 0;
    const auto same = [&](int64_t number) { return at < forms_.size() && forms_[at++] == number; };
    for (const Tensor& t : tensors)
      if (!Form(t).each(same) || !more(t)) return false;
    return at == forms_.size();
  }

  std::vector<int64_t> forms_;
};

class Kept {
 public:
  static int64_t add(std::shared_ptr<const KeptTensors> tensors) {
    const std::lock_guard<std::mutex> lock(all().mutex_);
    all().kept_[++all().last_] = std::move(tensors);
    return all().last_;
  }
  // What is kept under a number, which has to be a T; `name` is the argument's.
  template <class T>
  static std::shared_ptr<const T> find(int64_t number, const char* name) {
    std::shared_ptr<const T> found;
    {
      const std::lock_guard<std::mutex> lock(all().mutex_);
      const auto at = all().kept_.find(number);
      if (at != all().kept_.end()) found = std::dynamic_pointer_cast<const T>(at->second);
    }
    STD_TORCH_CHECK(found, "densenet_ext: ", name, ": expected the number of tensors that are kept, got ", number);
    return found;
  }
  static void drop(int64_t number) {
    std::shared_ptr<const KeptTensors> dropped;  // freed behind the lock: that may run Python
    const std::lock_guard<std::mutex> lock(all().mutex_);
    const auto at = all().kept_.find(number);
    if (at == all().kept_.end()) return;
    dropped = std::move(at->second);
    all().kept_.erase(at);
  }

 private:
  static Kept& all() {
    static Kept* const kept = new Kept;  // never freed: at exit there may be no Python any more
    return *kept;
  }
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const KeptTensors>> kept_;
  int64_t last_ = 0;
};

inline int64_t keep_tensors(const std::vector<Tensor>& tensors) {
  return Kept::add(std::make_shared<const KeptTensors>(tensors));
}
inline bool kept_hold(int64_t kept) { return Kept::find<KeptTensors>(kept, "kept")->hold(); }
inline void drop_kept(int64_t kept) { Kept::drop(kept); }

}  // namespace dx::ops
