"""The authors' own code from a checkout of their repository (github.com/hhb072/STViT), for `--official DIR`.

Its models/stvit.py imports timm, fvcore and scipy, which are replaced for the duration of the import, whether they are
here or not: timm's registry would take the file's stvit_small for ours, and newer versions lack some of the names. In
their place stand equals of our own where the model needs them, and placeholders that raise when they are used where
only the file's self-test does.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from torch import nn

from stvit.checks import stoken_pair
from stvit.modules import DropPath

MODEL_FILE = Path("models") / "stvit.py"
MODULE = "stvit_official"  # stays in sys.modules under this name: torch.compile looks modules up by name
REPLACED = (
    "timm", "timm.models", "timm.models.layers", "timm.models.registry", "timm.models.vision_transformer", "timm.data",
    "fvcore", "fvcore.nn", "scipy", "scipy.io",
)  # fmt: skip
EQUALS: dict[str, Any] = {
    "DropPath": DropPath,
    "to_2tuple": stoken_pair,
    "trunc_normal_": nn.init.trunc_normal_,
    "register_model": lambda function: function,
    "_cfg": lambda **settings: settings,
}


class OfficialError(ValueError):
    """The directory is no checkout of the authors' repository, or its model file can't be imported; says why."""


class StandIn(ModuleType):
    """A module that has every name."""

    __path__: list[str] = []  # a package, so that submodules may be imported from it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"{self.__name__}.{name} is a placeholder")

        return EQUALS.get(name, missing)


def load(directory: str | Path) -> ModuleType:
    """The module models/stvit.py of a checkout: `STViT`, `StokenAttention`, `stvit_small(args)` and so on.

    Runs that file. Raises OfficialError.
    """
    path = (Path(directory) / MODEL_FILE).resolve()
    if not path.is_file():
        raise OfficialError(f"--official: expected a checkout of the authors' repository, {path} is not a file")
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    try:
        with mock.patch.dict(sys.modules, {name: StandIn(name) for name in REPLACED}):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[MODULE]
        raise OfficialError(f"--official: {path} can't be imported: {type(error).__name__}: {error}") from error
    return module


def build(module: ModuleType, name: str) -> nn.Module:
    """The authors' model `name` (stvit_small, stvit_base, stvit_large), 1000 classes, freshly initialised."""
    entry = getattr(module, name, None)
    if not callable(entry):
        raise OfficialError(f"--official: {module.__file__} has no model {name}")
    model: nn.Module = entry(SimpleNamespace(drop=0.0, drop_path=0.0))
    return model


def super_token_attention(
    module: ModuleType, dim: int, stoken_size: tuple[int, int], num_heads: int | None
) -> nn.Module:
    """The authors' StokenAttention, refined by attention with qkv bias as in their models, or not (num_heads None)."""
    refined = {"refine": False} if num_heads is None else {"num_heads": num_heads, "qkv_bias": True}
    attention: nn.Module = module.StokenAttention(dim, stoken_size, **refined)
    return attention
