"""Fitting a step into the GPU's memory: recomputed activations, and what to do when it does not fit."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from stvit.modules import SuperTokenBlock
from stvit.train.engine import Precision
from stvit.train.errors import Stop, UserError


def checkpoint_activations(model: nn.Module, precision: Precision, size: int) -> str:
    """Let the backward recompute each block from its input; returns what that saves, for the user.

    Raises:
        UserError: for a model of timm that can't.
    """
    enable = getattr(model, "set_grad_checkpointing", None)
    counted = any(isinstance(module, SuperTokenBlock) for module in model.modules())
    before = kept_bytes(model, precision, size) if counted else 0
    try:
        if enable is None:
            raise NotImplementedError
        enable(True)
    except (NotImplementedError, AssertionError, AttributeError) as error:
        raise UserError("--checkpoint-activations: this model can't recompute its blocks") from error
    if not counted:
        return "blocks are recomputed in the backward"
    after = kept_bytes(model, precision, size)
    return (
        f"blocks are recomputed in the backward: {after / 2**20:.1f} MiB of activations an image are kept instead of "
        f"{before / 2**20:.1f}"
    )


def kept_bytes(model: nn.Module, precision: Precision, size: int) -> float:
    """Bytes an image that a forward pass keeps for the backward, parameters aside, counted on two images."""
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensor itself, so that its address is not used again
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    def keep_input(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        keep(inputs[0])  # of a block that is recomputed, which autograd does not show

    hooks = [m.register_forward_pre_hook(keep_input) for m in model.modules() if isinstance(m, SuperTokenBlock)]
    training = model.training
    images = torch.zeros(2, 3, size, size, device=next(model.parameters()).device)
    try:
        model.eval()  # statistics stay as they are
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), precision.autocast():
            model(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return sum(size for size, _ in kept.values()) / 2


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU or PyTorch's allocator on the CPU could not have as much as was asked for."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def out_of_memory(args: argparse.Namespace, device: torch.device) -> Stop:
    """One line: how much there is, and flags that make the same step need less."""
    used = ""
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        used = f" ({peak / 2**30:.1f} of {total / 2**30:.1f} GiB in use)"
    ways = []
    if args.batch_size % 2 == 0:
        halved = f"--batch-size {args.batch_size // 2} --grad-accum-steps {2 * args.grad_accum_steps}"
        ways.append(f"{halved} is the same step from batches of half the size")
    if not args.checkpoint_activations:
        ways.append("--checkpoint-activations keeps less, for a second forward pass")
    ways.append(f"an --input-size below {args.input_size} needs less")
    kind = "GPU memory" if device.type == "cuda" else "memory"
    return Stop(f"out of {kind}{used} at --batch-size {args.batch_size}: {'; '.join(ways)}")
