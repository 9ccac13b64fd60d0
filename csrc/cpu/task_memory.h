// Working memory of tasks that stays where it is from call to call. Memory from the heap lies elsewhere in each
// kernel's call: what one core has written there for one kernel another core writes for the next, and fetches every
// line of it from the first one's caches. So a task's memory is a part of a block that is kept, the same part in every
// call.
#pragma once

#include <cstddef>

namespace dx::cpu {

class TaskMemory {
 public:
  // bytes: of each task. Throws std::bad_alloc.
  TaskMemory(int tasks, size_t bytes);
  ~TaskMemory();
  TaskMemory(const TaskMemory&) = delete;
  TaskMemory& operator=(const TaskMemory&) = delete;

  char* of_task(int task) const { return data_ + size_t(task) * distance_; }
  size_t distance() const { return distance_; }

 private:
  char* data_;
  size_t distance_;
  bool kept_;
};

}  // namespace dx::cpu
