// The panel that is normalised beside the products of the one before it.
#pragma once

// Fills a panel as fill_panel does while another one is multiplied, a vector in each step of the product: BatchNorm and
// ReLU then run beside the multiply-adds, which leave a processor's other units idle. With 48 output channels and dot
// products of bf16 this work would take a sixth of the time by itself. Of the panel behind it, `behind` rows further
// on, the same vectors are asked for on the way. Levels of 16 registers have none left for this: there steps ask for
// the panel's memory, and finish() fills it.
template <class P, class T>
class PanelAhead {
  using A = typename P::A;
  static constexpr int64_t L = kLanes<A>;
  static constexpr bool kFills = kRegisters >= 32;

 public:
  PanelAhead(int64_t rows, int64_t C, const NormalisedRows<T>& source, const AlongColumns<P>& target, int64_t behind)
      : source_(source),
        target_(target),
        C_(C),
        rows_(rows),
        behind_(behind * source.x.pitch),
        reads_(kFills ? ReadAhead() : ReadAhead(source.x, 0, rows, C)) {}
  DX_INLINE void step() {
    if (!kFills)
      reads_.line();
    else if (rows_ > 0)
      next_vector();
  }
  // Does what there was no step for.
  DX_INLINE void finish() {
    while (c_ > 0 || rows_ % kRowGroup != 0) next_vector();
    fill_rows<A>(0, rows_, rows_, C_, source_, target_);
  }

 private:
  DX_INLINE void next_vector() {
    if (c_ + L <= C_)
      put(Whole{});
    else
      put(Part{int(C_ - c_)});
    prefetch<2>(source_.x.data + c_, behind_);
    c_ += L;
    if (c_ < C_) return;
    prefetch<2>(source_.x.data + c_ - 1, behind_);
    c_ = 0, source_.x.data += source_.x.pitch, target_.data += target_.pitch, --rows_;
  }
  template <class Columns>
  DX_INLINE void put(Columns columns) const {
    P::store_along_columns(target_.data, c_, source_.value(source_.at(c_), 0, c_, columns));
  }

  NormalisedRows<T> source_;  // from the next row on
  AlongColumns<P> target_;
  int64_t C_, rows_, behind_, c_ = 0;
  ReadAhead reads_;
};
