"""Every file that a benchmark writes: whole or not at all, and one line where it can't be written."""

import json
import re
from pathlib import Path

import pytest
import torch

from bench.harness import record
from bench.traffic import run as traffic
from tests.support.disk import disk_of

BENCH = Path(__file__).resolve().parents[2] / "bench"
CPU = torch.device("cpu")


def failed(capsys, path):
    """What the program said as it ended: one line, which names the file."""
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: ") and said.count("\n") == 1
    return said


def test_a_full_disk_is_one_line_and_costs_no_older_file(tmp_path, capsys):
    path = record.write(tmp_path / "new" / "ops.json", "ops", CPU, [{"op": "core"}])
    before = path.read_bytes()
    with disk_of(1000), pytest.raises(SystemExit) as ended:
        record.write(path, "ops", CPU, [{"op": "core"}] * 100)
    assert ended.value.code == 1 and "file too large" in failed(capsys, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_folder_that_can_not_be_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "ops.json", tmp_path / "file" / "new" / "ops.json"):
        with pytest.raises(SystemExit) as ended:
            record.write(path, "ops", CPU, [])
        assert ended.value.code == 1 and re.search("file exists|not a directory", failed(capsys, path))


def test_programs_end_likewise(tmp_path, capsys, monkeypatch):
    """Here one that keeps its figures beside its code."""
    monkeypatch.setattr(traffic, "CEILING", tmp_path / "ceiling.json")
    monkeypatch.setattr(traffic, "ceilings", lambda args: {"activations": {"moved_mb": 1.0}})
    assert traffic.main(["--quick", "--record"]) == 0
    capsys.readouterr()
    with disk_of(10), pytest.raises(SystemExit) as ended:
        traffic.main(["--quick", "--record"])
    assert ended.value.code == 1 and failed(capsys, traffic.CEILING)
    assert json.loads(traffic.CEILING.read_text())["ceilings"]["activations"] == {"moved_mb": 1.0}


def test_nothing_is_written_around_it():
    """Whoever calls write_text writes into what `written` yields, or into a log or a temporary folder."""
    scratch = {"training/case.py", "training/run.py", "gpu_check/stage.py", "machine/sass_count.py"}
    for file in BENCH.rglob("*.py"):
        if str(file.relative_to(BENCH)) not in scratch:
            for line in re.findall(r".*(?:write_text|savefig)\(.*", file.read_text()):
                assert re.match(r" +(partial\.write_text|figure\.savefig)\((partial)?", line), f"{file}: {line}"
