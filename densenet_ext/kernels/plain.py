"""The compiled operations once more, in plain PyTorch: for devices without compiled kernels, and to test those that
are."""

from densenet_ext.kernels.plain_conv3x3 import bn_relu_conv3x3, bn_relu_conv3x3_backward
from densenet_ext.kernels.plain_pool import (
    bn_relu_avg_pool,
    bn_relu_avg_pool_backward,
    bn_relu_avg_pool_backward_reduce,
    bn_relu_max_pool,
    bn_relu_max_pool_backward,
    bn_relu_max_pool_backward_reduce,
)
from densenet_ext.kernels.plain_rows import (
    acc_dtype,
    append_features,
    bn_relu,
    bn_relu_backward,
    bn_relu_backward_reduce,
    bn_relu_conv1x1,
    bn_relu_conv1x1_backward,
    cat_bn_relu,
    channel_stats,
    dropout_factor,
    feature_grad,
    rstd_scale,
)

__all__ = [
    "acc_dtype",
    "append_features",
    "bn_relu",
    "bn_relu_avg_pool",
    "bn_relu_avg_pool_backward",
    "bn_relu_avg_pool_backward_reduce",
    "bn_relu_backward",
    "bn_relu_backward_reduce",
    "bn_relu_conv1x1",
    "bn_relu_conv1x1_backward",
    "bn_relu_conv3x3",
    "bn_relu_conv3x3_backward",
    "bn_relu_max_pool",
    "bn_relu_max_pool_backward",
    "bn_relu_max_pool_backward_reduce",
    "cat_bn_relu",
    "channel_stats",
    "dropout_factor",
    "feature_grad",
    "rstd_scale",
]
