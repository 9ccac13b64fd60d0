#include "packed_weights.h"

#include <mutex>
#include <new>
#include <unordered_map>

namespace dx::cpu {

struct PackedMemory::Block {
  static constexpr std::align_val_t kAlign{64};
  PackedForm form;
  std::shared_ptr<void> data;

  Block(const PackedForm& form, size_t bytes)
      : form(form), data(::operator new(bytes, kAlign), [](void* p) { ::operator delete(p, kAlign); }) {}
};

struct PackedWeights::Content {
  std::mutex mutex;
  std::unique_ptr<PackedMemory::Block> kept;  // or null
};

PackedWeights::PackedWeights() : content_(std::make_unique<Content>()) {}
PackedWeights::~PackedWeights() = default;

namespace {

struct Known {
  std::mutex mutex;
  std::unordered_map<const void*, std::shared_ptr<PackedWeights>> of;
};
// Never destroyed: threads may still compute when the process ends.
Known& known() {
  static Known* const all = new Known;
  return *all;
}

}  // namespace

void PackedWeights::remember(const void* weight, std::shared_ptr<PackedWeights> packed) {
  const std::lock_guard<std::mutex> lock(known().mutex);
  known().of[weight] = std::move(packed);
}

void PackedWeights::forget(const void* weight, const PackedWeights* packed) {
  const std::lock_guard<std::mutex> lock(known().mutex);
  const auto at = known().of.find(weight);
  if (at != known().of.end() && at->second.get() == packed) known().of.erase(at);
}

std::shared_ptr<PackedWeights> PackedWeights::find(const void* weight) {
  const std::lock_guard<std::mutex> lock(known().mutex);
  const auto at = known().of.find(weight);
  return at == known().of.end() ? nullptr : at->second;
}

PackedMemory::PackedMemory(PackedWeights* of, const PackedForm& form, size_t bytes)
    : of_(of), block_(nullptr), ready_(false) {
  if (!of) return;
  {
    const std::lock_guard<std::mutex> lock(of->content_->mutex);
    const auto& kept = of->content_->kept;
    ready_ = kept && kept->form == form;
    if (ready_) block_ = new Block(*kept);
  }
  if (!ready_) block_ = new Block(form, bytes);
}

PackedMemory::~PackedMemory() { delete block_; }

void* PackedMemory::data() const { return block_ ? block_->data.get() : nullptr; }

void PackedMemory::keep() {
  if (!block_ || ready_) return;
  auto written = std::make_unique<Block>(*block_);
  const std::lock_guard<std::mutex> lock(of_->content_->mutex);
  of_->content_->kept.swap(written);
}

}  // namespace dx::cpu
