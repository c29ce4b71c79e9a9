"""`python -m stvit.info --explain` tells which kernels a shape gets, as the sources say and the extension plans."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stvit import info
from stvit.backends import explain, extension, registry
from tests.support import extensions

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SHAPE = explain.Shape(128, 64, 56, 56, 8, 8)
H100 = explain.GPUS["h100"]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """With an extension whose walk fits 16-bit numbers, and pools on GPUs with more than 100 KiB; what it was asked."""
    asked: list[tuple[Any, ...]] = []

    def plan(kind: int, pool: bool, grad: bool, *rest: int) -> dict[str, Any]:
        asked.append((kind, pool, grad, *rest))
        *_, size, multiprocessors, shared_bytes = rest
        pools = pool and shared_bytes > 102400
        return {"fits": size == 2, "pools": pools, "rows": 7, "columns": 4, "group": 3, "ahead": 2, "stages": 9,
                "regions": 2 * multiprocessors, "reads": 1.25, "shared_bytes": 1536}  # fmt: skip

    module: Any = SimpleNamespace(plan=plan, build_info=lambda: {"device": "cuda"})
    monkeypatch.setattr(extension, "_state", extension._State(True, module, "cuda", "a stand-in"))
    return asked


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("128x64x56x56/8x8", SHAPE),
        ("128x64x56x56/8", SHAPE),
        ("1x3x5x7/2x16", explain.Shape(1, 3, 5, 7, 2, 16)),
    ],
)
def test_shapes(text: str, expected: explain.Shape) -> None:
    assert explain.parse_shape(text) == expected
    assert explain.parse_shape(str(expected)) == expected


@pytest.mark.parametrize("text", ["", "128x64x56x56", "128x64x56/8", "0x64x56x56/8", "1x64x56x56/0x8", "1x2x3x4/5x6x7"])
def test_wrong_shapes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        info.main(["--explain", text])
    (*_, message) = capsys.readouterr().err.splitlines()
    assert "--explain: expected BxCxHxW/hxw, all at least 1, as 128x64x56x56/8x8" in message and repr(text) in message


def test_it_agrees_with_the_sources(planned: list[tuple[Any, ...]]) -> None:
    (maps,) = re.findall(r"enum class Map \{(.*?)\};", (CSRC / "plan.h").read_text(), re.DOTALL)
    assert tuple(re.findall(r"^\s*(\w+),", maps, re.MULTILINE)) == explain.MAPS
    assert f"SPREAD_CHANNELS = {explain.SPREAD_CHANNELS};" in (CSRC / "spread.cuh").read_text()
    kernels = set(re.findall(r"(\w+_kernel)\(", "".join(path.read_text() for path in CSRC.glob("*.cu*"))))
    told = [explain.explain(SHAPE, dtype, gpu) for dtype in explain.DTYPES for gpu in explain.GPUS.values()]
    assert {name for each in told for step in each["cuda"]["steps"] for name in step["kernels"]} == kernels
    for each in told:
        assert {step["op"] for step in each["cuda"]["steps"]} == set(registry.SUPER_TOKEN_OPS)


def test_what_the_extension_is_asked(planned: list[tuple[Any, ...]]) -> None:
    explain.explain(SHAPE, "bf16", H100)
    limits = (H100.multiprocessors, H100.shared_bytes)
    assert planned == [
        (0, True, False, *SHAPE, 2, *limits),
        (3, False, True, *SHAPE, 2, *limits),
        (1, False, False, *SHAPE, 2, *limits),
        (2, False, False, *SHAPE, 2, *limits),
    ]


def test_text(planned: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    info.main(["--explain", "128x64x56x56/8x8", "--gpu", "h100"])
    text = capsys.readouterr().out
    assert text.startswith("128x64x56x56/8x8 (BxCxHxW/hxw) in bf16, channels_last, on NVIDIA H100: 132 multiprocessors")
    assert re.search(r"^  sampling +walk_kernel: single pass$", text, re.MULTILINE)
    assert "264 blocks, 2.00 a multiprocessor, each 7 x 4 super tokens" in text
    assert "3 tiles at a time, 2 x 3 ahead on their way to shared memory; 1.5 KiB of it" in text
    assert "pixels are read 1.25 times" in text
    assert "programs hold 64 pixels x 64 channels in 4 warps" in text

    info.main(["--explain", "128x64x56x56/8x8", "--gpu", "rtx3090"])
    text = capsys.readouterr().out
    assert re.search(r"^  sampling +pooling_kernel \+ walk_kernel: two passes$", text, re.MULTILINE)

    info.main(["--explain", "128x512x56x56/8x8", "--dtype", "fp32"])
    text = capsys.readouterr().out
    assert re.search(r"^  sampling +pooling_kernel \+ weigh_kernel \+ sum_kernel: general$", text, re.MULTILINE)
    assert "because the channels or the tiles are too large for the fast kernel" in text
    assert re.search(r"^  upsampling +spread_single_kernel: fast$", text, re.MULTILINE)
    assert "pixels have more channels than that" in text


def test_json(planned: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    info.main(["--explain", "2x90x50x70/7x5", "--dtype", "fp16", "--gpu", "a100", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told == explain.explain(explain.Shape(2, 90, 50, 70, 7, 5), "fp16", explain.GPUS["a100"])
    spread = next(step for step in told["cuda"]["steps"] if step["op"] == "upsampling")
    assert spread["kernels"] == ["tokens_to_pixels_kernel"] and "no multiple of 8" in spread["why"]


def test_without_an_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "ready", lambda: False)
    monkeypatch.setattr(extension, "why_not", lambda: ["no nvcc"])
    assert "cuda\n  - no nvcc\n" in explain.as_text(explain.explain(SHAPE, "bf16", H100))
    monkeypatch.setattr(extension, "why_not", list)
    assert "  - it is not built yet: python -m stvit.info --build builds it" in explain.as_text(
        explain.explain(SHAPE, "bf16", H100)
    )


def test_without_triton(planned: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain.importlib.util, "find_spec", lambda name: None)
    assert "triton\n  - the package triton is not installed" in explain.as_text(explain.explain(SHAPE, "bf16", H100))


def test_the_real_plan(run_python: Callable[..., Any]) -> None:
    """Without a GPU: the limits are given."""
    extensions.real()

    def steps(*arguments: str) -> dict[str, dict[str, Any]]:
        environment = {"TORCH_CUDA_ARCH_LIST": ";".join(extensions.ARCHITECTURES)}
        told = json.loads(run_python("-m", "stvit.info", "--json", "--explain", *arguments, env=environment).stdout)
        assert told["cuda"]["reasons"] == []
        return {step["op"]: step for step in reversed(told["cuda"]["steps"])}

    whole = steps("128x64x56x56/8x8", "--gpu", "h100")
    assert whole["sampling"]["path"] == "single pass" and whole["sampling"]["reads"] == 1
    assert whole["sampling"]["regions"] == 128 and whole["sampling"]["shared_bytes"] <= H100.shared_bytes
    small = steps("128x64x56x56/8x8", "--gpu", "rtx3090")
    assert small["sampling"]["path"] == "two passes" and small["sampling"]["reads"] == 2
    single = steps("128x64x56x56/8x8", "--dtype", "fp32")
    assert single["sampling"]["path"] == "single pass" and single["upsampling_backward"]["path"] == "fast"
    assert single["upsampling"]["kernels"] == ["spread_single_kernel"]
    double = steps("128x64x56x56/8x8", "--dtype", "fp64").values()
    assert {step["path"] for step in double} == {"general"}
    assert {step["why"] for step in double} == {"the fast kernel is for 16- and 32-bit numbers"}
