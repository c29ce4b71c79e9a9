"""What `python -m bench.ops` times: ops, shapes, contenders, and the bytes that an op must move.

A further op is one entry of OPS or BLOCK_OPS: its name, what it takes and returns, how each family runs it, and its
floor. Bytes of a floor, after the table of the design: X are the bytes of x, A = 9/C X those of
the association's weights; tensors of super tokens (X/64 and X/16 at the published stages) are left out, so the floor
stays a lower bound.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

import stvit
from bench.baselines import official
from bench.baselines.attention import AuthorsStokenAttention
from bench.baselines.model import formulated
from stvit import functional, reference
from stvit.backends import dispatch
from stvit.geometry import Association, grid_size
from stvit.modules import StokenAttention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = {"detached": False, "association_grad": True}
PASSES = ("forward", "forward+backward")

# Stage: (channels, heads) of stages 1 and 2, whose tiles are 8 x 8 and 4 x 4; those of B and L are the same.
STAGES = {"S": ((64, 1), (128, 2)), "B": ((96, 2), (192, 3)), "L": ((96, 2), (192, 3))}
IMAGES = {"224": (224, 224), "384": (384, 384), "800x1344": (800, 1344)}


class Shape(NamedTuple):
    """Pixels (C, H, W), the tile of a super token, heads of the refinement; batch where the shape fixes one."""

    name: str
    channels: int
    height: int
    width: int
    tile: tuple[int, int]
    heads: int
    batch: int | None = None


def published_shapes() -> list[Shape]:
    """Stages 1 and 2 of S and B (L has B's) at every image size, named like S/1/224."""
    return [parse_shape(f"{model}/{stage}/{image}") for image in IMAGES for model in "SB" for stage in (1, 2)]


def parse_shape(text: str) -> Shape:
    """S/1/224 (model, stage, image) or 2x64x56x56/8x8 (B, C, H, W and the tile). ValueError for anything else."""
    published = re.fullmatch(r"([SBL])/([12])/(\w+)", text)
    if published and published[3] in IMAGES:
        stage = int(published[2])
        channels, heads = STAGES[published[1]][stage - 1]
        height, width = (side // (2 << stage) for side in IMAGES[published[3]])
        tile = 8 // stage
        return Shape(text.replace("L", "B"), channels, height, width, (tile, tile), heads)
    explicit = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)/(\d+)x(\d+)", text)
    if explicit and all(int(n) > 0 for n in explicit.groups()):
        batch, channels, height, width, h, w = map(int, explicit.groups())
        heads = channels // 64 if channels % 64 == 0 else 1
        return Shape(text, channels, height, width, (h, w), heads, batch)
    images = ", ".join(IMAGES)
    raise ValueError(f"expected S/1/224 and the like (images {images}) or BxCxHxW/hxw as 2x64x56x56/8x8, got {text!r}")


class Problem(NamedTuple):
    """One setting of an op: everything its numbers depend on but the contender and the pass."""

    shape: Shape
    batch: int
    dtype: torch.dtype
    device: torch.device
    association_grad: bool = False

    def bytes(self, name: str) -> int:
        """Of the tensor called `name`. The association's weights have 9/C of those of x."""
        return self.dtype.itemsize * torch.Size(self.sizes(name)).numel()

    def sizes(self, name: str) -> tuple[int, int, int, int]:
        """The shape of the tensor called `name`: x and y are pixels, hidden those in the middle of the MLP."""
        shape = self.shape
        if name == "hidden":
            return (self.batch, 4 * shape.channels, shape.height, shape.width)
        if name == "stokens":
            return (self.batch, shape.channels, *grid_size(shape.height, shape.width, shape.tile))
        return (self.batch, 9 if name == "weights" else shape.channels, shape.height, shape.width)


class Contender(NamedTuple):
    """A family of code and how it is run."""

    name: str
    family: str
    compiled: bool = False

    @property
    def baseline(self) -> bool:
        return self.family in ("authors", "reference")


# In the order in which they run: compiling takes tens of seconds.
CONTENDERS = [
    Contender("triton", "triton"),
    Contender("cuda", "cuda"),
    Contender("authors", "authors"),
    Contender("reference", "reference"),
    Contender("authors compiled", "authors", compiled=True),
    Contender("reference compiled", "reference", compiled=True),
]


def interpreted(contender: Contender, device: torch.device) -> bool:
    """Whether its kernels run in Triton's interpreter, or emulated on the CPU: that speed means nothing."""
    if contender.family == "triton" and dispatch.interpreting():
        return True
    return contender.family in ("triton", "cuda") and device.type == "cpu"


class Implementation(NamedTuple):
    """`run` maps the op's inputs to a tuple of its outputs; parameters are differentiated beside the inputs."""

    run: Callable[..., tuple[Tensor, ...]]
    parameters: dict[str, nn.Parameter] = {}


@dataclass(frozen=True)
class Op:
    """An op to time. Tensors go by name: x, y (pixels), stokens, weights; see Problem.sizes."""

    name: str
    inputs: Callable[[Problem], dict[str, bool]]  # name -> whether it is differentiated
    outputs: tuple[str, ...]
    implement: Callable[[Problem, str, ModuleType | None], Implementation]  # problem, family, the authors' module
    floor: Callable[[Problem], tuple[int, int]]  # bytes of the forward and of the backward
    split: bool = False  # a part of what the authors' code does in one go
    associates: bool = True  # whether the gradient modes differ; they don't in the rest of the block
    mixes_images: bool = False  # as BatchNorm's statistics do

    def why_not(self, contender: Contender, problem: Problem, authors: ModuleType | None) -> list[str]:
        """The reasons why the contender can't run this; an empty list means that it can. Builds the extension."""
        of_block = not self.associates
        if contender.family == "cuda" and of_block:
            return ["the extension holds super token sampling and upsampling alone, the rest runs on Triton"]
        if contender.family == "authors":
            reasons = []
            if of_block and authors is not None:
                reasons.append("PyTorch's own operators stand for the authors' code here; leave --official out")
            if problem.association_grad:
                reasons.append("the authors' formulation has no gradient through the association")
            if self.split and authors is not None:
                reasons.append("the authors' code has sampling and upsampling in one function")
            return reasons
        reasons = dispatch.prepare(contender.family, problem.device, problem.dtype)
        if dispatch.interpreting() and contender.family == "triton" and problem.dtype == torch.bfloat16:
            reasons.append("Triton's interpreter computes bfloat16 wrongly")
        return reasons


def in_layout(name: str, tensor: Tensor, problem: Problem, family: str) -> Tensor:
    """The tensor as the family keeps it: ours channels_last, the authors' in NCHW with weights (B, T, P, 9)."""
    if family == "authors":
        tiled = reference.pixels_by_tile(tensor, problem.shape.tile) if name == "weights" else tensor
        return tiled.contiguous()
    return tensor.contiguous(memory_format=torch.channels_last)


def out_of_layout(name: str, tensor: Tensor, problem: Problem, family: str) -> Tensor:
    """The (B, C, H, W) tensor of what `in_layout` gives."""
    if family == "authors" and name == "weights":
        return reference.pixels_from_tiles(tensor, problem.shape.tile, (problem.shape.height, problem.shape.width))
    return tensor


def _authors_core(problem: Problem) -> AuthorsStokenAttention:
    return AuthorsStokenAttention(problem.shape.tile).to(problem.device, problem.dtype)


def _sampling(problem: Problem, family: str, authors: ModuleType | None) -> Implementation:
    tile = problem.shape.tile
    if family == "authors":
        return Implementation(_authors_core(problem).sampling)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        stokens, association = stvit.super_token_sampling(
            x, tile, association_grad=problem.association_grad, backend=family
        )
        return stokens, association.weights

    return Implementation(run)


def _upsampling(problem: Problem, family: str, authors: ModuleType | None) -> Implementation:
    shape = problem.shape
    if family == "authors":
        core, size = _authors_core(problem), (shape.height, shape.width)
        return Implementation(lambda stokens, weights: (core.upsampling(stokens, weights, size),))

    sizes = problem.sizes("stokens")
    mass = torch.ones((sizes[0], 1, *sizes[2:]), device=problem.device)  # upsampling looks at its shape alone

    def run(stokens: Tensor, weights: Tensor) -> tuple[Tensor]:
        association = Association(weights, mass, shape.tile, True)
        return (stvit.token_upsampling(stokens, association, backend=family),)

    return Implementation(run)


def _core(problem: Problem, family: str, authors: ModuleType | None) -> Implementation:
    shape = problem.shape
    if family == "authors":
        theirs = official.super_token_attention(authors, shape.channels, shape.tile, None) if authors else None
        core = theirs.to(problem.device, problem.dtype) if theirs else _authors_core(problem)
        return Implementation(lambda x: (core(x),))

    def run(x: Tensor) -> tuple[Tensor]:
        stokens, association = stvit.super_token_sampling(
            x, shape.tile, association_grad=problem.association_grad, backend=family
        )
        return (stvit.token_upsampling(stokens, association, backend=family),)

    return Implementation(run)


def _attention(problem: Problem, family: str, authors: ModuleType | None) -> Implementation:
    shape = problem.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # every family gets the same weights
        ours = StokenAttention(
            shape.channels, shape.tile, num_heads=shape.heads, qkv_bias=True,
            association_grad=problem.association_grad, backend="reference" if family == "authors" else family,
        )  # fmt: skip
    module: nn.Module = ours
    if family == "authors" and authors:
        module = official.super_token_attention(authors, shape.channels, shape.tile, shape.heads)
        module.load_state_dict(ours.state_dict())
    elif family == "authors":
        module = formulated(ours)
    module = module.to(problem.device, problem.dtype)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return Implementation(lambda x: (module(x),), parameters)


def _floor_of_sampling(problem: Problem) -> tuple[int, int]:
    """Forward X + A: x read once, the weights written. Backward detached X + A: weights read, dx written.

    Backward through the association 2X + 2A: dx = A D^-1 dS + scale * dlogit S0 + pooling's part. dlogit takes
    <x_p, dS[n]>, hence x is read once more (X), beside the weights (A) and, from upsampling, the gradient of the
    weights (A); dx is written (X). The sums dS0 reach one tile further than dx; a kernel that walks down the tiles and
    keeps dlogit of the last rows on chip needs no second read of x for them.
    """
    x, weights = problem.bytes("x"), problem.bytes("weights")
    return x + weights, 2 * x + 2 * weights if problem.association_grad else x + weights


def _floor_of_upsampling(problem: Problem) -> tuple[int, int]:
    """Forward A + X: weights read, y written. Backward detached A + X: weights and dy read.

    Backward through the association X + 2A: dA[p, k] = <dy_p, S'[n]> is written too (A); S' counts as nothing.
    """
    x, weights = problem.bytes("x"), problem.bytes("weights")
    return weights + x, x + 2 * weights if problem.association_grad else weights + x


def _floor_of_both(problem: Problem) -> tuple[int, int]:
    """The sums: detached 2X + 2A each way; through the association 3X + 4A backward. Refinement adds only tokens."""
    sampling, upsampling = _floor_of_sampling(problem), _floor_of_upsampling(problem)
    return sampling[0] + upsampling[0], sampling[1] + upsampling[1]


def _of_x(problem: Problem) -> dict[str, bool]:
    return {"x": True}


# In the order of importance.
OPS = [
    Op("core", _of_x, ("y",), _core, _floor_of_both),
    Op("attention", _of_x, ("y",), _attention, _floor_of_both),
    Op("sampling", _of_x, ("stokens", "weights"), _sampling, _floor_of_sampling, split=True),
    Op(
        "upsampling",
        lambda problem: {"stokens": True, "weights": problem.association_grad},
        ("y",), _upsampling, _floor_of_upsampling, split=True,
    ),
]  # fmt: skip


# The rest of the block. The authors' formulation of each is PyTorch's own operators, the reference's, run in NCHW as
# they train. Pixels called `hidden` are those in the middle of the MLP, four times as wide.


def _op(
    name: str, call: Callable[..., Tensor], pixels: tuple[str, ...], shapes: dict[str, tuple[int, ...]],
    forward: int, backward: int, output: str = "y", mixes_images: bool = False,
) -> Op:  # fmt: skip
    """call(backend, *pixels, *parameters): one output. shapes: parameter -> its shape, the channels written as -1, four
    times as many as -4. forward, backward: how many times the bytes of the pixels have to move."""

    def implement(problem: Problem, family: str, authors: ModuleType | None) -> Implementation:
        generator = torch.Generator().manual_seed(0)  # every family gets the same parameters
        channels = problem.sizes(pixels[0])[1]
        parameters = {}
        for parameter, shape in shapes.items():
            values = 0.3 * torch.randn([-n * channels if n < 0 else n for n in shape], generator=generator)
            parameters[parameter] = nn.Parameter(values.to(problem.device, problem.dtype))
        backend = "reference" if family == "authors" else family
        return Implementation(lambda *given: (call(backend, *given, *parameters.values()),), parameters)

    def floor(problem: Problem) -> tuple[int, int]:
        moved = problem.bytes(pixels[0])
        return forward * moved, backward * moved

    wanted = dict.fromkeys(pixels, True)
    return Op(name, lambda _: wanted, (output,), implement, floor, associates=False, mixes_images=mixes_images)


def _branch(backend: str, x: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
    keep = x.new_full((x.shape[0],), 1.25)  # drop-path 0.2
    return functional.residual_branch(x, y, gamma, keep, backend)


def _depthwise(gelu: bool) -> Callable[..., Tensor]:
    return lambda backend, x, weight, bias: functional.residual_depthwise(x, weight, bias, gelu, backend)


def _norm(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.channel_layer_norm(x, weight, bias, 1e-6, backend)


def _batch_norm(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    running = bias.detach(), weight.detach()  # which momentum 0 leaves as they are
    return functional.batch_norm_and_skip(x, weight, bias, *running, 0.0, 1e-5, backend)[0]


def _mlp_start(backend: str, x: Tensor, weight: Tensor, bias: Tensor, *others: Tensor) -> Tensor:
    """The norm folded into the MLP's first convolution, and the GELU depthwise op, which adds the rest of its bias."""
    conv, conv_bias, filters, filter_bias = others
    given = (x, weight, bias, bias.detach(), weight.detach(), 0.0, 1e-5, backend)
    y, rest, _ = functional.batch_norm_conv_and_skip(*given, conv=(conv, conv_bias))
    return functional.residual_depthwise(y, filters, filter_bias, True, backend, x_bias=rest)


FILTER, VECTOR = (-1, 1, 3, 3), (-1,)
MLP_START: dict[str, tuple[int, ...]] = {
    "weight": VECTOR, "bias": VECTOR, "conv": (-4, -1, 1, 1), "conv_bias": (-4,), "filters": (-4, 1, 3, 3),
    "filter_bias": (-4,),
}  # fmt: skip
BLOCK_OPS: list[Op] = [
    # Forward: x read, y written. Backward: x and dy read, dx written.
    _op("gelu_depthwise", _depthwise(True), ("hidden",), {"weight": FILTER, "bias": VECTOR}, 2, 3, "hidden"),
    _op("residual_depthwise", _depthwise(False), ("x",), {"weight": FILTER, "bias": VECTOR}, 2, 3),
    _op("channel_layer_norm", _norm, ("x",), {"weight": VECTOR, "bias": VECTOR}, 2, 3),
    # Forward: x read for the statistics and again, y written. Backward: x and dy read twice, dx written.
    _op("batch_norm", _batch_norm, ("x",), {"weight": VECTOR, "bias": VECTOR}, 3, 5, mixes_images=True),
    # Forward: statistics 1, product 5, depthwise 8. Backward: depthwise 12, both gradients of the product 10, norm 3.
    _op("batch_norm_conv", _mlp_start, ("x",), MLP_START, 14, 25, "hidden", mixes_images=True),
    # Forward: x and y read, the sum written. Backward: dout and y (for LayerScale) read, dy written.
    _op("residual_branch", _branch, ("x", "y"), {"gamma": VECTOR}, 3, 3),
]
