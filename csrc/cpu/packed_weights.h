// Weights as kernels read them, kept from call to call where somebody says that they stay what they are
// (densenet_ext/packed.py): to pack them takes a good part of a small inference.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace dx::cpu {

// What packed weights follow from besides the numbers: which kernel's they are, and its sizes.
using PackedForm = std::array<int64_t, 6>;

// A weight's packed form, of the last kernel that asked for it.
class PackedWeights {
 public:
  PackedWeights();
  ~PackedWeights();
  PackedWeights(const PackedWeights&) = delete;
  PackedWeights& operator=(const PackedWeights&) = delete;

  // Lets kernels find it under the address of its weight; the last one counts. `forget` undoes that.
  static void remember(const void* weight, std::shared_ptr<PackedWeights> packed);
  static void forget(const void* weight, const PackedWeights* packed);
  static std::shared_ptr<PackedWeights> find(const void* weight);

 private:
  friend class PackedMemory;
  struct Content;
  std::unique_ptr<Content> content_;
};

// The memory that one call packs into, or finds packed. Other threads may be in calls with the same weight.
class PackedMemory {
 public:
  // `of` null: there is none. Throws std::bad_alloc.
  PackedMemory(PackedWeights* of, const PackedForm& form, size_t bytes);
  ~PackedMemory();
  PackedMemory(const PackedMemory&) = delete;
  PackedMemory& operator=(const PackedMemory&) = delete;

  void* data() const;
  bool ready() const { return ready_; }
  // Says that data() has been written.
  void keep();

 private:
  struct Block;
  friend class PackedWeights;
  PackedWeights* of_;
  Block* block_;
  bool ready_;
};

}  // namespace dx::cpu
