"""What loading costs, of this version of the training program and of another one in a checkout beside it.

Processor time, which a busy machine hardly changes: of one image without loader processes, and of the process that
trains where two loader processes bring the images. And the wait for the second epoch's first batch, by the clock, with
those two. Each is the least of several runs, the versions in turn. Random erasing is off: it runs elsewhere by now.

    git worktree add ../before COMMIT
    python -m bench.survival.loader --data photographs --before ../before
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness import console, record
from bench.survival.run import ROOT, links

FLAGS = (
    "--data-set FOLDER --model stvit_tiny --input-size 64 --batch-size 64 --reprob 0 --threads 1 --device cpu".split()
)
Row = dict[str, Any]


def measure(version: Path, data: Path, workers: int) -> Row:
    """Two epochs by the package in `version`."""
    command = [sys.executable, str(ROOT / "bench" / "survival" / "epochs.py"), *FLAGS, "--data-path", str(data)]
    environ = os.environ | {"PYTHONPATH": str(version.resolve()), "OMP_NUM_THREADS": "1"}
    command += ["--num_workers", str(workers)]
    child = subprocess.run(command, env=environ, text=True, stdout=subprocess.PIPE, check=True, cwd=data)
    return dict(json.loads(child.stdout.splitlines()[-1]))


def summary(name: str, commit: str, alone: Sequence[Row], helped: Sequence[Row]) -> Row:
    images = alone[0]["images"]
    each = min(row["cpu_s"] for row in alone) / images
    return {
        "version": name,
        "commit": commit,
        "cpu_ms_per_image": round(1e3 * each, 4),
        "images_per_cpu_second": round(1 / each, 1),
        "training_process_cpu_ms_per_image": round(1e3 * min(row["cpu_s"] for row in helped) / images, 4),
        "second_epoch_first_batch_s": round(min(row["first_batch_s"] for row in helped), 3),
        "images": images,
        "repeats": len(alone),
    }


def commit(folder: Path) -> str:
    words = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, text=True, stdout=subprocess.PIPE, check=True).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    p = console.parser("survival.loader", __doc__)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="DIR/{train,val or test}/CLASS/*.jpg")
    p.add_argument("--before", type=Path, required=True, metavar="DIR", help="a checkout of the other version")
    p.add_argument("--images", type=console.positive, default=100, metavar="N", help="of each class (100)")
    p.add_argument("--repeats", type=console.positive, default=3, metavar="N", help="(3)")
    p.add_argument("--out", type=Path, default=record.RESULTS / "loader.json", metavar="FILE")
    options = p.parse_args(arguments)
    versions = {"before": options.before, "after": ROOT}
    runs: dict[tuple[str, int], list[Row]] = {}
    with tempfile.TemporaryDirectory() as place:
        links(options.data, options.images, Path(place))
        for _ in range(options.repeats):
            for workers in (0, 2):
                for name, folder in versions.items():
                    runs.setdefault((name, workers), []).append(measure(folder, Path(place), workers))
    rows = [summary(name, commit(folder), runs[name, 0], runs[name, 2]) for name, folder in versions.items()]
    record.write(options.out, "survival.loader", torch.device("cpu"), rows, flags=" ".join(FLAGS))
    header = [name for name in rows[0] if name not in ("images", "repeats")]
    console.table("", header, [[str(row[name]) for name in header] for row in rows], 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
