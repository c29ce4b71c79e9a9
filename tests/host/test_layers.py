"""docs/layout.md lists the layers of the package; no file imports one below its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def layers(text: str) -> list[str]:
    """The files and folders of the layer table, first layer first, as paths from the root."""
    table = text.split("<!-- layers:begin")[1].split("<!-- layers:end")[0]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ") and "`" in line]
    return [path.rstrip("/") for cell in cells for path in re.findall(r"`([\w./]+)`", cell)]


def module_path(name: str, root: Path) -> Path | None:
    """The file or folder behind the dotted name of a module of this package."""
    parts = name.split(".")
    base = root / "kernels" if parts[:2] == ["stvit", "kernels"] else root.joinpath(*parts[:2])
    full = base.joinpath(*parts[2:])
    return next((path for path in (full.with_suffix(".py"), full) if path.exists()), None)


def imports(file: Path, root: Path) -> set[Path]:
    """The files of this package that `file` imports, wherever in it; those for type checkers alone too."""
    relative = file.relative_to(root).with_suffix("").parts
    package = ("stvit", *relative) if relative[0] == "kernels" else relative
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = [*package[: -node.level], *(node.module or "").split(".")] if node.level else [node.module or ""]
            stem = ".".join(part for part in base if part)
            names = [f"{stem}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names, stem = [alias.name for alias in node.names], ""
        else:
            continue
        for name in names:
            if name.split(".")[0] == "stvit":
                found.add(module_path(name, root) or module_path(stem, root))
    return {path for path in found if path is not None and path != root / "stvit"}


def climbs(order: list[str], root: Path) -> list[str]:
    """Every import of a lower layer, or of a file that no layer holds, as "file imports file"."""

    def rank(path: Path) -> int | None:
        inside = path.relative_to(root).as_posix()
        return next((i for i, entry in enumerate(order) if inside == entry or inside.startswith(f"{entry}/")), None)

    wrong = []
    for file in sorted([*root.glob("stvit/**/*.py"), *root.glob("kernels/*.py")]):
        if file.name == "__init__.py":
            continue
        mine = rank(file)
        for other in sorted(imports(file, root)):
            if other.is_dir() and rank(other) is None:
                continue  # a package that is named for its modules: each is looked at by its own name
            theirs = rank(other)
            if mine is None or theirs is None or theirs > mine:
                wrong.append(f"{file.relative_to(root)} imports {other.relative_to(root)}")
    return wrong


def test_no_layer_imports_one_below_it() -> None:
    assert climbs(layers((ROOT / "docs" / "layout.md").read_text()), ROOT) == []


def test_every_file_of_the_package_has_a_layer() -> None:
    order = layers((ROOT / "docs" / "layout.md").read_text())
    assert all((ROOT / entry).exists() for entry in order)
    files = [path for path in (ROOT / "stvit").glob("**/*.py") if path.name != "__init__.py"]
    strays = [
        path.name
        for path in files
        if not any(path.is_relative_to(ROOT / entry) or path == ROOT / entry for entry in order)
    ]
    assert strays == []


def test_an_import_turned_round_is_found(tmp_path: Path) -> None:
    for name, text in {
        "stvit/__init__.py": "",
        "stvit/tensors.py": "def late():\n    from .functional import run\n",
        "stvit/functional.py": "from . import tensors\nfrom .backends import ops\nfrom stvit.kernels import tiles\n",
        "stvit/backends/ops.py": "from ..functional import run\nimport torch\n",
        "kernels/tiles.py": "from ..tensors import late\nfrom stvit import functional\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    order = ["stvit/tensors.py", "kernels", "stvit/backends/ops.py", "stvit/functional.py"]
    assert climbs(order, tmp_path) == [
        "kernels/tiles.py imports stvit/functional.py",
        "stvit/backends/ops.py imports stvit/functional.py",
        "stvit/tensors.py imports stvit/functional.py",
    ]
