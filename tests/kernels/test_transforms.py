"""Derivatives and batches that kernels have no rule for: torch.func, forward mode, batched gradients, the meta device.

None may be silently zero. The reference has them all; "auto" takes it, and a backend asked for by name says to.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import stvit
from stvit.functional import channel_layer_norm, channel_layer_norm_and_skip, residual_branch, residual_depthwise

Function = Callable[[Tensor], Tensor]
C = 4


def functions(backend: str) -> dict[str, Function]:
    """Every function of the package, of pixels (B, C, H, W) alone."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(C, 1, 3, 3, generator=random, dtype=torch.float64)
    bias, gamma = torch.randn(2, C, generator=random, dtype=torch.float64)

    def attention(x: Tensor) -> Tensor:
        stokens, association = stvit.super_token_sampling(x, (2, 3), association_grad=True, backend=backend)
        return stvit.token_upsampling(stokens.tanh(), association, backend)

    return {
        "sampling and upsampling": attention,
        "residual_depthwise": lambda x: residual_depthwise(x, weight, bias, True, backend),
        "channel_layer_norm": lambda x: channel_layer_norm(x, gamma, bias, backend=backend),
        "channel_layer_norm_and_skip": lambda x: sum(channel_layer_norm_and_skip(x, gamma, bias, backend=backend)),
        "residual_branch": lambda x: residual_branch(x, x.sin(), gamma, None, backend),
    }


each_function = pytest.mark.parametrize("name", functions("auto"))


def pixels(*batch: int) -> Tensor:
    return torch.randn(*batch, C, 3, 4, dtype=torch.float64)


@each_function
def test_forward_mode_is_the_derivative(name: str) -> None:
    function, x, direction = functions("auto")[name], pixels(1), pixels(1)
    step = 1e-6
    expected = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
    torch.testing.assert_close(jvp(function, (x,), (direction,))[1], expected, rtol=1e-5, atol=1e-6)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent
        assert tangent is not None
        torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-6)


@each_function
def test_jacobians_agree_and_are_that_of_autograd(name: str) -> None:
    function, x = functions("auto")[name], pixels(1)
    expected = torch.autograd.functional.jacobian(functions("reference")[name], x)
    torch.testing.assert_close(jacrev(function)(x), expected)
    torch.testing.assert_close(jacfwd(function)(x), expected)


@each_function
def test_gradients_of_each_sample(name: str) -> None:
    function, x = functions("auto")[name], pixels(3, 2)
    expected = torch.stack([grad(lambda x: function(x).square().sum())(sample) for sample in x])
    torch.testing.assert_close(vmap(grad(lambda x: function(x).square().sum()))(x), expected)
    leaf = x.flatten(0, 1).requires_grad_()
    function(leaf).square().sum().backward()
    torch.testing.assert_close(leaf.grad, expected.flatten(0, 1))


@each_function
@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd, vmap, "jvp", "vjp", "dual"])
def test_kernels_asked_for_by_name_say_what_to_use(name: str, transform: object, backend: str, device: str) -> None:
    function, x = functions(backend)[name], pixels(1)
    runs: dict[object, Callable[[], object]] = {
        grad: lambda: grad(lambda x: function(x).sum())(x),
        vmap: lambda: vmap(function)(x[None]),
        "jvp": lambda: jvp(function, (x,), (x,)),
        "vjp": lambda: vjp(function, x),
        "dual": lambda: function(forward_ad.make_dual(x, x)),
    }
    run = runs.get(transform, lambda: transform(function)(x))  # type: ignore[operator]
    with forward_ad.dual_level() if transform == "dual" else torch.enable_grad():
        with pytest.raises(stvit.BackendError, match=r"torch\.func.*forward-mode.*backend='reference'"):
            run()


def test_batched_gradients_go_through_the_kernels(backend: str, device: str) -> None:
    """jacobian(vectorize=True) and is_grads_batched=True batch the backward alone, whose ops PyTorch loops over."""
    for name in ("sampling and upsampling", "residual_depthwise"):
        function, x = functions(backend)[name], pixels(1)
        expected = torch.autograd.functional.jacobian(functions("reference")[name], x)
        torch.testing.assert_close(torch.autograd.functional.jacobian(function, x, vectorize=True), expected)


def test_the_detached_mode_differs_between_forward_and_reverse_mode() -> None:
    """association_grad=False cuts reverse mode alone, as `detach` in the authors' code; docs/semantics.md says so."""

    def attention(x: Tensor) -> Tensor:
        return stvit.token_upsampling(*stvit.super_token_sampling(x, 2))

    x = pixels(1)
    assert not torch.allclose(jacrev(attention)(x), jacfwd(attention)(x))


@pytest.mark.parametrize("named", ["auto", "reference", "triton", "cuda"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_shapes_on_the_meta_device(named: str, memory_format: torch.memory_format) -> None:
    """Shapes and formats come out whatever the backend, and nothing is said of falling back."""
    x = torch.empty(2, C, 5, 6, device="meta").to(memory_format=memory_format)
    stokens, association = stvit.super_token_sampling(x, 2, backend=named)
    y = stvit.token_upsampling(stokens, association, named)
    shapes = [tuple(t.shape) for t in (stokens, *association[:2], y)]
    assert shapes == [(2, C, 3, 3), (2, 9, 5, 6), (2, 1, 3, 3), (2, C, 5, 6)]
    assert stokens.is_meta and y.is_meta and y.is_contiguous(memory_format=memory_format)
    weight, bias = torch.empty(C, 1, 3, 3, device="meta"), torch.empty(C, device="meta")
    for z in (
        residual_depthwise(x, weight, bias, True, named),
        channel_layer_norm(x, bias, bias, backend=named),
        residual_branch(x, x, bias, None, named),
    ):
        assert z.is_meta and z.shape == x.shape and z.is_contiguous(memory_format=memory_format)
