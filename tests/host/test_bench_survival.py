"""bench.survival draws its moments by seed and tells runs apart by the last bit of a weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.survival import run
from tests.support.train_killer import EVENTS

RESULT = Path(__file__).resolve().parents[2] / "bench" / "results" / "survival.json"


def test_moments_are_drawn_by_seed_and_of_another_kind_each() -> None:
    kills = run.draw(5, 2)
    assert kills == run.draw(5, 2) != run.draw(5, 3)
    kinds = [kind for _, kind, _, _ in kills]
    assert len(set(kinds)) == 5 and set(run.MOMENTS) <= set(EVENTS)


def test_one_bit_of_a_weight_makes_another_digest(tmp_path: Path) -> None:
    digests = []
    for value in (1.0, 1.0, 1.0000001):
        contents = {name: {"weight": torch.tensor([value])} for name in ("model", "model_ema", "optimizer")}
        torch.save(contents, tmp_path / "checkpoint.pth")
        digests.append(run.digest(tmp_path / "checkpoint.pth"))
    assert digests[0] == digests[1] != digests[2]


def test_the_recorded_runs_are_alike_and_every_kill_struck() -> None:
    recorded = json.loads(RESULT.read_text())
    unbroken, killed = recorded["rows"]
    assert recorded["alike"] and run.alike((unbroken, killed)) and not unbroken["kills"]
    assert len(killed["kills"]) == 5 and 0 not in killed["exit_codes"][:-1] and killed["exit_codes"][-1] == 0
    assert not run.alike((unbroken, killed | {"losses": killed["losses"][:-1] + [0.0]}))


def test_the_page_has_the_loaders_figures() -> None:
    page = (RESULT.parents[2] / "docs" / "training.md").read_text()
    for row in json.loads((RESULT.parent / "loader.json").read_text())["rows"]:
        cells = [row["version"], f"{row['cpu_ms_per_image']:.2f}", f"{row['images_per_cpu_second']:.0f}"]
        assert f"| {' | '.join(cells)} | {row['second_epoch_first_batch_s']:.2f} |" in page


def test_a_folder_without_photographs_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run.main(["--data", str(tmp_path)])
    assert error.value.code == 2 and "no folder train" in capsys.readouterr().err
