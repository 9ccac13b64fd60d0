// Dropout's factors, a vector of columns at a time: they are computed where they are needed, and never stored.
#pragma once

template <class A>
class DropFactors {
 public:
  DropFactors(double rate, const int64_t* seed, int64_t layer, int64_t rows)
      : dropout_(make_dropout(seed ? *seed : 0, layer, rate)), rows_(rows), any_(rate > 0) {}
  DX_INLINE explicit operator bool() const { return any_; }

  class Row {
   public:
    // The factors of the columns from c on.
    DX_INLINE Vec<A> at(int64_t c) const {
      if constexpr (std::is_same<A, float>::value) {
        // common.h's dropout_factor, with a column in each lane
        const U32 hash = mix(key_ + kGolden * (columns() + uint32_t(c + 1)));
        return hash >= dropout_.threshold ? broadcast(A(dropout_.scale)) : Vec<A>{};
      } else {
        alignas(64) A factors[kLanes<A>];
        for (int i = 0; i < kLanes<A>; ++i) factors[i] = dropout_factor<A>(dropout_, key_, c + i);
        return load_vec(factors);
      }
    }

   private:
    friend class DropFactors;
    DX_INLINE Row(const Dropout& dropout, uint32_t key) : dropout_(dropout), key_(key) {}
    static DX_INLINE U32 columns() {
      U32 v;
      for (int i = 0; i < kLanes<float>; ++i) v[i] = uint32_t(i);
      return v;
    }
    static DX_INLINE U32 mix(U32 h) {
      h ^= h >> 16;
      h *= 0x7feb352du;
      h ^= h >> 15;
      h *= 0x846ca68bu;
      return h ^ h >> 16;
    }
    Dropout dropout_;
    uint32_t key_;
  };
  DX_INLINE Row row(int64_t m) const {
    return {dropout_, any_ ? dropout_row_key(dropout_, rows_ == 1 ? m : m / rows_) : 0};
  }
  // The factors of a row's columns from c on.
  DX_INLINE Vec<A> at(int64_t m, int64_t c) const { return row(m).at(c); }

 private:
  Dropout dropout_;
  int64_t rows_;
  bool any_;
};
