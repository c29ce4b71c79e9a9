"""How a call reaches a kernel. Importing this package registers the ops."""

from . import batch_norm, channel_layer_norm, residual_branch, residual_depthwise, sampling, upsampling  # noqa: F401
