"""What every test runs under: kernels interpreted or emulated where there is no GPU, fixed seeds, fresh memory full of
NaN."""

import gc
import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path

UNDER_XDIST = "PYTEST_XDIST_WORKER" in os.environ
if UNDER_XDIST:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores; children inherit it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it in deterministic mode

import torch  # noqa: E402

# Triton reads this once, when it is first imported, and parts of torch import Triton: hence before everything else.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from bench.machine.processes import compiling_processes  # noqa: E402
from stvit.backends import extension  # noqa: E402
from tests.support import emulated  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

if UNDER_XDIST:
    torch.set_num_threads(1)
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from tests.support.interpreter import quicken

    quicken()

hypothesis.settings.register_profile(
    "stvit",
    deadline=None,  # the first call of a kernel compiles it
    max_examples=16,
    derandomize=True,  # everyone's run is the same; `make fuzz` draws anew
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile(
    "fuzz", hypothesis.settings.get_profile("stvit"), derandomize=False, report_multiple_bugs=False
)
hypothesis.settings.load_profile("stvit")


def pytest_collection_finish() -> None:
    """Spares what is imported by then every later collection of garbage: half a second each, and benchmarks ask for
    one before each measurement."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors live: "cuda" where kernels run on a GPU, "cpu" where they are interpreted."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "cuda" if torch.cuda.is_available() and not interpreted else "cpu"


@pytest.fixture(scope="module", params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """Each backend with kernels of its own, or those that a test is parametrized with.

    Where tensors live on the CPU "cuda" is the same sources, compiled for the CPU: see emulated.py.
    """
    if request.param != "cuda":
        yield request.param
        return
    if device == "cpu":
        before = extension.use(emulated.extension())
        yield "cuda"
        extension.use(before)
    else:
        try:
            extension.load()
        except extension.ExtensionError as error:
            pytest.skip(f"no CUDA extension: {error}")
        yield "cuda"


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN (integers: the largest), so that an unwritten element shows.

    PyTorch does so in deterministic mode, inside operators too. `warn_only` leaves every operation allowed.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    yield
    torch.use_deterministic_algorithms(was_on, warn_only=was_warning)


@pytest.fixture(scope="session")
def compiling() -> Iterator[Executor]:
    """A process in which Triton compiles, whatever it does in this one. What it runs has to be importable there."""
    with compiling_processes(1) as process:
        yield process


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a fresh interpreter and return its output; Triton is the real one there, not the interpreter.

    `run_python("-c", code, cwd=..., env={...})`; env adds to the present environment, a None value removes a name.
    A failure raises AssertionError with the child's output; `check=False` returns it instead.
    """

    def run(
        *arguments: str, cwd: Path = ROOT, env: dict[str, str | None] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        wanted: dict[str, str | None] = {**os.environ, "TRITON_INTERPRET": None, "PYTHONPATH": None, **(env or {})}
        child = subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env={name: value for name, value in wanted.items() if value is not None},
            text=True,
            capture_output=True,
            timeout=600,
        )
        if check:
            assert child.returncode == 0, f"exit code {child.returncode}\n{child.stdout}\n{child.stderr}"
        return child

    return run
