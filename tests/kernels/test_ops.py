"""Sampling and upsampling as differentiable ops: gradcheck through the kernels, what the backward keeps, torch.compile,
autocast, checkpointing, and how every op is registered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from stvit import super_token_sampling, token_upsampling
from stvit.backends.registry import SUPER_TOKEN_OPS
from tests.support.cases import Case, assert_within_twice, each, launching

full_or_not = pytest.mark.parametrize("full", [False, True], ids=["detached", "full"])
with_reference = pytest.mark.parametrize("backend", ["reference", "triton", "cuda"], indirect=True)


def whole(x: Tensor, tile: tuple[int, int], n_iter: int, full: bool, backend: str) -> tuple[Tensor, Tensor]:
    """Super tokens and pixels, with a map in the place of refinement."""
    stokens, association = super_token_sampling(x, tile, n_iter, association_grad=full, backend=backend)
    return stokens, token_upsampling(stokens.tanh(), association, backend=backend)


COMPOSED = [
    Case(2, 5, 5, 7, (2, 3), torch.float32),
    Case(2, 5, 5, 7, (2, 3), torch.float32, True),
    Case(1, 40, 5, 7, (3, 4), torch.float16, True, 2, "channels_last"),
    Case(1, 40, 5, 7, (3, 4), torch.float16, False, 2, "sliced_channels_last", run=2),
    Case(1, 3, 4, 4, (2, 2), torch.float64, True, 3),
]


@pytest.mark.parametrize("case", COMPOSED, ids=lambda case: case.name)
def test_composed_as_in_attention(case: Case, backend: str, device: str) -> None:
    """Gradients of the whole, through the super tokens and, in the full mode, through the association."""
    results = []
    for name, dtype in ((backend, case.dtype), ("reference", case.dtype), ("reference", torch.float64)):
        x = case.pixels(device).to(dtype).requires_grad_()
        grad_y = case.random(device, case.channels, (case.height, case.width), case.grad_layout).to(dtype)
        with launching(case, device):
            stokens, y = whole(x, case.tile, case.n_iter, case.full, name)
            (grad,) = torch.autograd.grad((stokens, y), x, (torch.ones_like(stokens), grad_y))
        results.append({"stokens": stokens.detach(), "y": y.detach(), "x": grad})
    assert_within_twice(*results, case.dtype)


@pytest.mark.parametrize(
    ("size", "tile", "n_iter"), [((3, 5), (2, 3), 1), ((3, 3), (2, 2), 2), ((2, 2), (3, 4), 1), ((2, 3), (1, 1), 1)]
)
def test_full_gradient_is_true_through_the_kernels(
    size: tuple[int, int], tile: tuple[int, int], n_iter: int, backend: str, device: str
) -> None:
    x = torch.randn(1, 2, *size, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: whole(x, tile, n_iter, True, backend), x, atol=1e-6, fast_mode=True)


def test_every_entry_of_the_full_jacobian_through_the_kernels(backend: str, device: str) -> None:
    x = torch.randn(1, 1, 2, 3, dtype=torch.float64, device=device, requires_grad=True)

    def outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stokens, association = super_token_sampling(x, 2, association_grad=True, backend=backend)
        return stokens, association.weights, token_upsampling(stokens.tanh(), association, backend=backend)

    assert torch.autograd.gradcheck(outputs, x, atol=1e-6)


def test_detached_gradient_is_true_with_the_association_given(backend: str, device: str) -> None:
    """Upsampling by gradcheck; sampling by its differences at the association of x, to which it is linear."""
    x = torch.randn(1, 2, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
    stokens, association = super_token_sampling(x, (2, 3), backend=backend)
    refined = torch.randn_like(stokens).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda refined: token_upsampling(refined, association, backend=backend), refined, atol=1e-6
    )
    # The transpose of a linear map, <S(x), g> = <x, S^T g>, and S(x) is the map applied to x itself.
    grad_stokens = torch.randn_like(stokens)
    (grad_x,) = torch.autograd.grad(stokens, x, grad_stokens)
    torch.testing.assert_close((stokens * grad_stokens).sum(), (x * grad_x).sum())
    # What upsampling's backward gives, divided by the mass, is sampling: S = D^-1 A^T x.
    (sums,) = torch.autograd.grad(token_upsampling(refined, association, backend=backend), refined, x)
    torch.testing.assert_close(sums / (association.mass + 1e-12), stokens)
    # Hence the whole Jacobian: column by column, by other vectors in the place of x.
    for _ in range(3):
        v = torch.randn_like(x)
        (sums,) = torch.autograd.grad(token_upsampling(refined, association, backend=backend), refined, v)
        along = (sums / (association.mass + 1e-12) * grad_stokens).sum()
        torch.testing.assert_close((v * grad_x).sum(), along)


def saved(function: Callable[[], object]) -> list[Tensor]:
    """What autograd keeps for the backward of what `function` computes."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return kept


def storages(*tensors: Tensor) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("n_iter", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_detached_backward_keeps_only_weights_and_mass(
    n_iter: int, memory_format: torch.memory_format, backend: str, device: str
) -> None:
    x = torch.randn(2, 20, 5, 7, device=device).contiguous(memory_format=memory_format).requires_grad_()
    made = []
    kept = saved(lambda: made.extend(super_token_sampling(x, (2, 3), n_iter, backend=backend)))
    stokens, association = made
    assert len(kept) == 2
    assert storages(*kept) == storages(association.weights, association.mass)
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == 4 * (2 * 9 * 5 * 7 + 2 * 3 * 3)

    refined = stokens.tanh()
    kept = saved(lambda: token_upsampling(refined, association, backend=backend))
    assert len(kept) == 1
    assert storages(*kept) == storages(association.weights)


@with_reference
def test_detached_backward_lets_x_go(backend: str, device: str) -> None:
    """After the forward nothing holds the memory of x, and the backward still runs."""
    leaf = torch.randn(1, 3, 5, 7, device=device, requires_grad=True)
    x = leaf * 2
    held = StorageWeakRef(x.untyped_storage())
    _, y = whole(x, (2, 3), 1, False, backend)
    assert not held.expired()
    del x
    assert held.expired()
    assert torch.autograd.grad(y.sum(), leaf)[0].isfinite().all()


def test_full_backward_keeps_x_once(backend: str, device: str) -> None:
    x = torch.randn(1, 3, 5, 7, device=device, requires_grad=True)
    kept = saved(lambda: super_token_sampling(x, (2, 3), association_grad=True, backend=backend))
    assert len(kept) == 5  # and weights, mass, super tokens, pooled ones
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in kept) == 1


@full_or_not
def test_saved_tensors_may_come_back_with_other_strides(full: bool, backend: str, device: str) -> None:
    """As from torch.autograd.graph.save_on_cpu(pin_memory=True), which keeps shape and values alone."""
    x = torch.randn(2, 8, 5, 7, device=device, requires_grad=True)

    def gradient() -> Tensor:
        stokens, y = whole(x, (2, 3), 2, full, backend)
        (grad,) = torch.autograd.grad((stokens, y), x, (stokens.detach().cos(), y.detach().cos()))
        return grad

    expected, changed = gradient(), []

    def unpack(tensor: Tensor) -> Tensor:
        changed.append(not tensor.is_contiguous())
        return tensor.contiguous()

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        assert torch.equal(gradient(), expected)
    assert sum(changed) >= 2  # the weights, of sampling and of upsampling


@full_or_not
def test_double_backward_is_refused(full: bool, backend: str, device: str) -> None:
    """An error, not a gradient that leaves the op out."""
    x = torch.randn(1, 2, 3, 5, device=device, requires_grad=True)
    _, y = whole(x, (2, 3), 1, full, backend)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="reference"):
            torch.autograd.grad(grad.square().sum(), x)


def arguments(name: str, backend: str, device: str, full: bool) -> tuple[object, ...]:
    """Arguments of an op of SUPER_TOKEN_OPS, on a padded image."""
    x = torch.randn(2, 5, 3, 4, device=device)
    tile, weights = (2, 3), torch.rand(2, 3, 4, 9, device=device).permute(0, 3, 1, 2)
    stokens, mass = torch.randn(2, 5, 2, 2, device=device), 1 + torch.rand(2, 1, 2, 2, device=device)
    pooled, grad_weights = torch.randn(2, 2, 2, 5, device=device), torch.randn_like(weights) if full else None
    return {
        "sampling": (x.clone().requires_grad_(), *tile, 1 + full, 0.5, full, backend),
        "sampling_backward": (stokens, weights, mass, *tile, full, backend),
        "sampling_backward_full": (stokens, grad_weights, x, stokens, pooled, weights, mass, *tile, 1, 0.5, backend),
        "upsampling": (
            stokens.clone().requires_grad_(), weights.clone().requires_grad_(full),
            x.clone().requires_grad_() if full else None, *tile, full, backend,
        ),
        "upsampling_backward": (x, weights, *tile, full, backend),
        "upsampling_backward_full": (x, stokens, weights, *tile, backend),
    }[name]  # fmt: skip


@full_or_not
@pytest.mark.parametrize("name", SUPER_TOKEN_OPS)
def test_opcheck(name: str, full: bool, backend: str, device: str) -> None:
    """Schema, autograd registration, fake kernel, and tracing with symbolic shapes."""
    torch.library.opcheck(getattr(torch.ops.stvit, name).default, arguments(name, backend, device, full))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", SUPER_TOKEN_OPS)
def test_fakes_have_the_strides_of_what_is_computed(
    name: str, memory_format: torch.memory_format, backend: str, device: str
) -> None:
    def formatted(value: object) -> object:
        last = isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == 5
        return value.detach().contiguous(memory_format=memory_format) if last else value

    given = [formatted(value) for value in arguments(name, backend, device, True)]
    op = getattr(torch.ops.stvit, name)
    real = op(*given)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(value) if isinstance(value, Tensor) else value for value in given))
    both = zip(*((result,) if isinstance(result, Tensor) else result for result in (real, fake)), strict=True)
    for tensor, imitation in both:
        assert tensor.shape == imitation.shape and tensor.dtype == imitation.dtype
        assert tensor.stride() == imitation.stride()


class Block(nn.Module):
    """Sampling, a convolution between the super tokens, upsampling."""

    def __init__(self, full: bool, backend: str) -> None:
        super().__init__()
        self.refine = nn.Conv2d(4, 4, 1)
        self.full, self.backend = full, backend

    def forward(self, x: Tensor) -> Tensor:
        stokens, association = super_token_sampling(x, (2, 3), association_grad=self.full, backend=self.backend)
        return x + token_upsampling(self.refine(stokens), association, backend=self.backend)


def step(call: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()


@full_or_not
@with_reference
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_block_equals_eager(full: bool, backend: str, device: str) -> None:
    """One graph, forward and backward; no compilation after the second batch size."""
    block = Block(full, backend).to(device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    frames = []
    for batch in (2, 3, 4, 1, 5):
        x = torch.randn(batch, 4, 3, 4, device=device).contiguous(memory_format=torch.channels_last)
        for ours, eager in zip(
            step(compiled, x, list(block.parameters())), step(block, x, list(block.parameters())), strict=True
        ):
            torch.testing.assert_close(ours, eager)
        frames.append(counter.frame_count)
    assert frames[0] == 1 and frames[1] <= 2
    assert frames[2] == frames[1] and frames[4] == frames[3]  # a batch of one is a case of its own to torch.compile


# One of the two modes for the reference: on a CPU its many operations take a C++ compiler a minute.
@pytest.mark.parametrize(
    ("backend", "full"),
    [("reference", False), ("triton", False), ("triton", True), ("cuda", False), ("cuda", True)],
    indirect=["backend"],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_equals_eager(full: bool, backend: str, device: str) -> None:
    block = Block(full, backend).to(device)
    x = torch.randn(2, 4, 3, 4, device=device)
    compiled = torch.compile(block, fullgraph=True)
    parameters = list(block.parameters())
    for ours, eager in zip(step(compiled, x, parameters), step(block, x, parameters), strict=True):
        torch.testing.assert_close(ours, eager)


@full_or_not
@each("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype, full: bool, backend: str, device: str) -> None:
    """Every backend computes in autocast's dtype, gradients come back in that of x, float64 is left alone."""
    found = []
    for name in ("reference", backend):
        torch.manual_seed(0)
        x = torch.randn(2, 4, 3, 4, device=device, requires_grad=True)
        block = Block(full, name).to(device)
        with torch.autocast(device, dtype):
            stokens, association = super_token_sampling(x, (2, 3), association_grad=full, backend=name)
            # Something between may answer in float32.
            y = token_upsampling(stokens.float(), association, backend=name)
            z = block(x)
            wide, _ = super_token_sampling(x.double(), (2, 3), backend=name)
        assert stokens.dtype == association.weights.dtype == y.dtype == dtype
        assert association.mass.dtype == torch.float32 and wide.dtype == torch.float64
        (grad,) = torch.autograd.grad(y.float().square().sum(), x)
        assert grad.dtype == torch.float32
        found.append((stokens, y, z, grad))
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found[1], found[0], **tolerance)


@full_or_not
@with_reference
def test_activation_checkpointing(full: bool, backend: str, device: str) -> None:
    block = Block(full, backend).to(device)
    x = torch.randn(2, 4, 3, 4, device=device)
    plain = step(block, x, list(block.parameters()))
    again = step(lambda x: checkpoint(block, x, use_reentrant=False), x, list(block.parameters()))
    for ours, theirs in zip(again, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_is_kept_without_grad(backend: str, device: str) -> None:
    x = torch.randn(1, 3, 5, 7, device=device, requires_grad=True)

    def inference() -> None:
        with torch.no_grad():
            for full in (False, True):
                stokens, y = whole(x, (2, 3), 1, full, backend)
                assert not stokens.requires_grad and not y.requires_grad

    assert saved(inference) == []
    with torch.inference_mode():
        whole(x, (2, 3), 1, False, backend)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@full_or_not
def test_captured_in_a_cuda_graph(full: bool, backend: str) -> None:
    """Any synchronisation, and any launch on another stream than the current one, would end the capture."""
    x = torch.randn(2, 16, 9, 7, device="cuda", requires_grad=True)

    def run() -> list[Tensor]:
        stokens, y = whole(x, (2, 3), 2, full, backend)
        return [stokens.detach(), y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))]

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        expected = run()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for result in captured:
        result.fill_(torch.nan)
    graph.replay()
    for result, value in zip(captured, expected, strict=True):
        assert torch.equal(result, value)
