"""One run from flags to result: build, resume, then train or evaluate."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.utils import NativeScaler
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from stvit.train import build, distributed, recipes, saving, seeds
from stvit.train.anomaly import watch
from stvit.train.console import Screen
from stvit.train.data import Data, build_data
from stvit.train.distributed import Process
from stvit.train.engine import Precision, Trainer
from stvit.train.errors import Preempted, Stop, UserError
from stvit.train.evaluation import Accuracy, evaluate
from stvit.train.graph import GraphedStep, why_not
from stvit.train.loop import Training, last_step, wrap
from stvit.train.losses import build_loss, build_mixup
from stvit.train.memory import checkpoint_activations, is_out_of_memory, out_of_memory
from stvit.train.signals import StopRequest
from stvit.train.state import State, load_finetune, load_weights
from stvit.train.summary import count_parameters, finished_table
from stvit.train.throughput import measure


def run(args: argparse.Namespace) -> int:
    """Run the program with parsed flags; returns the exit code 0.

    Raises:
        Stop: when the run ends early, with the exit code and a message.
    """
    build.check_name(args.model, "--model")
    if args.threads is not None:
        torch.set_num_threads(min(args.threads, os.cpu_count() or 1))  # more would each take memory and wait
    process = distributed.start(args)
    if not process.main:
        logging.getLogger("stvit").setLevel(logging.ERROR)  # the first process says what holds for all
    try:
        with StopRequest(process.world_size) as stop:
            this = _Run(args, process)
            try:
                this.go(stop)
            finally:
                this.data.close()
    except MemoryError as error:
        raise out_of_memory(args, process.device) from error
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise out_of_memory(args, process.device) from error
        if distributed.is_lost_peer(error):
            text = "another process of this run is gone; its own last line says why, if it had time for one"
            raise Stop(text) from error
        failed = build.compile_error(args, error)
        if failed is None:
            raise
        raise failed from error
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
        self.saved = self._find()
        self.data: Data = build_data(args, process, self.saved)
        seeds.set_all(args.seed, seeds.WEIGHTS)  # the same initial weights in every process
        self.model = build.build_model(args, self.data.num_classes)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision(args.matmul_precision)

    def _find(self) -> saving.Saved | None:
        """What to resume or evaluate: ``--resume``, or the last checkpoint in the output folder."""
        args = self.args
        if args.resume:
            return saving.read(Path(args.resume).expanduser())
        saved = saving.find(self.folder) if self.folder else None
        if saved is None and args.eval and args.finetune:
            return saving.read(Path(args.finetune).expanduser())
        return saved

    def go(self, stop: StopRequest) -> None:
        self._introduce()
        if self.saved and self.saved.note:
            self.screen.say(f"note: {self.saved.note}")
        if self.args.eval:
            self._evaluate_only(stop)
            return
        if not self.args.throughput:
            self._prepare_folder()
        state = self._state()
        self._resume(state)
        if state.epoch >= self.args.epochs or (state.step >= last_step(self.args, self.data) and not state.batch):
            own = self.saved is not None and self.saved.path.parent == self.folder
            self.screen.table("this run is already finished", finished_table(self.args, state, self.folder, own))
            return
        self._advise()
        mixup = build_mixup(self.args, self.data.num_classes)
        loss = build_loss(self.args, mixup, self.teacher())
        network = wrap(state.model, self.args, self.process)
        trainer = Trainer(self.args, self.process, self.precision, network, state, loss, mixup)
        self._record_steps(trainer)
        if self.args.throughput:
            size, classes = self.args.input_size, self.data.num_classes
            self.screen.say(measure(trainer, self.process, size, classes, self.args.throughput))
            return
        keep_previous = not (self.saved and self.saved.note)
        Training(
            self.args, self.process, self.screen, self.data, state, trainer, self.evaluate, self.folder, keep_previous
        ).go(stop)

    def _record_steps(self, trainer: Trainer) -> None:
        """``--cuda-graph``, where it can be."""
        if not self.args.cuda_graph:
            return
        device, state = self.process.device, trainer.state
        reason = why_not(self.args, device, state.scaler is not None, self.process.world_size)
        if reason:
            self.screen.say(f"note: --cuda-graph: {reason}; steps run plainly")
            return
        trainer.graphed = GraphedStep(trainer.forward_backward, state.optimizer, device, self.screen.say)

    def _prepare_folder(self) -> None:
        if self.folder is None or not self.process.main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {self.folder}: {error.strerror}") from error
        if leftovers := saving.remove_leftovers(self.folder):
            self.screen.say(f"removed what a killed run left: {', '.join(leftovers)}")
        recipes.write_config(self.folder / "config.yaml", self.args)

    def _resume(self, state: State) -> None:
        if self.saved is None:
            state.epoch = self.args.start_epoch
            state.step = state.epoch * self.data.steps
            return
        state.restore(self.saved, self.args, self.process, self.data.steps)
        if self.folder is not None and self.saved.path.parent != self.folder:
            state.best = state.best_ema = 0.0  # of another folder: best.pth here is to be this run's
        where = f" and {state.batch} of {len(self.data.train or ())} batches" if state.batch else ""
        self.screen.say(
            f"resuming {self.saved.path}: {state.epoch} of {self.args.epochs} epochs{where} done, best test "
            f"accuracy {state.best:.2f} %"
        )

    def _advise(self) -> None:
        args = self.args
        if args.warmup_epochs >= args.epochs and args.sched != "none":
            self.screen.say(
                f"note: the learning rate still warms up when training ends ({args.warmup_epochs} of {args.epochs} "
                "epochs): lower --warmup-epochs"
            )

    def _introduce(self) -> None:
        args, device = self.args, self.process.device
        threads = torch.get_num_threads()
        where = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
        if device.type == "cuda":
            where = f"{torch.cuda.get_device_name(device)}, float32 products {args.matmul_precision}"
        if self.process.world_size > 1:
            where = f"{self.process.world_size} processes, each {where}"
        amp = self.precision.dtype
        dtype = "float32" if amp is None else f"{str(amp).removeprefix('torch.')} autocast"
        self.screen.say(
            f"{args.model}, {count_parameters(self.model):,} parameters; {where}; {dtype}; backend "
            f"{self.backend}; {self.data.description}"
        )
        if args.preset and not args.eval:
            flags = " ".join(word for name, value in args.preset.items() for word in recipes.flag(name, value))
            self.screen.say(f"{args.data_set} implies {flags}")

    def to_device(self) -> None:
        memory_format = torch.channels_last if self.args.channels_last else torch.contiguous_format
        self.model.to(device=self.process.device, memory_format=memory_format)  # type: ignore[call-overload]

    def evaluate(self, model: nn.Module, after_batch: Callable[[], None]) -> Accuracy:
        """Accuracy of ``model`` on the test set."""
        task = self.screen.task(len(self.data.test))
        try:
            return evaluate(model, self.data.test, self.process, self.precision, task, after_batch)
        finally:
            task.close()

    def _evaluate_only(self, stop: StopRequest) -> None:
        if self.saved is None:
            raise UserError("--eval needs a checkpoint: --resume FILE, or an --output_dir that holds a checkpoint.pth")

        def after_batch() -> None:
            if stop.agreed():
                raise Preempted(f"{stop.name}: the evaluation was not finished")

        load_weights(self.model, self.saved, self.args)
        self.to_device()
        with self.screen.progress():
            result = self.evaluate(self.model, after_batch)
        averaged = " (averaged weights)" if self.args.eval_ema else ""
        self.screen.say(
            f"{self.saved.path}{averaged}: accuracy {result.acc1:.2f} % (top 5: {result.acc5:.2f} %), loss "
            f"{result.loss:.4f}, on {result.images:,} test images, {result.images_per_s:,.0f} images/s"
        )

    def _state(self) -> State:
        args, model = self.args, self.model
        if args.finetune and not self.saved:
            classes = load_finetune(model, Path(args.finetune), self.data.num_classes)
            head = ""
            if classes is not None:
                head = f"; its head for {classes} classes is replaced by a fresh one for {self.data.num_classes}"
            self.screen.say(f"fine-tuning {args.finetune} in {args.finetune_mode} mode{head}")
        if args.sync_bn:
            self._synchronise_batchnorm()
        self.to_device()
        if args.checkpoint_activations:
            self.screen.say(checkpoint_activations(self.model, self.precision, args.input_size))
        model = self.model
        ema = None
        if args.model_ema:
            device = torch.device("cpu") if args.model_ema_force_cpu else None
            ema = ModelEmaV3(model, args.model_ema_decay, device=device)
        if args.detect_anomaly:
            watch(model, gradients=self.precision.dtype is not torch.float16)
        optimizer = build.build_optimizer(args, model, self.process)
        scheduler = build.build_scheduler(args, optimizer, self.data.steps)
        scaler = NativeScaler(self.process.device.type) if self.precision.dtype is torch.float16 else None
        return State(model, ema, optimizer, scheduler, scaler, args.lag_lr)

    def _synchronise_batchnorm(self) -> None:
        if self.process.device.type != "cuda":
            raise UserError("--sync-bn needs GPUs: PyTorch's SyncBatchNorm does not run on the CPU")
        self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)

    def teacher(self) -> nn.Module | None:
        """The frozen teacher model, if the flags name one."""
        args = self.args
        if args.distillation_type == "none":
            return None
        build.check_name(args.teacher_model, "--teacher-model")
        teacher = timm.create_model(args.teacher_model, num_classes=self.data.num_classes)
        load_finetune(teacher, Path(args.teacher_path), self.data.num_classes)
        return teacher.to(self.process.device).eval().requires_grad_(False)
