"""The block's ops as torch.compile sees them, and their kernels as compiled for GPUs that need not be there.

Run as a program, ``python tests/host/test_block_compile.py 90`` prints what each kernel takes on a GPU of compute
capability 9.0, as JSON lines.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from stvit import modules
from stvit.backends import registry
from stvit.model import STViT
from stvit.modules import SuperTokenBlock
from tests.support.block_cases import NARROW, wide_programs

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
CAPABILITIES = [80, 90, 100]
# Channels of the stages of stvit_small, stvit_base and stvit_large, and the sides of their images of 224 x 224.
STAGES = [(56, (64, 96)), (28, (128, 192)), (14, (320, 384, 448)), (7, (512, 640))]


def arguments(device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of every op of the block, by a name that begins with that of the op."""
    memory_format = torch.channels_last

    def pixels(channels: int = 5, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(2, channels, 4, 3, device=device, dtype=dtype).contiguous(memory_format=memory_format)
        return x.requires_grad_(grad)

    def parameter(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad)

    vector, half = parameter(5, grad=True), torch.float16
    weight, keep = parameter(5, 1, 3, 3, grad=True), torch.rand(2, device=device)
    mean, rstd = parameter(2, 4, 3), parameter(2, 4, 3)
    sliced = torch.randn(3, 9, 7, 5, device=device)[1:, 1:6, 2:6, 1:4].requires_grad_()
    end = (vector.detach(), keep)
    return {
        "residual_depthwise": (pixels(grad=True), weight, vector, True, None),
        "residual_depthwise, x_bias": (pixels(grad=True), weight, vector, True, parameter(5, grad=True)),
        "residual_depthwise, no bias, sliced": (sliced, weight, None, False, None),
        "residual_depthwise, half": (pixels(grad=True, dtype=half), weight, vector, True, None),
        "residual_depthwise_backward": (pixels(), pixels(), weight.detach(), True, vector.detach().half()),
        "residual_depthwise_backward, sliced": (sliced.detach(), sliced.detach(), weight.detach(), False, None),
        "channel_layer_norm": (pixels(grad=True), vector, parameter(5, grad=True), 1e-6, torch.float32),
        "channel_layer_norm, sliced": (sliced, vector, parameter(5), 1e-6, torch.float32),
        "channel_layer_norm, half y": (pixels(grad=True), vector, parameter(5, grad=True), 1e-6, half),
        "channel_layer_norm_backward": (pixels(), None, pixels(), vector.detach(), mean, rstd),
        "channel_layer_norm_backward, skip": (pixels(dtype=half), pixels(), pixels(), vector.detach(), mean, rstd),
        "batch_norm_backward": (pixels(), None, pixels(), vector.detach(), *torch.rand(2, 5, device=device), None),
        "batch_norm_backward, skip, half": (
            *(pixels(dtype=half) for _ in range(3)),
            vector.detach(),
            *torch.rand(2, 5, device=device),
            parameter(2, 5),
        ),
        "batch_norm_statistics": (pixels(), parameter(5), torch.rand(5, device=device), 0.1, 1e-5),
        "batch_norm_conv": (parameter(7, 5), parameter(7), *(parameter(5) for _ in range(4)), half),
        "batch_norm_conv_backward": (parameter(7, 5), parameter(7), parameter(7, 5), *(parameter(5) for _ in range(4))),
        "residual_branch": (pixels(grad=True), pixels(grad=True), vector, keep, None),
        "residual_branch, bias": (pixels(grad=True), pixels(grad=True), vector, keep, parameter(5, grad=True)),
        "residual_branch, bias alone": (pixels(grad=True), pixels(grad=True), None, None, parameter(5, grad=True)),
        "residual_branch, sliced": (sliced, pixels(grad=True), vector, None, None),
        "residual_branch, gamma": (pixels(grad=True), pixels(grad=True, dtype=half), vector, None, None),
        "residual_branch, keep": (
            pixels(grad=True, dtype=half),
            pixels(grad=True, dtype=half),
            None,
            keep.half(),
            None,
        ),
        "residual_branch_backward": (pixels(), pixels(dtype=half), *end, vector.detach(), half),
        "residual_branch_backward, gamma": (
            sliced.detach(),
            sliced.detach(),
            vector.detach(),
            None,
            None,
            torch.float32,
        ),
        "residual_branch_backward, keep": (pixels(), None, None, keep, None, half),
        "residual_branch_backward, bias": (pixels(), None, None, None, vector.detach(), torch.float32),
    }


NAMES = list(arguments("cpu"))


def test_every_op_is_checked() -> None:
    assert {name.partition(",")[0] for name in NAMES} == set(registry.BLOCK_OPS)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, device: str) -> None:
    """Schema, autograd registration, fake kernel, and tracing with symbolic shapes."""
    op = getattr(torch.ops.stvit, name.partition(",")[0]).default
    torch.library.opcheck(op, (*arguments(device)[name], "triton"))


@pytest.mark.parametrize("name", NAMES)
def test_fakes_have_the_strides_of_what_is_computed(name: str, device: str) -> None:
    op = getattr(torch.ops.stvit, name.partition(",")[0])
    given = [value.detach() if isinstance(value, Tensor) else value for value in arguments(device)[name]]
    real = op(*given, "triton")
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in given]
        fake = op(*fakes, "triton")
    for tensor, imitation in zip(*(([r] if isinstance(r, Tensor) else r) for r in (real, fake)), strict=True):
        assert (tensor.shape, tensor.dtype, tensor.stride()) == (imitation.shape, imitation.dtype, imitation.stride())


class Small(nn.Sequential):
    """A block of super tokens and one of pixels, one of them with LayerScale."""

    def __init__(self, backend: str, layerscale: int) -> None:
        options: dict[str, Any] = {"mlp_ratio": 2.0, "drop_path": 0.3, "init_values": 0.5, "backend": backend}
        super().__init__(
            *(SuperTokenBlock(4, tile, layerscale=i == layerscale, **options) for i, tile in enumerate((2, 1)))
        )


def assert_same_step(compiled: nn.Module, eager: nn.Module, x: Tensor) -> None:
    """Output and gradients of a training step, the statistics after it, and where it leaves the random stream."""
    results = []
    for module in (compiled, eager):
        x = x.detach().requires_grad_()
        torch.manual_seed(1)
        y = module(x)
        stream = torch.rand(1)
        grads = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
        results.append([y.detach(), stream, *grads, *(buffer.clone() for buffer in module.buffers())])
    largest = max(value.abs().max().item() for value in results[1])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13 * largest)


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("backend", "layerscale", "folded"),
    [("reference", 0, False), ("triton", 0, False), ("triton", 1, True)],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_equal_eager_ones(
    layerscale: int, backend: str, folded: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph, forward and backward, drop-path's random stream included; no compilation after the second batch."""
    monkeypatch.setattr(modules, "FOLDED", (torch.float64,) if folded else ())
    blocks = Small(backend, layerscale).to(device, torch.float64).to(memory_format=torch.channels_last)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(blocks), fullgraph=True, backend=counter)
    frames = []
    for batch in (2, 3, 5):
        x = torch.randn(batch, 4, 3, 2, device=device, dtype=torch.float64)
        with wide_programs(device):
            assert_same_step(compiled, blocks, x.contiguous(memory_format=torch.channels_last))
        frames.append(counter.frame_count)
    assert frames[0] == 1 and frames[1] == frames[-1] == 2


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_model_equals_eager_one(backend: str, device: str) -> None:
    """The whole model in one graph."""
    options: dict[str, Any] = {"layerscale": (False, False, True, False), "init_values": 0.5, "backend": backend}
    model = STViT(3, **NARROW, drop_path_rate=0.3, **options).to(device, torch.float64)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    with wide_programs(device):
        assert_same_step(compiled, model, torch.randn(2, 3, 32, 32, dtype=torch.float64, device=device))


def calls(channels: int, side: int, dtype: torch.dtype, batch: int = 1) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What a stage of so many channels launches, with and without LayerScale and drop-path, under autocast or not."""

    def op(name: str, *given: Any) -> tuple[str, Callable[[], Any]]:
        return name, lambda: getattr(torch.ops.stvit, name)(*given, "triton")

    def pixels(channels: int, dtype: torch.dtype = dtype) -> Tensor:
        shape = (batch, channels, side, side)
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)

    for width, gelu in ((channels, False), (4 * channels, True)):
        x, weight, bias = pixels(width), torch.zeros(width, 1, 3, 3), torch.zeros(width)
        x_bias = bias if gelu else None
        yield op("residual_depthwise", x, weight, bias, gelu, x_bias)
        yield op("residual_depthwise_backward", x, x, weight, gelu, x_bias)
    x, stream, vector, keep = (
        pixels(channels),
        pixels(channels, torch.float32),
        torch.zeros(channels),
        torch.zeros(batch),
    )
    mean = torch.zeros(batch, side, side)
    yield op("channel_layer_norm", x, vector, vector, 1e-6, dtype)
    yield op("channel_layer_norm", stream, vector, vector, 1e-6, dtype)
    yield op("channel_layer_norm_backward", x, None, x, vector, mean, mean)
    yield op("channel_layer_norm_backward", x, x, x, vector, mean, mean)
    yield op("channel_layer_norm_backward", x, stream, stream, vector, mean, mean)
    yield op("batch_norm_backward", x, None, x, vector.to(dtype), vector, vector, None)
    yield op("batch_norm_backward", x, x, x, vector, vector, vector, None)
    yield op("batch_norm_backward", stream, stream, stream, vector, vector, vector, None)
    sums, conv, conv_bias = torch.zeros(2, channels), torch.zeros(4 * channels, channels), torch.zeros(4 * channels)
    norm = [vector] * 4
    yield op("batch_norm_backward", x, x, x, vector, vector, vector, sums)
    yield op("batch_norm_statistics", x, vector, vector, 0.1, 1e-5)
    yield op("batch_norm_conv", conv, conv_bias, *norm, dtype)
    yield op("batch_norm_conv", conv.to(dtype), conv_bias.to(dtype), *norm, dtype)
    yield op("batch_norm_conv_backward", conv, conv_bias, conv, *norm)
    for gamma, factors in ((None, keep.to(dtype)), (vector, keep)):
        yield op("residual_branch", x if gamma is None else stream, x, gamma, factors, vector)
        grad = x if gamma is None else stream
        yield op("residual_branch_backward", grad, None if gamma is None else x, gamma, factors, vector, dtype)


def combinations(capability: int, share: bool) -> list[tuple[int, int, torch.dtype]]:
    """(channels, side, dtype) of all; or of a sixth of them, no two GPUs the same."""
    stages = [(channels, side) for side, widths in STAGES for channels in widths]
    if not share:
        return [(*stage, dtype) for stage in stages for dtype in DTYPES]
    shift = CAPABILITIES.index(capability)
    return [(*stage, DTYPES[(i + shift) % len(DTYPES)]) for i, stage in enumerate(stages) if (i + shift) % 2 == 0]


def compile_all(capability: int, share: bool) -> Iterator[dict[str, Any]]:
    from tests.support.compiled import compile_call

    for channels, side, dtype in combinations(capability, share):
        for name, call in calls(channels, side, dtype):
            for usage in compile_call(call, capability):
                yield {"side": side, "channels": channels, "dtype": str(dtype), "op": name, **usage._asdict()}


def test_the_shares_are_half_of_it() -> None:
    """`make test` has time for no more; every stage and every dtype is in it."""
    taken = [given for capability in CAPABILITIES for given in combinations(capability, share=True)]
    whole = combinations(80, share=False)
    assert len(set(taken)) == len(taken) == (len(whole) + 1) // 2
    assert {given[:2] for given in taken} == {given[:2] for given in whole} and {given[2] for given in taken} == set(
        DTYPES
    )


@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.compiled_all)], ids=["a sixth", "all"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_spills_or_atomics(
    capability: int, share: bool, run_python: Callable[..., Any]
) -> None:
    """At the shapes of every stage. In a process of its own: this one may interpret Triton instead of compiling it."""
    arguments, root = [str(capability), *["share"] * share], Path(__file__).resolve().parents[2]
    output = run_python(__file__, *arguments, env={"PYTHONPATH": str(root)}).stdout
    kernels = [json.loads(line) for line in output.splitlines()]
    from tests.support.compiled import MOST_STACK

    assert not [kernel for kernel in kernels if kernel["stack"] > MOST_STACK or kernel["atomics"]]
    compiled = {(kernel["channels"], kernel["side"], kernel["dtype"], kernel["op"]) for kernel in kernels}
    wanted = combinations(capability, share)
    assert compiled == {(*stage, str(dtype), op) for *stage, dtype in wanted for op in registry.BLOCK_OPS}


BATCHES = (128, 80, 127, 100, 64, 32, 8, 2, 1)


def compiled_over_batches() -> Iterator[dict[str, Any]]:
    """How often a run over BATCHES compiles each kernel of each call at stage 1 of stvit_small."""
    from tests.support.compiled import compiled_kernels

    found: dict[tuple[int, str], set[str]] = {}
    for batch in BATCHES:
        for which, (_, call) in enumerate(calls(64, 56, torch.bfloat16, batch)):
            for name, hashed in compiled_kernels(call, 90):
                found.setdefault((which, name), set()).add(hashed)
    return ({"call": which, "kernel": name, "times": len(hashes)} for (which, name), hashes in found.items())


def test_a_run_over_many_batches_compiles_each_kernel_at_most_twice(run_python: Callable[..., Any]) -> None:
    output = run_python(__file__, "batches", env={"PYTHONPATH": str(Path(__file__).resolve().parents[2])}).stdout
    found = [json.loads(line) for line in output.splitlines()]
    assert found and not [kernel for kernel in found if kernel["times"] > 2]


if __name__ == "__main__":
    batches, share = sys.argv[1] == "batches", "share" in sys.argv
    for kernel in compiled_over_batches() if batches else compile_all(int(sys.argv[1]), share):
        print(json.dumps(kernel), flush=True)
