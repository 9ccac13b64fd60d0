// Weights whose packed forms are kept (cpu/packed_weights.h), from call to call until they are dropped.
#pragma once

#include "../cpu/packed_weights.h"
#include "kept.h"

namespace dx::ops {

class KeptPacked : public KeptTensors {
 public:
  explicit KeptPacked(const std::vector<Tensor>& weights) : KeptTensors(weights) {
    for (const Tensor& weight : tensors) {
      packed_.push_back(std::make_shared<cpu::PackedWeights>());
      cpu::PackedWeights::remember(weight.const_data_ptr(), packed_.back());
      addresses_.push_back(weight.const_data_ptr());
    }
  }
  ~KeptPacked() override {
    for (size_t i = 0; i < packed_.size(); ++i) cpu::PackedWeights::forget(addresses_[i], packed_[i].get());
  }

 private:
  std::vector<std::shared_ptr<cpu::PackedWeights>> packed_;
  std::vector<const void*> addresses_;
};

inline int64_t keep_packed(const std::vector<Tensor>& weights) {
  return Kept::add(std::make_shared<const KeptPacked>(weights));
}

}  // namespace dx::ops
