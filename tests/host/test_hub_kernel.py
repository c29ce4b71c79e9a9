"""`make hub-kernel`: what it writes is loaded by Hugging Face's `kernels`, twice, and computes what stvit computes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stvit
from stvit import hub_kernel

pytest.importorskip("triton")
kernels = pytest.importorskip("kernels")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, ModuleType]]:
    """Two versions: as it is, and with another logit scale than the paper's, so that they can be told apart."""
    found = []
    for name in ("one", "two"):
        folder = tmp_path_factory.mktemp(name)
        shutil.rmtree(folder)
        target = hub_kernel.write(folder, "stvit_other" if name == "two" else None)
        if name == "two":
            checks = target / "checks.py"
            assert "x.shape[1] ** -0.5" in checks.read_text()
            checks.write_text(checks.read_text().replace("x.shape[1] ** -0.5", "2.0"))
        found.append((folder, kernels.get_local_kernel(folder)))
    return found


def test_two_versions_and_an_installed_stvit_in_one_process(loaded: list[tuple[Path, ModuleType]]) -> None:
    x = torch.randn(1, 8, 9, 6, requires_grad=True)
    results = []
    for module in (stvit, *(module for _, module in loaded)):
        stokens, association = module.super_token_sampling(x, 3, backend="triton")
        y = module.token_upsampling(stokens, association, backend="triton")
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for ours, first, second in zip(*results, strict=True):
        assert torch.equal(ours, first)
        assert not torch.allclose(ours, second)
    namespaces = {module.__name__ for _, module in loaded}
    assert len(namespaces) == 2 and all(hasattr(getattr(torch.ops, name), "sampling") for name in namespaces)


def test_it_imports_its_own_files_alone(loaded: list[tuple[Path, ModuleType]]) -> None:
    for folder, module in loaded:
        for name, part in list(sys.modules.items()):
            if name.startswith(module.__name__ + ".") and getattr(part, "__file__", None):
                assert Path(part.__file__).is_relative_to(folder), name
        for path in folder.rglob("*.py"):
            lines = [line.strip() for line in path.read_text().splitlines()]
            assert not [line for line in lines if line.startswith(("import stvit", "from stvit"))], path


def test_kernelize_finds_the_layers(loaded: list[tuple[Path, ModuleType]]) -> None:
    @kernels.use_kernel_forward_from_hub("ResDWC")
    class ResDWC(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x)

    model, x = nn.Sequential(ResDWC(4)).eval(), torch.randn(1, 4, 6, 5)
    expected = model(x)
    mapping: Any = {"ResDWC": {"cpu": kernels.LocalLayerRepository(loaded[0][0], layer_name="ResDWC")}}
    with kernels.use_kernel_mapping(mapping):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    called = []
    inside = sys.modules[f"{loaded[0][1].__name__}.functional"]
    original = inside.residual_depthwise
    inside.residual_depthwise = lambda *args: called.append(args) or original(*args)
    try:
        torch.testing.assert_close(model(x), expected)
    finally:
        inside.residual_depthwise = original
    assert len(called) == 1
