// Dropout's factors where rows and columns come in tiles.
#pragma once

template <class A>
class DropFactors {
 public:
  DropFactors(double rate, const int64_t* seed, int64_t layer, int64_t rows)
      : dropout_(make_dropout(seed ? *seed : 0, layer, rate)), rows_(rows), any_(rate > 0) {}
  DX_INLINE explicit operator bool() const { return any_; }
  // The factors of a row's columns from c on.
  DX_INLINE Vec<A> at(int64_t row, int64_t c) const {
    const uint32_t key = dropout_row_key(dropout_, rows_ == 1 ? row : row / rows_);
    alignas(64) A factors[kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i) factors[i] = dropout_factor<A>(dropout_, key, c + i);
    return load_vec(factors);
  }

 private:
  Dropout dropout_;
  int64_t rows_;
  bool any_;
};
