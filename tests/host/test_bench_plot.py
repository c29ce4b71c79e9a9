"""bench.plot on result files that are made up here: tables, figures, and a README that can't drift from its files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.convergence import run as convergence
from bench.ops import cases
from bench.ops import run as ops
from bench.report import run as plot
from bench.report import tables

ROOT = Path(__file__).resolve().parents[2]
GPU = {
    "device": "cuda", "name": "NVIDIA Imaginary 1", "capability": "9.0", "driver": "1.2.3", "threads": None,
    "python": "3.12", "torch": "2.11.0", "cuda": "13.0", "triton": "3.6.0", "timm": "1.0", "commit": "0123456789abcdef",
    "clean": True,
}  # fmt: skip
SPEEDS = {"authors": 1.0, "authors compiled": 4.0, "reference": 1.3, "triton": 21.0, "cuda": 26.0}
TRAINING = {
    "authors": 700.0, "authors-channels-last": 650.0, "authors-compile": 1400.0, "authors-max-autotune": 1500.0,
    "ours-reference": 900.0, "ours-triton": 2200.0, "ours-graph": 2600.0,
}  # fmt: skip


def ops_rows(op: str, names: list[str], batch: int = 128, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Any]]:
    """Rows as bench.ops makes them, with times of our own invention."""
    entry = next(entry for entry in cases.OPS if entry.name == op)
    rows = []
    for index, name in enumerate(names):
        problem = cases.Problem(cases.parse_shape(name), batch, dtype, torch.device("cpu"))
        for contender in cases.CONTENDERS:
            if contender.name not in SPEEDS:
                continue
            for pass_ in cases.PASSES:
                row = ops.describe(entry, problem, contender, pass_)
                forward, backward = entry.floor(problem)
                median = (forward + backward) / 3e12 * 1e3 * 32 / SPEEDS[contender.name] * (1 + 0.07 * index)
                row.update(
                    status="timed", interpreted=False, median_ms=median, p20_ms=median * 0.97, p80_ms=median * 1.06,
                    repeats=30, host_ms=0.1, peak_bytes=int(8 * problem.bytes("x") / SPEEDS[contender.name] ** 0.5),
                    floor_bytes=forward + backward, percent_of_floor=(forward + backward) / 3e12 / median * 1e5,
                )  # fmt: skip
                rows.append(row)
    for row in rows:
        row["speedup"] = ops.speedups(row, rows)
    return rows


def training_rows(models: dict[str, float], size: int = 224) -> list[dict[str, Any]]:
    rows = []
    for model, share in models.items():
        speeds = TRAINING if model.startswith("stvit") else {"timm-compile": 3000.0}
        for (name, images), mode in ((item, mode) for item in speeds.items() for mode in ("train", "inference")):
            images *= share * (3 if mode == "inference" else 1)
            rows.append(
                {"model": model, "size": size, "contender": name, "mode": mode, "batch": 128, "batch_asked": 128,
                 "dtype": "bfloat16", "images_per_s": images, "images_per_s_p20": images * 0.98,
                 "images_per_s_p80": images * 1.01, "peak_bytes": int(2e13 / images), "peak_of": "allocated"}
            )  # fmt: skip
    return rows


def convergence_file(error: str | None = None) -> dict[str, Any]:
    """What bench.convergence makes of three runs that we make up."""
    runs = []
    for number, (contender, seed) in enumerate([("reference", 0), ("reference", 1), ("triton", 0)]):
        wave = 0.06 * seed + 0.005 * number
        losses = [2.3 * math.exp(-s / 400) + 0.5 + wave * math.sin(s / (30 + number)) for s in range(1000)]
        points = [(125 * k, 12.5 * k, 0.8 - 0.6 / k + wave / 9) for k in range(1, 9)]
        runs.append(convergence.Run(contender, seed, losses, points))
    runs[1].losses[7] = math.nan if error else 1.0
    runs[2].error = error
    common = {"model": "stvit_small", "size": 224, "batch": 64, "dtype": "bfloat16"}
    rows, about = convergence.as_rows(runs, common)
    return {"rows": rows, "data": "20000 of 50000 images in photographs/train, 2000 to test", **about}


def put(folder: Path, benchmark: str, name: str = "", environment: dict[str, Any] = GPU, **content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name or benchmark}.json"
    path.write_text(json.dumps({"benchmark": benchmark, "command": "", "environment": environment, **content}))
    return path


@pytest.fixture
def results(tmp_path) -> Path:
    """bench/results with one GPU's files."""
    folder = tmp_path / "results" / "imaginary"
    rows = ops_rows("core", ["S/1/224", "S/2/224", "B/1/224", "B/2/224", "S/1/384", "S/2/384", "B/1/384", "B/2/384"])
    rows += ops_rows("core", ["S/1/224"], batch=32) + ops_rows("core", ["S/1/224"], dtype=torch.float32)
    rows += ops_rows("attention", ["S/1/224", "S/2/224"])
    for row in rows:
        if (row["shape"], row["contender"]) == ("B/1/384", "authors"):
            row.update(status="out of memory", error="OutOfMemoryError: too much")
            for key in ("median_ms", "p20_ms", "p80_ms", "percent_of_floor"):
                del row[key]
        if (row["shape"], row["contender"]) == ("S/1/384", "cuda"):
            row.update(status="failed gate", error="failed gate: dx has 3 times the error allowed")
    put(folder, "ops", rows=rows, bandwidth_bytes_per_s=3e12)
    trained = training_rows({"stvit_small": 1.0, "stvit_base": 0.5, "convnext_tiny.fb_in1k": 1.0})
    next(r for r in trained if r["contender"] == "ours-reference").update(error="RuntimeError: no", images_per_s=None)
    put(folder, "training", rows=trained)
    put(folder, "convergence", **convergence_file())
    return tmp_path / "results"


@pytest.fixture
def readme(tmp_path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"before\n\n{plot.BEGIN}\n{plot.END}\n\nafter\n")
    return path


def run(results: Path, readme: Path, *flags: str) -> int:
    return plot.main(["--results", str(results), "--document", str(readme), *flags])


def test_the_readme_is_what_the_files_give(run_python):
    """This repository's own: a result file or a table that is changed alone makes this fail."""
    child = run_python("-m", "bench.plot", "--check", check=False)
    assert child.returncode == 0, child.stdout + child.stderr


def test_from_files_to_readme_and_figures(results, readme, capsys):
    assert run(results, readme, "--check") == 1
    assert run(results, readme, "--readme") == 0
    written = readme.read_text()
    assert written.startswith("before\n\n") and written.endswith("\n\nafter\n")
    for name in ("ops-core", "ops-attention", "training", "convergence"):
        assert (results / "imaginary" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](results/imaginary/{name}.png)" in written
    assert run(results, readme, "--check") == 0
    (results / "imaginary" / "training.png").unlink()
    assert run(results, readme, "--check") == 1
    assert "no figure" in capsys.readouterr().out
    assert run(results, readme) == 0  # draws it again, and leaves the document alone
    assert run(results, readme, "--check") == 0
    readme.write_text(written.replace("700 / ", "600 / ").replace("21.0x", "22.0x").replace("26.0x", "27.0x"))
    assert run(results, readme, "--check") == 1


def line(text: str, *words: str) -> list[str]:
    """The cells of the first line of a table that begins with these cells."""
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("|")]
    return next(row for row in rows if row[: len(words)] == list(words))


def test_numbers_in_the_tables(results, tmp_path):
    found, refused = tables.load(results)
    assert refused == []
    text = plot.section(found, tmp_path)
    small = line(text, "S stage 1, 224")
    assert small[1:3] == ["64 x 56 x 56", "128"]  # bfloat16 at the largest batch, not 32 nor float32
    assert small[6:9] == ["cuda", "26.0x", "6.50x"]
    assert line(text, "B/L stage 1, 384")[3] == "out of memory"
    assert line(text, "B/L stage 1, 384")[7] == tables.DASH  # against nothing
    assert line(text, "S stage 1, 384")[6] == "triton"  # cuda's numbers were wrong
    trained = line(text, "stvit_small", "224", "128")
    assert trained[3:8] == ["700", "1,500 (max-autotune)", "2,600 (graph)", "3.71x", "1.73x"]
    context = line(text, "convnext_tiny.fb_in1k")  # timm's, compiled; nobody to compare it with
    assert context[3:8] == [tables.DASH, "3,000 (compile)", *[tables.DASH] * 3]
    run = line(text, "triton, seed 0")
    assert run[3:6] == ["72.61%", "100.0", "100.0"] and run[1] == "1000" and run[7] == "passed"
    assert 0 < float(run[6]) < float(line(text, "reference, seed 1")[6])
    assert "NVIDIA Imaginary 1" in text and "0123456789" in text


def test_without_gpu_files_one_sentence_says_so(tmp_path, readme):
    (tmp_path / "results").mkdir()
    assert run(tmp_path / "results", readme, "--readme") == 0
    assert plot.LEGENDS["nothing"] in readme.read_text() and "|" not in readme.read_text()


def test_numbers_of_a_cpu_never_enter(results, tmp_path, readme, capsys):
    cpu = {**GPU, "device": "cpu", "name": "x86_64"}
    put(tmp_path / "others" / "cpu", "ops", environment=cpu, rows=ops_rows("core", ["S/1/224"]))
    put(tmp_path / "others" / "imaginary", "training", environment=cpu, rows=training_rows({"stvit_small": 1.0}))
    assert run(tmp_path / "others", readme, "--readme") == 0
    assert capsys.readouterr().out.count("left out: ") == 2
    assert plot.LEGENDS["nothing"] in readme.read_text()
    assert not list((tmp_path / "others").rglob("*.png"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "ops.json").write_text("{"),
        lambda folder: (folder / "ops.json").write_text('{"benchmark": "ops"}'),
        lambda folder: put(folder, "ops", rows=[{"op": "core"}]),
        lambda folder: put(folder, "training", "again", rows=training_rows({"stvit_small": 1.0})),
    ],
    ids=["no JSON", "no result", "a row without its keys", "measured twice"],
)
def test_a_file_that_cannot_be_used(results, readme, capsys, spoil):
    spoil(results / "imaginary")
    with pytest.raises(SystemExit) as ended:
        run(results, readme, "--readme")
    assert ended.value.code == 2
    assert "results/imaginary/" in capsys.readouterr().err


def test_a_document_without_its_markers(results, readme, capsys):
    readme.write_text("nothing\n")
    with pytest.raises(SystemExit) as ended:
        run(results, readme, "--check")
    assert ended.value.code == 2 and plot.BEGIN in capsys.readouterr().err


def test_failed_runs_are_drawn_as_such(tmp_path, readme):
    """A contender without numbers, a run that diverged: figures and tables say so instead of breaking."""
    put(tmp_path / "results" / "gpu", "convergence", **convergence_file("OutOfTime: 3 of 9 steps"))
    rows = ops_rows("core", ["S/1/224"])
    for row in rows:
        if row["contender"] != "cuda":
            row.update(status="error", error="RuntimeError: no", peak_bytes=None)
    put(tmp_path / "results" / "gpu", "ops", rows=rows)
    assert run(tmp_path / "results", readme, "--readme") == 0
    assert line(readme.read_text(), "triton, seed 0")[-1] == "failed"
    assert line(readme.read_text(), "S stage 1, 224")[3] == "failed"


def test_what_is_modelled_stands_apart_and_behind_what_is_timed(results, readme, capsys):
    rows = [
        {
            "model": "stvit_small",
            "size": 224,
            "mode": "train",
            "side": side,
            "batch": 128,
            "mb": mb,
            "kernels": 9,
            "us": us,
        }
        for side, mb, us in (("authors", 800.0, 300.0), ("ours", 400.0, 150.0))
    ]
    (results / "predicted.json").write_text(json.dumps({"gpu": "H100", "rows": rows}))
    kernel = {"kernel": "walk_kernel", "predicted_us": 100.0, "predicted_launches": 8, "timed_us": 130.0, "ratio": 1.3}
    put(results / "imaginary", "kernels", rows=[kernel, {**kernel, "kernel": "fold", "timed_us": None, "ratio": None}])
    assert run(results, readme, "--readme") == 0
    text = readme.read_text()
    timed, modelled = text.split("### Counted and modelled, not timed")
    assert line(modelled, "stvit_small", "224", "training step")[-3:] == ["300", "150", "2.00x"]
    assert "one H100, batch 128" in modelled and "(results/predicted.json)" in modelled
    assert line(timed, "walk_kernel") == ["walk_kernel", "8", "130", "100", "1.30"]
    assert line(timed, "fold")[2:] == [tables.DASH, "100", tables.DASH]
    (results / "predicted.json").write_text('{"rows": []}')
    with pytest.raises(SystemExit) as ended:
        run(results, readme, "--check")
    assert ended.value.code == 2 and "predicted.json" in capsys.readouterr().err
