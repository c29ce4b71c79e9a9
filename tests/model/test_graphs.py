"""Inference as one CUDA graph, and the plain fallback where there can be none."""

from __future__ import annotations

import logging

import pytest
import torch

import stvit
from stvit import graphs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def model() -> stvit.STViT:
    return stvit.stvit_tiny(num_classes=5).eval()


def test_without_a_gpu_the_model_runs_and_says_why_once(model: stvit.STViT, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="stvit")
    x = torch.randn(2, 3, 32, 32)
    graphed = stvit.cuda_graph(model, x)
    assert graphed.reason == "the example is on cpu, CUDA graphs need a CUDA device"
    with torch.no_grad():
        for images in (x, x[:1]):
            assert torch.equal(graphed(images), model(images))
    assert [r.getMessage() for r in caplog.records if r.getMessage().startswith("cuda_graph")] == [
        f"cuda_graph: runs without a CUDA graph: {graphed.reason}"
    ]


def test_wrong_arguments_are_named(model: stvit.STViT) -> None:
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(TypeError, match="^model: expected a torch.nn.Module"):
        stvit.cuda_graph(lambda x: x, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^example: expected a torch.Tensor"):
        stvit.cuda_graph(model, (1, 3, 32, 32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^model: expected evaluation mode"):
        stvit.cuda_graph(model.train(), x)


class Replay:
    """Stands in for torch.cuda.CUDAGraph: runs again what was captured."""

    def __init__(self, graphed: graphs.GraphedModel) -> None:
        self.graphed = graphed

    def replay(self) -> None:
        self.graphed._output.copy_(self.graphed.model(self.graphed._input))


def test_calls_that_the_graph_does_not_fit_run_the_model(
    model: stvit.STViT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="stvit")

    def capture(self: graphs.GraphedModel, example: torch.Tensor) -> None:
        self._input, self._graph = example.clone(), Replay(self)  # type: ignore[assignment]
        self._output = self.model(self._input)

    monkeypatch.setattr(graphs.GraphedModel, "_capture", capture)
    monkeypatch.setattr(graphs, "_reason", lambda model, example: None)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        graphed = stvit.cuda_graph(model, x)
        first = graphed(x)
        kept = first.clone()
        second = graphed(2 * x)
        assert torch.equal(first, kept) and torch.equal(second, model(2 * x)), "each call owns its output"
        assert not caplog.records
        assert torch.equal(graphed(x[:1]), model(x[:1]))
        assert "images are (1, 3, 32, 32) float32 on cpu" in caplog.text
    wanted = x.clone().requires_grad_()
    graphed(wanted).sum().backward()
    assert wanted.grad is not None and len(caplog.records) == 1
    assert graphed.train()(x).shape == (2, 5)


@needs_gpu
def test_a_graph_gives_what_the_model_gives(model: stvit.STViT) -> None:
    model = model.cuda()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    graphed = stvit.cuda_graph(model, x)
    assert graphed.reason is None
    with torch.no_grad():
        for images in (x, 2 * x, torch.randn_like(x)):
            torch.testing.assert_close(graphed(images), model(images))
        model.head.weight.mul_(2)
        torch.testing.assert_close(graphed(x), model(x))
