"""The CUDA extension, where it can be built; pyproject.toml describes the rest of the package.

STVIT_BUILD_CUDA=0 leaves the extension out; 1 fails where it can't be built, instead of installing without it.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

from setuptools import setup

SOURCES = "csrc"
# Those of setuptools' commands that compile; metadata and sdist need no compiler, and no import of torch.
COMPILING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


def load_settings():
    """stvit/backends/build.py, without importing stvit."""
    path = Path(__file__).parent / "stvit" / "backends" / "build.py"
    spec = importlib.util.spec_from_file_location("stvit_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extension_options():
    """The arguments of `setup` that build the extension; none, and a message that says why, where it can't be built."""
    asked = os.environ.get("STVIT_BUILD_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"error: STVIT_BUILD_CUDA: expected 0, 1 or nothing, got {asked!r}")
    if asked == "0" or not COMPILING.intersection(sys.argv):
        return {}
    build = load_settings()
    reasons = build.obstacles()
    tools = build.toolkit()
    if not reasons:
        try:
            wanted = build.architectures(tools)
        except ValueError as error:
            reasons = [str(error)]
    if reasons and asked == "1":
        raise SystemExit(f"error: the CUDA extension can't be built, and STVIT_BUILD_CUDA=1: {'; '.join(reasons)}")
    if reasons:
        print(
            f"stvit is installed without the CUDA extension: {'; '.join(reasons)}. All else works without it;"
            ' backend="cuda" builds it at first use where it can.',
            file=sys.stderr,
        )
        return {}
    os.environ.update(build.environment(tools, wanted))
    return {
        "ext_modules": [build.extension(SOURCES, tools, wanted)],
        "cmdclass": {"build_ext": build.build_ext(SOURCES, wanted)},
    }


def description():
    """README.md for a package index, where files beside it can't be reached: links and pictures of them left out."""
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^]]*\]\((?!https:)[^)]*\)\n+", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^]]+)\]\((?!https:)[^)]*\)", r"\1", text)


setup(long_description=description(), long_description_content_type="text/markdown", **extension_options())
