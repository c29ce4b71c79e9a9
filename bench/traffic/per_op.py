"""What one op moves: bytes, kernels, category. The one place that knows; docs/traffic.md gives the reasons.

The rule: an op reads each input once and writes each output once, in one kernel. Views are free, an op in place reads
and writes what it changes. Below that rule come the exceptions: what cuDNN and PyTorch are known to move once more
inside an op, a bias added by a kernel of its own or a second pass for sums, counts for whoever calls the op. Our own
Triton ops need none: they are taken apart into their launches, workspace included, by bench/traffic/count.py. Nor do
those of the CUDA extension, whose kernels keep to the rule: a test holds it against the bytes that they move on an
emulated device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.harness.categories import of_op

Arguments = Mapping[str, Any]  # an op's arguments by the names of its schema


class Traffic(NamedTuple):
    """Bytes read plus written, passes inside the op included; kernels launched; operations of its products."""

    moved: int = 0
    kernels: int = 0
    flops: int = 0

    def plus(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))


def nbytes(tensor: Tensor) -> int:
    """Bytes of the elements that differ in place: an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


# Ops that allocate only, and ops in place that don't read what they overwrite.
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
OVERWRITES = {"copy_", "fill_", "zero_", "bernoulli_", "normal_", "uniform_", "random_"}


def traffic(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Traffic | None:
    """What a call of an OpOverload moves; None if it launches nothing."""
    name, given = op._schema.name.split("::")[1], arguments(op, args, kwargs)
    if name in ALLOCATES:
        return None
    inputs = {id(t): t for t in tensors(list(given.values()))}
    changed = {
        id(t): t
        for argument in op._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for t in tensors(given.get(argument.name))
    }
    storages = {_storage(t) for t in inputs.values()}
    fresh = [t for t in tensors(output) if _storage(t) not in storages]
    if not fresh and not changed:
        return None
    made_like = name.endswith("_like") or name.startswith("new_")  # takes no more than a shape from its input
    read = [t for key, t in inputs.items() if not made_like and (key not in changed or name not in OVERWRITES)]
    moved = Traffic(sum(map(nbytes, [*read, *fresh, *changed.values()])), flops=_flops(op, given, args, kwargs, output))
    exception = EXCEPTIONS.get(op._schema.name)
    return moved.plus(exception(given, tensors(output)) if exception else Traffic(kernels=1))


def _flops(op: Any, given: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """Of products that tensor cores do, by PyTorch's own table; a depthwise convolution is none."""
    counts = flop_registry.get(op.overloadpacket)
    if counts is None or ("groups" in given and _is_depthwise(given)):
        return 0
    return int(counts(*args, **kwargs, out_val=output))


def arguments(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in op._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# --- Exceptions: what an op moves beyond the rule, and its kernels. ---
Exception_ = Callable[[Arguments, list[Tensor]], Traffic]


def _convolution(given: Arguments, outputs: list[Tensor]) -> Traffic:
    """cuDNN adds the bias in a kernel of its own, over the output; PyTorch's depthwise kernel (NCHW) includes it."""
    native = _is_depthwise(given) and given["input"].is_contiguous()
    if given["bias"] is None or native:
        return Traffic(kernels=1)
    return Traffic(moved=2 * nbytes(outputs[0]), kernels=2)


def _convolution_backward(given: Arguments, outputs: list[Tensor]) -> Traffic:
    """Input, weight and bias have a kernel each, and each reads the output's gradient."""
    kernels = sum(given["output_mask"])
    return Traffic(moved=(kernels - 1) * nbytes(given["grad_output"]), kernels=kernels)


def _sums_first(*names: str) -> Exception_:
    """Two kernels, for sums and for the result; the tensors named are read by both."""

    def exception(given: Arguments, outputs: list[Tensor]) -> Traffic:
        return Traffic(moved=sum(nbytes(given[name]) for name in names), kernels=2)

    return exception


EXCEPTIONS: dict[str, Exception_] = {
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "aten::native_batch_norm": _sums_first("input"),
    "aten::cudnn_batch_norm": _sums_first("input"),
    "aten::native_batch_norm_backward": _sums_first("grad_out", "input"),
    "aten::cudnn_batch_norm_backward": _sums_first("grad_output", "input"),
    "aten::native_layer_norm_backward": _sums_first("grad_out", "input"),
    "aten::_scaled_dot_product_flash_attention_backward": lambda given, outputs: Traffic(
        moved=nbytes(given["grad_out"]), kernels=3
    ),
}


def category(op: Any, given: Arguments, hint: str | None) -> str:
    """The category of a call; `hint` is that of the module it runs in, if the module has one."""
    if hint == "super token ops":
        return hint
    weight = given.get("weight")
    return of_op(op._schema.name, weight.shape if isinstance(weight, Tensor) else None) or hint or "pointwise"


def _is_depthwise(given: Arguments) -> bool:
    return 1 < given["groups"] == given["input"].shape[1]
