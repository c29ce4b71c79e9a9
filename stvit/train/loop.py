"""The loop over epochs: train, evaluate, log, save, and stop cleanly when asked to."""

from __future__ import annotations

import argparse
import copy
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.utils.distributed import distribute_bn
from torch import nn

from stvit.train import saving
from stvit.train.console import Screen, Task
from stvit.train.data import Data
from stvit.train.distributed import Process
from stvit.train.engine import Trainer
from stvit.train.errors import Interrupted, LossNotFinite, Preempted
from stvit.train.evaluation import Accuracy
from stvit.train.log import Log
from stvit.train.meter import Meter, Trained
from stvit.train.signals import StopRequest
from stvit.train.state import State
from stvit.train.summary import epoch_line, epoch_row, final_table

Evaluate = Callable[[nn.Module, Callable[[], None]], Accuracy]


class Training:
    """Runs ``state`` from where it is to its end."""

    def __init__(
        self,
        args: argparse.Namespace,
        process: Process,
        screen: Screen,
        data: Data,
        state: State,
        trainer: Trainer,
        evaluate: Evaluate,
        folder: Path | None,
        keep_previous: bool = True,
    ) -> None:
        """``folder``: where to save; ``keep_previous``: as for `Saver`."""
        assert data.train is not None
        self.args, self.process, self.screen, self.data = args, process, screen, data
        self.state, self.trainer, self.evaluate = state, trainer, evaluate
        self.folder = folder
        self.saver = saving.Saver(folder, keep_previous) if folder and process.main else None
        self.feeder = data.train
        self.last_step = last_step(args, data)
        self.drop_path = DropPathSchedule(state.model, args.drop_path_rates)
        self.accuracies = ""  # of the last evaluation, for the bar

    def go(self, stop: StopRequest) -> None:
        """Train until the end.

        Raises:
            Stop: when the run ends early.
        """
        main = self.process.main
        log = Log(self.folder if main else None, self.state.epoch, self.state.step, self.args, main)
        began = time.perf_counter()
        try:
            with self.screen.progress():
                self._epochs(log, stop)
            self._wait()
        except KeyboardInterrupt as interrupt:
            with _quiet_destructors():
                traceback.clear_frames(interrupt.__traceback__)
            self._wait()
            log.draw()
            raise Interrupted(f"interrupted; {self._how_to_go_on()}") from None
        except LossNotFinite as error:
            self._wait()
            raise LossNotFinite(f"{error}: training stops here; {self._what_to_do()}") from None
        finally:
            log.close()
        log.draw()
        if self.process.main:
            self.screen.table(
                "done", final_table(self.state, log.epochs.rows[-1], time.perf_counter() - began, self.folder)
            )

    def _epochs(self, log: Log, stop: StopRequest) -> None:
        args, state = self.args, self.state
        task = self.screen.task(self.last_step, state.step)
        while state.epoch < args.epochs and (state.step < self.last_step or state.batch):
            began = time.perf_counter()
            trained = self._train_epoch(log, stop, task)
            self._wait()  # loader processes may start now: not while another thread writes
            tested, averaged = self._test(stop)
            improved = self._improved(tested.acc1, state.best, saving.BEST)
            improved_ema = averaged is not None and self._improved(averaged.acc1, state.best_ema, saving.BEST_EMA)
            state.best = max(state.best, tested.acc1)
            state.best_ema = max(state.best_ema, averaged.acc1 if averaged else 0.0)
            epoch = state.epoch
            state.next_epoch(tested.acc1)
            row = epoch_row(state, epoch, trained, tested, averaged, time.perf_counter() - began, self.data.bad)
            if self.process.main:
                log.add_epoch(row)
            self.screen.say(epoch_line(row, state, args.epochs))
            self._save(improved, improved_ema)

    def _train_epoch(self, log: Log, stop: StopRequest, task: Task) -> Trained:
        args, state = self.args, self.state
        if not self.feeder.loader.persistent_workers:
            self._wait()  # as above
        self.data.order.start(state.epoch, state.batch * args.batch_size)
        self.drop_path.set(state.epoch)
        meter = Meter(state, self.process, log, task, args.epochs, self.accuracies)

        def after_step() -> None:
            stopping = stop.agreed()
            if stopping or (args.save_every and state.step % args.save_every == 0):
                meter.flush()
                self._save()
            if stopping:
                self._preempted(stop)

        self.trainer.epoch(self.feeder, self.last_step, meter, after_step)
        return meter.finish()

    def _test(self, stop: StopRequest) -> tuple[Accuracy, Accuracy | None]:
        """Accuracy of the model, and of the averaged one. The running statistics of process 0 count for both."""
        state = self.state

        def after_batch() -> None:
            if stop.agreed():
                self._save()  # the epoch's steps are done; resuming begins with its evaluation
                self._preempted(stop)

        if self.process.world_size > 1:
            distribute_bn(state.model, self.process.world_size)
        tested = self.evaluate(state.model, after_batch)
        self.accuracies = f"accuracy {tested.acc1:.2f} %"
        if state.ema is None:
            return tested, None
        averaged_model: nn.Module = state.ema.module
        if self.args.model_ema_force_cpu:
            averaged_model = copy.deepcopy(averaged_model).to(self.process.device)
        if self.process.world_size > 1:
            distribute_bn(averaged_model, self.process.world_size)
        averaged = self.evaluate(averaged_model, after_batch)
        self.accuracies += f", averaged {averaged.acc1:.2f} %"
        return tested, averaged

    def _improved(self, accuracy: float, best: float, name: str) -> bool:
        return accuracy > best or (self.folder is not None and not (self.folder / name).exists())

    def _save(self, best: bool = False, best_ema: bool = False) -> None:
        """Begin to write the state; every process has to call it."""
        if self.folder is None:
            return
        contents = self.state.contents(self.args, self.process, self.data.classes)
        if self.saver is not None:
            self.saver.save(contents, best, self.state.ema_contents(contents) if best_ema else None)

    def _wait(self) -> None:
        if self.saver is not None:
            self.saver.wait()

    def _preempted(self, stop: StopRequest) -> None:
        self._wait()
        raise Preempted(f"{stop.name}: {self._how_to_go_on()}")

    def _how_to_go_on(self) -> str:
        if self.folder is None:
            return "nothing was saved (--output_dir DIR saves a checkpoint after each epoch)"
        last = self.folder / saving.LAST
        if not last.exists():
            return f"{last} was not written yet: nothing to resume (--save-every STEPS saves sooner)"
        contents = saving.read(last).contents
        return (
            f"{last} holds the state after step {contents['step']} ({contents['epoch'] + 1} of {self.args.epochs} "
            "epochs). The same command again resumes it"
        )

    def _what_to_do(self) -> str:
        where = "" if self.args.detect_anomaly else ", or --detect-anomaly to see where it begins"
        advice = f"try a lower --lr, --clip-grad 1 or --amp-dtype bf16{where}"
        if self.folder is not None and (self.folder / saving.LAST).exists():
            return f"{self.folder / saving.LAST} is from before; {advice}"
        return f"no checkpoint was saved before; {advice}"


class DropPathSchedule:
    """Stochastic depth rates that change with the epoch. A model is built with the largest, growing over its blocks."""

    def __init__(self, model: nn.Module, rates: list[tuple[int, float]]) -> None:
        self.rates = rates
        self.most = max((rate for _, rate in rates), default=0.0)
        self.modules: list[tuple[Any, Any]] = []  # with the rate that each was built with
        if rates:
            self.modules = [(m, m.drop_prob) for m in model.modules() if getattr(m, "drop_prob", None)]

    def set(self, epoch: int) -> None:
        """Scale every block's rate to that of ``epoch``."""
        rate = next((rate for first, rate in reversed(self.rates) if first <= epoch), self.most)
        for module, built in self.modules:
            module.drop_prob = built * rate / self.most


def last_step(args: argparse.Namespace, data: Data) -> int:
    """The step that ends the run."""
    return min(args.max_steps or 10**18, data.steps * args.epochs)


@contextmanager
def _quiet_destructors() -> Iterator[None]:
    """Within, what fails in a destructor is not printed; those of PyTorch's loaders do when cut off at their start."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


def wrap(model: nn.Module, args: argparse.Namespace, process: Process) -> Any:
    """The model as it is called in training: under DistributedDataParallel and torch.compile as the flags say."""
    network: Any = model
    if process.world_size > 1:
        devices = [process.device.index] if process.device.type == "cuda" else None
        network = nn.parallel.DistributedDataParallel(network, device_ids=devices)
    return torch.compile(network, backend=args.compile_backend) if args.compile else network
