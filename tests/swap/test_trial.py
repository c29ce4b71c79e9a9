"""What stvit.accelerate takes for the authors' classes and what it leaves alone: variants found in copies of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stvit.swap.accelerate import accelerate, accelerate_report
from tests.support import authors_classes as authors
from tests.support.authors_classes import small_network
from tests.swap.test_accelerate import FEW, assert_same_outcome, images, swapped


def only_remark(module: nn.Module) -> str:
    """Why `module` itself was left."""
    report = accelerate_report(accelerate(module))
    assert "" not in report.swapped and type(module).__module__ == "tests.support.authors_classes"
    return report.left[""]


def constant_tile(tile: Any) -> authors.TokenAttention:
    return authors.TokenAttention(8, tile, **FEW)


SWAPPED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "tile as a list": (lambda: constant_tile([4, 3]), 8),
    "tile as a tensor": (lambda: constant_tile(torch.tensor([4, 3])), 8),
    "tile as an int": (lambda: constant_tile(4), 8),
    "tile of one pixel": (lambda: constant_tile((1, 1)), 8),
    "flat tile": (lambda: constant_tile((1, 2)), 8),
    "other names": (lambda: authors.OtherNames(8, (4, 3), 2, **FEW), 8),
    "iterations": (lambda: authors.TokenAttention(8, (3, 4), 3, **FEW), 8),
    "refinement by convolutions": (lambda: authors.TokenAttention(6, (4, 4), refine_attention=False), 6),
    "no refinement": (lambda: authors.TokenAttention(6, (4, 4), refine=False), 6),
    "whole tiles only": (lambda: authors.UnpaddedTokenAttention(8, (4, 4), **FEW), 8),
    "trained association": (lambda: authors.TrainedAssociation(8, (3, 4), 2, **FEW), 8),
    "90 channels": (lambda: authors.Block(90, (4, 4), 3), 90),
    "1280 channels": (lambda: authors.PixelNorm(1280), 1280),
    "1280 channels, position": (lambda: authors.Position(1280), 1280),
    "norm frozen": (lambda: authors.PixelNorm(7).requires_grad_(False), 7),
}


@pytest.mark.parametrize("case", SWAPPED)
def test_variants_that_are_swapped(case: str) -> None:
    make, channels = SWAPPED[case]
    module = make().double()
    fast = accelerate(copy.deepcopy(module))
    report = accelerate_report(fast)
    assert report.left == {} and report.swapped
    full = "association_grad=True" in str(report.swapped)
    assert full == (case == "trained association")
    x = images(2, channels, 8, 12) if case == "whole tiles only" else images(2, channels, 9, 11)
    assert_same_outcome(fast, module, x)


def frozen_weights_gone(module: nn.Module) -> nn.Module:
    module.unfold.weights.requires_grad_()
    return module


def other_kernels(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.fold.weights.mul_(2)
    return module


def own_forward(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def silent_projection(module: Any) -> nn.Module:
    """Gives 0 whatever attention computes, as where a branch starts at zero."""
    nn.init.zeros_(module.proj.weight)
    nn.init.zeros_(module.proj.bias)
    return module


def lazy_attention() -> nn.Module:
    module = authors.HeadAttention(8, 2)
    module.qkv = nn.LazyConv2d(24, 1)
    return module


def tanh_gelu() -> nn.Module:
    return nn.GELU(approximate="tanh")


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "returns a tuple": (lambda: authors.TupleTokenAttention(8, (4, 4), **FEW), "its forward returns a tuple"),
    "attention returns a tuple": (lambda: authors.TupleHeadAttention(8, 2), "its forward returns a tuple"),
    "half-trained association": (lambda: authors.HalfTrainedAssociation(8, (4, 4), **FEW), "its gradient is neither"),
    "parameter at zero": (lambda: authors.PositionedTokenAttention(8, (4, 4), **FEW), "of its own: position"),
    "resizes": (lambda: authors.ResizedTokenAttention(8, (4, 4), **FEW), "output in evaluation differs"),
    "masks": (lambda: authors.MaskedTokenAttention(8, (4, 4), **FEW), "output in evaluation differs"),
    "no tile": (lambda: authors.TokenAttention(8, None, **FEW), "positive int, got None"),
    "fractional tile": (lambda: authors.TokenAttention(8, 2.5, **FEW), "positive int, got 2.5"),
    "no iterations": (lambda: authors.TokenAttention(8, (4, 4), n_iter=-1, **FEW), "n_iter is -1"),
    "trained unfold": (lambda: frozen_weights_gone(constant_tile((4, 4))), "constant one-hot"),
    "other fold": (lambda: other_kernels(constant_tile((4, 4))), "constant one-hot"),
    "q, k, v not by head": (lambda: authors.GroupedHeadAttention(8, 2), "differs from ours"),
    "differs, hidden by zeros": (lambda: silent_projection(authors.GroupedHeadAttention(8, 2)), "differs from ours"),
    "heads that don't divide": (lambda: authors.HeadAttention(9, 4), "and 4 heads"),
    "differs in training": (lambda: authors.NoisyPosition(6), "output in training differs"),
    "depthwise 5x5": (lambda: authors.Position(6, 5), "isn't depthwise 3x3"),
    "tanh GELU": (lambda: authors.ConvMlp(4, 8, tanh_gelu), "expected exact GELU"),
    "ReLU": (lambda: authors.ConvMlp(4, 8, nn.ReLU), "expected exact GELU"),
    "own forward": (lambda: own_forward(authors.PixelNorm(4)), "replaced on the object"),
    "meta device": (lambda: authors.PixelNorm(4).to("meta"), "weights aren't there yet"),
    "lazy": (lazy_attention, "weights aren't there yet"),
}


@pytest.mark.parametrize("case", LEFT)
def test_variants_that_are_left(case: str) -> None:
    make, reason = LEFT[case]
    assert reason in only_remark(make())


def test_a_module_left_does_not_keep_its_parts_from_being_swapped() -> None:
    module = accelerate(authors.TupleTokenAttention(8, (4, 4), **FEW))
    assert list(swapped(module)) == ["stoken_refine"]
    outer = authors.ConvMlp(4, 8)
    outer.conv = authors.NoisyPosition(8)
    report = accelerate_report(accelerate(outer))
    assert set(report.left) == {"", "conv"} and not report.swapped


def test_equal_structure_is_tried_once_a_class_and_shape() -> None:
    """Two blocks of a kind share a trial; another class, number of heads or flag has its own."""
    flagged = authors.TokenAttention(8, (4, 4), **FEW)
    flagged.association_grad, flagged.constant_mass = True, False
    network = nn.Sequential(
        authors.HeadAttention(8, 2), authors.GroupedHeadAttention(8, 2), authors.GroupedHeadAttention(8, 1),
        authors.TokenAttention(8, (4, 4), **FEW), flagged, authors.TokenAttention(8, (4, 4), **FEW),
    )  # fmt: skip
    report = accelerate_report(accelerate(network))
    assert set(report.left) == {"1"}  # with one head there is nothing to group
    full = [name for name, remark in report.swapped.items() if "association_grad=True" in remark]
    assert full == ["4"]


def test_zeros_do_not_hide_the_gradient_of_the_association() -> None:
    """A refinement that gives 0 gives the input no gradient in either mode."""
    module = authors.TrainedAssociation(8, (4, 4), **FEW)
    silent_projection(module.stoken_refine)
    assert "association_grad=True" in accelerate_report(accelerate(module)).swapped[""]


def test_norms_and_attentions_of_other_kinds_are_left() -> None:
    class OnTokens(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(dim)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    class Linears(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)

    assert "it can't be tried: RuntimeError: Given normalized_shape=[5]" in accelerate_report(OnTokens(5)).left[""]
    assert "its output in evaluation differs" in accelerate_report(OnTokens(6)).left[""]  # as wide as the trial's image
    assert accelerate_report(Linears()).left[""] == "qkv is a Linear, expected a 1x1 nn.Conv2d"
    bare = authors.PixelNorm(4)
    bare.norm = type("SingleNorm", (nn.LayerNorm,), {})(4)  # may compute anything
    assert accelerate_report(bare).left[""] == "norm isn't an nn.LayerNorm over one dimension"
    bare.norm = nn.LayerNorm(4, bias=False)
    assert accelerate_report(bare).left[""] == "norm has no weight or no bias"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_passed_by() -> None:
    network = nn.Sequential(authors.Position(4), torch.jit.script(authors.Position(4)))
    assert list(swapped(accelerate(network))) == ["0"]


def test_trial_touches_nothing() -> None:
    network = small_network(drop_path=0.2)
    network(images(2, 3, 32, 32, dtype=torch.float32)).sum().backward()
    before = copy.deepcopy(network)
    grads = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    state, threads, called = torch.get_rng_state(), torch.get_num_threads(), []
    network.layers[0].blocks[0].attn.register_forward_hook(lambda *_: called.append(1))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        report = accelerate_report(network)
    assert len(report.left) == 30 and set(report.left.values()) == {"not swapped yet"}
    assert torch.equal(torch.get_rng_state(), state) and called == []
    assert torch.get_num_threads() == threads
    assert [part.training for part in network.modules()] == [part.training for part in before.modules()]
    for (name, a), (_, b) in zip(network.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    kept = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))


def test_without_trial_structure_is_trusted() -> None:
    trained = authors.TrainedAssociation(8, (4, 4), **FEW)
    assert "association_grad=False" in str(accelerate_report(accelerate(trained, verify=False)))
    assert swapped(accelerate(authors.GroupedHeadAttention(8, 2), verify=False))
    assert not swapped(accelerate(authors.Position(6, 5), verify=False))
