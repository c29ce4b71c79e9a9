"""Images to train on, and the program as a process of its own that can be killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stvit.train.cli import main
from tests.support.train_cases import flags, write_photos

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def trained(photos, tmp_path_factory):
    """The output folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    assert main([*flags(photos), "--epochs", "2", "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def train(tmp_path_factory):
    """The program killed as `train_killer.py` says, then run to its end: (exit codes, what was printed)."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "tests.support.train_killer"]
    output = tmp_path_factory.mktemp("killer") / "output"
    with subprocess.Popen(
        command, env=environ, text=True, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as killer:

        def run(arguments, kills=(), processes=1, plant=""):
            output.write_text("")
            job = {"arguments": arguments, "processes": processes, "kills": list(kills), "output": str(output)}
            job["plant"] = plant
            killer.stdin.write(json.dumps(job) + "\n")
            killer.stdin.flush()
            codes = json.loads(killer.stdout.readline())
            printed = output.read_text()
            assert "Traceback" not in printed, printed
            return codes, printed

        yield run
        killer.stdin.close()
