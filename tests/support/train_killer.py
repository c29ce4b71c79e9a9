"""Runs the training program again and again, each time killed at a given moment, then to its end.

A program of its own, so that it imports everything once and forks for each attempt. It reads jobs from standard input,
a JSON object a line: {"arguments": [...], "processes": N, "kills": [[signal, event, count, rank], ...], "output": ...,
"plant": ...}. In each attempt process `rank` gets `signal` at the count-th `event` (SIGTERM goes to all processes, as
launchers send them); the file `output` takes what they print; `plant` names a module to import first, if any. It
answers a line for each job: the exit codes of each attempt, minus the signal where one killed.
"""

import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import stvit.checkpoint
from stvit.train import engine, loader, run, saving
from stvit.train.cli import main

# event: (object, name of what is called at that moment, whether the signal comes before or after it)
EVENTS = {
    "step": (engine.Trainer, "step", "after"),
    "update": (engine, "dispatch_clip_grad", "before"),
    "copy": (saving, "to_host", "before"),
    "write": (stvit.checkpoint._Recorder, "write", "after"),
    "sync": (os, "fsync", "before"),
    "rename": (os, "replace", "before"),
    "renamed": (os, "replace", "after"),
    "rotate": (Path, "replace", "before"),
    "rotated": (Path, "replace", "after"),
    "batch": (loader.Feeder, "_normalised", "before"),
    "evaluate": (run, "evaluate", "before"),
}


def arm(number, event, count, processes):
    """Send the signal at the count-th event of this process."""
    owner, name, when = EVENTS[event]
    original = getattr(owner, name)
    seen = 0

    def strike():
        nonlocal seen
        seen += 1
        if seen == count:
            for pid in processes() if number == signal.SIGTERM else []:
                if pid != os.getpid():
                    os.kill(pid, number)
            signal.raise_signal(number)  # to this thread: its handler runs before the next line, not some time later

    def wrapped(*args, **kwargs):
        if when == "before":
            strike()
        result = original(*args, **kwargs)
        if when == "after":
            strike()
        return result

    setattr(owner, name, wrapped)


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def attempt(arguments, world_size, kill, output, plant):
    port, group = str(free_port()), []
    killer = os.getpid()  # one of several where tests run side by side, each with its own group

    def pid_of(rank):
        return Path(tempfile.gettempdir(), f"train_killer.{killer}.{rank}")

    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                if world_size > 1:
                    os.environ |= {
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(world_size),
                        "MASTER_ADDR": "localhost",
                        "MASTER_PORT": port,
                    }
                pid_of(rank).write_text(str(os.getpid()))
                if plant:
                    importlib.import_module(plant)

                def processes():
                    return [int(pid_of(rank).read_text()) for rank in range(world_size)]

                if kill and kill[3] == rank:
                    arm(signal.Signals[kill[0]], kill[1], kill[2], processes)
                code = main(arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        group.append(pid)
    codes = _wait(group)
    for rank in range(world_size):
        pid_of(rank).unlink(missing_ok=True)
    return codes


def _wait(group):
    """As a launcher: when one process failed, the others get ten seconds, then SIGKILL."""
    codes, deadline = {}, None
    while len(codes) < len(group):
        for pid in group:
            if pid in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] and deadline is None:
                    deadline = time.monotonic() + 10
            elif deadline is not None and time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in group]


def work():
    for line in sys.stdin:
        job = json.loads(line)
        with open(job["output"], "a") as output:
            kills = [*job["kills"], None]
            codes = [attempt(job["arguments"], job["processes"], kill, output, job.get("plant", "")) for kill in kills]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    work()
