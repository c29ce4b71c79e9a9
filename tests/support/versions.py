"""The table of what ran with what, in docs/compatibility.md, from docs/versions.json.

    make test-newest ARGS=tests/kernels | tee log.txt
    .venv-newest/bin/python -m tests.support.versions log.txt tests/kernels    # adds that run, and writes the table

The interpreter that ran the tests records them: the versions are its own.
"""

import argparse
import importlib.metadata
import json
import platform
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE, RUNS = ROOT / "docs" / "compatibility.md", ROOT / "docs" / "versions.json"
BEGIN, END = "<!-- versions:begin, by tests/support/versions.py -->", "<!-- versions:end -->"
PACKAGES = ("torch", "triton", "numpy", "timm")


def counts(log: str) -> dict[str, int]:
    """What the last line of pytest's output says; ValueError where there is none."""
    lines = [line for line in log.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    if not lines:
        raise ValueError("expected the output of a whole run of pytest, whose last line counts the tests")
    found = {kind.rstrip("s"): int(number) for number, kind in re.findall(r"(\d+) ([a-z]+)", lines[-1])}
    return {
        "passed": found.get("passed", 0),
        "skipped": found.get("skipped", 0),
        "failed": found.get("failed", 0) + found.get("error", 0),
    }


def table(runs: list[dict[str, object]]) -> str:
    columns = ["python", *PACKAGES, "tests", "passed", "skipped", "failed"]
    rows = [columns, ["---"] * len(columns), *([str(run[column]) for column in columns] for run in runs)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def page(text: str, runs: list[dict[str, object]]) -> str:
    """The page with the table of `runs` between its markers."""
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{table(runs)}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="what pytest printed")
    parser.add_argument("tests", nargs="+", help="the paths that it ran")
    options = parser.parse_args(arguments)
    run: dict[str, object] = {"python": platform.python_version()}
    run |= {name: importlib.metadata.version(name) for name in PACKAGES}
    run |= {"tests": " ".join(f"`{path}`" for path in options.tests)} | counts(options.log.read_text())
    same = ("python", *PACKAGES, "tests")
    runs = json.loads(RUNS.read_text()) if RUNS.exists() else []
    runs = [old for old in runs if any(old[key] != run[key] for key in same)] + [run]
    RUNS.write_text(json.dumps(runs, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), runs))


if __name__ == "__main__":
    main()
