"""What only an emulated GPU shows of the CUDA kernels: bytes moved, missing barriers, accesses outside their tensors.

Their results are tested with those of the other backends, in test_sampling.py, test_upsampling.py and test_ops.py.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stvit.tensors import is_channels_last
from tests.support import emulated
from tests.support.cases import BRAIN, HALF, LISTED, SINGLE, Case, launching
from tests.support.vectorized_cases import VECTORIZED


@pytest.fixture(scope="module", autouse=True)
def emulation(backend: str, device: str) -> emulated.Device:
    if device != "cpu":
        pytest.skip("the kernels run on a GPU here")
    return emulated.device()


pytestmark = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


def every_op(case: Case, device: str, done: Callable[[str], object] = lambda name: None) -> list[Tensor]:
    """The results of each op, of which `done` is told."""
    ops, tile, x = torch.ops.stvit_cuda, case.tile, case.pixels(device)
    scale, last = case.channels**-0.5, is_channels_last(x)
    grad_y = case.random(device, case.channels, (case.height, case.width), case.grad_layout)
    grad_stokens = case.random(device, case.channels, case.grid, case.grad_layout)
    done("arguments")
    stokens, weights, mass, pooled = results = ops.sampling(x, *tile, case.n_iter, scale)
    done("sampling")
    results += (ops.sampling_backward(grad_stokens, weights, mass, *tile, last),)
    done("sampling_backward")
    gradients, saved = (grad_stokens, case.weights(device)), (x, stokens, pooled, weights, mass)
    results += (ops.sampling_backward_full(*gradients, *saved, *tile, case.n_iter, scale),)
    done("sampling_backward_full")
    results += (ops.upsampling(stokens, weights, *tile, last, grad_y),)
    done("upsampling")
    results += (ops.upsampling_backward(grad_y, weights, *tile, last),)
    done("upsampling_backward")
    results += ops.upsampling_backward_full(grad_y, stokens, weights, *tile)
    done("upsampling_backward_full")
    return list(results)


@pytest.mark.parametrize(
    ("channels", "size", "tile", "dtype"),
    [(64, 56, 8, HALF), (96, 56, 8, HALF), (128, 28, 4, HALF), (192, 28, 4, HALF), (64, 56, 8, SINGLE),
     (128, 28, 4, SINGLE)],
    ids=["stage 1 of S", "stage 1 of B and L", "stage 2 of S", "stage 2 of B and L", "stage 1 of S, float32",
         "stage 2 of S, float32"],
)  # fmt: skip
def test_bytes_moved(
    channels: int, size: int, tile: int, dtype: torch.dtype, emulation: emulated.Device, device: str
) -> None:
    """Pixels are read once, by pooling, association and sampling together; nothing is written twice.

    Where a region is a whole image, as with enough images for the GPU. Super tokens, and what else is shared by the
    pixels of a tile, come from the caches, hence a tolerance for them, but none for pixels.
    """
    case = Case(4, channels, size, size, (tile, tile), dtype, layout="channels_last", grad_layout="channels_last")
    counted: dict[str, emulated.Counts] = {}
    with launching(case._replace(limits=(4, 232448)), device):
        every_op(case, device, lambda name: counted.update({name: emulation.counts()}))
    pixels = dtype.itemsize * 4 * channels * size**2  # X
    weights, stokens, mass = 9 * pixels // channels, pixels // tile**2, 4 * 4 * (size // tile) ** 2
    assert counted["sampling"] == (pixels, weights + 2 * stokens + mass, 1)  # super tokens, and the pooled ones
    written = {
        "sampling_backward": pixels,
        "sampling_backward_full": weights + stokens + pixels,
        "upsampling": pixels,
        "upsampling_backward": stokens,
        "upsampling_backward_full": stokens + weights,
    }
    assert {name: counted[name].stored for name in written} == written
    if dtype == HALF:  # in float32 every thread of a pixel reads its weights, from the cache; the pixels are a residual
        assert counted["upsampling"].loaded <= 1.1 * (pixels + weights + stokens)
    assert counted["upsampling_backward"].loaded <= 1.01 * (pixels + weights)  # pieces of 16 bytes overlap
    assert counted["upsampling_backward_full"].loaded <= 1.01 * (pixels + weights + stokens)


def test_listed_cases_are_carried_out_in_every_way() -> None:
    """What test_sampling.py and test_upsampling.py run takes every path of the plans."""
    ways: dict[int, set[object]] = {2: set(), 4: set()}
    for case in VECTORIZED:
        size = case.dtype.itemsize
        found = emulated.extension().plan(0, True, False, *case.shape, *case.tile, size, *case.limits)
        split = [found[side] < of for side, of in zip(("rows", "columns"), case.grid, strict=True)]
        ways[size].add((found["pools"], *split) if found["fits"] else "general")
    one_pass = {(True, False, False), (True, True, False)}
    assert ways[2] >= one_pass | {(False, False, False), (False, False, True), (False, True, True), "general"}
    assert ways[4] >= one_pass | {(False, False, False), (False, True, True)}


def groups_across_the_end(case: Case, plan: dict[str, Any]) -> bool:
    """Whether any group of a whole image has tiles at both ends of the ring of stages."""
    rows, columns = case.grid
    of_row = [min(plan["group"], columns - first) for first in range(0, columns, plan["group"])]
    stage = 0
    for tiles in of_row * rows:
        if stage + tiles > plan["stages"]:
            return True
        stage = (stage + tiles) % plan["stages"]
    return False


def test_listed_cases_take_every_map_across_the_end_of_the_ring() -> None:
    found = set()
    for case in VECTORIZED:
        for map_ in range(4):
            size = case.dtype.itemsize
            plan = emulated.extension().plan(map_, map_ == 0, map_ == 3, *case.shape, *case.tile, size, *case.limits)
            if plan["fits"] and plan["columns"] == case.grid[1] and groups_across_the_end(case, plan):
                found.add((size, map_, plan["pools"]))
    assert found >= {(size, map_, map_ == 0) for size in (2, 4) for map_ in range(4)}


GENERAL = [case for case in LISTED if case.full and case.layout != "channels_last"][::3]


@pytest.mark.parametrize("case", [*VECTORIZED, *GENERAL], ids=lambda case: case.name)
def test_the_order_of_threads_does_not_matter(case: Case, emulation: emulated.Device, device: str) -> None:
    """Else a barrier is missing."""
    results = []
    for order in emulated.ORDERS:
        with launching(case, device), emulation.order(order):
            results.append(every_op(case, device))
    for tensors in zip(*results, strict=True):
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [BRAIN, SINGLE], ids=str)
def test_what_is_not_finite_reaches_its_neighbours_alone(dtype: torch.dtype, value: float, device: str) -> None:
    """Sums and means of several tiles are products with zeros for the tiles that they don't belong to."""
    region = (1, 232448)  # one of whole rows
    case = Case(
        1, 48, 12, 44, (4, 4), dtype, layout="channels_last", grad_layout="channels_last", limits=region
    )  # fmt: skip
    x, y = case.pixels(device), case.random(device, case.channels, (case.height, case.width), case.grad_layout)
    x[0, 3, 1, 17] = y[0, 3, 1, 17] = value
    with launching(case, device):
        _, weights, mass, pooled = torch.ops.stvit_cuda.sampling(x, *case.tile, 1, 0.1)
        _, clean, _, _ = torch.ops.stvit_cuda.sampling(case.pixels(device), *case.tile, 1, 0.1)
        sums = torch.ops.stvit_cuda.upsampling_backward(y, clean, *case.tile, True)
    expected = torch.ones(case.grid, dtype=torch.bool)
    expected[0, 4] = False
    assert torch.equal(pooled[0].isfinite().all(-1), expected)
    expected[:2, 3:6] = False
    assert torch.equal(sums[0, 3].isfinite(), expected) and sums[0, 4:].isfinite().all()
    by_tile = weights[0].isfinite().all(0).view(3, 4, 11, 4).all(3).all(1)
    assert by_tile[expected].all() and (torch.isinf(torch.tensor(value)) or not by_tile[~expected].any())
    expected[:, 2:7] = False
    assert mass[0, 0][expected].isfinite().all() and not mass[0, 0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"weights": lambda t: t.float()}, TypeError, "weights: expected Half, got Float"),
        ({"weights": lambda t: t[:, :8]}, ValueError, "weights: expected the shape"),
        ({"mass": lambda t: t.half()}, TypeError, "mass: expected Float, got Half"),
        ({"mass": lambda t: t[..., :1]}, ValueError, "mass: expected the shape"),
        ({"stokens": lambda t: t[:, :, :1]}, ValueError, "grad_stokens: expected the shape"),
        ({"stokens": lambda t: t.int()}, TypeError, "expected Int|got Int"),
        ({"tile": lambda t: (0, 8)}, ValueError, "a tile of 1 to"),
        ({"tile": lambda t: (65536, 65536)}, ValueError, "a tile of 1 to"),
    ],
)  # fmt: skip
def test_the_ops_name_an_argument_that_does_not_fit(
    change: dict[str, Callable[..., object]], error: type[Exception], told: str, device: str
) -> None:
    """Called from C++ nothing else checks them, and kernels would read elsewhere."""
    case = VECTORIZED[0]._replace(dtype=torch.float16)
    x = case.pixels(device)
    stokens, weights, mass, _ = torch.ops.stvit_cuda.sampling(x, *case.tile, 1, 0.1)
    given = {"stokens": stokens, "weights": weights, "mass": mass, "tile": case.tile}
    given.update({name: changed(given[name]) for name, changed in change.items()})
    tile = given.pop("tile")
    with pytest.raises(error, match=told):
        torch.ops.stvit_cuda.sampling_backward(*given.values(), *tile, True)


def test_an_error_in_a_kernel_reaches_python(emulation: emulated.Device, device: str) -> None:
    case = VECTORIZED[0]
    stokens = case.random(device, case.channels, case.grid, case.layout)
    with emulation.limits(shared_bytes=100), pytest.raises(RuntimeError, match="shared memory, the device has 100"):
        torch.ops.stvit_cuda.upsampling(stokens, case.weights(device), *case.tile, True)


def test_nothing_outside_the_tensors_is_touched(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """The same tests under the address sanitizer, which test_emulation.py shows to find a mistake."""
    files = ["tests/kernels/test_sampling.py", "tests/kernels/test_upsampling.py"]
    chosen = "cuda and not beyond_two_to_the_31"  # which reserves more memory than the sanitizer lets it
    options = ["-q", "-x", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
    environment = {**emulated.sanitizer_environment(), "OMP_NUM_THREADS": "1"}
    child = run_python("-m", "pytest", *files, *options, env=environment, check=False)
    assert child.returncode == 0, f"{child.stdout[-3000:]}\n{child.stderr[:3000]}"
    assert " passed" in child.stdout and " skipped" not in child.stdout
