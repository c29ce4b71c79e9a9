"""What the tools that a stage runs say at their end, read off their output or their files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

Counts = dict[str, Any]


def extension_origin(output: str) -> Counts:
    found = re.search(r"^extension +(.+)", output, re.MULTILINE)
    return {"note": found[1]} if found else {}


def pytest_counts(output: str) -> Counts:
    """Counts from pytest's last line; from the progress lines of a run that was cut off."""
    for line in reversed(output.splitlines()):
        if re.search(r"\bin \d+(\.\d+)?s\b", line):
            found = re.findall(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|deselected)\b", line)
            return {name.rstrip("s") if name.startswith("error") else name: int(count) for count, name in found}
    letters = "".join(re.findall(r"^([.FEsxX]+)(?: +\[ *\d+%\])?$", output, re.MULTILINE))
    names = {"passed": ".", "failed": "F", "error": "E", "skipped": "s"}
    return {name: letters.count(letter) for name, letter in names.items() if letter in letters}


def sanitizer_counts(output: str, whole: str = "") -> Counts:
    """Errors by compute-sanitizer's own summary, and the kernels they were seen in. A run that printed no summary, or
    not what a program that ran to its end prints (`whole`, a regular expression), did not check everything: failed."""
    errors = [int(n) for n in re.findall(r"= ERROR SUMMARY: (\d+) error", output)]
    errors += [int(n) for n in re.findall(r"= RACECHECK SUMMARY: .*\((\d+) errors?", output)]
    warnings = [int(n) for n in re.findall(r"= RACECHECK SUMMARY: .*\(.*, (\d+) warnings?\)", output)]
    if not errors:
        return {"status": "failed", "note": "no summary by compute-sanitizer"}
    ended = re.search(whole, output) is not None
    counts: Counts = {"status": "passed" if ended and not sum(errors) else "failed", "errors": sum(errors)}
    if sum(warnings):
        counts["warnings"] = sum(warnings)
    kernels = sorted(set(re.findall(r"^=+ .*\bat (?:0x\w+ in )?([\w:~<>]+)(?:\(.*)?(?:\+0x\w+)", output, re.MULTILINE)))
    if sum(errors) and kernels:
        counts["note"] = "in " + ", ".join(kernels[:5])
    elif not ended:
        counts["note"] = "the cases did not all run"
    return counts


def row_counts(path: Path) -> Counts:
    """Rows of a result file, and how many of them hold an error."""
    try:
        rows = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError):
        return {"rows": 0}
    failed = sum(1 for row in rows if row.get("error"))
    return {"rows": len(rows), "file": str(path), **({"with an error": failed} if failed else {})}
