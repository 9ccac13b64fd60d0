#include "task_memory.h"

#include <atomic>
#include <new>

namespace dx::cpu {
namespace {

constexpr std::align_val_t kAlign{4096};
// Of a task in the kept block: more than any kernel asks for. Pages that nobody has touched take no memory.
constexpr size_t kKeptBytes = size_t(8) << 20;

// One call at a time has it; a call of another thread meanwhile takes memory of its own.
struct Kept {
  std::atomic<bool> taken{false};
  char* data = nullptr;
  int tasks = 0;
};
// Never destroyed: threads may still compute when the process ends.
Kept& kept() {
  static Kept* block = new Kept;
  return *block;
}

char* allocate(size_t bytes) { return static_cast<char*>(::operator new(bytes, kAlign)); }

}  // namespace

TaskMemory::TaskMemory(int tasks, size_t bytes)
    : data_(nullptr), distance_((bytes + 63) / 64 * 64), kept_(bytes <= kKeptBytes && !kept().taken.exchange(true)) {
  if (!kept_) {
    data_ = allocate(distance_ * size_t(tasks));
    return;
  }
  Kept& block = kept();
  if (block.tasks < tasks) {
    if (block.data) ::operator delete(block.data, kAlign);
    block.data = nullptr;
    block.tasks = 0;
    try {
      block.data = allocate(kKeptBytes * size_t(tasks));
    } catch (...) {
      block.taken = false;
      throw;
    }
    block.tasks = tasks;
  }
  data_ = block.data;
  distance_ = kKeptBytes;
}

TaskMemory::~TaskMemory() {
  if (kept_)
    kept().taken = false;
  else
    ::operator delete(data_, kAlign);
}

}  // namespace dx::cpu
