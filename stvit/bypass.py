"""When a module may use its submodules' parameters and not call them: where nobody would notice.

What a fused op computes for a submodule is the submodule's own answer only while it is of the class it was made as and
nobody listens to it or has put another forward in its place.
"""

from __future__ import annotations

import torch.fx
from torch import Tensor, nn

from .backends import dispatch


def silent(*passed_over: nn.Module) -> bool:
    """Whether nothing is lost when these modules' parameters are used and the modules themselves are not called.

    Hooks also stand for pruning, old-style spectral and weight norm, and adapters that put their own forward in place.
    """
    if nn.modules.module._has_any_global_hook():
        return False
    return not any(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or "forward" in part.__dict__
        for part in passed_over
    )


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a submodule is of this very class (a parametrization or an adapter is another) and `silent`.

    If so its parameters may be used without calling it; any other is called.
    """
    return type(module) is kind and silent(module)


def idle(drop: nn.Module) -> bool:
    """Whether this dropout passes its input on and nobody listens to it."""
    return plain(drop, nn.Dropout) and (not drop.training or bool(drop.p == 0.0))


def by_kernels(backend: str, x: Tensor) -> bool:
    """Whether the block's ops run on kernels for x, which add a bias where they read pixels anyway."""
    return not isinstance(x, torch.fx.Proxy) and dispatch.choose_for_block(backend, x) != "reference"


def bias_apart(conv: nn.Module) -> Tensor | None:
    """The bias of a 1x1 convolution that may be computed without it, or None.

    cuDNN adds a bias in a kernel of its own, which reads and writes the output once more, and sums its gradient in
    another.
    """
    return conv.bias if isinstance(conv, nn.Conv2d) and plain(conv, nn.Conv2d) else None


def norm_apart(norm: nn.Module, backend: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float, float] | None:
    """Weight, bias, running mean and variance, momentum and eps of a BatchNorm in training, for an op; the batch is
    counted. None where the module is to be called: another class, in evaluation, or not as PyTorch makes it."""
    if not (
        isinstance(norm, nn.BatchNorm2d) and plain(norm, nn.BatchNorm2d) and norm.training and by_kernels(backend, x)
    ):
        return None
    mean, variance, momentum = norm.running_mean, norm.running_var, norm.momentum
    usual = norm.affine and norm.track_running_stats
    if not usual or mean is None or variance is None or momentum is None:
        return None
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return norm.weight, norm.bias, mean, variance, momentum, norm.eps
