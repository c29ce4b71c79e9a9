"""The authors' own code from a checkout of their repository (github.com/hhb072/STViT), for `--official DIR`.

Its models/stvit.py imports timm, fvcore and scipy. timm, and what is missing here, is replaced for the duration of the
import: by an equal of our own where the model needs it, and by a placeholder that raises when it is used where only the
file's self-test does.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from torch import nn

from stvit.checks import stoken_pair
from stvit.modules import DropPath

MODEL_FILE = Path("models") / "stvit.py"
MODULE = "stvit_official"  # stays in sys.modules under this name: torch.compile looks modules up by name
# Always replaced: its registry would take the file's stvit_small for ours, and newer versions lack some of the names.
TIMM = "timm"
EQUALS: dict[str, Any] = {
    "DropPath": DropPath,
    "to_2tuple": stoken_pair,
    "trunc_normal_": nn.init.trunc_normal_,
    "register_model": lambda function: function,
    "_cfg": lambda **settings: settings,
}


class OfficialError(ValueError):
    """The directory is no checkout of the authors' repository, or its model file can't be imported; says why."""


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
        with _stand_ins(_imports(path)):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[MODULE]
        raise OfficialError(f"--official: {path} can't be imported: {type(error).__name__}: {error}") from error
    return module


def build(module: ModuleType, name: str, drop_path: float = 0.0) -> nn.Module:
    """The authors' model `name` (stvit_small, stvit_base, stvit_large), 1000 classes, freshly initialised."""
    entry = getattr(module, name, None)
    if not callable(entry):
        raise OfficialError(f"--official: {module.__file__} has no model {name}")
    model = entry(SimpleNamespace(drop=0.0, drop_path=drop_path))
    assert isinstance(model, nn.Module)
    return model


def super_token_attention(
    module: ModuleType, dim: int, stoken_size: tuple[int, int], num_heads: int | None
) -> nn.Module:
    """The authors' StokenAttention, refined by attention with qkv bias as in their models, or not (num_heads None)."""
    if num_heads is None:
        attention = module.StokenAttention(dim, stoken_size, refine=False)
    else:
        attention = module.StokenAttention(dim, stoken_size, num_heads=num_heads, qkv_bias=True)
    assert isinstance(attention, nn.Module)
    return attention


def _imports(path: Path) -> dict[str, set[str]]:
    """Module -> names that the file imports from it at the top level; an empty set for a plain import."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name, set())
    return found


@contextmanager
def _stand_ins(wanted: dict[str, set[str]]) -> Iterator[None]:
    """Within the block every module in `wanted` can be imported and has the names wanted."""
    replaced: dict[str, ModuleType] = {}
    for name, attributes in wanted.items():
        if name.partition(".")[0] == TIMM or not _imports_here(name):
            parts = name.split(".")
            for end in range(1, len(parts) + 1):  # scipy.io stands on scipy
                replaced.setdefault(".".join(parts[:end]), _stand_in(".".join(parts[:end])))
            for attribute in attributes:
                setattr(replaced[name], attribute, EQUALS.get(attribute, _placeholder(f"{name}.{attribute}")))
    with mock.patch.dict(sys.modules, replaced):
        yield


def _imports_here(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # a package that is there but broken is as good as missing
        return False
    return True


def _stand_in(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []  # a package, so that submodules may be imported from it
    return module


def _placeholder(name: str) -> Callable[..., Any]:
    def missing(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{name} is not installed; a placeholder stands in for it")

    return missing
