"""Command lines drawn from the programs' flags: the exit code is 0, 1 or 2, an error is one line, never a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import stvit
import stvit.info
import stvit.visualize
from stvit.backends import explain
from stvit.train.cli import main, parse_args
from stvit.train.errors import Stop
from stvit.train.flags import build_parser
from tests.support.cases import PHASES
from tests.support.train_cases import SMALL, write_photos

MEMORY = 4 * 2**30  # bytes that runs may take beside what is there: a batch of 2**31 ends one, not the machine
# Flags that would start processes, call a service, write where no test may, or print the page of help.
LEFT_OUT = {"--help", "--processes", "--world_size", "--dist_url", "--wandb", "--output_dir", "--list-recipes"}
FLAGS = {
    action.option_strings[0]: action
    for action in build_parser()._actions
    if action.option_strings and not LEFT_OUT & set(action.option_strings)
}
FILES = ("junk", "folder", "missing", "weights.pth", "flags.yaml", "photos")
TEXTS = st.sampled_from(["", "x", "-1", "nan", "auto", "none", "a b", "é", *FILES, "cpu", "cuda", "meta", "sgd"])
INTEGERS = st.sampled_from([0, 1, 2, 3, 7, 16, 64, 1000, -1, 2**31, 2**63, 10**30]).map(str)
REALS = st.sampled_from(["0", "0.1", "0.5", "0.9", "1", "1.5", "-1", "1e-3", "1e30", "1e400", "nan", "inf", "-inf"])
NAMES = {
    "--model": ["stvit_tiny", "stvit_smal", "test_vit", "resnet", "hf-hub:"],
    "--aa": ["none", "rand-m9", "augmix", "original", "v0", "rand", "rand-mx", "3augment"],
    "--sched": ["cosine", "step", "plateau", "none", "poly", "tanh", "multistep", "coz"],
    "--opt": ["adamw", "sgd", "lion", "muon", "lbfgs", "nadamw", "fusedadam", "adamx", "lookahead_sgd"],
    "--amp-dtype": ["auto", "bf16", "fp16", "fp8"],
    "--backend": ["auto", "reference", "cuda", "metal"],
    "--device": ["cpu", "cuda", "cuda:7", "meta", "cpu:3", "gpu", "mps"],
    "--drop-path-schedule": ["0:0.1", "0:0.1,1:0.3", "1:0.2", "0:nan", "0:1", ":", ",", "0:0.1:2"],
    "--data-set": ["DIGITS", "SYNTHETIC", "FOLDER", "IMNET", "CIFAR", "INAT", "torch/x", "nope"],
    "--throughput": ["1", "3", "0", "-1", "x"],  # so many steps are run, however long that takes
    "--recipe": ["small-224", "nope", "digits"],
}


@st.composite
def words(draw: st.DrawFn, flag: str) -> list[str]:
    """The flag with a value that fits its type, or sometimes with one that doesn't."""
    action: Any = FLAGS[flag]
    if action.nargs == 0:
        return [draw(st.sampled_from(action.option_strings))]
    by_type: dict[Any, st.SearchStrategy[str]] = {int: INTEGERS, float: REALS}
    choices = NAMES.get(flag) or action.choices
    value = st.sampled_from([str(choice) for choice in choices]) if choices else by_type.get(action.type, TEXTS)
    if draw(st.integers(0, 7)) == 0:
        value = TEXTS | INTEGERS | REALS
    count = action.nargs if isinstance(action.nargs, int) else draw(st.integers(0, 3)) if action.nargs else 1
    return [flag, *(draw(value) for _ in range(count))]


@st.composite
def command_lines(draw: st.DrawFn, most: int) -> list[str]:
    flags = draw(st.lists(st.sampled_from(sorted(FLAGS)), max_size=most, unique=True))
    return [word for flag in flags for word in draw(words(flag))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of all runs, with the files that flags name; what runs set is set back after all."""
    folder = tmp_path_factory.mktemp("programs")
    write_photos(folder / "photos")
    (folder / "folder").mkdir()
    (folder / "junk").write_bytes(b"\x89PNG no image")
    (folder / "flags.yaml").write_text("lr: 0.1\nepochs: [1, 2]\n")
    Image.new("RGB", (20, 30), (200, 10, 20)).save(folder / "photo.png")
    stvit.save_checkpoint(folder / "weights.pth", model=stvit.stvit_tiny(num_classes=3).state_dict())
    threads, precision, start = torch.get_num_threads(), torch.get_float32_matmul_precision(), Path.cwd()
    memory = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, memory[1]))
    os.chdir(folder)
    yield folder
    os.chdir(start)
    resource.setrlimit(resource.RLIMIT_AS, memory)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def ends(program: Callable[[list[str]], int | None], arguments: list[str]) -> tuple[int, str]:
    """(exit code, what was said on standard error)."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = program(arguments) or 0
        except SystemExit as end:  # argparse, and `sys.exit("error: ...")`
            code = end.code if isinstance(end.code, int) else 1
            told.write("" if isinstance(end.code, int) else str(end.code))
    return code, told.getvalue().strip()


@settings(max_examples=80, phases=PHASES)
@given(arguments=command_lines(4))
def test_flags_of_training_are_understood_or_refused(place: Path, arguments: list[str]) -> None:
    try:
        args = parse_args(arguments)
    except Stop as stop:
        assert stop.exit_code == 2 and len(str(stop).splitlines()) == 1, repr(stop)
    else:
        assert all(hasattr(args, action.dest) for action in FLAGS.values())


@settings(max_examples=12, phases=PHASES)
@given(arguments=command_lines(2))
@pytest.mark.filterwarnings("ignore")
def test_training_ends_well_or_in_one_line(place: Path, arguments: list[str]) -> None:
    """One step on random images, unless the flags that are drawn say otherwise."""
    tiny = [*SMALL, "--synthetic", "--batch-size", "2", "--no-model-ema", "--epochs", "1"]
    code, told = ends(main, [*tiny, *arguments, "--max-steps", "1", "--num_workers", "0"])
    errors = [line for line in told.splitlines() if line.startswith("main.py: ")]
    assert code in (0, 1, 2) and "Traceback" not in told, told
    assert len(errors) == (code > 0), told


shapes = st.lists(st.integers(-1, 70) | st.sampled_from([2**31, 10**20]), min_size=4, max_size=4)
explained = st.builds(
    lambda x, t: "x".join(map(str, x)) + f"/{t[0]}x{t[1]}", shapes, st.tuples(*[st.integers(0, 9)] * 2)
)


@settings(max_examples=30, phases=PHASES)
@given(
    arguments=st.lists(
        st.sampled_from([["--json"], ["--nope"], ["word"], ["--dtype", "fp7"]])
        | st.sampled_from([*explain.DTYPES]).map(lambda name: ["--dtype", name])
        | st.sampled_from([*explain.GPUS, "", "tpu"]).map(lambda name: ["--gpu", name])
        | (explained | TEXTS).map(lambda text: ["--explain", text]),
        max_size=3,
    ),
    backend=st.sampled_from(["", "auto", "triton", "nope", "a\nb"]),
)
def test_info_ends_well_or_in_one_line(arguments: list[list[str]], backend: str) -> None:
    with mock.patch.dict(os.environ, {"STVIT_BACKEND": backend}):
        code, told = ends(stvit.info.main, [word for part in arguments for word in part])
    assert code in (0, 2) and "Traceback" not in told
    assert (code == 2) == (" error: " in told) and told.count(" error: ") <= 1, told


@settings(max_examples=15, phases=PHASES)
@given(
    image=st.sampled_from([[], ["photo.png"], ["photos/val/red"], ["folder"], ["junk"], ["missing"]]),
    size=st.sampled_from(["32", "33", "1", "0", "-3", "x", "1000000000"]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "--checkpoint": st.sampled_from(["weights.pth", "junk", "missing", "folder", ""]),
            "--model": st.sampled_from(["stvit_tiny", "stvit_smal", "", "resnet18"]),
            "--output": st.sampled_from(["drawn.png", "folder", "missing/x.png", "x.nope", "", "drawn"]),
            "--point": st.sampled_from(["0 0", "31 31", "32 0", "-1 3", "1", "a b"]),
            "--backend": st.sampled_from(["auto", "cuda", "reference", "nope"]),
            "--device": st.sampled_from(["cpu", "cuda", "meta", "nope", ""]),
            "--seed": st.sampled_from(["0", "-1", "x", str(2**63), str(10**30)]),
        },
    ),
)
@pytest.mark.filterwarnings("ignore")
def test_visualize_ends_well_or_in_one_line(place: Path, image: list[str], size: str, options: dict[str, str]) -> None:
    given = {"--model": "stvit_tiny", **options}
    arguments = [
        *image,
        "--input-size",
        size,
        *(word for flag, text in given.items() for word in [flag, *text.split()]),
    ]
    code, told = ends(stvit.visualize.main, arguments)
    assert code in (0, 1, 2) and "Traceback" not in told
    errors = [line for line in told.splitlines() if line.startswith("python -m stvit.visualize: ")]
    assert len(errors) == (code > 0), told
