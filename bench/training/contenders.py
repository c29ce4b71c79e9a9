"""Who takes part in `bench.training`: the contenders, their models from the same weights, and one step of each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines import official
from stvit.backends import dispatch
from stvit.model import CONFIGS, STViT

Step = Callable[[], Tensor]
CLASSES = 1000
CONTEXT_MODELS = ("convnext_tiny", "caformer_s18")  # of timm, for context
WARM_UP = 3  # steps before anything is captured or timed


@dataclass(frozen=True)
class Contender:
    """One way of running a model. `tier` orders: 0 runs first, what takes long to compile comes last."""

    tier: int
    family: str  # "authors", "ours" or "timm"
    channels_last: bool = True
    backend: str = "auto"
    compile_mode: str | None = None  # of torch.compile; None: not compiled
    graph: bool = False  # the whole step is one CUDA graph
    optimized: bool = False  # by stvit.optimize_for_inference; takes no part in training

    @property
    def replays(self) -> bool:
        """Whether steps replay CUDA graphs, whose memory the allocator's own counters don't see."""
        return self.graph or self.compile_mode == "max-autotune"


CONTENDERS: dict[str, Contender] = {
    "authors": Contender(0, "authors", channels_last=False),
    "ours-triton": Contender(0, "ours", backend="triton"),
    "ours-graph": Contender(0, "ours", graph=True),
    "ours-cuda": Contender(0, "ours", backend="cuda"),
    "authors-channels-last": Contender(0, "authors"),
    "ours-reference": Contender(0, "ours", backend="reference"),
    "ours-optimized": Contender(0, "ours", optimized=True),
    "authors-compile": Contender(1, "authors", channels_last=False, compile_mode="default"),
    "ours-compile": Contender(1, "ours", compile_mode="default"),
    "authors-compile-channels-last": Contender(2, "authors", compile_mode="default"),
    "timm-compile": Contender(2, "timm", compile_mode="default"),
    "authors-max-autotune": Contender(3, "authors", compile_mode="max-autotune"),
    "ours-max-autotune": Contender(3, "ours", compile_mode="max-autotune"),
}


@dataclass(frozen=True)
class Case:
    """One model, image size and contender, with all that a fresh process needs to measure it."""

    model: str
    size: int
    contender: str
    modes: tuple[str, ...] = ("train", "inference")
    batch: int = 128
    dtype: str = "bfloat16"
    device: str = "cuda"
    official: str | None = None
    seconds: float = 3.0  # of timing, each mode
    profile: bool = False
    shared: str | None = None  # folder for the truth that cases of one model share


class Batch(NamedTuple):
    """Images (B, 3, size, size) in float32 and labels (B,)."""

    images: Tensor
    labels: Tensor


def why_not(name: str, device: torch.device) -> list[str]:
    """The reasons why contender `name` can't take part on this device. Builds the extension if that takes part."""
    contender = CONTENDERS[name]
    reasons = []
    if contender.graph and device.type != "cuda":
        reasons.append("CUDA graphs need a CUDA device")
    if contender.compile_mode == "max-autotune" and device.type != "cuda":
        reasons.append("max-autotune is timed on a CUDA device only")
    if contender.family == "timm" and importlib.util.find_spec("timm") is None:
        reasons.append("timm is not installed")
    if contender.backend != "auto":
        reasons += dispatch.prepare(contender.backend, device)
    if contender.backend == "triton" and dispatch.interpreting():
        reasons.append("Triton's interpreter is on, and its speed says nothing")
    return reasons


def fresh_batch(batch: int, size: int, device: torch.device) -> Batch:
    """The same random images and labels for every contender."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return Batch(images.to(device), torch.randint(CLASSES, (batch,), generator=generator).to(device))


def reference_model(name: str) -> nn.Module:
    """The model that defines the right answer, on the CPU in float32: our PyTorch reference, or timm's own model.

    Its weights are those of every contender. LayerScale starts at 0.5: at its usual 1e-6 the branches behind it
    would vanish from loss and gradients, and the check with them.
    """
    torch.manual_seed(0)
    if name in CONFIGS:
        return STViT(**{**CONFIGS[name], "backend": "reference", "init_values": 0.5, "num_classes": CLASSES})
    import timm

    model: nn.Module = timm.create_model(name, num_classes=CLASSES)
    for key, parameter in model.named_parameters():
        if key.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    return model


def contender_model(case: Case, weights: dict[str, Tensor]) -> nn.Module:
    """The contender's model on the device, with `weights`, and channels_last if that is its format; not optimized."""
    contender, device = CONTENDERS[case.contender], torch.device(case.device)
    model = _fresh_model(case, contender)
    unset = [name for name, _ in model.named_parameters() if name not in weights]
    if unset:
        raise ValueError(f"{case.contender}: no weight for its parameter {unset[0]}; the models differ")
    model.load_state_dict(weights, strict=False)  # strict but for buffers that hold constants
    # PyTorch's own type hints lack memory_format here.
    return model.to(device, memory_format=_memory_format(contender))  # type: ignore[call-overload,no-any-return]


def _fresh_model(case: Case, contender: Contender) -> nn.Module:
    if contender.family == "ours":
        return STViT(**{**CONFIGS[case.model], "backend": contender.backend, "num_classes": CLASSES})
    if contender.family == "timm":
        import timm

        model: nn.Module = timm.create_model(case.model, num_classes=CLASSES)
        return model
    if case.official:
        return official.build(official.load(case.official), case.model)
    from bench.baselines.model import authors_model

    return authors_model(case.model)


def _memory_format(contender: Contender) -> torch.memory_format:
    return torch.channels_last if contender.channels_last else torch.contiguous_format


def in_format(batch: Batch, contender: Contender) -> Batch:
    """The batch with its images in the contender's memory format, as its data loader would deliver them."""
    return batch._replace(images=batch.images.contiguous(memory_format=_memory_format(contender)))


def forward_of(model: nn.Module, contender: Contender) -> Callable[[Tensor], Tensor]:
    """The model as it is called: itself, or compiled."""
    if contender.compile_mode is None:
        return model
    return torch.compile(model, mode=contender.compile_mode)  # type: ignore[no-any-return]


def step_of(
    model: nn.Module, forward: Callable[[Tensor], Tensor], batch: Batch, dtype: torch.dtype, contender: Contender,
    mode: str,
) -> Step:  # fmt: skip
    """One step of `batch` under autocast. Training: forward and loss, backward, fused AdamW; returns the loss.
    Inference: a forward pass without gradients; returns the logits.

    Gradients stay in the parameters until the next step begins. The loss is not scaled, in float16 neither.
    """
    device, training = batch.images.device, mode == "train"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-6, weight_decay=0.05, fused=True, capturable=contender.graph
    )

    def step() -> Tensor:
        if contender.compile_mode == "max-autotune":
            torch.compiler.cudagraph_mark_step_begin()
        if training:
            optimizer.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(training), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            result = forward(batch.images)
            result = F.cross_entropy(result, batch.labels) if training else result
        if training:
            result.backward()
            optimizer.step()
        return result.detach()

    return step


def captured(step: Step, model: nn.Module) -> Step:
    """`step` recorded as one CUDA graph: a call replays it on the same inputs and returns the same output tensor."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants libraries, kernels and optimizer state to be there already
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)  # so that gradients are allocated in the graph's own memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
