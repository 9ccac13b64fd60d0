// move_running_stats: the running statistics of all norms of a unit, by those of its batch.
#pragma once

#include "kept.h"

namespace dx::ops {

// Norm i moves by means[which[i]] and vars[which[i]] from element starts[i] on.
struct KeptNorms : KeptTensors {
  size_t norms, counters;  // tensors: running means, running variances, counters of batches
  std::vector<int64_t> which, starts;
  std::vector<double> momenta;

  const Tensor& running_mean(size_t i) const { return tensors[i]; }
  const Tensor& running_var(size_t i) const { return tensors[norms + i]; }
  const Tensor& counter(size_t i) const { return tensors[2 * norms + i]; }

  KeptNorms(const std::vector<Tensor>& all, size_t norms_, const std::vector<int64_t>& which_,
            const std::vector<int64_t>& starts_, const std::vector<double>& momenta_)
      : KeptTensors(all),
        norms(norms_),
        counters(all.size() - 2 * norms_),
        which(which_),
        starts(starts_),
        momenta(momenta_) {}
};

inline int64_t keep_norms(const std::vector<Tensor>& running_means, const std::vector<Tensor>& running_vars,
                          const std::vector<Tensor>& counters, const std::vector<int64_t>& which,
                          const std::vector<int64_t>& starts, const std::vector<double>& momenta) {
  const size_t count = running_means.size();
  for (const size_t size : {running_vars.size(), which.size(), starts.size(), momenta.size()})
    STD_TORCH_CHECK(size == count, "densenet_ext: keep_norms: expected lists of ", count, " entries, got ", size);
  std::vector<Tensor> all = running_means;
  all.insert(all.end(), running_vars.begin(), running_vars.end());
  all.insert(all.end(), counters.begin(), counters.end());
  return Kept::add(std::make_shared<const KeptNorms>(all, count, which, starts, momenta));
}

// Notes no memory: there are hundreds of small tensors.
struct Unnoted {
  const Place& at;
  void check(const Tensor& t, const char* name) const { at.check(t, name); }
  void uses(const Region&) const {}
};

// running_mean += momentum (mean - running_mean) and so on for the variance, times `unbiased`, of norm after norm: one
// that occurs twice moves twice. Every counter counts one batch more.
template <class A, class D>
void move_norms(const D& at, const KeptNorms& kept, const std::vector<Tensor>& means, const std::vector<Tensor>& vars,
                double unbiased) {
  const auto move = [](A* running, const A* batch, int64_t C, A momentum, A factor) {
    for (int64_t c = 0; c < C; ++c) running[c] = running[c] * (A(1) - momentum) + momentum * (factor * batch[c]);
  };
  std::vector<const A*> sources[2];
  for (size_t i = 0; i < means.size(); ++i) {
    sources[0].push_back(dense<A>(at, means[i], "means", means[i].numel()));
    sources[1].push_back(dense<A>(at, vars[i], "vars", means[i].numel()));
  }
  for (size_t i = 0; i < kept.norms; ++i) {
    const int64_t C = kept.running_mean(i).numel(), from = kept.which[i], start = kept.starts[i];
    STD_TORCH_CHECK(from >= 0 && from < int64_t(means.size()), "densenet_ext: which: expected numbers below ",
                    means.size(), ", got ", from);
    STD_TORCH_CHECK(start >= 0 && start <= means[from].numel() - C, "densenet_ext: starts: expected numbers in [0, ",
                    means[from].numel() - C, "], got ", start);
    A* mean = dense_out<A>(at, kept.running_mean(i), "running_means", C);
    A* var = dense_out<A>(at, kept.running_var(i), "running_vars", C);
    if (C == 0) continue;
    move(mean, sources[0][from] + start, C, A(kept.momenta[i]), A(1));
    move(var, sources[1][from] + start, C, A(kept.momenta[i]), A(unbiased));
  }
  for (size_t i = 0; i < kept.counters; ++i) {
    const Tensor& t = kept.counter(i);
    at.check(t, "counters");
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.numel() == 1,
                    "densenet_ext: counters: expected int64 tensors of one element, got shape ", shape_of(t));
    ++*check_memory<int64_t>(at, t, "counters", 1, 1, 1, true);
  }
}

inline void move_running_stats(int64_t norms, const std::vector<Tensor>& means, const std::vector<Tensor>& vars,
                               double unbiased) {
  const auto kept = Kept::find<KeptNorms>(norms, "norms");
  STD_TORCH_CHECK(means.size() == vars.size() && !means.empty(), "densenet_ext: vars: expected ", means.size(),
                  " tensors, as many as means, got ", vars.size());
  const Place place(defined(means[0], "means"));
  const Unnoted at = {place};
  if (means[0].scalar_type() == ScalarType::Double)
    move_norms<double>(at, *kept, means, vars, unbiased);
  else
    move_norms<float>(at, *kept, means, vars, unbiased);
}

}  // namespace dx::ops
