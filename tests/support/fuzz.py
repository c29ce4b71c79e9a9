"""Draws new examples for every test that draws any, round after round, until the time is over: `make fuzz`.

    python -m tests.support.fuzz                                   ten minutes over all of them
    python -m tests.support.fuzz --minutes 60 tests/kernels
    python -m tests.support.fuzz --seed 17 --rounds 1 tests/kernels/test_sampling.py

A failure is printed with the example that fails, `Falsifying example: test(case=Case(...))`, which can be pasted into
the test's listed cases, and with the round's seed, which draws it again.

Exit codes: 0 nothing failed, 1 something did, 2 a wrong command line.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence

KEPT = re.compile(r"(^E .*$\n)|(^(?:FAILED|ERROR) .*$\n)", re.MULTILINE)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.support.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", default=["tests"], help="files or folders of tests (tests)")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="when to begin no further round (10)")
    parser.add_argument("--rounds", type=int, metavar="N", help="at most so many")
    parser.add_argument("--seed", type=int, metavar="S", help="of the first round; the next ones count on (the time)")
    parser.add_argument("--workers", default="2", metavar="N", help="processes, as pytest-xdist takes them (2)")
    options = parser.parse_args(arguments)
    if not options.minutes > 0 or (options.rounds is not None and options.rounds < 1):
        parser.error("--minutes, --rounds: expected more than 0")
    return options


def one_round(seed: int, options: argparse.Namespace) -> tuple[bool, str]:
    """Whether pytest passed with this seed, and what it said of failures."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "hypothesis", "--hypothesis-profile=fuzz"]
    command += [f"--hypothesis-seed={seed}", "-n", options.workers, *options.paths]
    child = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if child.returncode == 5:
        sys.exit(f"error: no test in {', '.join(options.paths)} draws examples")
    said = "".join(match[0] for match in KEPT.finditer(child.stdout))
    return child.returncode == 0, said or child.stdout[-2000:]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    begin, failed, done = time.monotonic(), 0, 0
    first = options.seed if options.seed is not None else int(time.time())
    while time.monotonic() - begin < 60 * options.minutes and (options.rounds is None or done < options.rounds):
        passed, said = one_round(first + done, options)
        failed += not passed
        print(
            f"seed {first + done}: {'passed' if passed else 'FAILED'}, {(time.monotonic() - begin) / 60:.1f} min",
            flush=True,
        )
        if not passed:
            print(said, flush=True)
        done += 1
    print(f"{done} rounds, {failed} with a failure")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
