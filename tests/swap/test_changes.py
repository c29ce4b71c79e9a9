"""Foreign modules that take another way at another size, change after they were swapped, or want a memory format."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvit.swap.accelerate import accelerate, accelerate_report, restore
from tests.support import authors_classes as authors
from tests.swap.test_accelerate import FEW, images


class WindowedAbove(authors.HeadAttention):
    """Attention in windows of the left and the right half where an image is wider than `window`."""

    window = 7

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[3] <= self.window:
            return super().forward(x)
        half = x.shape[3] // 2
        return torch.cat([super(WindowedAbove, self).forward(part) for part in (x[..., :half], x[..., half:])], 3)


class ShrunkTile(authors.TokenAttention):
    """The tile is at most the image."""

    def forward(self, x: Tensor) -> Tensor:
        kept = self.stoken_size
        self.stoken_size = (min(kept[0], x.shape[2]), min(kept[1], x.shape[3]))
        try:
            return super().forward(x)
        finally:
            self.stoken_size = kept


class Fusible(authors.Position):
    """Folds the identity into its convolution on request, and then leaves it out."""

    fused = False

    def fuse(self) -> None:
        weight = self.conv.weight.detach().clone()
        weight[:, 0, 1, 1] += 1
        self.conv.weight = nn.Parameter(weight)
        self.fused = True

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.fused else super().forward(x)


class Gather(nn.Module):
    """The authors' unfold by another name of its constant, which views its input."""

    w: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.eye(9).reshape(9, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return F.conv2d(x.reshape(b * c, 1, h, w), self.w, padding=1).reshape(b, c * 9, h * w)


class Scatter(Gather):
    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return F.conv_transpose2d(x, self.w, padding=1).reshape(b, c // 9, h, w)


class Unfold(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.unfold(x, 3, padding=1)


class Fold(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.fold(x.flatten(2), x.shape[2:], 3, padding=1).reshape(x.shape[0], -1, *x.shape[2:])


@pytest.mark.parametrize("module", [WindowedAbove(8, 2), ShrunkTile(8, (4, 4), **FEW)], ids=["windows", "tile"])
def test_another_way_at_another_size_is_left(module: nn.Module) -> None:
    assert "differs from ours" in accelerate_report(accelerate(module)).left[""]


@pytest.mark.parametrize("change", ["parameters", "attribute"])
def test_a_module_that_changed_runs_its_own_forward_and_says_so_once(
    change: str, caplog: pytest.LogCaptureFixture
) -> None:
    module, x = Fusible(6).double(), images(2, 6, 5, 4)
    expected = module(x)
    accelerate(module, "reference")
    copies = [module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    with caplog.at_level(logging.WARNING, logger="stvit"):
        for one in copies:
            torch.testing.assert_close(one(x), expected)
            assert accelerate_report(one).left == {} and not caplog.records
        if change == "parameters":
            module.fuse()
        else:  # in place, so that only the flag tells
            with torch.no_grad():
                module.conv.weight[:, 0, 1, 1] += 1
            module.fused = True
        for _ in range(3):
            torch.testing.assert_close(module(x), expected)
    (record,) = caplog.records
    assert "since" in record.getMessage() and "Fusible" in record.getMessage()
    assert "since it was swapped" in accelerate_report(module).left[""]
    for one in copies[1:]:
        torch.testing.assert_close(one(x), expected)
    accelerate(module)  # tries it again, and it no longer computes x + conv(x)
    assert "differs from ours" in accelerate_report(module).left[""]
    restore(module)
    assert type(module) is Fusible


def test_attributes_that_are_read_at_each_call_may_change() -> None:
    module, x = authors.TokenAttention(8, (4, 3), **FEW).double(), images(2, 8, 8, 12)
    fast = accelerate(copy.deepcopy(module))
    for one in (module, fast):
        one.stoken_size = (2, 4)
        one.eval()
    torch.testing.assert_close(fast(x), module(x))
    assert "" in accelerate_report(fast).swapped


class Viewing(nn.Module):
    """A norm, and behind it code that counts on contiguous memory."""

    def __init__(self, *more: nn.Module) -> None:
        super().__init__()
        self.start = authors.PixelNorm(6)
        self.more = nn.ModuleList(more)

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x)
        return y.view(-1, 1, *y.shape[2:])


@pytest.mark.parametrize(
    ("more", "options", "works"),
    [((), {}, False), ((), {"keep_format": True}, True), ((WindowedAbove(8, 2),), {}, True)],
    ids=["swapped throughout", "asked for", "a part left"],
)
def test_the_format_of_the_original(more: tuple[nn.Module, ...], options: dict[str, Any], works: bool) -> None:
    module = accelerate(Viewing(*more).double(), **options)
    assert "start" in accelerate_report(module).swapped
    x = images(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)
    if works:
        torch.testing.assert_close(module(x), restore(copy.deepcopy(module))(x))
    else:
        with pytest.raises(RuntimeError, match="view"):
            module(x)


def with_parts(unfold: Callable[[], nn.Module], fold: Callable[[], nn.Module]) -> Any:
    module: Any = authors.TokenAttention(8, (4, 3), **FEW)
    module.unfold, module.fold = unfold(), fold()
    return module


@pytest.mark.parametrize("parts", [(Gather, Scatter), (Unfold, Fold)], ids=["another name", "F.unfold and F.fold"])
def test_the_constant_may_have_any_name_or_be_missing(parts: tuple[Any, Any]) -> None:
    module, x = with_parts(*parts).double().eval(), images(2, 8, 9, 11)
    torch.testing.assert_close(module(x), authors_like(module)(x))
    fast = accelerate(copy.deepcopy(module))
    assert accelerate_report(fast).left == {} and "" in accelerate_report(fast).swapped
    torch.testing.assert_close(fast(x), module(x))


def authors_like(module: nn.Module) -> nn.Module:
    other = authors.TokenAttention(8, (4, 3), **FEW).double().eval()
    other.load_state_dict(module.state_dict(), strict=False)
    return other


def test_a_swapped_model_under_torch_func_runs_its_own_forward() -> None:
    module, x = authors.Position(6).double(), images(3, 6, 5, 4)
    fast = accelerate(copy.deepcopy(module), "triton")
    torch.testing.assert_close(torch.func.vmap(fast)(x[:, None])[:, 0], module(x))
