"""The authors' own code from a checkout of their repository (github.com/hhb072/STViT), for `--official DIR`.

Its models/stvit.py imports timm, fvcore and scipy, and names that newer versions of timm have dropped. What is
missing here is replaced for the duration of the import: by an equal of our own where the model needs it, and by a
placeholder that raises when it is used where only the file's self-test does.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn

from stvit.checks import stoken_pair
from stvit.modules import DropPath

MODEL_FILE = Path("models") / "stvit.py"
MODULE = "stvit_official"  # stays in sys.modules under this name: torch.compile looks modules up by name
# timm's registry would take the file's stvit_small for ours, so it is replaced even where timm is there.
ALWAYS = {"timm.models.registry"}
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
        if name in ALWAYS or not _has(name, attributes):
            replaced[name] = _stand_in(name, attributes)
    for name in list(replaced):  # scipy.io stands on scipy
        for parent in _parents(name):
            if parent not in replaced and not _has(parent, set()):
                replaced[parent] = _stand_in(parent, set())
    before = {name: sys.modules[name] for name in replaced if name in sys.modules}
    sys.modules.update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del sys.modules[name]
        sys.modules.update(before)


def _has(name: str, attributes: set[str]) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm warns of its old names
            module = importlib.import_module(name)
            return all(hasattr(module, part) or importlib.import_module(f"{name}.{part}") for part in attributes)
    except Exception:  # a package that is there but broken is as good as missing
        return False


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _stand_in(name: str, attributes: set[str]) -> ModuleType:
    there = sys.modules.get(name) if name not in ALWAYS else None  # lacks some of the names
    module = ModuleType(name)
    module.__path__ = []  # a package, so that submodules may be imported from it
    for attribute in attributes:
        equal = EQUALS.get(attribute, _placeholder(f"{name}.{attribute}"))
        setattr(module, attribute, getattr(there, attribute, equal))
    return module


def _placeholder(name: str) -> Callable[..., Any]:
    def missing(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{name} is not installed; a placeholder stands in for it")

    return missing
