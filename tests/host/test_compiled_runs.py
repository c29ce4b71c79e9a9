"""Compiled kernels, executed on the CPU by bench/machine: the checks of each op against float64, and
planted faults, each of which has to be found.

What the interpreter leaves out is checked here: bfloat16, what the compiler makes of the kernels for a GPU of compute
capability 8.0 and 9.0, barriers, asynchronous copies and products, layouts in shared memory, races between warps.
"""

from __future__ import annotations

import re
from concurrent.futures import Executor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import test_batch_norm as batch_norm
from tests.kernels import test_batch_norm_conv as batch_norm_conv
from tests.kernels import test_channel_layer_norm as norm
from tests.kernels import test_residual_branch as branch
from tests.kernels import test_residual_depthwise as depthwise
from tests.kernels import test_sampling as sampling
from tests.kernels import test_upsampling as upsampling
from tests.support import compiled_runs
from tests.support.block_cases import Pixels, drawn_pixels
from tests.support.cases import BRAIN, DOUBLE, HALF, LAST, PHASES, SINGLE, SLICED, SLICED_LAST, Case, cases

CAPABILITIES = (80, 90)
BOTH = (False, True)  # detached, full

# The stages of stvit_small; rows walked by one program or by several; padding, slices and tiles that nothing divides.
STOKENS = [
    *(Case(1, 64, 16, 24, (8, 8), BRAIN, full, 1, LAST, LAST, run=3) for full in BOTH),
    *(Case(1, 128, 8, 12, (4, 4), HALF, full, 1, LAST, LAST, run=2) for full in BOTH),
    *(Case(2, 40, 10, 9, (5, 3), BRAIN, full, 2, SLICED_LAST, SLICED, run=2) for full in BOTH),
    *(Case(1, 64, 10, 13, (4, 4), HALF, full) for full in BOTH),
    Case(1, 300, 3, 7, (2, 3), BRAIN, True, layout=LAST, grad_layout=LAST),  # wider than a block of channels
    Case(1, 20, 5, 7, (2, 3), SINGLE, True, layout=LAST, grad_layout=LAST),
    Case(1, 20, 5, 7, (2, 3), DOUBLE, True),
]
DEPTHWISE = [
    depthwise.Case(Pixels(1, 64, 9, 6, BRAIN, LAST, LAST, SINGLE), gelu=True),
    depthwise.Case(Pixels(1, 64, 9, 6, BRAIN, LAST, LAST), bias=False),
    depthwise.Case(Pixels(2, 40, 5, 7, HALF, SLICED, SLICED_LAST), gelu=True, x_bias=True),
    depthwise.Case(Pixels(1, 64, 7, 3, BRAIN, LAST, LAST, SINGLE), gelu=True, x_bias=True),
    depthwise.Case(Pixels(1, 256, 7, 3, HALF, LAST, LAST, SINGLE), gelu=True),
    depthwise.Case(Pixels(1, 20, 5, 7, SINGLE, LAST, LAST), gelu=True, span=3),
    depthwise.Case(Pixels(1, 20, 5, 3, DOUBLE)),
]
NORM = [
    norm.Case(Pixels(1, 64, 7, 6, BRAIN, LAST, LAST, SINGLE), skip=True),
    norm.Case(Pixels(1, 64, 7, 6, BRAIN, LAST, LAST)),
    norm.Case(Pixels(2, 40, 5, 7, HALF, SLICED, SLICED_LAST), skip=True),
    norm.Case(Pixels(1, 320, 5, 9, HALF, LAST, LAST, SINGLE), elements=1024, programs=2),
    norm.Case(Pixels(1, 20, 5, 7, SINGLE, LAST, LAST), skip=True),
    norm.Case(Pixels(1, 20, 3, 3, DOUBLE)),
]
BATCH_NORM = [
    batch_norm.Case(Pixels(2, 64, 7, 6, BRAIN, LAST, LAST, SINGLE)),
    batch_norm.Case(Pixels(1, 64, 7, 6, BRAIN, LAST, LAST)),
    batch_norm.Case(Pixels(2, 40, 5, 7, HALF, SLICED, SLICED_LAST)),
    batch_norm.Case(Pixels(1, 320, 5, 9, HALF, LAST, LAST, SINGLE), elements=1024, programs=2),
    batch_norm.Case(Pixels(1, 20, 5, 7, SINGLE, LAST, LAST)),
    batch_norm.Case(Pixels(1, 20, 3, 3, DOUBLE)),
]
BATCH_NORM_CONV = [
    batch_norm_conv.Case(Pixels(2, 64, 7, 6, BRAIN, LAST, LAST, SINGLE), 256),
    batch_norm_conv.Case(Pixels(1, 96, 7, 6, BRAIN, LAST, LAST), 40, mean=10.0),
    batch_norm_conv.Case(Pixels(1, 320, 5, 9, HALF, LAST, LAST, SINGLE), 20, elements=1024, programs=2),
    batch_norm_conv.Case(Pixels(1, 20, 5, 7, SINGLE, LAST, LAST), mean=3.0),
    batch_norm_conv.Case(Pixels(1, 20, 3, 3, DOUBLE, LAST, LAST)),
]
BRANCH = [
    branch.Case(Pixels(3, 64, 5, 6, BRAIN, LAST, LAST)),
    branch.Case(Pixels(3, 64, 5, 6, BRAIN, LAST, LAST, SINGLE), gamma=False, stream=SINGLE),
    branch.Case(Pixels(2, 40, 5, 7, HALF, SLICED, SLICED_LAST), bias=True),
    branch.Case(Pixels(3, 64, 5, 6, BRAIN, LAST, LAST, SINGLE), gamma=False, bias=True),
    branch.Case(Pixels(1, 320, 5, 9, HALF, LAST, LAST, SINGLE), keep=False, elements=1024, programs=2),
    branch.Case(Pixels(2, 20, 5, 7, SINGLE, LAST, LAST)),
    branch.Case(Pixels(2, 20, 3, 3, DOUBLE), keep=False),
]
LISTED = {
    "sampling": STOKENS,
    "upsampling": [case._replace(n_iter=1) for case in STOKENS],
    "residual_depthwise": DEPTHWISE,
    "channel_layer_norm": NORM,
    "batch_norm": BATCH_NORM,
    "batch_norm_conv": BATCH_NORM_CONV,
    "residual_branch": BRANCH,
}


def dtype(case: Any) -> Any:
    return case.dtype if isinstance(case, Case) else case.pixels.dtype


def name(case: Any) -> str:
    first, *others = case
    return case.name if isinstance(case, Case) else "-".join([first.name, *map(str, others)])


def common() -> list[Any]:
    """bfloat16 on both GPUs; the other formats, whose compiled code hardly differs between the two, on one."""
    return [
        pytest.param(op, case, capability, id=f"{op}-{capability}-{name(case)}")
        for capability in CAPABILITIES
        for op, listed in LISTED.items()
        for case in listed
        if capability == 90 or dtype(case) == BRAIN
    ]


@pytest.mark.parametrize(("op", "case", "capability"), common())
def test_listed_cases(op: str, case: Any, capability: int, compiling: Executor) -> None:
    assert compiling.submit(compiled_runs.run, op, case, capability).result() > 0


# Drawn shapes share their tile and channels, so that few kernels are compiled for them.
SIZES = (st.integers(1, 2), st.just(40), st.integers(1, 12), st.integers(1, 14))  # images, channels, height, width
DTYPES, FLAGS, SEEDS = st.sampled_from((BRAIN, HALF)), st.booleans(), st.integers(0, 2**16)
STRIDES = st.sampled_from((LAST, SLICED_LAST))


@st.composite
def stokens(draw: st.DrawFn) -> Case:
    batch, channels, height, width = (draw(size) for size in SIZES)
    return Case(
        batch, channels, height, width, (4, 4), draw(DTYPES), draw(FLAGS), layout=draw(STRIDES),
        grad_layout=draw(STRIDES), run=draw(st.integers(1, 3)), seed=draw(SEEDS),
    )  # fmt: skip


@st.composite
def pixels(draw: st.DrawFn) -> Pixels:
    return Pixels(*(draw(size) for size in SIZES), draw(DTYPES), draw(STRIDES), draw(STRIDES), seed=draw(SEEDS))


DRAWN = {
    "sampling": stokens(),
    "upsampling": stokens(),
    "residual_depthwise": st.tuples(pixels(), FLAGS).map(lambda drawn: depthwise.Case(*drawn)),
    "channel_layer_norm": st.tuples(pixels(), FLAGS).map(lambda drawn: norm.Case(drawn[0], skip=drawn[1])),
    "batch_norm": pixels().filter(batch_norm.several).map(batch_norm.Case),
    "batch_norm_conv": pixels().filter(batch_norm.several).map(batch_norm_conv.folded),
    "residual_branch": st.tuples(pixels(), FLAGS).map(lambda drawn: branch.Case(*drawn)),
}


@pytest.mark.parametrize("op", DRAWN)
@given(data=st.data())
@settings(max_examples=5, derandomize=True, phases=PHASES)
def test_drawn_cases(op: str, data: st.DataObject, compiling: Executor) -> None:
    compiling.submit(compiled_runs.run, op, data.draw(DRAWN[op]), 90).result()


# --- More than `make test` has time for: make test ARGS="-m compiled_all" ---


def everything() -> list[Any]:
    """The interpreter's listed cases on both GPUs, those in float16 in bfloat16 too."""
    ops = {
        "sampling": sampling.LISTED,
        "upsampling": [case for case in upsampling.LISTED if case.n_iter == 1],
        "residual_depthwise": depthwise.LISTED,
        "channel_layer_norm": norm.LISTED,
        "batch_norm": batch_norm.LISTED,
        "batch_norm_conv": batch_norm_conv.LISTED,
        "residual_branch": branch.LISTED,
    }
    pairs = [(op, case) for op, listed in ops.items() for case in listed]
    pairs += [(op, with_dtype(case, BRAIN)) for op, case in pairs if dtype(case) == HALF]
    return [
        pytest.param(op, case, capability, id=f"{op}-{capability}-{name(case)}")
        for op, case in dict.fromkeys(pairs)
        for capability in CAPABILITIES
    ]


def with_dtype(case: Any, wanted: Any) -> Any:
    if isinstance(case, Case):
        return case._replace(dtype=wanted)
    return case._replace(pixels=case.pixels._replace(dtype=wanted))


@pytest.mark.compiled_all
@pytest.mark.parametrize(("op", "case", "capability"), everything())
def test_all_listed_cases(op: str, case: Any, capability: int, compiling: Executor) -> None:
    compiling.submit(compiled_runs.run, op, case, capability).result()


ANY = {
    "sampling": cases(),
    "upsampling": cases(rounds=1),
    "residual_depthwise": st.tuples(drawn_pixels(), FLAGS).map(lambda drawn: depthwise.Case(*drawn)),
    "channel_layer_norm": st.tuples(drawn_pixels(), FLAGS).map(lambda drawn: norm.Case(drawn[0], skip=drawn[1])),
    "batch_norm": drawn_pixels().filter(batch_norm.several).map(batch_norm.Case),
    "batch_norm_conv": drawn_pixels().filter(batch_norm.several).map(batch_norm_conv.folded),
    "residual_branch": st.tuples(drawn_pixels(), FLAGS).map(lambda drawn: branch.Case(*drawn)),
}


@pytest.mark.compiled_all
@pytest.mark.parametrize("op", ANY)
@given(data=st.data())
@settings(max_examples=30, derandomize=True, phases=PHASES)
def test_any_drawn_case(op: str, data: st.DataObject, compiling: Executor) -> None:
    case = data.draw(ANY[op])
    for wanted in {dtype(case), BRAIN}:
        for capability in CAPABILITIES:
            compiling.submit(compiled_runs.run, op, with_dtype(case, wanted), capability).result()


# --- Planted faults ---

ROUNDED = Case(1, 40, 7, 9, (4, 4), BRAIN, layout=LAST)  # and the last tile is padded


@pytest.mark.parametrize(("capability", "dtype"), [(80, HALF), (90, BRAIN), (90, HALF)], ids=str)
def test_rounded_once_is_to_nearest(capability: int, dtype: Any, compiling: Executor) -> None:
    compiling.submit(compiled_runs.run, "rounding", ROUNDED._replace(dtype=dtype), capability).result()


WALKED = STOKENS[0]  # a run of three tiles of 8 x 8 with 64 channels, in bfloat16, by cp.async and mma or wgmma
FAULTS = {
    # op, case, capability; kernel, what is replaced by what, how often (0: everywhere); what notices it
    "no barrier": (
        "sampling", WALKED, 80, "walk_kernel", r"^\s*bar\.sync\s+0;", "", 0, "races",
    ),
    "no wait for asynchronous copies": (
        "sampling", WALKED, 80, "walk_kernel", r"cp\.async\.wait_group\s+\d+;", "", 0, "exceeds",
    ),
    "no wait for asynchronous products": (
        "sampling", WALKED, 90, "walk_kernel", r"wgmma\.wait_group\.sync\.aligned \d+;", "", 0, "exceeds",
    ),
    "another lane in a shuffle": (
        "sampling", WALKED, 80, "walk_kernel", r"(shfl\.sync\.bfly\.b32 .*?), 1, 31", r"\1, 4, 31", 0, "exceeds",
    ),
    "another swizzle": (
        "sampling", WALKED, 90, "walk_kernel", r"(or\.b64\s+%rd\d+, %rd\d+, )46116\d{14}",
        r"\g<1>9223372311732682752", 0, "exceeds",
    ),
    "a store past the end": (
        "upsampling", WALKED, 80, "tokens_to_pixels_kernel", r"(st\.global\.\S+ \[ %rd\d+) \+ 0",
        r"\1 + 1048576", 1, "out of bounds",
    ),
    "a store off by a row": (
        "upsampling", WALKED, 90, "tokens_to_pixels_kernel", r"(st\.global\.\S+ \[ %rd\d+) \+ 0",
        rf"\1 + {WALKED.width * WALKED.channels * 2}", 1, "exceeds|out of bounds",
    ),
    "a misaligned load": (
        "sampling", WALKED, 80, "walk_kernel", r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+ 0 \], \[ %rd\d+) \+ 0",
        r"\1 + 4", 1, "misaligned",
    ),
    "truncated instead of rounded": (
        "rounding", ROUNDED, 90, "channel_layer_norm_kernel", r"cvt\.rn\.bf16\.f32\s+(%rs\d+), (%r\d+);",
        r"mov.b32 {_, \1}, \2;", 0, "exceeds its rounding",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, compiling: Executor) -> None:
    *planted, notice = FAULTS[fault]
    said = compiling.submit(compiled_runs.plant, *planted).result()
    assert re.search(notice, said), said or "nothing noticed it"
