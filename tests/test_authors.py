"""The authors' formulation, the baseline of benchmarks, is the same function; on a CPU the reference is no slower."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import oracle
import pytest
import torch
from torch import Tensor

from bench import reference_cpu
from bench.authors import AuthorsStokenAttention
from stvit import super_token_sampling, token_upsampling

SHAPES = [
    ((2, 3, 8, 12), (4, 4)),
    ((2, 3, 5, 7), (2, 3)),  # padded both ways
    ((1, 4, 7, 6), (4, 2)),
    ((1, 4, 6, 7), (2, 4)),
    ((2, 5, 2, 3), (4, 5)),  # smaller than a tile
    ((1, 2, 1, 9), (1, 2)),
    ((1, 2, 3, 4), (3, 4)),  # one super token
    ((2, 1, 4, 6), (1, 2)),
]


def reference(x: Tensor, tile: tuple[int, int], n_iter: int) -> tuple[Tensor, Tensor]:
    stokens, association = super_token_sampling(x, tile, n_iter, backend="reference")
    return stokens, token_upsampling(stokens.tanh(), association, backend="reference")


def authors(x: Tensor, tile: tuple[int, int], n_iter: int) -> tuple[Tensor, Tensor]:
    attention = AuthorsStokenAttention(tile, n_iter).to(x)
    stokens, association = attention.sampling(x)
    return stokens, attention.upsampling(stokens.tanh(), association, (x.shape[2], x.shape[3]))


@pytest.mark.parametrize(("shape", "tile"), SHAPES)
@pytest.mark.parametrize("n_iter", [1, 2, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_the_reference_is_the_authors_formulation(
    shape: tuple[int, ...], tile: tuple[int, int], n_iter: int, memory_format: torch.memory_format
) -> None:
    """Values and the gradient of the detached mode, in float64."""
    x = (1.5 * torch.randn(shape, dtype=torch.float64)).contiguous(memory_format=memory_format).requires_grad_()
    results = []
    for side in (reference, authors):
        stokens, y = side(x, tile, n_iter)
        torch.manual_seed(1)
        grads = [torch.randn(t.shape, dtype=t.dtype) for t in (stokens, y)]
        results.append((stokens, y, *(torch.autograd.grad(t, x, g, retain_graph=True)[0]
                                      for t, g in zip((stokens, y), grads, strict=True))))  # fmt: skip
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_the_baseline_is_the_oracle() -> None:
    """Not only the two equal: the baseline is right by itself."""
    x = torch.randn(1, 3, 5, 7, dtype=torch.float64)
    attention = AuthorsStokenAttention((2, 3), 2).double()
    stokens, weights, _ = oracle.sampling(x, (2, 3), 2, 3**-0.5)
    torch.testing.assert_close(attention.sampling(x)[0], stokens)
    torch.testing.assert_close(attention(x), oracle.upsampling(stokens, weights, (2, 3)))


@pytest.fixture
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and no time for filling fresh memory with NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("stage", reference_cpu.STAGES)
@pytest.mark.parametrize("memory_format", reference_cpu.FORMATS)
def test_the_reference_is_no_slower_on_a_cpu(stage: str, memory_format: str) -> None:
    """Forward and backward, taking turns. A tenth is left to noise; a busy machine gets three tries."""
    sides = reference_cpu.steps(reference_cpu.STAGES[stage], 2, reference_cpu.FORMATS[memory_format])
    ratios = []
    while not ratios or (min(ratios) > 1.1 and len(ratios) < 3):
        ratios.append(reference_cpu.compare(sides, 15)["ratio"]["median"])
    assert min(ratios) <= 1.1, f"reference / authors: {ratios}"


def test_the_benchmark_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    small = {"stage 1": reference_cpu.Shape(4, 8, 4), "stage 2": reference_cpu.Shape(6, 4, 2)}
    monkeypatch.setattr(reference_cpu, "STAGES", small)
    path = tmp_path / "deep" / "result.json"
    status = reference_cpu.main(["--batch", "1", "--pairs", "3", "--out", str(path)])
    result = json.loads(path.read_text())
    assert result["benchmark"] == "reference_cpu" and result["environment"]["device"] == "cpu"
    assert [(row["stage"], row["format"]) for row in result["rows"]] == [
        (stage, name) for stage in small for name in reference_cpu.FORMATS
    ]
    for row in result["rows"]:
        assert row["shape"] == [1, small[row["stage"]].channels, *[small[row["stage"]].side] * 2]
        for values in row["timings"].values():
            assert 0 < values["p20"] <= values["median"] <= values["p80"]
    assert status == any(row["timings"]["ratio"]["median"] > 1 for row in result["rows"])
    assert "stage 1" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = reference_cpu.Shape(4, 8, 4)
    sides = reference_cpu.steps(shape, 1, torch.contiguous_format)
    right = sides["authors"]
    sides["authors"] = lambda: (right()[0] * 1.01, right()[1])
    with pytest.raises(AssertionError):
        reference_cpu.compare(sides, 1)
