// first_conv
#pragma once

#include "images.h"
#include "taps.h"
#include "tensors.h"

namespace dx::ops {

// Sizes of images x [N, C, *spatial] and of what a convolution makes of them; stride and padding have an entry for
// each spatial dimension.
inline Pooling convolution_geometry(const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding) {
  const int64_t dims = x.dim() - 2;
  check_entries(stride, dims, 1, "stride");
  check_entries(padding, dims, 0, "padding");
  Pooling g = {x.size(0), {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}};
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t at = 3 - dims + i;
    const int64_t size = x.size(i + 2), window = weight.size(i + 2);
    STD_TORCH_CHECK(stride[i] <= INT32_MAX, "densenet_ext: stride: expected at most ", INT32_MAX, ", got ", stride[i]);
    STD_TORCH_CHECK(padding[i] <= INT32_MAX && size <= INT32_MAX, "densenet_ext: padding: expected at most ", INT32_MAX,
                    ", as the sides of x, got ", padding[i], " beside shape ", shape_of(x));
    STD_TORCH_CHECK(window >= 1 && window <= size + 2 * padding[i],
                    "densenet_ext: conv_weight: expected windows of at least one pixel and at most the padded images, "
                    "got shape ",
                    shape_of(weight), " for x of shape ", shape_of(x));
    g.size[at] = size, g.window[at] = window, g.stride[at] = stride[i], g.padding[at] = padding[i];
    g.out[at] = (size + 2 * padding[i] - window) / stride[i] + 1;
  }
  // What a task holds of the images, in its own memory.
  int64_t numbers = g.size[2] + 2 * g.padding[2];
  const bool fits = !__builtin_mul_overflow(numbers, weight.numel(), &numbers) && numbers <= kMostPixels;
  STD_TORCH_CHECK(fits, "densenet_ext: padding: expected padded lines that fit the memory, got ", text_of(padding));
  return g;
}

// Images of any layout, and null where there are none.
template <class X, class D>
const X* images(const D& at, const Tensor& t, const char* name) {
  check_dtype<X>(at, t, name);
  if (t.numel() == 0) return nullptr;
  int64_t extent = 1;
  for (int64_t i = 0; i < t.dim(); ++i) {
    int64_t last = 0;
    const bool fits =
        !__builtin_mul_overflow(t.size(i) - 1, t.stride(i), &last) && !__builtin_add_overflow(extent, last, &extent);
    STD_TORCH_CHECK(fits, "densenet_ext: ", name, ": expected strides within memory, got shape ", shape_of(t));
  }
  return check_memory<X>(at, t, name, 1, extent, extent, false);
}

template <class W, class D>
Taps<const W> weight_of(const D& at, const Tensor& t, const char* name) {
  check_dtype<W>(at, t, name);
  const auto strides = tap_strides(t);
  STD_TORCH_CHECK(strides, "densenet_ext: ", name, ": expected contiguous or channels_last memory, got other of shape ",
                  shape_of(t));
  const W* data = check_memory<W>(at, t, name, 1, t.numel(), t.numel(), false);
  return {data, strides->output, strides->input, strides->tap};
}

template <class D>
void first_conv(const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias, const Ints& stride,
                const Ints& padding, const Tensor& out) {
  const D at(defined(x, "x"));
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 3 && dims <= 5 && x.size(1) > 0,
                  "densenet_ext: x: expected images [N, C, *spatial] of at least one channel, got shape ", shape_of(x));
  STD_TORCH_CHECK(defined(conv_weight, "conv_weight").dim() == dims && conv_weight.size(1) == x.size(1),
                  "densenet_ext: conv_weight: expected shape [O, ", x.size(1), ", *window] of ", dims,
                  " dimensions, got ", shape_of(conv_weight));
  STD_TORCH_CHECK(defined(out, "out").dim() == dims, "densenet_ext: out: expected ", dims,
                  " dimensions, as x has, got shape ", shape_of(out));
  const Pooling g = convolution_geometry(x, conv_weight, stride, padding);
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t expected = i == 0 ? g.batch : i == 1 ? conv_weight.size(0) : g.out[i + 3 - dims];
    STD_TORCH_CHECK(out.size(i) == expected, "densenet_ext: out: expected size ", expected, " in dimension ", i,
                    ", got shape ", shape_of(out));
  }
  for_type_of(out, "out", [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    FirstConv<T> p = {};
    p.C = x.size(1), p.N = conv_weight.size(0), p.geometry = g;
    if (x.scalar_type() == Storage<T>::type)
      p.x = images<T>(at, x, "x");
    else
      p.wide_x = images<A>(at, x, "x");
    p.strides = {x.stride(0), x.stride(1), {0, 0, 0}};
    for (int64_t i = 2; i < dims; ++i) p.strides.spatial[i + 3 - dims] = x.stride(i);
    if (conv_weight.scalar_type() == Storage<A>::type)
      p.wide_weight = weight_of<A>(at, conv_weight, "conv_weight");
    else
      p.weight = weight_of<T>(at, conv_weight, "conv_weight");
    p.bias = dense<A>(at, conv_bias, "conv_bias", p.N);
    p.out = features_out<T>(at, out, "out", g.out_rows(), p.N);
    at.check_apart();
    if (p.out && g.in_rows() > 0) at.first_conv(p, g.in_rows() * p.C + g.out_rows() * p.N);
  });
}

template <class D>
void implement_first_conv(torch::stable::detail::StableLibrary& m) {
  m.impl("first_conv", TORCH_BOX(&first_conv<D>));
}

}  // namespace dx::ops
