// Threads for kernels that know no torch: the op files pass torch's own pool in (a second OpenMP runtime in one process
// is slow). Work is split into one contiguous range of rows per task, by sizes alone, so that every reduction has the
// same order from run to run for a given thread count.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dx::cpu {

struct Pool {
  int tasks;                                                   // how many tasks to run, at least 1
  void (*launch)(int tasks, void (*body)(void*, int), void*);  // runs body(context, i) for i in [0, tasks)

  template <class F>
  void run(const F& f) const {
    if (tasks == 1) return f(0);
    launch(
        tasks, [](void* context, int i) { (*static_cast<const F*>(context))(i); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }
};

struct Range {
  int64_t begin, end;
};

// The i-th of `tasks` contiguous parts of [0, size), cut at multiples of `unit`.
inline Range part(int64_t size, int64_t unit, int tasks, int i) {
  const int64_t units = (size + unit - 1) / unit;
  const int64_t lo = units * i / tasks, hi = units * (i + 1) / tasks;
  return {std::min(lo * unit, size), std::min(hi * unit, size)};
}

}  // namespace dx::cpu
