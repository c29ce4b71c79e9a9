"""How a call reaches a kernel. Importing this package registers the ops."""

from . import (  # noqa: F401
    batch_norm,
    batch_norm_conv,
    channel_layer_norm,
    residual_branch,
    residual_depthwise,
    sampling,
    upsampling,
)
