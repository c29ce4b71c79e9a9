"""stvit.accelerate: same numbers, same objects, found by structure, undone without a trace; what it leaves, and why."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stvit
from stvit.swap.accelerate import Report, accelerate, accelerate_report, restore
from stvit.swap.kinds import Accelerated, AcceleratedMlp
from tests.support import authors_classes as authors
from tests.support.authors_classes import small_network
from tests.support.authors_structure import published_forward, published_shapes

ROOT = Path(__file__).resolve().parents[2]
FEW: dict[str, Any] = {"num_heads": 2, "qkv_bias": True}


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def outcome(model: nn.Module, x: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Output, input gradient and parameter gradients under a seed."""
    x = x.detach().requires_grad_()
    leaves = {"x": x, **{name: value for name, value in model.named_parameters() if value.requires_grad}}
    torch.manual_seed(seed)
    y = model(x)
    grads = torch.autograd.grad(
        y, list(leaves.values()), torch.randn_like(y), allow_unused=True, materialize_grads=True
    )
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_same_outcome(a: nn.Module, b: nn.Module, x: Tensor, atol: float = 1e-11) -> None:
    ours, theirs = outcome(a, x), outcome(b, x)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-9, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def swapped(model: nn.Module) -> dict[str, Accelerated]:
    return {name: part for name, part in model.named_modules() if isinstance(part, Accelerated)}


def test_the_structure_is_the_published_one() -> None:
    """Otherwise everything below would be shown on a structure of our own making."""
    network = small_network().double().eval()
    config = authors.SMALL
    shapes = published_shapes(
        config["embed_dim"], config["depths"], config["layerscale"], config["num_classes"], config["projection"]
    )
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == shapes
    x = images(2, 3, 40, 40)
    for training in (False, True):
        expected = published_forward(
            network.state_dict(), x, config["depths"], config["num_heads"], config["stoken_size"], training
        )
        torch.testing.assert_close(copy.deepcopy(network).train(training)(x), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_same_outputs_and_gradients(training: bool) -> None:
    """With drop-path: the random stream is the same, so a seed drops the same samples."""
    network = small_network(drop_path=0.3).double().train(training)
    fast = accelerate(copy.deepcopy(network))
    assert_same_outcome(fast, network, images(3, 3, 40, 40))
    for (name, a), (_, b) in zip(fast.named_buffers(), network.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_all_of_the_published_structure_is_swapped() -> None:
    network = small_network()
    before = dict(network.named_parameters())
    assert accelerate(network) is network
    report = accelerate_report(network)
    assert report.left == {} and len(report.swapped) == 5 * 6  # blocks; parts of each
    assert report.swapped.keys() == swapped(network).keys()
    assert all(value is before[name] for name, value in network.named_parameters())
    block = network.layers[0].blocks[0]
    assert isinstance(block.attn, authors.TokenAttention) and isinstance(block.norm1, authors.PixelNorm)
    assert type(block) is authors.Block
    assert report.swapped["layers.0.blocks.0.attn"] == (
        "super token sampling and upsampling in place of TokenAttention, backend='auto', association_grad=False"
    )


def test_the_swapped_forwards_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, not the original's: the original's forward would go through its submodules."""
    network = accelerate(small_network())
    network.patch_embed = nn.Conv2d(3, 8, 4, 4)
    depthwise = [part for name, part in network.named_modules() if name.endswith("pos_embed.conv")]
    for kind in (authors.Gather, nn.LayerNorm, nn.GELU):
        monkeypatch.setattr(kind, "forward", lambda self, x: pytest.fail(f"{type(self).__name__} was called"))
    convolve = nn.Conv2d.forward
    monkeypatch.setattr(
        nn.Conv2d,
        "forward",
        lambda self, x: pytest.fail("depthwise") if any(self is part for part in depthwise) else convolve(self, x),
    )
    assert depthwise
    network(images(2, 3, 32, 32, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_other_dtypes_and_formats(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    network = small_network().eval()
    fast = accelerate(copy.deepcopy(network)).to(memory_format=memory_format)
    x = images(2, 3, 40, 40, dtype=torch.float32)
    truth = copy.deepcopy(network).double()(x.double())
    theirs = network.to(dtype)(x.to(dtype)).double()
    ours = fast.to(dtype)(x.to(dtype).contiguous(memory_format=memory_format)).double()
    # The rule of twice the error, with room for the noise of the largest of ten numbers.
    assert (ours - truth).abs().max() <= 4 * (theirs - truth).abs().max() + 1e-6


def test_autocast() -> None:
    network = small_network().eval()
    fast = accelerate(copy.deepcopy(network))
    x = images(2, 3, 40, 40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x), network(x), rtol=0.05, atol=0.02)


def test_kernels(device: str) -> None:
    """Through the Triton kernels themselves, interpreted without a GPU."""
    block = authors.Block(4, (4, 3), 2, layerscale=True).to(device)
    fast = accelerate(copy.deepcopy(block), "triton")
    x = images(2, 4, 7, 8, dtype=torch.float32).to(device)
    ours, theirs = outcome(fast, x), outcome(block, x)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4 * (1 + value.abs().max().item()))


def test_twice_is_once_and_the_backend_can_be_changed() -> None:
    network = accelerate(small_network())
    classes = [type(part) for part in network.modules()]
    accelerate(network, "reference")
    assert [type(part) for part in network.modules()] == classes
    assert {part._stvit_backend for part in swapped(network).values()} == {"reference"}
    assert accelerate_report(network).left == {}


def test_reference_backend_is_explicit_about_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    network = accelerate(small_network(), "reference")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    network(images(2, 3, 32, 32, dtype=torch.float32))
    with pytest.raises(TypeError):
        accelerate(network)(images(2, 3, 32, 32, dtype=torch.float32))


def test_restore_leaves_no_trace() -> None:
    network = small_network(drop=0.1)
    before = [(type(part), sorted(vars(part))) for part in network.modules()]
    assert restore(accelerate(network)) is network
    assert [(type(part), sorted(vars(part))) for part in network.modules()] == before
    assert restore(network) is network
    assert set(accelerate_report(network).left.values()) == {"not swapped yet"}


def test_deepcopy() -> None:
    network = accelerate(small_network(drop_path=0.2).double())
    twin = copy.deepcopy(network)
    assert [type(part) for part in twin.modules()] == [type(part) for part in network.modules()]
    assert_same_outcome(twin, network, images(2, 3, 40, 40))
    restore(twin)
    assert swapped(network) and not swapped(twin)


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_pickle(protocol: int) -> None:
    network = accelerate(small_network().double().eval())
    twin = pickle.loads(pickle.dumps(network, protocol))
    assert [type(part) for part in twin.modules()] == [type(part) for part in network.modules()]
    x = images(2, 3, 40, 40)
    assert torch.equal(twin(x), network(x))
    assert not swapped(restore(twin))


def test_pickle_in_another_process(run_python: Callable[..., Any], tmp_path: Path) -> None:
    network = accelerate(small_network().double().eval())
    x = images(2, 3, 32, 32)
    torch.save({"model": network, "x": x, "y": network(x)}, tmp_path / "model.pt")
    code = (
        "import torch, sys; saved = torch.load(sys.argv[1], weights_only=False); model = saved['model']\n"
        "torch.testing.assert_close(model(saved['x']), saved['y'])\n"
        "from stvit.swap.accelerate import restore; from tests.support import authors_classes\n"
        "print([type(part).__name__ for part in model.layers[0].blocks[0].children()])\n"
        "print(type(restore(model).layers[0].blocks[0].attn) is authors_classes.TokenAttention)\n"
    )
    out = run_python("-c", code, str(tmp_path / "model.pt"), env={"PYTHONPATH": str(ROOT)}).stdout.split("\n")
    assert "AcceleratedTokenAttention" in out[0] and out[1] == "True"


def test_state_dicts_go_both_ways() -> None:
    network, fast = small_network().double().eval(), accelerate(small_network().double().eval())
    assert list(fast.state_dict()) == list(network.state_dict())
    x = images(2, 3, 40, 40)
    fast.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(fast(x), network(x), rtol=1e-10, atol=1e-12)
    fast = accelerate(small_network().double().eval())
    network.load_state_dict(fast.state_dict(), strict=True)
    torch.testing.assert_close(fast(x), network(x), rtol=1e-10, atol=1e-12)


HOOKED = [
    "layers.0.blocks.0.attn",
    "layers.0.blocks.0.attn.unfold",
    "layers.0.blocks.0.attn.stoken_refine",
    "layers.0.blocks.0.attn.stoken_refine.qkv",
    "layers.0.blocks.0.attn.stoken_refine.attn_drop",
    "layers.0.blocks.0.norm1.norm",
    "layers.0.blocks.0.pos_embed.conv",
    "layers.0.blocks.0.mlp2.act1",
    "layers.0.blocks.0.mlp2.drop",
    "layers.0.blocks.0.mlp2.conv",
    "layers.0.blocks.0.mlp2.conv.conv",
]


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_hooks_on_any_submodule_work(name: str, late: bool) -> None:
    """A hook that changes the output, and one that only looks; also where our forward would pass the module over."""
    network = small_network().double()

    def hook(model: nn.Module) -> list[torch.Size]:
        seen: list[torch.Size] = []
        part = model.get_submodule(name)
        part.register_forward_hook(lambda module, inputs, output: output * 1.5)
        part.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
        return seen

    fast = copy.deepcopy(network)
    if late:
        accelerate(fast)
        seen = hook(fast)
    else:
        seen = hook(fast)
        accelerate(fast)
    expected = hook(network)
    assert_same_outcome(fast, network, images(2, 3, 40, 40))
    assert seen == expected != []


def test_calls_that_ours_does_not_cover_run_the_original() -> None:
    class Scaled(authors.Position):
        def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
            return super().forward(x) * factor

    module = Scaled(6)
    fast = accelerate(copy.deepcopy(module))
    assert swapped(fast)
    x = images(2, 6, 5, 7, dtype=torch.float32)
    assert torch.equal(fast(x, 3.0), module(x, 3.0))
    assert torch.equal(fast(x=x, factor=2.0), module(x, 2.0))
    assert torch.equal(fast(x[0]), module(x[0]))  # without a batch


def test_parts_replaced_after_the_swap_are_called() -> None:
    """As a tool that adds adapters does."""

    class Adapter(nn.Module):
        def __init__(self, inner: nn.Conv2d) -> None:
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1.0

    network = small_network().double()
    fast = accelerate(copy.deepcopy(network))
    for model in (network, fast):
        block = model.layers[0].blocks[0]
        for parent, name in [
            (block.pos_embed, "conv"), (block.mlp2.conv, "conv"), (block.mlp2, "fc1"), (block.attn.stoken_refine, "qkv")
        ]:  # fmt: skip
            setattr(parent, name, Adapter(getattr(parent, name)))
        model.layers[1].blocks[0].mlp2.act1 = nn.ReLU()
    assert_same_outcome(fast, network, images(2, 3, 40, 40))


def test_attributes_are_read_at_each_call() -> None:
    module = authors.TokenAttention(8, (4, 4), **FEW).double()
    fast = accelerate(copy.deepcopy(module))
    for model in (module, fast):
        model.stoken_size, model.n_iter, model.scale = (2, 3), 2, 0.7
    assert_same_outcome(fast, module, images(2, 8, 9, 10))


def test_active_dropout_draws_the_original_numbers() -> None:
    network = small_network(drop=0.2, attn_drop=0.3, drop_path=0.2).double()
    fast = accelerate(copy.deepcopy(network))
    assert len(swapped(fast)) == 30
    assert_same_outcome(fast, network, images(2, 3, 40, 40))
    fast.eval(), network.eval()
    assert_same_outcome(fast, network, images(2, 3, 40, 40))


def test_our_own_modules_get_their_backend_set() -> None:
    model = stvit.stvit_tiny(num_classes=3, backend="reference")
    keys = list(model.state_dict())
    accelerate(model, "triton")
    assert {part.backend for part in model.modules() if hasattr(part, "backend")} == {"triton"}
    assert not swapped(model) and list(model.state_dict()) == keys
    accelerate(model)
    assert accelerate_report(model).left == {}
    restore(model)
    assert {part.backend for part in model.modules() if hasattr(part, "backend")} == {"reference"}


def test_log(caplog: pytest.LogCaptureFixture) -> None:
    network = nn.Sequential(authors.Position(4), authors.Position(4), authors.Position(4, 5))
    with caplog.at_level(logging.INFO, "stvit"):
        accelerate(network)
        accelerate(nn.Linear(2, 2))
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    first, second = caplog.messages
    assert "swapped 2 modules, left 1" in first and "swapped 0 and 1 more: residual depthwise" in first
    assert "left 2: conv isn't depthwise 3x3" in first and "swapped 0 modules" in second


def test_report_is_readable() -> None:
    assert str(Report({"": "a"}, {})) == "swapped 1 modules, left 0\nswapped the model itself: a"


def test_errors() -> None:
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got list"):
        accelerate([])  # type: ignore[type-var]
    network = small_network()
    with pytest.raises(ValueError, match="backend: expected one of auto, "):
        accelerate(network, "cudnn")
    assert not swapped(network)
    with pytest.raises(TypeError, match="model: expected"):
        restore(None)  # type: ignore[type-var]


def test_restore_refuses_when_another_tool_has_changed_the_class() -> None:
    network = accelerate(small_network())
    attn = network.layers[0].blocks[0].attn
    attn.__class__ = type("Sharded", (type(attn),), {})
    with pytest.raises(RuntimeError, match="layers.0.blocks.0.attn: can't restore, its class is now Sharded"):
        restore(network)
    assert len(swapped(network)) == 30


def test_torch_compile() -> None:
    blocks = nn.Sequential(authors.Block(8, (4, 4), 2), authors.Block(8, (1, 1), 2, layerscale=True)).double()
    fast = accelerate(copy.deepcopy(blocks))
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    x = images(2, 8, 9, 10)
    ours, theirs = compiled(x), blocks(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    ours.square().sum().backward(), theirs.square().sum().backward()
    for a, b in zip(compiled.parameters(), blocks.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)
    assert len(accelerate_report(compiled).swapped) == 12


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch built without distributed")
def test_distributed_data_parallel(process_group: None) -> None:
    network = small_network().double()
    wrapped = nn.parallel.DistributedDataParallel(accelerate(copy.deepcopy(network)))
    late = nn.parallel.DistributedDataParallel(copy.deepcopy(network))
    assert accelerate(late) is late and len(swapped(late)) == 30
    x = images(2, 3, 40, 40)
    expected = copy.deepcopy(network)
    expected(x).square().sum().backward()
    for model in (wrapped, late):
        model(x).square().sum().backward()
        for a, b in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)
    restore(late)
    assert not swapped(late)


def test_mlp_falls_back_inside_only_with_dropout() -> None:
    network = accelerate(authors.ConvMlp(4, 8, drop=0.5))
    assert not AcceleratedMlp.covers(network)
    assert AcceleratedMlp.covers(network.eval())


def test_saved_twin_of_a_class_that_cannot_be_imported_says_so() -> None:
    class Local(authors.Position):
        pass

    with pytest.raises((AttributeError, pickle.PicklingError), match="Local"):
        torch.save(accelerate(Local(4)), io.BytesIO())
