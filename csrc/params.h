// What the kernels of every backend take: raw pointers, sizes, pitches in elements; no torch.
//
// Words: rows are pixels of the whole batch, M of them; columns are channels, contiguous; a pitch is the distance of
// two rows in elements. T is the storage type of feature maps, Acc<T> that of everything per channel. The structs carry
// the names of the operators (module.cpp has the schemas); what each computes stands at its kernel.
#pragma once

#include <cstdint>

#include "common.h"

namespace dx {

template <class T>
struct Rows {
  T* data;
  int64_t pitch;
  DX_HOST_DEVICE T* row(int64_t m) const { return data + m * pitch; }
  DX_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

// One BatchNorm as values. weight and bias may be null (affine=False).
template <class A>
struct Norm {
  const A* mean;    // [C]
  const A* var;     // [C], biased
  const A* weight;  // [C] or null
  const A* bias;    // [C] or null
  double eps;
};

// Geometry of a pooling, or of a convolution. Size and window have three spatial entries; 1-D and 2-D have ones in
// front.
struct Pooling {
  int64_t batch;
  int64_t size[3];  // input  D, H, W
  int64_t out[3];   // output D, H, W
  int64_t window[3];
  int64_t stride[3];
  int64_t padding[3];
  DX_HOST_DEVICE int64_t in_rows() const { return batch * size[0] * size[1] * size[2]; }
  DX_HOST_DEVICE int64_t out_rows() const { return batch * out[0] * out[1] * out[2]; }
};

// Images as rows. 1-D and 2-D have ones in front.
struct Images {
  int64_t batch;
  int64_t size[3];  // D, H, W
  DX_HOST_DEVICE int64_t pixels() const { return size[0] * size[1] * size[2]; }
  DX_HOST_DEVICE int64_t rows() const { return batch * pixels(); }
};

// Images of any layout; strides in elements, those of a dimension that is not there are not read.
struct ImageStrides {
  int64_t image, channel, spatial[3];  // D, H, W
};

// A convolution's weight or its gradient as PyTorch has it, contiguous or channels_last; strides in elements. Element
// (n, c, t) lies at n * output + c * input + t * tap; t counts the window's D, H, W positions, W fastest.
template <class A>
struct Taps {
  A* data;
  int64_t output, input, tap;
  DX_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

// A weight, or its gradient, copied into another layout and type.
template <class From, class To>
struct TapsCopy {
  int64_t N, C, taps;
  Taps<const From> from;
  Taps<To> to;
};

template <class T>
struct ChannelStats {
  int64_t M, C;
  Rows<const T> x;
  Acc<T>*mean, *var;  // [C]
};

template <class T>
struct AppendFeatures {
  int64_t M, C;
  Rows<const T> src;
  Rows<T> out;
  Acc<T>*mean, *var;  // [C] or null
  double drop_rate;
  const int64_t* seed;  // one number beside the data (a GPU's kernel reads it without the host), or null
  int64_t layer;
  int64_t drop_rows;  // so many rows after each other share their factors: 1, or the pixels of a sample
};

template <class T>
struct BnRelu {
  int64_t M, C;
  Rows<const T> x;
  Norm<Acc<T>> norm;
  Rows<T> out;
};

template <class T>
struct FeatureGrad {
  int64_t M, C;
  Rows<const T> grad, x;
  const Acc<T>*mean, *grad_mean, *grad_var;  // [C]
  double drop_rate;
  const int64_t* seed;  // one number beside the data (a GPU's kernel reads it without the host), or null
  int64_t layer;
  int64_t drop_rows;  // so many rows after each other share their factors: 1, or the pixels of a sample
  Rows<T> out;
};

template <class T>
struct BnReluBackwardReduce {
  int64_t M, C;
  Rows<const T> grad, x;
  Norm<Acc<T>> norm;
  Rows<T> out;                     // relu(bn(x)), recomputed on the way; or null
  Acc<T>*grad_weight, *grad_bias;  // [C]
};

template <class T>
struct BnReluBackward {
  int64_t M, C;
  Rows<const T> grad, x;
  Norm<Acc<T>> norm;
  const Acc<T>*grad_weight, *grad_bias;  // [C], or both null: the norm is frozen
  Rows<T> grad_x;
};

template <class T>
struct BnReluConv1x1 {
  int64_t M, C, N;  // N output channels
  Rows<const T> x;
  Norm<Acc<T>> norm;       // on a processor, mean null: x is normalised already
  const Acc<T>* weight;    // [N, C]
  const Acc<T>* out_bias;  // [N] or null
  bool out_relu;
  Rows<T> out;
  Acc<T>*out_mean, *out_var;  // [N] or null
  bool tf32;                  // float on a GPU: products of TF32 numbers are allowed
  bool bf16;                  // float on a processor: products of bf16 numbers are allowed
};

template <class T>
struct BnReluConv1x1Backward {
  int64_t M, C, N;
  Rows<const T> x;
  Norm<Acc<T>> norm;
  const Acc<T>* weight;  // [N, C]
  Rows<const T> grad_out;
  Rows<const T> z;  // or null: grad_out is the gradient of z itself
  Norm<Acc<T>> z_norm;
  const Acc<T>*z_grad_weight, *z_grad_bias;  // [N], or both null: norm2 is frozen
  Rows<const T> grad_in;                     // added to the result; null: nothing, or grad_x's old value
  bool accumulate;
  Rows<T> grad_x;
  Acc<T>* grad_conv_weight;        // [N, C] or null
  Acc<T>*grad_weight, *grad_bias;  // [C]
  Acc<T>*grad_mean, *grad_var;     // [C], subtracted from; both null: norm1 is frozen
  bool tf32;                       // float on a GPU: products of TF32 numbers are allowed
  bool bf16;                       // float on a processor: products of bf16 numbers are allowed
};

template <class T>
struct BnReluConv3x3 {
  int64_t C, N;  // N output channels
  Images images;
  int64_t window[3];  // 3 along the dimensions that the convolution has, 1 in front
  Rows<const T> x;
  Norm<Acc<T>> norm;  // mean null: x is normalised and rectified already
  Taps<const Acc<T>> weight;
  const Acc<T>* bias;  // [N] or null
  double drop_rate;
  const int64_t* seed;
  int64_t layer, drop_rows;  // as in AppendFeatures
  Rows<T> out;
  Acc<T>*out_mean, *out_var;  // [N] or null
  bool tf32;                  // float on a GPU: products of TF32 numbers are allowed
  bool bf16;                  // float on a processor: products of bf16 numbers are allowed
};

template <class T>
struct BnReluConv3x3Backward {
  int64_t C, N;
  Images images;
  int64_t window[3];
  Rows<const T> x;
  Norm<Acc<T>> norm;
  Taps<const Acc<T>> weight;
  Rows<const T> grad;
  // What grad is the gradient of, with what its statistics receive, as in FeatureGrad; or null: grad is complete.
  Rows<const T> features;
  const Acc<T>*features_mean, *features_grad_mean, *features_grad_var;  // [N]
  double drop_rate;
  const int64_t* seed;
  int64_t layer, drop_rows;  // as in AppendFeatures
  bool scaled;               // grad_x is x's gradient, to which is added; else that of relu(bn(x)), alone
  Rows<const T> grad_in;     // added to the result; null: nothing, or grad_x's old value
  bool accumulate;
  Rows<T> grad_x;                  // or null
  Taps<Acc<T>> grad_conv_weight;   // or null
  Acc<T>* grad_conv_bias;          // [N] or null
  Acc<T>*grad_weight, *grad_bias;  // [C], or both null
  Acc<T>*grad_mean, *grad_var;     // [C], subtracted from; or both null
  bool tf32;                       // float on a GPU: products of TF32 numbers are allowed
  bool bf16;                       // float on a processor: products of bf16 numbers are allowed
};

template <class T>
struct BnReluPool {
  int64_t C;
  Pooling pooling;
  Rows<const T> x;
  Norm<Acc<T>> norm;
  Rows<T> out;
  Rows<uint8_t> index;  // max pooling: position of the maximum in its window; or null
};

template <class T>
struct BnReluPoolBackwardReduce {
  int64_t C;
  Pooling pooling;
  Rows<const T> grad_out;
  Rows<const uint8_t> index;  // max pooling
  Rows<const T> x;
  Norm<Acc<T>> norm;
  Rows<T> pooled;  // average pooling, recomputed on the way; or null
  Acc<T>*grad_weight, *grad_bias;
};

template <class T>
struct BnReluPoolBackward {
  int64_t C;
  Pooling pooling;
  Rows<const T> grad_out;
  Rows<const uint8_t> index;
  Rows<const T> x;
  Norm<Acc<T>> norm;
  const Acc<T>*grad_weight, *grad_bias;
  Rows<T> grad_x;
};

template <class T>
struct FirstConv {
  int64_t C, N;  // N output channels
  Pooling geometry;
  // Images and weight in the type of the result, or in that of the sums: of each one is null.
  const T* x;
  const Acc<T>* wide_x;
  ImageStrides strides;
  Taps<const T> weight;
  Taps<const Acc<T>> wide_weight;
  const Acc<T>* bias;  // [N] or null
  Rows<T> out;
};

}  // namespace dx
