// Weights packed as right operands: in column blocks, whose vectors a product then reads one after the other. They are
// packed at every call. At batch 1 that is a good part of the work, so it is done by whole vectors where it can be:
// squares of 16 x 16 operands are transposed in registers.
#pragma once

// Operands along an inner dimension of K.
template <class P>
inline int64_t depth_steps(int64_t K) {
  return (K + P::kDepth - 1) / P::kDepth;
}

// A right operand [K, N] in column blocks, each contiguous: the block that starts at column n starts at
// n * depth_steps(K). Columns beyond N are zero.
template <class P>
inline int64_t packed_size(int64_t K, int64_t N) {
  return padded<typename P::A>(N) * depth_steps<P>(K);
}

// Weights [taps, K, N], whose number (t, k, n) is w.data[t * w.tap + k * w.input + n * w.output], in column blocks of
// which each holds its taps one after the other.
template <class P>
struct Packing {
  using A = typename P::A;
  using Operand = typename P::Operand;
  static constexpr int L = kLanes<A>;

  Taps<const A> w;
  int64_t K, N, taps, steps;
  Operand* packed;

  // Steps k0 to k1 of the block of NB columns from n0 on.
  void block(int64_t n0, int64_t NB, int64_t k0, int64_t k1) const {
    for (int64_t n = 0; n < NB; n += L) {
      const Target out = {packed + n0 * steps * taps + n, NB, steps, std::min<int64_t>(L, NB - n)};
      const int64_t columns = std::max<int64_t>(0, std::min<int64_t>(out.width, N - n0 - n));
#if DX_VECTOR_BYTES == 64
      if constexpr (sizeof(Operand) == 4) {
        if (w.output == 1 || w.input == 1 || w.tap == 1 || w.tap == -1) {
          vectors(out, n0 + n, columns, k0, k1);
          continue;
        }
      }
#endif
      numbers(out, n0 + n, columns, k0, k1);
    }
  }

 private:
  struct Target {
    Operand* data;
    int64_t NB, steps, width;
    DX_INLINE Operand* at(int64_t tap, int64_t k) const { return data + (tap * steps + k) * NB; }
#if DX_VECTOR_BYTES == 64
    DX_INLINE void store(int64_t tap, int64_t k, __m512i v) const {
      _mm512_mask_storeu_epi32(at(tap, k), __mmask16((1u << width) - 1), v);
    }
#endif
  };
  DX_INLINE const A* from(int64_t n, int64_t k, int64_t t) const {
    return w.data + n * w.output + k * P::kDepth * w.input + t * w.tap;
  }
  // Where the second numbers of the operands of step k begin, those of the first being `first`.
  DX_INLINE const A* second(const A* first, int64_t k) const {
    return k * P::kDepth + 1 < K ? first + w.input : nullptr;
  }

  void numbers(const Target& out, int64_t n, int64_t columns, int64_t k0, int64_t k1) const {
    // One tap after the other: what they write lies at distances that would all fall into the same cache sets.
    for (int64_t t = 0; t < taps; ++t) {
      const auto pack = [&](int64_t i, int64_t k) {
        out.at(t, k)[i] = P::pack(from(n + i, k, t), w.input, k * P::kDepth + 1 < K);
      };
      if (w.output < w.input) {
        for (int64_t k = k0; k < k1; ++k)
          for (int64_t i = 0; i < columns; ++i) pack(i, k);
      } else {
        for (int64_t i = 0; i < columns; ++i)
          for (int64_t k = k0; k < k1; ++k) pack(i, k);
      }
      for (int64_t k = k0; k < k1; ++k)
        for (int64_t i = columns; i < out.width; ++i) out.at(t, k)[i] = Operand{};
    }
  }

#if DX_VECTOR_BYTES == 64
  // Weights come from memory, along many rows at once: more than a processor follows by itself.
  static DX_INLINE void ahead(const A* w) { _mm_prefetch(reinterpret_cast<const char*>(w) + 1024, _MM_HINT_T0); }

  // Calls f(i, vector of columns) for `count` numbers after each other in each column's row, the first one's at
  // `first`.
  template <class F>
  DX_INLINE void squares(const float* first, int64_t columns, int64_t count, const F& f) const {
    for (int64_t at = 0; at < count; at += L) {
      __m512i square[L];
      const float* rows = first + at;
      for (int64_t i = 0; i < columns; ++i) ahead(rows + i * w.output);
      const auto whole = [&](auto quarters) {
        load_columns<decltype(quarters)::value>(rows, w.output, square);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) f(at + i, square[i]);
      };
      if (count - at >= L && columns == L) {
        whole(Constant<4>{});
        continue;
      }
      if (count - at >= L && columns == 12) {
        whole(Constant<3>{});
        continue;
      }
      for (int i = 0; i < L; ++i)
        square[i] = i < columns ? P::load_along(rows + i * w.output, count - at) : _mm512_setzero_si512();
      transpose(square);
      for (int64_t i = 0; i < std::min<int64_t>(L, count - at); ++i) f(at + i, square[i]);
    }
  }

  // The same where the numbers are neighbours along the columns, the inner dimension or the taps.
  void vectors(const Target& out, int64_t n, int64_t columns, int64_t k0, int64_t k1) const {
    if constexpr (std::is_same<P, Fma<float>>::value) {
      if (w.output != 1 && w.input == 1) {
        for (int64_t t = 0; t < taps; ++t)
          squares(from(n, k0, t), columns, k1 - k0, [&](int64_t i, __m512i v) { out.store(t, k0 + i, v); });
        return;
      }
      if (w.output != 1 && w.input == taps) {  // the taps of an input after those of the one before
        const float* first = from(n, k0, w.tap > 0 ? 0 : taps - 1);
        int64_t t = 0, k = k0;
        return squares(first, columns, (k1 - k0) * taps, [&](int64_t, __m512i v) {
          out.store(w.tap > 0 ? t : taps - 1 - t, k, v);
          if (++t == taps) t = 0, ++k;
        });
      }
    }
    if (w.output == 1) {
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t k = k0; k < k1; ++k) {
          const A* first = from(n, k, t);
          out.store(t, k, P::load_neighbours(first, second(first, k), columns));
        }
    } else if (w.input == 1) {
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t k = k0; k < k1; k += L) {
          __m512i square[L];
          const int64_t left = K - k * P::kDepth;
          for (int i = 0; i < L; ++i) {
            square[i] = i < columns ? P::load_along(from(n + i, k, t), left) : _mm512_setzero_si512();
            if (i < columns) ahead(from(n + i, k, t));
          }
          transpose(square);
          for (int64_t i = 0; i < std::min<int64_t>(L, k1 - k); ++i) out.store(t, k + i, square[i]);
        }
    } else {
      for (int64_t k = k0; k < k1; ++k)
        for (int64_t t = 0; t < taps; t += L) {
          const int64_t count = std::min<int64_t>(L, taps - t), lowest = w.tap > 0 ? t : t + count - 1;
          __m512i square[L];
          for (int i = 0; i < L; ++i) {
            const A* first = from(n + i, k, lowest);
            square[i] = i < columns ? P::load_neighbours(first, second(first, k), count) : _mm512_setzero_si512();
            if (i < columns) ahead(first);
          }
          transpose(square);
          for (int64_t i = 0; i < count; ++i) out.store(w.tap > 0 ? t + i : t + count - 1 - i, k, square[i]);
        }
    }
  }
#endif
};

constexpr int kPackedSteps = 128;  // at a time: of few columns, so that few streams of memory are read at once
constexpr int kPackedUnit = 16;    // steps that one task packs

// Packs [K, N] from w, whose element (k, n) is w[k * k_stride + n * n_stride]. The column blocks are those of `parts`
// tasks side by side.
template <class P>
struct RightPacking {
  using A = typename P::A;
  using Operand = typename P::Operand;
  const A* w;
  int64_t K, N, k_stride, n_stride;
  int parts;

  // A task's share of the inner dimension, for all columns.
  void share(Operand* packed, int task, int tasks) const {
    some(packed, part(depth_steps<P>(K), kPackedUnit, tasks, task), {0, parts});
  }
  // All of the inner dimension, for one part of the columns.
  void columns(Operand* packed, int i) const { some(packed, {0, depth_steps<P>(K)}, {i, i + 1}); }

 private:
  void some(Operand* packed, Range steps, Range of_parts) const {
    const Packing<P> packing = {{w, n_stride, k_stride, 0}, K, N, 1, depth_steps<P>(K), packed};
    for (int64_t k = steps.begin; k < steps.end; k += kPackedSteps)
      for (int64_t i = of_parts.begin; i < of_parts.end; ++i) {
        const Range range = part(N, kLanes<A>, parts, int(i));
        for_column_blocks<A>(range.begin, range.end, [&](int64_t n, auto vectors) {
          packing.block(n, decltype(vectors)::value * kLanes<A>, k, std::min(k + kPackedSteps, steps.end));
        });
      }
  }
};

// Packs [taps, K, N] in the column blocks of a product, or in blocks of so many columns each. `w` has the inner
// dimension as its `input`.
template <class P>
struct TapsPacking {
  using A = typename P::A;
  Taps<const A> w;
  int64_t K, N, taps;
  int64_t block = 0;

  // With the window turned round.
  static TapsPacking backwards(Taps<const A> w, int64_t K, int64_t N, int64_t taps) {
    w.data += (taps - 1) * w.tap;
    w.tap = -w.tap;
    return {w, K, N, taps};
  }
  // A task's share of the inner dimension.
  void share(typename P::Operand* packed, int task, int tasks) const {
    const Packing<P> packing = {w, K, N, taps, depth_steps<P>(K), packed};
    const Range range = part(packing.steps, kPackedUnit, tasks, task);
    for (int64_t k = range.begin; k < range.end; k += kPackedSteps) {
      const int64_t end = std::min<int64_t>(k + kPackedSteps, range.end);
      if (block > 0)
        for (int64_t n = 0; n < N; n += block) packing.block(n, block, k, end);
      else
        for_column_blocks<A>(
            0, N, [&](int64_t n, auto vectors) { packing.block(n, decltype(vectors)::value * kLanes<A>, k, end); });
    }
  }
};
