"""The emulator of PTX on small programs: arithmetic against Python's, threads that part and meet, what is refused."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench.machine.counters import Counters
from bench.machine.machine import Kernel
from bench.machine.memory import Range
from bench.machine.parse import Fault

THREADS = 64  # of a block: two warps


def execute(body: str, *tensors: Tensor, grid: int = 1, shared: int = 1024, profile: bool = False) -> Counters:
    """Runs a program on tensors, whose addresses are in %rd0, %rd1, ..; %r0 is the thread, %rd9 it as 64 bits."""
    parameters = ", ".join(f".param .u64 p{n}" for n in range(len(tensors)))
    loads = "".join(f"ld.param.u64 %rd{n}, [p{n}];\n" for n in range(len(tensors)))
    text = f"""
.visible .entry test({parameters}) .reqntid {THREADS} {{
    .reg .pred %p<9>; .reg .b16 %rs<20>; .reg .b32 %r<40>; .reg .f32 %f<20>; .reg .b64 %rd<20>; .reg .f64 %fd<9>;
    {loads} mov.u32 %r0, %tid.x; cvt.u64.u32 %rd9, %r0;
    {body}
    ret;
}}"""
    ranges = [Range(t.data_ptr(), t.nbytes, f"t{n}") for n, t in enumerate(tensors)]
    kernel = Kernel(text, shared)
    return kernel.run(grid, [t.data_ptr() for t in tensors], ranges, profile=profile, races=True)


def compute(instruction: str, type_: str, sources: list[int], result: str | None = None, constants: str = "") -> int:
    """The bits that one instruction makes of the bits of its sources, and of constants behind them."""
    width, out = (int(re.sub(r"\D", "", t)) // 8 for t in (type_, result or type_))
    register = {2: "%rs", 4: "%r", 8: "%rd"}
    given = torch.tensor([list(source.to_bytes(8, "little")) for source in sources], dtype=torch.uint8)
    found = torch.zeros(8, dtype=torch.uint8)
    loads = "".join(
        f"ld.global.b{8 * width} {register[width]}{n + 10}, [%rd0 + {8 * n}];\n" for n in range(len(sources))
    )
    names = ", ".join(f"{register[width]}{n + 10}" for n in range(len(sources))) + constants
    execute(f"{loads} {instruction} {register[out]}19, {names}; st.global.b{8 * out} [%rd1], {register[out]}19;",
            given, found)  # fmt: skip
    return int.from_bytes(bytes(found.tolist()), "little")


def signed(number: int, width: int) -> int:
    return (number + (1 << width - 1)) % (1 << width) - (1 << width - 1)


numbers = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])


@given(numbers, numbers)
def test_integers_are_pythons(a: int, b: int) -> None:
    for width in (32, 64):
        x, y = a % 2**width, b % 2**width
        sx, sy, modulus = signed(x, width), signed(y, width), 2**width
        assert compute(f"mul.hi.s{width}", f"s{width}", [x, y]) == (sx * sy >> width) % modulus
        assert compute(f"mul.hi.u{width}", f"u{width}", [x, y]) == x * y >> width
        assert compute(f"sub.s{width}", f"s{width}", [x, y]) == (x - y) % modulus
        if y:
            assert compute(f"rem.u{width}", f"u{width}", [x, y]) == x % y
            quotient = abs(sx) // abs(sy) * (1 if (sx < 0) == (sy < 0) else -1)
            assert compute(f"div.s{width}", f"s{width}", [x, y]) == quotient % modulus
    x, y = a % 2**32, b % 2**32
    assert compute("mul.wide.s32", "s32", [x, y], "s64") == signed(x, 32) * signed(y, 32) % 2**64
    shift = y % 40
    assert compute("shl.b32", "b32", [x, shift]) == (x << shift) % 2**32
    assert compute("shr.s32", "s32", [x, shift]) == (signed(x, 32) >> shift) % 2**32
    assert compute("min.s32", "s32", [x, y]) == min(signed(x, 32), signed(y, 32)) % 2**32
    assert compute("bfe.u32", "u32", [x], constants=", 5, 7") == x >> 5 & 0x7F
    assert compute("bfi.b32", "b32", [x, y], constants=", 16, 8") == (x & 0xFF) << 16 | y & 0xFF00FFFF


@given(st.floats(width=32) | st.sampled_from([0.0, -0.0, math.nan, math.inf, 1 + 2**-8, 1 + 3 * 2**-8]))
def test_bfloat16_rounds_as_pytorch(value: float) -> None:
    single = torch.tensor([value], dtype=torch.float32)
    found = compute("cvt.rn.bf16.f32", "b32", [int(single.view(torch.int32)) % 2**32], "b16")
    rounded = torch.tensor([found], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    torch.testing.assert_close(rounded, single.bfloat16(), rtol=0, atol=0, equal_nan=True)


@given(*[st.floats(-100, 100, width=32)] * 3)
def test_half_precision_is_rounded_once(a: float, b: float, c: float) -> None:
    """fma of bfloat16: float64 holds its product and sum exactly enough, torch rounds that once."""
    values = torch.tensor([a, b, c]).bfloat16()
    found = compute("fma.rn.bf16", "b16", [n % 2**16 for n in values.view(torch.int16).tolist()])
    exact = values[0].double() * values[1].double() + values[2].double()
    rounded = torch.tensor([found], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert abs(rounded.double() - exact) <= 2.0**-8 * abs(exact) * 1.01 + 1e-40


def test_comparisons_with_nan_are_false_unless_unordered() -> None:
    out = torch.zeros(4, dtype=torch.int32)
    nan = "0f7FC00000"
    body = "".join(
        f"setp.{name}.f32 %p1, {nan}, 0f3F800000; selp.b32 %r1, 1, 0, %p1; st.global.b32 [%rd0 + {4 * n}], %r1;\n"
        for n, name in enumerate(("lt", "ltu", "ne", "neu"))
    )
    execute(body, out)
    assert out.tolist() == [0, 1, 0, 1]


def test_threads_that_part_meet_again() -> None:
    """Each thread loops as often as its number says; all of a warp shuffle together after it."""
    out = torch.zeros(THREADS, dtype=torch.int32)
    counters = execute(
        """
        mov.u32 %r1, 0;
        $loop: setp.ge.s32 %p1, %r1, %r0; @%p1 bra $done;
        add.s32 %r1, %r1, 1; bra $loop;
        $done: shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
        shl.b32 %r3, %r0, 2; cvt.u64.u32 %rd8, %r3; add.s64 %rd7, %rd0, %rd8; st.global.b32 [%rd7], %r2;
        """,
        out,
    )
    assert out.tolist() == [n ^ 1 for n in range(THREADS)]
    assert counters.by_name()["shfl.sync.bfly.b32"] == 2 and counters.divergent == 62  # a warp's last two leave as one


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r1, [%rd0 + 2];", "misaligned"),
        ("ld.global.b32 %r1, [%rd0 + 256];", "out of bounds: 64 threads"),
        ("ld.global.b32 %r1, [%rd0 + -4];", "out of bounds"),
        ("ld.shared.b32 %r1, [%r0 + 2048];", "misaligned|out of bounds of shared memory"),
        ("setp.lt.s32 %p1, %r0, 40; @%p1 bar.sync 0;", "not all threads of a block"),
        ("setp.lt.s32 %p1, %r0, 40; @%p1 shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;", "not all threads of a warp"),
        ("$a: bra $b; $b: bra $a;", "endless"),
        ("sin.approx.f32 %f1, %f1;", "not emulated"),
        ("cvt.rz.f16.f32 %rs1, %f1;", "not emulated"),
    ],
)  # fmt: skip
def test_what_must_not_be_is_refused(body: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.machine.machine.LONGEST", 1000)
    with pytest.raises(Fault, match=message):
        execute(body, torch.zeros(64))


def test_fresh_registers_and_shared_memory_are_nan() -> None:
    out = torch.zeros(2)
    execute("ld.shared.b32 %f2, [16]; st.global.b32 [%rd0], %f1; st.global.b32 [%rd0 + 4], %f2;", out)
    assert out.isnan().all()


SHARE = "shl.b32 %r1, %r0, 2; xor.b32 %r2, %r1, 128; st.shared.b32 [%r1], %r0;"  # 128: the other warp's


@pytest.mark.parametrize(("between", "races"), [("", 1), ("bar.sync 0;", 0), ("bar.warp.sync -1;", 1)])
def test_races_between_warps(between: str, races: int) -> None:
    assert len(execute(f"{SHARE} {between} ld.shared.b32 %r3, [%r2];").races) == races


@pytest.mark.parametrize(("wait", "arrived"), [("cp.async.wait_group 0;", True), ("cp.async.wait_group 1;", False)])
def test_asynchronous_copies_arrive_at_their_wait(wait: str, arrived: bool) -> None:
    given, out = torch.arange(4 * THREADS, dtype=torch.float32), torch.zeros(4 * THREADS)
    execute(
        f"""
        shl.b32 %r1, %r0, 4; cvt.u64.u32 %rd8, %r1; add.s64 %rd7, %rd0, %rd8; add.s64 %rd6, %rd1, %rd8;
        cp.async.cg.shared.global [%r1], [%rd7], 16; cp.async.commit_group; {wait}
        ld.shared.v4.b32 {{%f1, %f2, %f3, %f4}}, [%r1]; st.global.v4.b32 [%rd6], {{%f1, %f2, %f3, %f4}};
        """,
        given, out,
    )  # fmt: skip
    assert torch.equal(out, given) if arrived else out.isnan().all()


@pytest.mark.parametrize(("stride", "sectors", "wavefronts"), [(4, 8, 2), (8, 16, 4), (128, 64, 64)])
def test_sectors_and_bank_conflicts(stride: int, sectors: int, wavefronts: int) -> None:
    """Two warps: 32-byte sectors of global memory, and as many wavefronts as threads that share a bank."""
    counters = execute(
        f"""
        mul.lo.s32 %r1, %r0, {stride}; cvt.u64.u32 %rd8, %r1; add.s64 %rd7, %rd0, %rd8;
        ld.global.b32 %r2, [%rd7]; st.shared.b32 [%r1], %r2;
        """,
        _aligned(THREADS * stride), shared=THREADS * stride, profile=True,
    )  # fmt: skip
    loads, stores = counters.memory("global load"), counters.memory("shared store")
    assert (loads.requests, loads.found, loads.best) == (2, sectors, 8)
    assert (stores.found, stores.best) == (wavefronts, 2)
    assert counters.read == 4 * THREADS and counters.written == 0
    assert counters.l2_bytes == 32 * sectors


def _aligned(size: int) -> Tensor:
    """Bytes that begin at a multiple of 128, as a GPU's allocations do."""
    whole = torch.zeros(size + 128, dtype=torch.uint8)
    first = -whole.data_ptr() % 128
    return whole[first : first + size]
