"""``--throughput``: images/s of training and inference without any data."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from stvit.train.distributed import Process
from stvit.train.engine import Trainer
from stvit.train.loader import Batch

WARM_UP = 5  # kernels are chosen and compiled in the first steps


def measure(trainer: Trainer, process: Process, size: int, num_classes: int, steps: int) -> str:
    """Time ``steps`` whole training steps, and as many forward passes, on one random batch; a line for the user."""
    args = trainer.args
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    images = torch.randn(args.batch_size, 3, size, size, device=process.device).to(memory_format=memory_format)
    targets = torch.randint(num_classes, (args.batch_size,), device=process.device)
    model = trainer.state.model

    def train() -> None:
        trainer.step([Batch(images.clone(), targets) for _ in range(args.grad_accum_steps)])

    @torch.no_grad()
    def infer() -> None:
        with trainer.precision.autocast():
            model(images)

    trainer.network.train()
    training = _seconds(train, process, steps)
    memory = ""
    if process.device.type == "cuda":
        memory = f", {torch.cuda.max_memory_allocated(process.device) / 2**30:.2f} GiB"
    model.eval()
    inference = _seconds(infer, process, steps)
    images_a_step = args.batch_size * process.world_size
    return (
        f"training {images_a_step * args.grad_accum_steps / training:,.1f} images/s ({1e3 * training:.1f} ms a step"
        f"{memory}), inference {images_a_step / inference:,.1f} images/s; medians of {steps} at --batch-size "
        f"{args.batch_size}, --input-size {size}, without data"
    )


def _seconds(work: Callable[[], None], process: Process, steps: int) -> float:
    """The median time of a call, everything on the device included."""
    times = []
    for _ in range(WARM_UP + steps):
        began = time.perf_counter()
        work()
        if process.device.type == "cuda":
            torch.cuda.synchronize(process.device)
        times.append(time.perf_counter() - began)
    return sorted(times[WARM_UP:])[steps // 2]
