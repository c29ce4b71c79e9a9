"""The rest of the block among what `python -m bench.ops` times: residual depthwise, LayerNorm, the end of a branch.

The authors' formulation of each is PyTorch's own operators, the reference's, run in NCHW as they train. Pixels called
`hidden` are those in the middle of the MLP, four times as wide. Floors: X are the bytes of the op's pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from bench.ops.cases import Contender, Implementation, Op, Problem
from stvit import functional, reference


class BlockOp(Op):
    """An op that the extension doesn't hold, whose baseline is PyTorch's own operators, with and without a checkout of
    the authors' code."""

    def why_not(self, contender: Contender, problem: Problem, authors: ModuleType | None) -> list[str]:
        if contender.family == "authors" and authors is not None:
            return ["PyTorch's own operators stand for the authors' code here; leave --official out"]
        if contender.family == "cuda":
            return ["the extension holds super token sampling and upsampling alone, the rest runs on Triton"]
        return super().why_not(contender, problem, authors)


def _parameters(problem: Problem, **shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    """The same random parameters for every family; float32 beside autocast, else the problem's dtype."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if problem.autocast else problem.dtype
    return {
        name: nn.Parameter((0.3 * torch.randn(shape, generator=generator)).to(problem.device, dtype))
        for name, shape in shapes.items()
    }


def _depthwise(problem: Problem, name: str, gelu: bool, family: str) -> Implementation:
    channels = problem.sizes(name)[1]
    parameters = _parameters(problem, weight=(channels, 1, 3, 3), bias=(channels,))

    def run(x: Tensor) -> tuple[Tensor]:
        if family == "authors":
            return (reference.residual_depthwise(x, parameters["weight"], parameters["bias"], gelu),)
        return (functional.residual_depthwise(x, parameters["weight"], parameters["bias"], gelu, family),)

    return Implementation(run, parameters)


def _layer_norm(problem: Problem, family: str, authors: ModuleType | None) -> Implementation:
    parameters = _parameters(problem, weight=(problem.shape.channels,), bias=(problem.shape.channels,))

    def run(x: Tensor) -> tuple[Tensor]:
        if family == "authors":
            return (reference.channel_layer_norm(x, parameters["weight"], parameters["bias"], 1e-6),)
        return (functional.channel_layer_norm(x, parameters["weight"], parameters["bias"], 1e-6, family),)

    return Implementation(run, parameters)


def _branch(problem: Problem, family: str, authors: ModuleType | None) -> Implementation:
    parameters = _parameters(problem, gamma=(problem.shape.channels,))
    keep = torch.full((problem.batch,), 1.25, device=problem.device, dtype=problem.dtype)  # drop-path 0.2

    def run(x: Tensor, y: Tensor) -> tuple[Tensor]:
        if family == "authors":
            return (reference.residual_branch(x, y, parameters["gamma"], keep),)
        return (functional.residual_branch(x, y, parameters["gamma"], keep, family),)

    return Implementation(run, parameters)


def _floor(name: str, forward: int, backward: int) -> Callable[[Problem], tuple[int, int]]:
    """So many times the bytes of the pixels called `name`."""

    def floor(problem: Problem) -> tuple[int, int]:
        bytes_ = problem.dtype.itemsize * torch.Size(problem.sizes(name)).numel()
        return forward * bytes_, backward * bytes_

    return floor


BLOCK_OPS: list[Op] = [
    # Forward: x read, y written. Backward: x and dy read, dx written.
    BlockOp(
        "gelu_depthwise", lambda _: {"hidden": True}, ("hidden",),
        lambda problem, family, _: _depthwise(problem, "hidden", True, family),
        _floor("hidden", 2, 3), associates=False,
    ),
    BlockOp(
        "residual_depthwise", lambda _: {"x": True}, ("y",),
        lambda problem, family, _: _depthwise(problem, "x", False, family),
        _floor("x", 2, 3), associates=False,
    ),
    BlockOp("channel_layer_norm", lambda _: {"x": True}, ("y",), _layer_norm, _floor("x", 2, 3), associates=False),
    # Forward: x and y read, the sum written. Backward: dout and y (for LayerScale) read, dy written.
    BlockOp("residual_branch", lambda _: {"x": True, "y": True}, ("y",), _branch, _floor("x", 3, 3), associates=False),
]  # fmt: skip
