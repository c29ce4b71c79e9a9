"""FSDP2, FSDP, DDP and DTensor: two processes' step is the one of the joined batch, and their weights can be moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import sharded_cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left what went wrong."""
    folder = tmp_path_factory.mktemp("sharded")
    sharded_cases.run(folder)
    return folder


@pytest.mark.xdist_group("sharded")  # one pair of processes for all
@pytest.mark.parametrize("case", sharded_cases.CASES)
def test_two_processes(case: str, folder: Path) -> None:
    wrong = [(folder / f"{case}.{rank}") for rank in range(sharded_cases.PROCESSES)]
    assert not [path.read_text() for path in wrong if path.exists()]
