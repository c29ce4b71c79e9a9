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
