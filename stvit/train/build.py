"""Models, teacher, precision and optimization by the flags, through timm."""

from __future__ import annotations

import argparse
import difflib
from contextlib import suppress
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg_value, is_model
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.optim import optimizer_kwargs as optimizer_flags
from timm.scheduler import create_scheduler
from torch import nn

import stvit
import stvit.timm_models  # registers the models that `timm.create_model` is asked for
from stvit.backends import dispatch
from stvit.model import CONFIGS
from stvit.train.distributed import Process
from stvit.train.engine import Precision
from stvit.train.errors import UserError

AMP_DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The model named by ``--model``, with random weights, on the CPU.

    Raises:
        UserError: for an unknown name or options that the model does not take.
    """
    check_name(args.model, "--model")
    options: dict[str, Any] = {"num_classes": num_classes, "drop_rate": args.drop, "drop_path_rate": args.drop_path}
    if args.model in CONFIGS:
        options |= {"backend": args.backend, "association_grad": args.association_grad}
    elif get_pretrained_cfg_value(args.model, "fixed_input_size"):
        options["img_size"] = args.input_size
    try:
        return timm.create_model(args.model, **options)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        del options["drop_path_rate"]  # this model has no stochastic depth
        return timm.create_model(args.model, **options)
    except (ValueError, AssertionError) as error:
        raise UserError(f"--model {args.model}: {error}") from error


def check_name(name: str, flag: str) -> None:
    """Raise UserError, with the closest names, unless timm or this package has a model of this name."""
    if is_model(name):
        return
    close = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
    raise UserError(f"{flag} {name}: no such model" + (f"; did you mean {', '.join(close)}?" if close else ""))


def build_precision(args: argparse.Namespace, device: torch.device) -> Precision:
    """Mixed precision by ``--amp`` and ``--amp-dtype``.

    Raises:
        UserError: for an unknown dtype.
    """
    if args.amp_dtype != "auto" and args.amp_dtype not in AMP_DTYPES:
        raise UserError(f"--amp-dtype {args.amp_dtype}: expected auto, bf16 or fp16")
    on = device.type == "cuda" if args.amp is None else args.amp
    if not on:
        return Precision(device.type, None)
    if args.amp_dtype == "auto":
        bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
        return Precision(device.type, torch.bfloat16 if bf16 else torch.float16)
    return Precision(device.type, AMP_DTYPES[args.amp_dtype])


def resolve_backend(args: argparse.Namespace, precision: Precision, device: torch.device) -> str:
    """What to say of the super token kernels: the backend that the model will use on this device.

    Raises:
        UserError: for an unknown backend, or one named explicitly that can't run here, with the reasons.
    """
    try:
        asked = dispatch.check_backend(args.backend, "--backend")
        asked = dispatch.default_backend() if asked == "auto" else asked
        used = dispatch.resolve(asked, device, precision.dtype or torch.float32)
    except (ValueError, stvit.BackendError) as error:
        raise UserError(str(error)) from error
    if args.model not in CONFIGS:
        return "none (timm's model)"
    return f"{used} (auto)" if asked == "auto" else used


def build_optimizer(args: argparse.Namespace, model: nn.Module, process: Process) -> torch.optim.Optimizer:
    """timm's optimizer at the learning rate for this batch: ``--lr`` x images a step / 512.

    One kernel for all parameters (``--fused``) where the optimizer has one; on the CPU the plain one, whose rounding
    every machine shares.

    Raises:
        UserError: for an unknown name or arguments that it does not take.
    """
    _check_betas(args)
    images = args.batch_size * args.grad_accum_steps * process.world_size
    options = optimizer_flags(args) | {"lr": args.lr * images / 512}
    fused = process.device.type == "cuda" if args.fused is None else args.fused
    try:
        if fused:
            with suppress(TypeError, RuntimeError, ValueError):  # an optimizer without a fused form
                return create_optimizer_v2(model, **options, fused=True)
        return create_optimizer_v2(model, **options)
    except (ValueError, TypeError, KeyError, IndexError, AssertionError, RuntimeError) as error:
        raise UserError(f"--opt {args.opt}: {error}") from error


def compile_error(args: argparse.Namespace, error: RuntimeError) -> UserError | None:
    """What to say where torch.compile failed, for want of a C++ compiler say; None for another error."""
    if not args.compile:
        return None
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    if not isinstance(error, TorchDynamoException):
        return None
    lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
    return UserError(f"--compile with --compile-backend {args.compile_backend}: {lines[0].strip()}")


def _check_betas(args: argparse.Namespace) -> None:
    """Some optimizers look at their betas in the first step only."""
    name = args.opt.lower().split("_")[-1]  # behind lookahead_
    with suppress(ValueError):  # no such optimizer, which its creation says
        info = get_optimizer_info(name)
        if args.opt_betas and info.has_betas and len(args.opt_betas) != info.num_betas:
            raise UserError(f"--opt-betas: {args.opt} takes {info.num_betas}, not {len(args.opt_betas)}")


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """timm's schedule over ``--epochs``, of ``steps`` steps each; None for ``--sched none``.

    Raises:
        UserError: for an unknown name or arguments that don't make a schedule.
    """
    try:
        return create_scheduler(args, optimizer, updates_per_epoch=steps)[0]
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"--sched {args.sched}: {error}") from error
