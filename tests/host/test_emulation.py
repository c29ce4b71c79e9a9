"""The emulated GPU of tests/support/emulation: what it computes, and that it finds the mistakes it is there to find."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import torch

from tests.support.emulated import ORDERS, Counts, Device, sanitizer_environment
from tests.support.emulated import samples as build_samples

every_order = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module")
def samples() -> Device:
    return build_samples()


def run(samples: Device, name: str, given: torch.Tensor, out: torch.Tensor, n: int = 0) -> torch.Tensor:
    assert samples.run_sample(name, given, out.fill_(torch.nan), n) == ""
    return out


@every_order
def test_barriers_and_shuffles(order: str, samples: Device) -> None:
    x = torch.randint(-9, 9, (384,)).float()
    with samples.order(order):
        assert torch.equal(run(samples, "block_sum", x, torch.empty(3)), x.view(3, 128).sum(1))
        assert torch.equal(run(samples, "warp_rotate", x, torch.empty(32)), x[:32].roll(-1))
        assert torch.equal(run(samples, "half_block_turn", x, torch.empty(64)), x[64:128].flip(0))
        sums = run(samples, "warp_sum", x.double(), torch.empty(32, dtype=torch.float64))
        assert torch.equal(sums, x[:32].double().sum().expand(32))
        assert torch.equal(run(samples, "warp_turn", x, torch.empty(32)), x[:32].flip(0))
        one = torch.zeros(32)
        assert not run(samples, "warp_any", one, torch.empty(32)).any()
        one[17] = 1
        assert run(samples, "warp_any", one, torch.empty(32)).all()


@every_order
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matrix_instruction(dtype: torch.dtype, transposed: bool, order: str, samples: Device) -> None:
    given = torch.randn(384).to(dtype)
    a, b = given[:256].view(16, 16).double(), given[256:].double()
    name = f"{'half' if dtype == torch.float16 else 'bfloat16'} product{' transposed' * transposed}"
    with samples.order(order):
        found = run(samples, name, given, torch.empty(16, 8))
    exact = a @ (b.view(8, 16).T if transposed else b.view(16, 8))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@every_order
@pytest.mark.parametrize("n", [1, 128, 382, 700])
def test_copies_in_flight(n: int, order: str, samples: Device) -> None:
    x = torch.randint(-9, 9, (n,)).float()
    x = torch.cat([x, torch.full((-n % 4,), torch.nan)])  # not read: behind the last byte that is asked for
    samples.counts()
    with samples.order(order):
        assert run(samples, "pipeline", x, torch.empty(32), n).sum() == x[:n].sum()
    assert samples.counts() == Counts(4 * n, 4 * 32, 1)


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_conversions(kind: str, samples: Device) -> None:
    """Every 16-bit number to float; to 16 bits random floats, ties, subnormals, what overflows, infinity and NaN."""
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16}[kind]
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    wide = run(samples, f"{kind} widened", every, torch.empty(2**16), 2**16)
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)

    bits = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32)
    middle = wide.view(torch.int32) + (2**12 if kind == "half" else 2**15)  # between a number and the next
    around = torch.cat([middle - 1, middle, middle + 1]).view(torch.float32)
    near_one = torch.randn(50_000) * torch.logspace(-9, 6, 50_000)
    given = torch.cat([wide, around, bits.view(torch.float32), near_one, torch.tensor([65519.9, 65520.0, -65520.0])])
    narrow = run(samples, f"{kind} narrowed", given, torch.empty(len(given), dtype=dtype), len(given))
    torch.testing.assert_close(narrow, given.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "size"), [("block_sum", 3), ("half_block_turn", 64), ("warp_rotate", 32)])
def test_a_missing_barrier_shows_in_one_of_the_orders(name: str, size: int, samples: Device) -> None:
    x, wrong = torch.randint(-9, 9, (384,)).float(), 0
    for order in ORDERS:
        with samples.order(order):
            right = run(samples, name, x, torch.empty(size))
            found = run(samples, f"{name} without a barrier", x, torch.empty_like(right))
        wrong += not torch.equal(found, right)
    assert wrong


@pytest.mark.parametrize("fault", ["without waiting", "with a slot too few"])
def test_data_that_is_still_being_copied_is_nan(fault: str, samples: Device) -> None:
    assert run(samples, f"pipeline {fault}", torch.randn(700), torch.empty(32), 700).isnan().any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some_leave", "block 0: threads wait for ever: thread 0 at barrier, thread 41 at barrier, while 1 of 64 have"),
        ("partial warp", "thread 0 at warp_barrier, while 0 of 16 have ended"),
        ("no_whole_warps", "thread 0: barrier of 48 threads"),
        ("halves_of_warps", "barrier of 32 threads: a part of a warp came"),
        ("different_numbers", "thread 32: barrier of 32 threads and of 64"),
        ("two_operations", "thread 1: warp_barrier while other lanes of the warp are at shuffle_xor"),
        ("pipeline with a copy left over", "ended with asynchronous copies that it did not wait for"),
        ("misaligned_copy", "copy_async, device memory: the address is no multiple of 16"),
        ("misaligned_rows", "load_matrices: the address is no multiple of 16"),
        ("misaligned_load", "load: the address is no multiple of 4"),
        ("outside_shared", "copy_async: outside shared memory"),
        ("too much shared memory", "1048576 bytes of shared memory, the device has 232448"),
        ("too many threads", "a launch of 2048 threads a block"),
    ],
)
def test_errors_name_the_mistake(name: str, message: str, samples: Device) -> None:
    x = torch.randn(384)
    assert message in samples.run_sample(name, x, torch.empty(384), 32)
    assert torch.equal(run(samples, "warp_rotate", x, torch.empty(32)), x[:32].roll(-1))  # the next kernel is unharmed


def test_limits_of_the_device(samples: Device) -> None:
    x, out = torch.randn(384), torch.empty(3)
    with samples.limits(shared_bytes=511):
        assert "512 bytes of shared memory, the device has 511" in samples.run_sample("block_sum", x, out)
    assert samples.run_sample("block_sum", x, out) == ""


# --- The address sanitizer, in a child process ---


@pytest.fixture(scope="module")
def run_sanitized(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda *arguments, env=(), **options: run_python(
        *arguments, env={**sanitizer_environment(), "PYTHONPATH": ".", **dict(env)}, **options
    )


PLANTED = """
import os, torch
from tests.support import emulated
samples = emulated.samples()
assert samples.run_sample("block_sum", torch.ones(384), torch.zeros(3)) == ""
for kind in ("reads", "writes", "copies", "shared"):
    if not (child := os.fork()):
        samples.run_sample(f"{kind}_past_the_end", torch.ones(8), torch.zeros(8), 8)
        os._exit(0)
    print(kind, "found" if os.waitpid(child, 0)[1] else "missed")
"""


def test_one_element_past_the_end_is_found(run_sanitized: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Of tensors, which PyTorch allocates one by one on the CPU, and of shared memory."""
    child = run_sanitized("-c", PLANTED)
    assert child.stdout.split("\n")[:4] == ["reads found", "writes found", "copies found", "shared found"]
    assert child.stderr.count("ERROR: AddressSanitizer: heap-buffer-overflow") == 4
