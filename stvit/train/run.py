"""One run from flags to result: build, resume, then train or evaluate."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import NativeScaler
from timm.utils.distributed import distribute_bn
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stvit.train import build, distributed
from stvit.train.console import Screen
from stvit.train.data import Data, build_data
from stvit.train.distributed import Process
from stvit.train.engine import Accuracy, Precision, Trained, Trainer, evaluate, seed_epoch
from stvit.train.errors import Interrupted, Stop, UserError
from stvit.train.log import Log
from stvit.train.losses import build_loss, build_mixup
from stvit.train.state import State, load_finetune, load_weights


def run(args: argparse.Namespace) -> int:
    """Run the program with parsed flags; returns the exit code 0.

    Raises:
        Stop: when the run ends early, with the exit code and a message.
    """
    build.check_name(args.model, "--model")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    process = distributed.start(args)
    try:
        _Run(args, process).go()
    except torch.OutOfMemoryError as error:
        raise Stop(f"out of GPU memory: lower --batch-size (now {args.batch_size}) or --input-size") from error
    distributed.stop()
    return 0


class _Run:
    """What all parts of one run share."""

    def __init__(self, args: argparse.Namespace, process: Process) -> None:
        self.args, self.process = args, process
        self.screen = Screen(process.main)
        self.folder = Path(args.output_dir).expanduser() if args.output_dir else None
        self.precision: Precision = build.build_precision(args, process.device)
        self.backend = build.resolve_backend(args, self.precision, process.device)
        self.checkpoint = _checkpoint(args, self.folder)
        self.data: Data = build_data(args, process)
        seed_epoch(args.seed, 0, 0)  # the same initial weights in every process
        self.model = build.build_model(args, self.data.num_classes)
        torch.backends.cudnn.benchmark = True

    def go(self) -> None:
        self._introduce()
        if self.args.eval:
            self._evaluate_only()
            return
        state = self._state()
        if self.checkpoint:
            state.restore(self.checkpoint, self.args)
            state.step = state.step or state.epoch * len(self.data.train or ())  # other programs' files don't say
            self.screen.say(
                f"resuming {self.checkpoint}: {state.epoch} of {self.args.epochs} epochs done, best test "
                f"accuracy {state.best:.2f} %"
            )
        else:
            state.epoch = self.args.start_epoch
            state.step = state.epoch * len(self.data.train or ())
        if self.folder and self.process.main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--output_dir {self.folder}: {error.strerror}") from error
        _Training(self, state).go()

    def _introduce(self) -> None:
        args, device = self.args, self.process.device
        threads = torch.get_num_threads()
        where = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
        if device.type == "cuda":
            where = torch.cuda.get_device_name(device)
        if self.process.world_size > 1:
            where = f"{self.process.world_size} processes, each {where}"
        amp = self.precision.dtype
        dtype = "float32" if amp is None else f"{str(amp).removeprefix('torch.')} autocast"
        self.screen.say(
            f"{args.model}, {count_parameters(self.model):,} parameters; {where}; {dtype}; backend "
            f"{self.backend}; {self.data.description}"
        )
        if args.preset and not args.eval:
            flags = " ".join(_flag(name, value) for name, value in args.preset.items())
            self.screen.say(f"{args.data_set} implies {flags}")

    def to_device(self) -> None:
        memory_format = torch.channels_last if self.args.channels_last else torch.contiguous_format
        self.model.to(device=self.process.device, memory_format=memory_format)  # type: ignore[call-overload]

    def evaluate(self, model: nn.Module) -> Accuracy:
        """Accuracy of ``model`` on the test set."""
        task = self.screen.task(len(self.data.test))
        try:
            return evaluate(model, self.data.test, self.process, self.precision, self.args.channels_last, task)
        finally:
            task.close()

    def _evaluate_only(self) -> None:
        path = self.checkpoint or (Path(self.args.finetune) if self.args.finetune else None)
        if path is None:
            raise UserError("--eval needs a checkpoint: --resume FILE, or an --output_dir that holds a checkpoint.pth")
        load_weights(self.model, path, self.args)
        self.to_device()
        with self.screen.progress():
            result = self.evaluate(self.model)
        averaged = " (averaged weights)" if self.args.eval_ema else ""
        self.screen.say(
            f"{path}{averaged}: accuracy {result.acc1:.2f} % (top 5: {result.acc5:.2f} %), loss "
            f"{result.loss:.4f}, on {result.images:,} test images"
        )

    def _state(self) -> State:
        args, model = self.args, self.model
        if args.finetune and not self.checkpoint:
            classes = load_finetune(model, Path(args.finetune), self.data.num_classes)
            head = (
                ""
                if classes is None
                else f"; its head for {classes} classes is replaced by a fresh one for {self.data.num_classes}"
            )
            self.screen.say(f"fine-tuning {args.finetune} in {args.finetune_mode} mode{head}")
        self.to_device()
        ema = None
        if args.model_ema:
            device = torch.device("cpu") if args.model_ema_force_cpu else None
            ema = ModelEmaV3(model, args.model_ema_decay, device=device)
        optimizer = build.build_optimizer(args, model, self.process.world_size)
        scheduler = build.build_scheduler(args, optimizer, len(self.data.train or ()))
        scaler = NativeScaler(self.process.device.type) if self.precision.dtype is torch.float16 else None
        return State(model, ema, optimizer, scheduler, scaler)

    def teacher(self) -> nn.Module | None:
        """The frozen teacher model, if the flags name one."""
        args = self.args
        if args.distillation_type == "none":
            return None
        build.check_name(args.teacher_model, "--teacher-model")
        teacher = timm.create_model(args.teacher_model, num_classes=self.data.num_classes)
        load_finetune(teacher, Path(args.teacher_path), self.data.num_classes)
        return teacher.to(self.process.device).eval().requires_grad_(False)


class _Training:
    """The loop over epochs, and what each leaves on disk and screen."""

    def __init__(self, run: _Run, state: State) -> None:
        self.run, self.args, self.process, self.screen, self.state = run, run.args, run.process, run.screen, state
        assert run.data.train is not None
        self.loader = run.data.train
        self.folder = run.folder if run.process.main else None
        self.last_step = min(self.args.max_steps or 10**18, len(self.loader) * self.args.epochs)

    def go(self) -> None:
        state = self.state
        if state.epoch >= self.args.epochs or state.step >= self.last_step:
            self._already_finished()
            return
        if self.args.warmup_epochs >= self.args.epochs:
            self.screen.say(
                f"note: the learning rate still warms up when training ends ({self.args.warmup_epochs} of "
                f"{self.args.epochs} epochs): lower --warmup-epochs"
            )
        log = Log(self.folder, state.epoch, self.args.tensorboard)
        mixup = build_mixup(self.args, self.run.data.num_classes)
        loss = build_loss(self.args, mixup, self.run.teacher())
        trainer = Trainer(self.args, self.process, self.run.precision, self._network(), state, loss, mixup, log)
        began = time.perf_counter()
        try:
            with self.screen.progress():
                self._epochs(trainer, log)
        except KeyboardInterrupt as interrupt:
            with _quiet_destructors():
                traceback.clear_frames(interrupt.__traceback__)
            log.draw()
            raise Interrupted(self._how_to_go_on()) from None
        log.draw()
        self._summary(log, time.perf_counter() - began)

    def _network(self) -> Any:
        network: Any = self.state.model
        if self.process.world_size > 1:
            devices = [self.process.device.index] if self.process.device.type == "cuda" else None
            network = DistributedDataParallel(network, device_ids=devices)
        return torch.compile(network) if self.args.compile else network

    def _epochs(self, trainer: Trainer, log: Log) -> None:
        state = self.state
        task = self.screen.task(self.last_step, state.step)
        while state.epoch < self.args.epochs and state.step < self.last_step:
            began = time.perf_counter()
            epoch = state.epoch
            self.run.data.train_sampler.set_epoch(epoch)
            trained = trainer.epoch(self.loader, epoch, self.last_step, task)
            if self.process.world_size > 1:  # running statistics differ between processes: those of process 0 count
                distribute_bn(state.model, self.process.world_size)
            averaged = self.args.eval_ema and state.ema is not None
            tested = self.run.evaluate(state.ema.module if averaged and state.ema else state.model)
            state.epoch = epoch + 1
            improved = tested.acc1 > state.best or (self.folder and not (self.folder / "best.pth").exists())
            state.best = max(state.best, tested.acc1)
            if state.scheduler is not None:
                state.scheduler.step(state.epoch, tested.acc1)
            self._record(log, epoch, trained, tested, time.perf_counter() - began)
            self._save(bool(improved))

    def _record(self, log: Log, epoch: int, trained: Trained, tested: Accuracy, seconds: float) -> None:
        if not self.process.main:
            return
        log.add_epoch(
            {
                "epoch": epoch,
                "n_parameters": count_parameters(self.state.model),
                "train_loss": trained.loss,
                "train_lr": trained.lr,
                "test_loss": tested.loss,
                "test_acc1": tested.acc1,
                "test_acc5": tested.acc5,
                "steps": self.state.step,
                "lr": self.state.optimizer.param_groups[0]["lr"],
                "images_per_s": round(trained.images_per_s, 2),
                "seconds": round(seconds, 3),
            }
        )
        self.screen.say(
            f"epoch {epoch + 1}/{self.args.epochs}: loss {trained.loss:.4f}, test loss {tested.loss:.4f}, "
            f"accuracy {tested.acc1:.2f} % (best {self.state.best:.2f} %), {trained.images_per_s:,.0f} "
            f"images/s, {seconds:.1f} s"
        )

    def _save(self, improved: bool) -> None:
        if self.folder is None:
            return
        if improved:
            self.state.save(self.folder / "best.pth", self.args)
        self.state.save(self.folder / "checkpoint.pth", self.args)

    def _how_to_go_on(self) -> str:
        folder, state = self.run.folder, self.state
        if folder is None:
            return "interrupted; nothing was saved (--output_dir DIR saves a checkpoint after each epoch)"
        if not (folder / "checkpoint.pth").exists():
            return f"interrupted in the first epoch, before {folder}/checkpoint.pth was written: nothing to resume"
        return (
            f"interrupted; {folder}/checkpoint.pth holds the state after {state.epoch} of {self.args.epochs} "
            "epochs. The same command again resumes it"
        )

    def _already_finished(self) -> None:
        done = f"{self.state.epoch} of {self.args.epochs} epochs, {self.state.step} steps"
        folder = self.run.folder
        rows = [
            ("done", done),
            ("best test accuracy", f"{self.state.best:.2f} %"),
            ("evaluate again", "the same command with --eval"),
            (
                "train longer",
                f"the same command with a larger --epochs (now {self.args.epochs})"
                + (f" or --max-steps (now {self.args.max_steps})" if self.args.max_steps else ""),
            ),
        ]
        if folder and self.run.checkpoint == folder / "checkpoint.pth":
            rows.append(("start over", f"rm -r {shlex.quote(str(folder))}, or another --output_dir"))
        self.screen.table("this run is already finished", rows)

    def _summary(self, log: Log, seconds: float) -> None:
        if not self.process.main:
            return
        last = log.epochs.rows[-1]
        rows = [
            ("test accuracy", f"{last['test_acc1']:.2f} %"),
            ("best test accuracy", f"{self.state.best:.2f} %"),
            ("training loss", f"{last['train_loss']:.4f}"),
            ("steps", f"{self.state.step:,}"),
            ("time", f"{seconds:.1f} s"),
            ("speed", f"{last['images_per_s']:,.0f} images/s"),
        ]
        if self.folder:
            rows += [
                ("last and best weights", f"{self.folder}/checkpoint.pth, best.pth"),
                ("log and curve", f"{self.folder}/log.txt, steps.jsonl, curve.png"),
            ]
        self.screen.table("done", rows)


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _checkpoint(args: argparse.Namespace, folder: Path | None) -> Path | None:
    """What to resume: ``--resume``, or a checkpoint.pth that is already in the output folder."""
    if args.resume:
        return Path(args.resume).expanduser()
    path = folder / "checkpoint.pth" if folder else None
    return path if path is not None and path.exists() else None


def _flag(name: str, value: Any) -> str:
    flag = name if name == "output_dir" else name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"


@contextmanager
def _quiet_destructors() -> Iterator[None]:
    """Within, what fails in a destructor is not printed; those of PyTorch's loaders do when cut off at their start."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        yield
    finally:
        sys.unraisablehook = hook
