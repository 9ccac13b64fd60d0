#include "levels.h"

#include <atomic>

#include "winograd_use.h"

namespace dx::cpu {
namespace {

std::vector<const Level*> find_levels() {
  std::vector<const Level*> found = {level_portable()};
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  // Every processor with AVX2 has F16C; not every compiler can ask for it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && level_avx2()) found.push_back(level_avx2());
  if (avx512 && level_avx512()) found.push_back(level_avx512());
  if (avx512 && level_avx512_bf16() && __builtin_cpu_supports("avx512bf16")) found.push_back(level_avx512_bf16());
#endif
  return found;
}

// Intel's cores of 2023 take a dot product of bf16 numbers every two cycles, and two multiply-adds of as many floats in
// each: on one core of Emerald Rapids 87 GFLOP/s beside 178, where AMD's Zen 4 has 235 beside 118. A training step of
// DenseNet-121 in bf16 took 1.4 times as long. Cooper Lake, which they say is quick at it, came before VBMI2.
bool bf16_dots_are_slow() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_is("intel") && __builtin_cpu_supports("avx512vbmi2");
#else
  return false;
#endif
}

const Level* fastest() {
  const std::vector<const Level*>& found = levels();
  return found.back() == level_avx512_bf16() && bf16_dots_are_slow() ? level_avx512() : found.back();
}

std::atomic<const Level*>& current() {
  static std::atomic<const Level*> chosen{fastest()};
  return chosen;
}

std::atomic<WinogradUse> wanted_winograd{WinogradUse::kFaster};

}  // namespace

const std::vector<const Level*>& levels() {
  static const std::vector<const Level*> found = find_levels();
  return found;
}

const Level& level() { return *current().load(std::memory_order_relaxed); }

bool set_level(const std::string& name) {
  for (const Level* candidate : levels())
    if (name == candidate->name) {
      current().store(candidate);
      return true;
    }
  return false;
}

WinogradUse winograd_use() { return wanted_winograd.load(std::memory_order_relaxed); }

bool set_winograd_use(const std::string& name) {
  if (name != "faster" && name != "always" && name != "never") return false;
  wanted_winograd = name == "faster"   ? WinogradUse::kFaster
                    : name == "always" ? WinogradUse::kAlways
                                       : WinogradUse::kNever;
  return true;
}

}  // namespace dx::cpu
