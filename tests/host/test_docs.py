"""The documentation is true as far as a program can tell: links, paths, commands, names and examples."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

import stvit
from tests.support import versions

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


def texts_of(root: Path) -> list[str]:
    """Every piece of text in the sources, f-strings cut where something is put in."""
    constants = (node for path in root.rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    return [node.value for node in constants if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def messages(page: str) -> list[str]:
    """The messages in the first column of a page's last table, cut at `...`."""
    rows = [line for line in page.split("\n| message |")[1].split("\n\n")[0].splitlines() if line.startswith("| `")]
    quoted = [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    return [piece.strip() for message in quoted for piece in message.split("...") if piece.strip()]


@pytest.mark.parametrize("page", ["troubleshooting", "install"])
def test_quoted_messages_are_the_sources_own(page):
    texts = texts_of(ROOT / "stvit") + ["Unknown model ("]  # timm's
    quoted = messages((ROOT / "docs" / f"{page}.md").read_text())
    assert len(quoted) > 5
    assert [message for message in quoted if not any(message in text for text in texts)] == []


def test_every_environment_variable_has_its_line():
    """Those that the package, its installation, benchmarks and tests read by name."""
    files = [
        ROOT / "setup.py",
        *(path for folder in ("stvit", "bench", "tests") for path in (ROOT / folder).rglob("*.py")),
    ]
    reads = re.compile(r"""environ(?:\.get\(|\.setdefault\(|\[)\s*"([A-Z_]+)"|"([A-Z_]+)" in (?:os\.)?environ""")
    read = {name for file in files for match in reads.findall(file.read_text()) for name in match if name}
    page = (ROOT / "docs" / "environment.md").read_text()
    own = {"PATH", "PYTHONPATH", "PYTEST_XDIST_WORKER"}  # of the shell, Python and the tests' own processes
    assert len(read) > 15 and {name for name in read - own if f"`{name}`" not in page} == set()


def test_the_table_of_versions_is_that_of_its_file():
    text = versions.PAGE.read_text()
    assert text == versions.page(text, json.loads(versions.RUNS.read_text()))
    assert versions.counts("F\n= 1 failed, 20 passed, 3 skipped, 2 errors in 9.9s =") == {
        "passed": 20,
        "skipped": 3,
        "failed": 3,
    }
    with pytest.raises(ValueError, match="a whole run"):
        versions.counts("....")


def test_the_drawings_are_of_the_op(tmp_path):
    """What the script draws now says the same numbers and words as the committed files."""
    spec = importlib.util.spec_from_file_location("drawings", ROOT / "docs" / "assets" / "drawings.py")
    drawings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawings)
    drawings.main(tmp_path)
    for name in ("neighbourhood.svg", "padding.svg"):
        drawn, committed = (
            re.findall(r">([^<>]+)</text>", (folder / name).read_text())
            for folder in (tmp_path, ROOT / "docs" / "assets")
        )
        assert drawn == committed and len(drawn) > 5


def rows_without_a_test(text: str, root: Path) -> list[str]:
    """Rows of tables whose verdict is none of the three, or whose last cell names no test file that there is."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    wrong = []
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    for what, verdict, tests in (row for row in rows if len(row) == 3):
        named = re.findall(r"`(tests/[\w/]+\.py)`", tests)
        right = named and all((root / path).is_file() for path in named)
        if verdict != "what happens" and not (right and re.match("works|falls back|refused|the same", verdict)):
            wrong.append(what)
    return wrong


def test_what_works_is_shown_by_tests():
    assert rows_without_a_test((ROOT / "docs/compatibility.md").read_text(), ROOT) == []


def test_the_checks_can_fail():
    text = "# A b\n[x](nowhere.md) [y](#a-b) [z](#c) `stvit/nowhere.py` `nowhere.py`\n"
    text += "`make nothing` `stvit.nowhere(1)` `stvit.info`\n"
    text += "```bash\nmake less\npython -m stvit.nowhere\n```\n"
    assert broken_links(text, ROOT) == ["nowhere.md", "#c"]
    assert missing_paths(text, ROOT) == ["stvit/nowhere.py", "nowhere.py"]
    assert missing_targets(text, "test:\n") == {"nothing", "less"}
    assert missing_modules(text) == ["stvit.nowhere"]
    assert missing_names(text) == ["nowhere"]
    table = "| what | what happens | shown by |\n|---|---|---|\n| a | works | `tests/nowhere.py` |\n| b | works | |\n"
    table += "| c | breaks | `tests/conftest.py` |\n| d | refused | `tests/conftest.py` |\n"
    assert rows_without_a_test(table, ROOT) == ["a", "b", "c"]
