"""Inference as one CUDA graph: the host launches one graph instead of a few hundred kernels."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

logger = logging.getLogger("stvit")
WARM_UP = 3  # calls before the capture: kernels are compiled, cuBLAS and cuDNN make their plans


class GraphedModel(nn.Module):
    """What `cuda_graph` returns: calls like the example replay the graph, every other call runs the model.

    model: the model itself; its weights may change in place, and the graph sees them.
    reason: why there is no graph, or None.
    """

    reason: str | None

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.model = model
        self.reason = _reason(model, example)
        self._told = False
        if self.reason is None:
            self._capture(example)
        else:
            self._say(f"runs without a CUDA graph: {self.reason}")

    def _capture(self, example: Tensor) -> None:
        self._input = example.detach().clone(memory_format=torch.preserve_format)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(example.device)
        stream.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.device(example.device), torch.no_grad():
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.model(self._input)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self._output = self.model(self._input)

    def _say(self, text: str) -> None:
        if not self._told:
            self._told = True
            logger.warning("cuda_graph: %s", text)

    def _misfit(self, x: Tensor) -> str | None:
        """Why a call can't replay the graph, or None."""
        if self.model.training:
            return "the model is in training mode"
        if torch.is_grad_enabled() and x.requires_grad:
            return "the images want a gradient"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on, and the graph was made without: use a model in half precision"
        kept = self._input
        if (x.shape, x.dtype, x.device) != (kept.shape, kept.dtype, kept.device):
            return f"images are {_described(x)}, the graph's are {_described(kept)}"
        return None

    def forward(self, x: Tensor) -> Any:
        if self.reason is not None:
            return self.model(x)
        misfit = self._misfit(x)
        if misfit:
            self._say(f"runs the model itself where {misfit}")
            return self.model(x)
        self._input.copy_(x)
        self._graph.replay()
        return _copied(self._output)


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def _copied(output: Any) -> Any:
    """The graph's output, which its next replay writes over, as tensors of the caller's own."""
    return tree_map_only(Tensor, torch.clone, output)


def _reason(model: nn.Module, example: Tensor) -> str | None:
    if example.device.type != "cuda":
        return f"the example is on {example.device}, CUDA graphs need a CUDA device"
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if places - {example.device}:
        return f"the model lies on {', '.join(sorted(map(str, places)))}, the example on {example.device}"
    return None


def cuda_graph(model: nn.Module, example: Tensor) -> GraphedModel:
    """Captures inference of `model` on images like `example` as one CUDA graph, and returns what replays it.

    Small batches are bound by the host, which launches every kernel; a graph is launched at once. Each call copies its
    images to where the graph reads them and its output from where the graph writes it. Images of another shape, dtype
    or device, gradients, autocast and training mode run the model itself, which is said once through `logging`.

    Args:
        model: any nn.Module in evaluation mode whose forward takes one tensor and makes no choice that depends on its
            values. `stvit.optimize_for_inference(model)` first is a little faster still.
        example: images (B, 3, H, W) of the shape, dtype, memory format and device to come.

    Returns:
        A module; its `reason` is None, or says why there is no graph (no CUDA device, for instance) and every call runs
        the model.

    Raises:
        TypeError, ValueError: naming the argument and what was expected.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example, Tensor):
        raise TypeError(f"example: expected a torch.Tensor of images, got {type(example).__name__}")
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode: call model.eval() first")
    return GraphedModel(model, example).eval()
