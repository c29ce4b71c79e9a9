"""Where the time of a step goes: kernels and their categories, read from torch.profiler.

On a GPU the entries are device kernels; on the CPU they are PyTorch operators with the time of their own (without
the operators they call). A kernel's category follows from its own name, from the operator that launched it, and from
the module whose forward, or whose forward's backward, it belongs to (bench/harness/categories.py). Compiled code and
CUDA graphs run outside the modules: there kernels are told by name, and what the compiler fused counts as pointwise.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from bench.harness.calls import watched
from bench.harness.categories import is_convolution, of_module, of_op

SCOPE = "category: "  # begins the names of the ranges that mark modules with one

# Kernels whose names say more than the operator around them: regular expression -> category.
FIRST = [
    (r"multi_tensor_apply|FusedAdam", "optimiser"),
    (r"^(walk|fold|pooling|tokens_to_pixels|pixels_to_tokens)_kernel|stoken|super_token", "super token ops"),
    (r"\bstvit::.*_kernel\b", "super token ops"),  # of the extension, which has no others
    (r"Memcpy|Memset|nchwToNhwc|nhwcToNchw|tensorTransform|transpose|direct_copy|CatArray", "copies"),
    (r"^triton_poi_fused(__to_copy|_clone|_constant_pad_nd|_cat)+(_\d+)?$", "copies"),
]
# Kernels of which no operator tells enough: compiled, of a graph, or of an operator that is not in harness/categories.
LAST = [
    (r"depthwise|dwconv|grouped_direct|conv2d_c1_k1", "depthwise"),
    (r"flash|fmha|attention|sdpa|softmax|^triton_(?!poi)\w*bmm", "attention"),
    (r"(?!triton_poi)(?=.*(fprop|dgrad|wgrad|convolve|conv2d|^triton_tem\w*conv))", "other convolutions"),
    (r"^triton_tem|gemm|gemv|nvjet|cutlass|splitKreduce", "1x1 products"),
    (r"^triton_poi|cpp_fused", "pointwise"),
    (r"(?i)layer_?norm|batch_?norm|bn_fw|bn_bw|welford|RowwiseMoments|GammaBeta", "norms"),
    (r"elementwise|vectorized|residual|reduce_kernel|^triton_(red|per)|gelu", "pointwise"),
    (r"^aten::(add|sub|mul|div|gelu|silu|sum|mean|sigmoid|bernoulli|where|neg|exp|sqrt)", "pointwise"),  # of a CPU
]


class Entry(NamedTuple):
    """Time of one kernel by name, category and launching operator, per step."""

    name: str
    category: str
    op: str
    ms: float
    calls: float


class Profile(NamedTuple):
    """`busy_ms`: time a step during which at least one kernel ran (on the CPU: summed operator time)."""

    busy_ms: float
    entries: list[Entry]

    @property
    def categories(self) -> dict[str, float]:
        """Milliseconds a step by category, largest first."""
        sums: dict[str, float] = defaultdict(float)
        for entry in self.entries:
            sums[entry.category] += entry.ms
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def take(
    step: Callable[[], Any], device: torch.device, steps: int = 3, model: nn.Module | None = None, shapes: bool = False
) -> Profile:
    """Profiles `steps` calls of a step that has run before.

    model: the one that the step runs, if its modules' categories are wanted and it isn't compiled. shapes: record the
    shapes by which convolutions are told apart; costs host time, so neither matters to the busy time of a GPU.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with _marked(model), profile(activities=activities, record_shapes=shapes, acc_events=True) as recorded:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return read(list(recorded.events() or ()), steps, device.type == "cuda")


def category(kernel: str, ops: Sequence[str], weight: Sequence[int] | None, hint: str) -> str:
    """The category of a kernel: `ops` are its launching operator and those around it, innermost first; `weight` is the
    shape of the weight of the convolution among them, if there is one; `hint` is what its module gives, or empty."""
    if any(re.match(r"Optimizer\.step|aten::_fused_adam", op) for op in ops):
        return "optimiser"
    first = _named(kernel, FIRST)
    if first is None and hint == "super token ops":
        return hint
    told = (of_op(op, weight) for op in ops)
    return first or next(filter(None, told), None) or hint or _named(kernel, LAST) or "other"


def _named(kernel: str, rules: Sequence[tuple[str, str]]) -> str | None:
    return next((name for pattern, name in rules if re.search(pattern, kernel)), None)


def read(events: Sequence[FunctionEvent], steps: int, on_gpu: bool) -> Profile:
    """The entries of recorded events, and the busy time."""
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    hints = _hints_by_sequence(on_host)
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    host_names = {event.name for event in on_host}
    # Ranges that mark modules are mirrored on the device under their own names; they are no kernels.
    device_events = [e for e in events if e.device_type == DeviceType.CUDA and e.name not in host_names]
    launched: dict[str, int] = defaultdict(int)
    for event in on_host:
        found = [(k.name, k.duration) for k in event.kernels if k.name not in host_names] if on_gpu else _own(event)
        if not found:
            continue
        ops, weight, hint = _around(event, hints)
        for name, microseconds in found:
            launched[name] += 1
            entry = sums[name, category(name, ops, weight, hint), ops[0] if ops else ""]
            entry[0] += microseconds
            entry[1] += 1
    for event in device_events:  # kernels of CUDA graphs: no operator launched them
        launched[event.name] -= 1
        if launched[event.name] < 0:
            entry = sums[event.name, category(event.name, [], None, ""), ""]
            entry[0] += event.time_range.end - event.time_range.start
            entry[1] += 1
    entries = [Entry(*key, ms / 1e3 / steps, calls / steps) for key, (ms, calls) in sums.items()]
    entries.sort(key=lambda entry: -entry.ms)
    ranges = ((event.time_range.start, event.time_range.end) for event in device_events)
    busy = union(ranges) / 1e3 / steps if on_gpu else sum(entry.ms for entry in entries)
    return Profile(busy, entries)


def union(ranges: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: kernels that overlap count once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _own(event: FunctionEvent) -> list[tuple[str, float]]:
    """On the CPU an operator is its own kernel; ranges and autograd's bookkeeping are none."""
    if not re.match(r"(?!autograd|torch::autograd|profiler)\w+::|.*cpp_fused", event.name):
        return []
    return [(event.name, event.self_cpu_time_total)]


def _chain(event: FunctionEvent) -> Iterator[FunctionEvent]:
    at: FunctionEvent | None = event
    while at is not None:
        yield at
        at = at.cpu_parent


def _hints_by_sequence(events: Iterable[FunctionEvent]) -> dict[int, str]:
    """Autograd numbers a forward operator and its backward alike: number -> category of the forward's module."""
    found: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
            scope = next((e.name for e in _chain(event) if e.name.startswith(SCOPE)), None)
            if scope is not None:
                found[event.sequence_nr] = scope.removeprefix(SCOPE)
    return found


def _around(event: FunctionEvent, hints: dict[int, str]) -> tuple[list[str], Sequence[int] | None, str]:
    """Operators around an event, innermost first, the weight's shape of the convolution among them, and the
    category of its module."""
    ops: list[str] = []
    weight: Sequence[int] | None = None
    hint = ""
    for at in _chain(event):
        if at.name.startswith(SCOPE):
            hint = hint or at.name.removeprefix(SCOPE)
            continue
        if at.name.startswith("autograd::engine"):
            hint = hint or hints.get(at.sequence_nr, "")
        if weight is None and at.name.startswith("aten::") and is_convolution(at.name):
            # (grad, input, weight, ...) or (input, weight, ...)
            shapes: list[Any] = list(at.input_shapes or [])
            weight = next(iter(shapes[2 if "backward" in at.name else 1 :]), None)
        if "::" in at.name or at.name.startswith("Optimizer"):
            ops.append(at.name)
    return ops, weight, hint


@contextmanager
def _marked(model: nn.Module | None) -> Iterator[None]:
    """Within the block every forward of a module with a category is a range of the profile."""
    ranges: list[record_function] = []

    def enter(hint: str, *_: Any) -> None:
        ranges.append(record_function(SCOPE + hint))
        ranges[-1].__enter__()

    def leave() -> None:
        ranges.pop().__exit__(None, None, None)

    hints = {module: of_module(module) for module in model.modules()} if model is not None else {}
    with watched({module: hint for module, hint in hints.items() if hint}, enter, leave):
        yield
