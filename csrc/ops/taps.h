// The weights of convolutions that are PyTorch's own, and their gradients, for many layers at once: a copy for each
// would be a launch for each on a GPU. They take next to no memory of their own: a weight lies where its gradient will,
// or where the last layer writes later on.
#pragma once

#include <functional>
#include <unordered_map>

#include "../step.h"
#include "tensors.h"

namespace dx::ops {

// How a convolution's weight [N, C, window...] lies in memory, contiguous or channels_last.
struct TapStrides {
  int64_t output, input, tap;
};
inline std::optional<TapStrides> tap_strides(const Tensor& t) {
  if (t.dim() < 3) return std::nullopt;
  int64_t taps = 1;
  for (int64_t i = 2; i < t.dim(); ++i) taps *= t.size(i);
  const auto has = [&](int64_t input, int64_t tap) {
    int64_t step = tap;
    for (int64_t i = t.dim() - 1; i >= 2; --i) {
      if (t.size(i) > 1 && t.stride(i) != step) return false;
      step *= t.size(i);
    }
    return (t.size(1) == 1 || t.stride(1) == input) && (t.size(0) == 1 || t.stride(0) == t.size(1) * taps);
  };
  if (has(taps, 1)) return TapStrides{t.size(1) * taps, taps, 1};
  if (has(1, t.size(1))) return TapStrides{t.size(1) * taps, 1, t.size(1)};
  return std::nullopt;
}

template <class T>
int64_t taps_of(const SameConvolution<T>& conv) {
  return conv.window[0] * conv.window[1] * conv.window[2];
}

// Gradients wait for a common copy until they are so many bytes, or half of scratch.a, beside which they do not show;
// whole.py counts them.
constexpr int64_t kMostWaiting = int64_t(1) << 20;

// A call's copies. A convolution that is added finds its weight here, as PyTorch takes it without a copy of its own: in
// the dtype of feature maps, channels_last.
template <class T>
class WeightCopies {
 public:
  using A = Acc<T>;

  // waiting: how many elements of gradients may wait; never more than kMostWaiting bytes.
  template <class D>
  WeightCopies(const D& at, const Tensor& like, int64_t waiting)
      : like_(like),
        most_(std::min<int64_t>(waiting, kMostWaiting / int64_t(sizeof(T)))),
        to_([&at](const Copies<A, T>& copies) { at.copy_taps(copies); }),
        back_([&at](const Copies<T, A>& copies) { at.copy_taps(copies); }) {}
  WeightCopies(const WeightCopies&) = delete;
  WeightCopies& operator=(const WeightCopies&) = delete;

  // gradient: memory of the weight's, where the copy may lie until it is written; or null.
  void add(SameConvolution<T>& conv, A* gradient) {
    conv.copies = this;
    index_[&conv] = entries_.size();
    Taps<const T> stored = {};
    if constexpr (std::is_same_v<A, T>)
      if (conv.weight.input == 1) stored = conv.weight;
    entries_.push_back({&conv, reinterpret_cast<T*>(gradient), stored, Memory::lasting});
  }
  // Memory that all convolutions but the last `without` may use; they run in the order in which they were added.
  void lend(T* memory, int64_t elements, size_t without) {
    if (entries_.size() <= without) return;
    constexpr uintptr_t kLine = 64;
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
    const int64_t skipped = int64_t((kLine - address % kLine) % kLine / sizeof(T));
    room_ = memory + skipped, room_elements_ = elements - skipped, room_end_ = entries_.size() - without;
  }

  // The weight of a convolution that was added, until the next one is asked for.
  Taps<const T> of(const SameConvolution<T>& conv) {
    const size_t i = index_.at(&conv);
    if (!entries_[i].stored) store(i);
    return entries_[i].stored;
  }

  // Has a gradient wait until many can be written where they belong.
  void write_later(Tensor found, const SameConvolution<T>& conv, const Taps<A>& target) {
    const int64_t elements = conv.N * conv.C * taps_of(conv);
    if (elements_ + elements > most_) write();
    if (!tap_strides(found)) found = torch::stable::contiguous(found);
    const TapStrides from = *tap_strides(found);
    const T* data = static_cast<const T*>(found.const_data_ptr());
    waiting_.push_back({conv.N, conv.C, taps_of(conv), {data, from.output, from.input, from.tap}, target});
    found_.push_back(std::move(found));
    elements_ += elements;
  }
  // Writes all that wait.
  void write() {
    if (!waiting_.empty()) back_(waiting_);
    waiting_.clear(), found_.clear(), elements_ = 0;
  }

 private:
  template <class From, class To>
  using Copies = std::vector<TapsCopy<From, To>>;
  enum class Memory { lasting, own, room };
  struct Entry {
    const SameConvolution<T>* conv;
    T* gradient;
    Taps<const T> stored;  // or null
    Memory memory;         // where it is stored
    int64_t elements() const { return conv->N * conv->C * taps_of(*conv); }
  };

  // Copies the weight of i, with all others that lie in their gradients' memory, or that follow and fit the room.
  void store(size_t i) {
    Copies<A, T> copies;
    if (entries_[i].gradient) {
      for (Entry& entry : entries_)
        if (entry.gradient && !entry.stored) copies.push_back(copy(entry, entry.gradient, Memory::lasting));
    } else if (i < room_end_ && entries_[i].elements() <= room_elements_) {
      forget(Memory::room);
      constexpr int64_t kLine = 64 / sizeof(T);
      for (int64_t used = 0; i < room_end_ && used + entries_[i].elements() <= room_elements_; ++i) {
        if (entries_[i].stored) continue;
        copies.push_back(copy(entries_[i], room_ + used, Memory::room));
        used += (entries_[i].elements() + kLine - 1) / kLine * kLine;
      }
    } else {
      forget(Memory::own);
      own_ = torch::stable::new_empty(like_, {entries_[i].elements()}, Storage<T>::type);
      copies.push_back(copy(entries_[i], static_cast<T*>(own_->mutable_data_ptr()), Memory::own));
    }
    to_(copies);
  }
  static TapsCopy<A, T> copy(Entry& entry, T* to, Memory memory) {
    const SameConvolution<T>& conv = *entry.conv;
    const int64_t taps = taps_of(conv);
    entry.stored = {to, conv.C * taps, 1, conv.C}, entry.memory = memory;
    return {conv.N, conv.C, taps, conv.weight, {to, conv.C * taps, 1, conv.C}};
  }
  // What lies in a memory is about to be written over.
  void forget(Memory memory) {
    for (Entry& entry : entries_)
      if (entry.memory == memory) entry.stored = {};
  }

  const Tensor& like_;
  std::vector<Entry> entries_;
  std::unordered_map<const SameConvolution<T>*, size_t> index_;
  OptionalTensor own_;
  T* room_ = nullptr;
  int64_t room_elements_ = 0;
  size_t room_end_ = 0;
  int64_t most_, elements_ = 0;
  Copies<T, A> waiting_;
  std::vector<Tensor> found_;  // their memory
  std::function<void(const Copies<A, T>&)> to_;
  std::function<void(const Copies<T, A>&)> back_;
};

}  // namespace dx::ops
