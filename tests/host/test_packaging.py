"""The sdist and the wheel hold what they must; checkout, editable install and wheel all import the kernels."""

import importlib
import importlib.util
import json
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from stvit.backends import build
from tests.support import extensions

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    *("stvit", "kernels", "csrc", "tests", "bench", "docs"),
    *("main.py", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "constraints.txt"),
)
LITTER = shutil.ignore_patterns("__pycache__", "*.py[cod]", "*.so", "_C.json", "*.egg-info", ".*", "build")
KERNELS = sorted(f"stvit.kernels.{path.stem}" for path in (ROOT / "kernels").glob("*.py"))


class Built(NamedTuple):
    checkout: Path  # a clean copy of the sources
    sdist: list[str]  # file names, relative to the archive's only folder
    wheel: list[str]  # file names
    unpacked: Path  # the wheel's contents
    editable: Path  # the contents of the wheel that pip makes for an editable install


def copy_sources(to: Path) -> Path:
    to.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=LITTER)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, to / name)
    return to


@pytest.fixture(scope="module")
def built(tmp_path_factory, run_python) -> Built:
    """Built as `pip` and `python -m build` do, without isolation and without the network."""
    folder = tmp_path_factory.mktemp("packaging")
    checkout = copy_sources(folder / "checkout")
    offline = {"PIP_NO_INDEX": "1", "STVIT_BUILD_CUDA": "0"}
    dist = folder / "dist"  # the sdist first, and then the wheel from the sdist
    run_python("-m", "build", "--no-isolation", "--outdir", str(dist), str(checkout), cwd=folder, env=offline)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        sdist_names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    with zipfile.ZipFile(wheel) as archive:
        wheel_names = archive.namelist()
        archive.extractall(folder / "wheel")
    build_editable = "from setuptools import build_meta; build_meta.build_editable('../editable-dist')"
    run_python("-c", build_editable, cwd=checkout, env=offline)
    (editable,) = (folder / "editable-dist").glob("*.whl")
    with zipfile.ZipFile(editable) as archive:
        archive.extractall(folder / "editable")
    return Built(checkout, sdist_names, wheel_names, folder / "wheel", folder / "editable")


@pytest.fixture
def bare_python(run_python):
    """Like run_python, but with the dependencies alone on the path: no stvit that is installed here gets in the way."""
    dependencies = ("torch", "numpy", "safetensors", "triton")
    specs = [importlib.util.find_spec(name) for name in dependencies]
    folders = {str(Path(spec.origin).parent.parent) for spec in specs if spec is not None}

    def run(code: str, *path: Path, cwd: Path) -> list[str]:
        python_path = os.pathsep.join([*map(str, path), *sorted(folders)])
        return json.loads(run_python("-S", "-c", code, cwd=cwd, env={"PYTHONPATH": python_path}).stdout)

    return run


# Prints where stvit and every kernel module came from.
IMPORT_ALL = f"""
import importlib, json
names = ["stvit", *{KERNELS}]
print(json.dumps([importlib.import_module(name).__file__ for name in names]))
"""


def expected_files(package: Path, kernels: Path) -> list[str]:
    return [str(package / "__init__.py"), *(str(kernels / f"{name.rsplit('.', 1)[1]}.py") for name in KERNELS)]


def test_there_are_kernels_and_no_init():
    assert KERNELS
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow Hugging Face's `kernels`


def test_wheel_has_the_package_and_nothing_else(built):
    sources = {path.relative_to(built.checkout).as_posix() for path in (built.checkout / "stvit").rglob("*.py")}
    kernels = {f"stvit/kernels/{path.name}" for path in (built.checkout / "kernels").glob("*.py")}
    code = {name for name in built.wheel if ".dist-info/" not in name}
    cuda = {f"stvit/csrc/{path.name}" for path in build.files(built.checkout / "csrc")}
    assert code == sources | kernels | cuda | {"stvit/py.typed"}
    metadata = {name.split("/", 1)[1] for name in built.wheel if ".dist-info/" in name}
    assert {"licenses/LICENSE", "entry_points.txt"} <= metadata


def test_what_an_index_shows(built):
    """Links that hold away from the repository, and the extras that messages and pages name."""
    (path,) = built.unpacked.glob("*.dist-info/METADATA")
    header, _, readme = path.read_text(encoding="utf-8").partition("\n\n")
    assert "Description-Content-Type: text/markdown" in header and readme.startswith("# stvit")
    assert [link for link in re.findall(r"\]\(([^)]*)\)", readme) if not link.startswith("https://")] == []
    assert "https://arxiv.org/abs/2211.11167" in readme and "Troubleshooting, Compatibility" in readme
    extras = set(re.findall(r"^Provides-Extra: (\w+)$", header, re.MULTILINE))
    files = [*(ROOT / "stvit").rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    texts = [file.read_text() for file in files]
    named = {name for text in texts for name in re.findall(r"(?:stvit|'\.)\[(\w+)\]'", text)}
    assert {"train", "export"} <= named <= extras


def test_console_scripts_name_functions():
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"stvit-train", "stvit-info", "stvit-visualize"}
    for target in scripts.values():
        module, name = target.split(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_sdist_has_every_source(built):
    sources = {path.relative_to(built.checkout).as_posix() for path in built.checkout.rglob("*") if path.is_file()}
    sources = {name for name in sources if name.split("/")[0] in SOURCES}
    assert sources <= set(built.sdist), f"missing from the sdist: {sorted(sources - set(built.sdist))}"
    cuda = {Path(name).suffix for name in built.sdist if name.startswith("csrc/")}
    assert cuda >= {".cu", ".cuh", ".cpp", ".h"}


def test_version_has_one_source(built, bare_python):
    (metadata,) = built.unpacked.glob("stvit-*.dist-info/METADATA")
    (version,) = [line.split(": ")[1] for line in metadata.read_text().splitlines() if line.startswith("Version: ")]
    code = "import json, stvit; print(json.dumps([stvit.__version__]))"
    assert bare_python(code, built.unpacked, cwd=built.unpacked) == [version]


def test_checkout_imports_kernels(built, bare_python, tmp_path):
    found = bare_python(IMPORT_ALL, built.checkout, cwd=tmp_path)
    assert found == expected_files(built.checkout / "stvit", built.checkout / "kernels")


def test_wheel_imports_kernels(built, bare_python, tmp_path):
    found = bare_python(IMPORT_ALL, built.unpacked, cwd=tmp_path)
    assert found == expected_files(built.unpacked / "stvit", built.unpacked / "stvit" / "kernels")


def test_editable_install_imports_kernels(built, bare_python, tmp_path):
    enable = f"import site; site.addsitedir({str(built.editable)!r})\n"
    beside = tmp_path / "beside"  # where a checkout is, in a folder of the package's name
    (beside / "stvit").mkdir(parents=True)
    for cwd, first in ((tmp_path, ""), (beside, f"import sys; sys.path.insert(0, {str(beside)!r})\n")):
        found = bare_python(enable + first + IMPORT_ALL, built.editable, cwd=cwd)
        assert found == expected_files(built.checkout / "stvit", built.checkout / "kernels")


def test_the_package_named_kernels_is_not_shadowed(built, bare_python, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    theirs = "import json, kernels; print(json.dumps([kernels.__file__]))"
    assert bare_python(theirs, tmp_path, cwd=built.checkout) == [str(tmp_path / "kernels" / "__init__.py")]
    both = "import kernels\n" + IMPORT_ALL
    expected = expected_files(built.checkout / "stvit", built.checkout / "kernels")
    assert bare_python(both, tmp_path, cwd=built.checkout) == expected


def test_the_cuda_sources_are_found(built, bare_python, tmp_path):
    code = "import json; from stvit.backends import extension; print(json.dumps([str(extension.sources())]))"
    assert bare_python(code, built.checkout, cwd=tmp_path) == [str(built.checkout / "csrc")]
    assert bare_python(code, built.unpacked, cwd=tmp_path) == [str(built.unpacked / "stvit" / "csrc")]
    enable = f"import site; site.addsitedir({str(built.editable)!r})\n"
    assert bare_python(enable + code, built.editable, cwd=tmp_path) == [str(built.checkout / "csrc")]


@pytest.fixture
def wheel(tmp_path, run_python) -> Callable[..., tuple[Path | None, str]]:
    """wheel(csrc, **environment): builds a wheel from this checkout with those CUDA sources, as
    `pip install --no-build-isolation` does. The wheel, None where that failed, and what was said."""

    def make(csrc: Path, **environment: str) -> tuple[Path | None, str]:
        checkout = copy_sources(tmp_path / "checkout")
        shutil.rmtree(checkout / "csrc")
        shutil.copytree(csrc, checkout / "csrc")
        unset = dict.fromkeys(("STVIT_BUILD_CUDA", "CUDA_PATH", "MAX_JOBS"))
        arguments = ("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(checkout))
        child = run_python(*arguments, cwd=tmp_path, env={**unset, **environment}, check=False)
        found = next((tmp_path / "dist").glob("*.whl"), None)
        assert (child.returncode == 0) == (found is not None)
        return found, child.stdout + child.stderr

    return make


@pytest.fixture
def stand_in(tmp_path) -> Path:
    return extensions.write_stand_in(tmp_path / "csrc")


needs_nvcc = pytest.mark.skipif(build.toolkit() is None, reason="needs nvcc")


@needs_nvcc
def test_a_wheel_carries_the_binary_where_it_can_be_built(wheel, stand_in, tmp_path, run_python):
    found, said = wheel(stand_in, TORCH_CUDA_ARCH_LIST="7.5 8.0;9.0", STVIT_BUILD_CUDA="1")
    assert found and "linux" in found.name, said
    with zipfile.ZipFile(found) as archive:
        assert {f"stvit/{build.FILE}", "stvit/_C.json", "stvit/csrc/kernel.cu"} <= set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    code = "import json; from stvit.backends import extension; print(json.dumps(extension.describe()))"
    # No GPU in sight: beside one that it holds no code for it would not be loaded.
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "CUDA_HOME": "/nowhere", "CUDA_VISIBLE_DEVICES": ""}
    told = json.loads(run_python("-c", code, cwd=tmp_path, env=environment).stdout)
    assert told["origin"] == f"installed: {tmp_path}/installed/stvit/{build.FILE}" and told["reasons"] == []
    assert told["built"]["architectures"] == "8.0 9.0" and told["built"]["device"] == "cuda"
    record = json.loads((tmp_path / "installed" / "stvit" / "_C.json").read_text())
    assert record["architectures"] == ["8.0", "9.0"]


def test_a_wheel_without_the_extension_says_why(wheel, stand_in):
    found, said = wheel(stand_in, CUDA_HOME="/nowhere")
    assert found and found.name.endswith("-py3-none-any.whl")
    told = [line for line in said.splitlines() if "without the CUDA extension" in line]
    assert len(told) == 1 and "/nowhere/bin holds no nvcc that runs: install the CUDA toolkit" in told[0]


def test_the_extension_is_left_out_when_told_so(wheel, stand_in):
    found, said = wheel(stand_in, STVIT_BUILD_CUDA="0", CUDA_HOME="/nowhere")
    assert found and found.name.endswith("-py3-none-any.whl") and "without the CUDA extension" not in said


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"STVIT_BUILD_CUDA": "1", "CUDA_HOME": "/nowhere"}, "and STVIT_BUILD_CUDA=1: /nowhere/bin holds no nvcc"),
        ({"STVIT_BUILD_CUDA": "yes"}, "error: STVIT_BUILD_CUDA: expected 0, 1 or nothing, got 'yes'"),
        pytest.param({"TORCH_CUDA_ARCH_LIST": "7.5", "STVIT_BUILD_CUDA": "1"}, "from 8.0 on", marks=needs_nvcc),
        pytest.param({"TORCH_CUDA_ARCH_LIST": "8.0;x"}, "Unknown CUDA arch (x)", marks=needs_nvcc),
        pytest.param({"TORCH_CUDA_ARCH_LIST": "8.0"}, "the CUDA extension does not build: ", marks=needs_nvcc),
    ],
)
def test_a_build_that_fails_ends_in_one_message(environment, expected, wheel, stand_in):
    (stand_in / "kernel.cu").write_text("#error this does not compile\n")
    found, said = wheel(stand_in, **environment)
    assert found is None
    # `build` prints a traceback of its own; there is none of ours in it.
    assert len([line for line in said.splitlines() if expected in line]) == 1, said
    assert "BuildExtension" not in said


# Hides the training packages as if they were not installed, and makes initialising CUDA an error.
GUARDS = """
import importlib.machinery
import torch

HIDDEN = ("timm", "torchvision", "rich", "matplotlib", "sklearn", "tensorboard")
finder = importlib.machinery.PathFinder
find = finder.find_spec
finder.find_spec = lambda name, *rest, **named: None if name.split(".")[0] in HIDDEN else find(name, *rest, **named)

def no_context(*args, **kwargs):
    raise AssertionError("CUDA was initialised")

torch.cuda._lazy_init = no_context
"""


@pytest.mark.parametrize(
    "breach, message",
    [
        ("import timm", "No module named 'timm'"),
        ("import torchvision.ops", "No module named 'torchvision'"),
        ("torch.cuda.current_device()", "CUDA was initialised"),
    ],
)
def test_guards_bite(breach, message, run_python):
    child = run_python("-c", GUARDS + breach, check=False)
    assert child.returncode != 0 and message in child.stderr


def test_import_needs_no_training_package_and_no_context(run_python):
    run_python("-c", GUARDS + "import stvit, stvit.info\nassert not torch.cuda.is_initialized()")


def test_a_model_needs_no_training_package(run_python):
    code = "import stvit\nprint(stvit.stvit_tiny(num_classes=3).eval()(torch.zeros(1, 3, 32, 32)).shape)"
    assert run_python("-c", GUARDS + code).stdout == "torch.Size([1, 3])\n"
