// Threads that stay together for a whole operation. A block runs hundreds of short parallel pieces; to fork and join
// the threads of torch's pool for each costs about five microseconds, to call a thread that looks out for work a tenth.
//
// One parallel region of torch's pool is entered once: the thread that called it leads, and runs the operation as it
// would alone; the others wait for pieces of work until it has come to its end.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dx::cpu {

class Team {
 public:
  explicit Team(int size) : seats_(new Seat[size]), size_(size) {}

  int size() const { return size_; }

  // The team that the calling thread leads, or null.
  static Team*& led() {
    static thread_local Team* team = nullptr;
    return team;
  }

  // Waits until all are here, each having called this from a thread of its own. False where that cannot be, or takes
  // too long: a pool may give several places to one thread, or be busy with somebody else's work.
  bool gather(bool alone) {
    if (!alone) return give_up(), false;
    int here = here_.load(std::memory_order_relaxed);
    do {
      if (here < 0) return false;
    } while (!here_.compare_exchange_weak(here, here + 1, std::memory_order_acq_rel));
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(2);
    Wait wait;
    while ((here = here_.load(std::memory_order_acquire)) != size_) {
      if (here < 0) return false;
      if (wait.next() && std::chrono::steady_clock::now() > deadline && give_up()) return false;
    }
    return true;
  }

  // Of everybody but the leader: works until the team is dismissed.
  void serve(int place) {
    Seat& seat = seats_[place];
    for (uint32_t seen = 0;;) {
      Wait wait;
      while (seat.calls.load(std::memory_order_acquire) == seen) wait.next();
      ++seen;
      if (!body_) return;
      body_(context_, place);
      working_.fetch_sub(1, std::memory_order_release);
    }
  }

  // Of the leader: runs body(context, i) for i in [0, tasks), tasks <= size.
  void run(int tasks, void (*body)(void*, int), void* context) {
    body_ = body, context_ = context;
    working_.store(tasks - 1, std::memory_order_relaxed);
    for (int i = 1; i < tasks; ++i) seats_[i].calls.fetch_add(1, std::memory_order_release);
    body(context, 0);
    Wait wait;
    while (working_.load(std::memory_order_acquire) > 0) wait.next();
  }
  void dismiss() {
    body_ = nullptr;
    for (int i = 1; i < size_; ++i) seats_[i].calls.fetch_add(1, std::memory_order_release);
  }

 private:
  struct alignas(64) Seat {
    std::atomic<uint32_t> calls{0};  // how many pieces of work this one was called to
  };
  // Looking again and again at first; the processor goes to others where that takes long.
  struct Wait {
    int times = 0;
    bool next() {
      if (++times % 4096) {
#if defined(__x86_64__)
        _mm_pause();
#endif
        return false;
      }
      std::this_thread::yield();
      return true;
    }
  };
  // Returns whether the team will not come together: all may have come just now.
  bool give_up() {
    int here = here_.load(std::memory_order_relaxed);
    do {
      if (here == size_) return false;
    } while (!here_.compare_exchange_weak(here, -1, std::memory_order_acq_rel));
    return true;
  }

  std::unique_ptr<Seat[]> seats_;
  int size_;
  std::atomic<int> here_{0};  // or -1: given up
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<int> working_{0};
};

}  // namespace dx::cpu
