"""``--cuda-graph``: a whole training step recorded once and replayed, so that the host no longer launches kernels."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

WARM_UP = 3  # steps before recording: libraries choose their kernels, the optimizer makes its state


def why_not(args: argparse.Namespace, device: torch.device, scaled: bool, world_size: int) -> str:
    """Why a step can't be recorded; empty where it can."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if scaled:
        return "fp16's loss scaler decides on the host whether to step; use --amp-dtype bf16"
    if args.compile:
        return "--compile makes graphs of its own"
    if args.detect_anomaly:
        return "--detect-anomaly looks at values on the host"
    if args.grad_accum_steps > 1:
        return "--grad-accum-steps takes several passes a step"
    if args.drop_path_schedule:
        return "--drop-path-schedule changes the step"
    if args.opt.lower() not in ("adam", "adamw"):
        return f"--opt {args.opt} reads its step count on the host; adam and adamw don't"
    if world_size > 1:
        return "the exchange of gradients between processes is not recorded"
    return ""


class GraphedStep:
    """Calls ``step(images, targets)`` plainly at first, then records one call and replays it.

    ``step`` does forward, backward and update of Adam or AdamW, and returns the loss. Inputs are copied to where the
    recording reads them, learning rates into tensors on the device. Random numbers differ at each replay: PyTorch hands
    the recording the present seed. Where recording fails ``tell`` says why and steps stay plain.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        tell: Callable[[str], None],
    ) -> None:
        self.step, self.optimizer, self.tell = step, optimizer, tell
        self.graph: torch.cuda.CUDAGraph | None = None
        self.plain_calls, self.failed = 0, False
        self.stream = torch.cuda.Stream(device)
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["capturable"] = True
        for state in optimizer.state.values():  # of a resumed run
            state["step"] = state["step"].to(device)

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            rate.fill_(float(group["lr"]))
        if self.graph is None and self.plain_calls >= WARM_UP and not self.failed:
            self._record(images, targets)
        if self.graph is None:
            self.plain_calls += 1
            return self._aside(images, targets)
        self.images.copy_(images)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.loss.clone()

    @contextmanager
    def _rates_on_the_device(self) -> Iterator[None]:
        """Within, the update reads the tensors; outside, the schedule and the log have their floats."""
        groups = self.optimizer.param_groups
        floats = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, number in zip(groups, floats, strict=True):
                group["lr"] = number

    def _aside(self, images: Tensor, targets: Tensor) -> Tensor:
        """Recording wants that earlier steps ran on a stream of their own."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), self._rates_on_the_device():
            loss = self.step(images, targets)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def _record(self, images: Tensor, targets: Tensor) -> None:
        """Recording runs nothing: the replay that follows is this step."""
        self.images, self.targets = images.clone(), targets.clone()
        self.optimizer.zero_grad(set_to_none=True)  # gradients then live in the graph's own memory
        graph = torch.cuda.CUDAGraph()
        try:
            with self._rates_on_the_device(), torch.cuda.graph(graph, stream=self.stream):
                self.loss = self.step(self.images, self.targets)
        except RuntimeError as error:
            self.failed = True
            self.tell(
                f"note: --cuda-graph: the step can't be recorded, and runs plainly ({str(error).splitlines()[0]})"
            )
            return
        self.graph = graph
