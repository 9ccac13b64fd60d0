// The panel that is normalised beside the products of the one before it.
#pragma once

// Fills a panel as fill_panel does while another one is multiplied, a vector in each step of the product: BatchNorm and
// ReLU then run beside the multiply-adds, which leave a processor's other units idle. With 48 output channels and dot
// products of bf16 this work would take a sixth of the time by itself. Of the panel behind it, `behind` rows further
// on, the same vectors are asked for on the way. Levels of 16 registers have none left for this: there steps ask for
// the panel's memory, and finish() fills it. Where there are several times as many steps as vectors, every so many
// steps fill one: a core asks for so many lines at a time and no more, and loads wait behind what is asked for in a
// burst.
//
// A step has three pointers that move on and a number that counts down, as a product leaves no more integer registers:
// what does not fit them a compiler keeps in vectors, and fetches it with the units that multiply.
template <class P, class T>
class PanelAhead {
  using A = typename P::A;
  static constexpr int64_t L = kLanes<A>;
  static constexpr bool kFills = kRegisters >= 32;

 public:
  PanelAhead(int64_t rows, int64_t C, const NormalisedRows<T>& source, const AlongColumns<P>& target, int64_t behind,
             int64_t every)
      : x_(source.x.data),
        to_(target.data),
        norm_(source.norm.vectors),
        source_(source),
        target_(target),
        C_(C),
        rows_(rows),
        vectors_((C + L - 1) / L),
        behind_(behind * source.x.pitch),
        every_(every),
        wait_(every),
        reads_(kFills ? ReadAhead() : ReadAhead(source.x, 0, rows, C)) {
    left_ = rows_ > 0 ? vectors_ : 0;
  }
  DX_INLINE void step() {
    if (!kFills)
      reads_.line();
    else if (--wait_ == 0) {
      wait_ = every_;
      if (__builtin_expect(left_ > 1, 1))
        next_vector();
      else if (left_ > 0)
        last_vector();
    }
  }
  // Does what there was no step for.
  DX_INLINE void finish() {
    while (rows_ > 0 && (left_ < vectors_ || rows_ % kRowGroup != 0)) left_ > 1 ? next_vector() : last_vector();
    fill_rows<A>(0, rows_, rows_, C_, NormalisedRows<T>{{x_, source_.x.pitch}, source_.norm},
                 AlongColumns<P>{to_, target_.pitch});
  }

 private:
  DX_INLINE void next_vector() {
    put(Whole{});
    x_ += L, to_ += L / P::kDepth, norm_ += 3 * L, --left_;
  }
  // Of a row, which may end in it; the next vector is the next row's first one.
  DX_INLINE void last_vector() {
    const int64_t before = C_ - 1 - (C_ - 1) % L;
    put(Part{int(C_ - before)});
    prefetch<2>(x_ + (C_ - before - 1), behind_);
    x_ += source_.x.pitch - before, to_ += target_.pitch - before / P::kDepth, norm_ = source_.norm.vectors;
    left_ = --rows_ > 0 ? vectors_ : 0;
  }
  template <class Columns>
  DX_INLINE void put(Columns columns) const {
    P::store_along_columns(to_, 0, relu<A>(typename Affine<A>::Columns(norm_)(columns.load(x_))));
    prefetch<2>(x_, behind_);
  }

  const T* x_;               // the next vector
  typename P::Operand* to_;  // where it goes
  const A* norm_;            // of its columns
  int64_t left_;             // vectors of the row, or 0 behind the last one
  NormalisedRows<T> source_;
  AlongColumns<P> target_;
  int64_t C_, rows_, vectors_, behind_, every_, wait_;
  ReadAhead reads_;
};
