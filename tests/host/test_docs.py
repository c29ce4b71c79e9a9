"""The documentation is true as far as a program can tell: links, paths, commands, names and examples."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import stvit

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# In backticks: below one of our folders, or a file name with one of our endings.
PATH = re.compile(r"`((?:\.ci|bench|csrc|docs|kernels|stvit|tests)/[\w./*{},-]*|[a-zA-Z][\w-]*\.(?:py|md|toml|txt))`")
NAME = re.compile(r"`stvit\.([A-Za-z_][\w.]*)[(`]")


def prose(text: str) -> str:
    return FENCE.sub("", text)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)}


def broken_links(text: str, folder: Path) -> list[str]:
    broken = []
    for link in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", link):  # https:, mailto:
            continue
        file, _, anchor = link.partition("#")
        target = folder / file if file else None
        if target is not None and not target.exists():
            broken.append(link)
        elif anchor and anchor not in anchors(target.read_text() if target else text):
            broken.append(link)
    return broken


def missing_paths(text: str, root: Path) -> list[str]:
    return [path for path in PATH.findall(prose(text)) if not any(root.glob(path.rstrip("/")))]


def missing_targets(text: str, makefile: str) -> set[str]:
    """Targets that the text tells one to make (in backticks or at the start of a line of code), and nobody can."""
    told = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
    return told - set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def missing_modules(text: str) -> list[str]:
    told = re.findall(r"python -m ((?:stvit|bench)[\w.]*)", text)
    return [name for name in told if importlib.util.find_spec(name) is None]


def missing_names(text: str) -> list[str]:
    """Names in backticks, as `stvit.info` or `stvit.use_backend(...)`, that are neither attributes nor modules."""
    missing = []
    for name in NAME.findall(prose(text)):
        first = name.split(".")[0]
        if not hasattr(stvit, first) and importlib.util.find_spec(f"stvit.{first}") is None:
            missing.append(name)
    return missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_document(document):
    path = ROOT / document
    text = path.read_text()
    assert broken_links(text, path.parent) == []
    assert missing_paths(text, ROOT) == []
    assert missing_targets(text, (ROOT / "Makefile").read_text()) == set()
    assert missing_modules(text) == []
    assert missing_names(text) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_examples_run(document, tmp_path, monkeypatch):
    """Python blocks run in order, sharing their names; one that starts with `# on a GPU` runs where there is one."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / document).read_text()
    namespace: dict[str, object] = {"__name__": "example"}
    for block in FENCE.finditer(text):
        language, code = block.groups()
        if language != "python" or (code.startswith("# on a GPU") and not torch.cuda.is_available()):
            continue
        line = text[: block.start(2)].count("\n")  # so that a traceback names the document's own line
        exec(compile("\n" * line + code, str(ROOT / document), "exec"), namespace)


def test_the_checks_can_fail():
    text = "# A b\n[x](nowhere.md) [y](#a-b) [z](#c) `stvit/nowhere.py` `nowhere.py`\n"
    text += "`make nothing` `stvit.nowhere(1)` `stvit.info`\n"
    text += "```bash\nmake less\npython -m stvit.nowhere\n```\n"
    assert broken_links(text, ROOT) == ["nowhere.md", "#c"]
    assert missing_paths(text, ROOT) == ["stvit/nowhere.py", "nowhere.py"]
    assert missing_targets(text, "test:\n") == {"nothing", "less"}
    assert missing_modules(text) == ["stvit.nowhere"]
    assert missing_names(text) == ["nowhere"]
