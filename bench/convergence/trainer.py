"""The training runs that `bench.convergence` compares: a contender, its schedule, its losses, its tests."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.convergence.data import Batches, Data, normalised
from stvit.backends import dispatch
from stvit.model import CONFIGS, STViT

TESTS = 8  # times that a run is tested


@dataclass
class Run:
    """One training run. points: (step, seconds, test accuracy)."""

    contender: str
    seed: int
    losses: list[float] = field(default_factory=list)
    points: list[tuple[int, float, float]] = field(default_factory=list)
    seconds: float = 0.0
    setup_s: float = 0.0
    error: str | None = None


class OutOfTime(RuntimeError):
    """The budget ended in the middle of a run."""


def why_not(name: str, device: torch.device) -> list[str]:
    """The reasons why a contender can't run on this device. Builds the extension if that is asked for."""
    backend, _, suffix = name.partition("+")
    if backend not in (*dispatch.BACKENDS, "authors") or suffix not in ("", "compile"):
        return [f"expected one of {', '.join(dispatch.BACKENDS)}, authors, with or without +compile"]
    return dispatch.prepare(backend, device) if backend != "authors" else []


def build(name: str, options: argparse.Namespace, classes: int) -> nn.Module:
    """The contender's model on the CPU, weights to be loaded."""
    backend = name.partition("+")[0]
    settings = {"num_classes": classes, "drop_path_rate": options.drop_path}
    if backend == "authors":
        from bench.baselines.model import authors_model

        return authors_model(options.model, **settings)
    return STViT(**{**CONFIGS[options.model], **settings, "backend": backend})


class Trainer:
    """A contender with weights, optimizer and data; `steps` at a time."""

    def __init__(self, run: Run, options: argparse.Namespace, data: Data, weights: dict[str, Tensor]) -> None:
        self.run, self.options, self.data, self.weights = run, options, data, weights
        self.device = data.train.labels.device
        self.dtype = getattr(torch, options.dtype)
        self.batches = Batches(data.train, options.batch, run.seed, data.mirror)
        model = build(run.contender, options, data.classes)
        # PyTorch's own type hints lack memory_format here.
        self.model: nn.Module = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.forward: Callable[[Tensor], Tensor] = self.model
        if run.contender.endswith("+compile"):
            # Same draws of stochastic depth as uncompiled: otherwise the compiler has random numbers of its own.
            torch._inductor.config.fallback_random = True
            self.forward = torch.compile(self.model, backend=options.compile_backend)
        self.begin()

    def begin(self) -> None:
        """From the start: first weights, empty optimizer, seeded random numbers."""
        self.model.load_state_dict(self.weights)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.options.lr, weight_decay=0.05, fused=True)
        torch.manual_seed(self.run.seed)

    def warm_up(self, steps: int = 3) -> float:
        """Compiles and allocates, then starts again; seconds a step, of the last ones."""
        began = time.perf_counter()
        self.step(0)
        self.synchronize()
        first = time.perf_counter()
        for number in range(steps):
            self.step(number)
        self.synchronize()
        now = time.perf_counter()
        self.begin()
        self.run.setup_s = now - began
        return (now - first) / steps

    def step(self, number: int) -> Tensor:
        """One training step; its loss, not waited for."""
        self.model.train()
        images, labels = self.batches.at(number)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = F.cross_entropy(self.forward(images), labels, label_smoothing=0.1)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def train(self, steps: int, deadline: float) -> None:
        """All steps, with tests in between; fills the run. Raises OutOfTime."""
        losses = torch.zeros(steps, device=self.device)
        marks = sorted({round(steps * (i + 1) / TESTS) for i in range(TESTS)} - {0})
        done = 0
        for mark in marks:
            self.synchronize()
            began = time.perf_counter()
            for number in range(done, mark):
                for group in self.optimizer.param_groups:
                    group["lr"] = self.options.lr * schedule(number, steps)
                losses[number] = self.step(number)
            self.synchronize()
            self.run.seconds += time.perf_counter() - began
            done = mark
            self.run.losses = losses[:done].tolist()
            self.run.points.append((done, self.run.seconds, self.accuracy()))
            if time.monotonic() > deadline and done < steps:
                raise OutOfTime(f"out of time after {done} of {steps} steps")

    def accuracy(self) -> float:
        """Share of the test images whose class is found."""
        self.model.eval()
        right = torch.zeros((), device=self.device)
        images, labels = self.data.test
        with torch.no_grad(), self.autocast():
            for pixels, wanted in zip(images.split(self.options.batch), labels.split(self.options.batch), strict=True):
                right += (self.model(normalised(pixels)).argmax(1) == wanted).sum()
        return float(right) / len(labels)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: a tenth of linear warm-up, then a cosine to 0."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
