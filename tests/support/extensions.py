"""Extensions that tests build: a stand-in that compiles in seconds, and the real one, kept in the user's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from stvit.backends import build, extension

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ["8.0", "9.0", "10.0"]

# Python's own interface alone: torch's and pybind11's headers take half a minute.
BINDINGS = """\
#include <Python.h>
#include "stand_in.h"

static PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{ssssssssss}", "nvcc", STVIT_BUILD_NVCC, "torch", STVIT_BUILD_TORCH, "architectures",
                       STVIT_BUILD_ARCHITECTURES, "flags", STVIT_BUILD_FLAGS, "device", "cuda");
}
static PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods};
PyMODINIT_FUNC PyInit__C() {
  launch();
  return PyModule_Create(&definition);
}
"""
KERNEL = """\
#include "stand_in.h"
__global__ void atomic_kernel(float* to) { atomicAdd(to, 1.f); }
__global__ void spilling_walk_kernel(float* to, int at) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i * at % 64] = to[i];
  for (int i = 0; i < 64; ++i) to[i] = kept[i];
}
void launch() {}
"""


def write_stand_in(folder: Path) -> Path:
    """Sources of an extension without ops, with a kernel that does what kernels must not."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bindings.cpp").write_text(BINDINGS)
    (folder / "kernel.cu").write_text(KERNEL)
    (folder / "stand_in.h").write_text("#pragma once\nvoid launch();\n")
    return folder


def real() -> extension.Target:
    """The extension for three generations of GPUs, built once for each state of its sources."""
    tools = build.toolkit()
    reasons = build.obstacles()
    if tools is None:
        pytest.skip("; ".join(reasons))
    assert not reasons
    target = extension.target(ROOT / "csrc", tools, ARCHITECTURES)
    extension.compile_target(target)
    return target
