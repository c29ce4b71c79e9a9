"""One process or many: what torchrun or SLURM says, and the few collectives that training needs."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from stvit.train.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import PrefixStore


@dataclass(frozen=True)
class Process:
    """Which process this is, of how many, and the device it works on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and saves."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over all processes, exactly for counts below 2^53."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, values: list[float]) -> list[list[float]]:
        """The values of every process, in order of rank."""
        if self.world_size == 1:
            return [values]
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        every = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(every, mine)
        return [row.tolist() for row in every]


def start(args: argparse.Namespace) -> Process:
    """Join the process group if there is one, and pick the device.

    Raises:
        UserError: for a device that this machine does not have.
    """
    rank, world_size, local_rank = _place(args)
    device = _device(args.device, local_rank if world_size > 1 else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = _meeting_place(args.dist_url, rank, world_size)
        dist.init_process_group(backend, store=store, world_size=world_size, rank=rank)
    return Process(rank, world_size, device)


def _meeting_place(url: str, rank: int, world_size: int) -> PrefixStore:
    """Where the processes tell each other their addresses.

    torchrun keeps its store when it starts processes again, with the addresses of those that are gone: a new process
    that came upon one of these was refused. Hence keys of its own for each start.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous(url, rank, world_size))
    return PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def first_to_say(text: str) -> bool:
    """Whether no other process has said this yet: an error that all of them meet is one line."""
    rank = os.environ.get("RANK", "0")
    if not (dist.is_available() and dist.is_initialized()):
        return rank == "0"
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add(f"stvit/{text}", 1) == 1
    except RuntimeError:  # the process that kept the store is gone
        return True


def let_others_ask(text: str, seconds: float = 10) -> None:
    """Where this process keeps the store that `first_to_say` asks: stay until all have asked it, or not much longer."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() != 0:
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun keeps it
        return
    store, until = dist.distributed_c10d._get_default_store(), time.monotonic() + seconds
    while store.add(f"stvit/{text}", 0) < dist.get_world_size() and time.monotonic() < until:
        time.sleep(0.05)


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def _place(args: argparse.Namespace) -> tuple[int, int, int]:
    """Rank, number of processes, rank on this machine."""
    environ = os.environ
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", 0))
    if "SLURM_PROCID" in environ and args.world_size > 1:
        rank = int(environ["SLURM_PROCID"])
        return rank, args.world_size, rank % max(1, torch.cuda.device_count())
    return 0, 1, 0


def _device(name: str | None, local_rank: int | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such kind of device") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: torch sees no CUDA GPU here; try --device cpu")
        index = device.index if device.index is not None else local_rank or 0
        if index >= torch.cuda.device_count():
            raise UserError(f"--device cuda:{index}: torch sees {torch.cuda.device_count()} GPUs here")
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise UserError(f"--device {name}: cpu and cuda are supported")
    return device
