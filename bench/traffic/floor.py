"""The floor: what a training step moves when every kernel listed here reads its inputs and writes its outputs once.

One kernel a line below. Pointwise work is folded into them: GELU into the depthwise
convolution, the sum with the skip connection, LayerScale and drop-path into the last kernel of a branch, the sum of the
two gradients at the start of a branch into that norm's backward, a BatchNorm's sums into the kernel that writes what
they are of. Between kernels a tensor passes through memory: keeping one on chip from one line to the next (a whole MLP
in one kernel) would go below this floor. docs/traffic.md works out the sums.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

from stvit.checks import stoken_pair
from stvit.geometry import grid_size
from stvit.model import CONFIGS, STViT

OUTSIDE = "head and loss"


class Line(NamedTuple):
    """One kernel, forward and backward: elements an image that it reads or writes, that it saves, its weights.

    `saved` are elements kept for the backward that no other line keeps.
    """

    block: str
    category: str
    what: str
    forward: int
    backward: int
    saved: int = 0
    weights: int = 0

    def bytes(self, batch: int, width: int) -> tuple[int, int]:
        """Of the forward and the backward of a step with numbers of `width` bytes.

        Both read the weights, the backward writes their gradient.
        """
        return width * (batch * self.forward + self.weights), width * (batch * self.backward + 2 * self.weights)


def floor(name: str, size: int, **options: Any) -> list[Line]:
    """The lines of the model `name` ("stvit_small", ...) on images of size x size; `options` are STViT's."""
    defaults = {key: value.default for key, value in inspect.signature(STViT).parameters.items()}
    return list(_lines({**defaults, **CONFIGS[name], **options}, size))


def _lines(model: dict[str, Any], size: int) -> Iterator[Line]:
    dims = model["embed_dim"]
    channels, side = model["in_chans"], size
    stem = ((dims[0] // 2, 2), (dims[0] // 2, 1), (dims[0], 2), (dims[0], 1))
    for index, (width, stride) in enumerate(stem):
        yield _convolution("patch_embed", channels, width, side, stride, first=index == 0)
        channels, side = width, -(-side // stride)
        yield _norm("patch_embed", "GELU and BatchNorm", width * side**2, width, skip=False)
    for stage, (dim, depth) in enumerate(zip(dims, model["depths"], strict=True)):
        for index in range(depth):
            tile = stoken_pair(model["stoken_size"][stage])
            block = f"layers.{stage}.blocks.{index}"
            yield from _block(block, dim, side, tile, int(dim * model["mlp_ratio"]))
            if model["layerscale"][stage]:
                # Its gradient follows from that of the product before it, so nothing but the weights moves.
                yield Line(block, "pointwise", "LayerScale", 0, 0, 0, 2 * dim)
        if stage + 1 < len(dims):
            yield _convolution(f"layers.{stage}.downsample", dim, dims[stage + 1], side, 2)
            side = -(-side // 2)
            wider = dims[stage + 1]
            yield _norm(f"layers.{stage}.downsample", "BatchNorm", wider * side**2, wider, skip=False)
    wide, classes = model["projection"], model["num_classes"]
    yield _product(OUTSIDE, "projection", dims[-1], wide, side**2)
    x = wide * side**2  # forward writes, backward reads the gradient of, `wide` pooled features
    yield Line(OUTSIDE, "norms", "BatchNorm, SiLU, pooling", x + wide, 2 * x + wide, x, 2 * wide)
    yield _product(OUTSIDE, "head", wide, classes, 1)
    yield Line(OUTSIDE, "pointwise", "loss", classes, 2 * classes, classes)  # writes one number; reads logits twice


def _block(block: str, dim: int, side: int, tile: tuple[int, int], hidden: int) -> Iterator[Line]:
    pixels = side**2
    x, u = dim * pixels, hidden * pixels
    yield Line(block, "depthwise", "x + depthwise3x3(x)", 2 * x, 3 * x, x, 10 * dim)
    yield _norm(block, "LayerNorm", x, dim, skip=True)
    if tile == (1, 1):
        yield from _attention(block, dim, pixels, skip=True)
    else:
        gh, gw = grid_size(side, side, tile)
        tokens, association = dim * gh * gw, 9 * pixels
        both = x + association + tokens
        yield Line(block, "super token ops", "sampling", both, both, association)
        yield from _attention(block, dim, gh * gw, skip=False)
        yield Line(block, "super token ops", "upsampling", both + x, both)  # forward reads the skip connection too
    yield _norm(block, "BatchNorm", x, dim, skip=True)
    yield _product(block, "MLP, first product", dim, hidden, pixels)
    yield Line(block, "depthwise", "h + depthwise3x3(h), h = GELU(u)", 2 * u, 3 * u, u, 10 * hidden)
    yield _product(block, "MLP, second product", hidden, dim, pixels, skip=True)


def _norm(block: str, what: str, x: int, dim: int, *, skip: bool) -> Line:
    """Backward reads x and the gradient, writes one; the gradient that went past the branch is added on the way."""
    return Line(block, "norms", what, 2 * x, (4 if skip else 3) * x, x, 2 * dim)


def _product(block: str, what: str, inner: int, outer: int, pixels: int, *, skip: bool = False) -> Line:
    """1x1 convolution; `skip`: forward reads the skip connection and adds it."""
    x, y = inner * pixels, outer * pixels
    return Line(block, "1x1 products", what, x + (2 if skip else 1) * y, y + 2 * x, x, inner * outer + outer)


def _attention(block: str, dim: int, tokens: int, *, skip: bool) -> Iterator[Line]:
    x = dim * tokens
    yield _product(block, "q, k, v", dim, 3 * dim, tokens)
    # Backward reads q, k, v, the output and its gradient, and writes three gradients.
    yield Line(block, "attention", "attention", 4 * x, 8 * x, 3 * x)
    yield _product(block, "attention's projection", dim, dim, tokens, skip=skip)


def _convolution(block: str, inner: int, outer: int, side: int, stride: int, *, first: bool = False) -> Line:
    """3x3 convolution; the first one's input needs no gradient."""
    x, y = inner * side**2, outer * (-(-side // stride)) ** 2
    weights = 9 * inner * outer + outer
    what = f"3x3 convolution, {inner} to {outer}"
    return Line(block, "other convolutions", what, x + y, y + (1 if first else 2) * x, x, weights)
