"""Processes in which Triton compiles, for where this one interprets: it decides that when it is first imported."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def compiling_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """So many of them; what they run has to be importable there."""
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        interpreted = os.environ.pop("TRITON_INTERPRET", None)
        try:
            for started in [pool.submit(os.getpid) for _ in range(count)]:
                started.result()
        finally:
            if interpreted is not None:
                os.environ["TRITON_INTERPRET"] = interpreted
        yield pool
