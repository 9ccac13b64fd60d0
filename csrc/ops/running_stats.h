// move_running_stats: the running statistics of all norms of a unit, by those of its batch.
#pragma once

#include "tensors.h"

namespace dx::ops {

// running_mean += momentum (mean - running_mean) and so on for the variance, times `unbiased`, of norm after norm: one
// that occurs twice moves twice. Norm i reads means[which[i]] and vars[which[i]] from element starts[i] on.
template <class A, class D>
void move_running_stats_of(const D& at, const std::vector<Tensor>& running_means,
                           const std::vector<Tensor>& running_vars, const std::vector<Tensor>& means,
                           const std::vector<Tensor>& vars, const std::vector<int64_t>& which,
                           const std::vector<int64_t>& starts, const std::vector<double>& momenta, double unbiased) {
  const auto move = [](A* running, const A* batch, int64_t C, A momentum, A factor) {
    for (int64_t c = 0; c < C; ++c) running[c] = running[c] * (A(1) - momentum) + momentum * (factor * batch[c]);
  };
  std::vector<const A*> sources[2];
  for (size_t i = 0; i < means.size(); ++i) {
    sources[0].push_back(dense<A>(at, means[i], "means", means[i].numel()));
    sources[1].push_back(dense<A>(at, vars[i], "vars", means[i].numel()));
  }
  for (size_t i = 0; i < running_means.size(); ++i) {
    const int64_t C = defined(running_means[i], "running_means").numel(), from = which[i], start = starts[i];
    STD_TORCH_CHECK(from >= 0 && from < int64_t(means.size()), "densenet_ext: which: expected numbers below ",
                    means.size(), ", got ", from);
    STD_TORCH_CHECK(start >= 0 && start <= means[from].numel() - C, "densenet_ext: starts: expected numbers in [0, ",
                    means[from].numel() - C, "], got ", start);
    A* mean = dense_out<A>(at, running_means[i], "running_means", C);
    A* var = dense_out<A>(at, running_vars[i], "running_vars", C);
    if (C == 0) continue;
    move(mean, sources[0][from] + start, C, A(momenta[i]), A(1));
    move(var, sources[1][from] + start, C, A(momenta[i]), A(unbiased));
  }
}

// Notes no memory: there are hundreds of small tensors.
struct Unnoted {
  const Place& at;
  void check(const Tensor& t, const char* name) const { at.check(t, name); }
  void uses(const Region&) const {}
};

inline void move_running_stats(const std::vector<Tensor>& running_means, const std::vector<Tensor>& running_vars,
                               const std::vector<Tensor>& means, const std::vector<Tensor>& vars,
                               const std::vector<int64_t>& which, const std::vector<int64_t>& starts,
                               const std::vector<double>& momenta, double unbiased) {
  const size_t count = running_means.size();
  for (const size_t size : {running_vars.size(), which.size(), starts.size(), momenta.size()})
    STD_TORCH_CHECK(size == count, "densenet_ext: move_running_stats: expected lists of ", count, " entries, got ",
                    size);
  STD_TORCH_CHECK(means.size() == vars.size(), "densenet_ext: vars: expected ", means.size(), " tensors, got ",
                  vars.size());
  if (count == 0) return;
  const Place place(defined(running_means[0], "running_means"));
  const Unnoted at = {place};
  if (running_means[0].scalar_type() == ScalarType::Double)
    move_running_stats_of<double>(at, running_means, running_vars, means, vars, which, starts, momenta, unbiased);
  else
    move_running_stats_of<float>(at, running_means, running_vars, means, vars, which, starts, momenta, unbiased);
}

}  // namespace dx::ops
