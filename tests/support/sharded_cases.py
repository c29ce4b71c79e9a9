"""What two processes do with one model, on the CPU over gloo: each case runs in both, and raises where it is wrong.

`run` starts the processes once for all cases, since to import PyTorch takes longer than any of them.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import stvit
from stvit.model import STViT

SMALLEST = {"embed_dim": (8, 12, 20, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 5, 4), "projection": 24}
PROCESSES = 2
WHOLE = StateDictOptions(full_state_dict=True)


def build(seed: int = 0) -> STViT:
    """A model whose BatchNorm answers alike whatever the batch is, so that half batches make the whole one's step."""
    torch.manual_seed(seed)
    model = STViT(num_classes=5, layerscale=(False, True, False, True), init_values=0.5, **SMALLEST)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def images() -> Tensor:
    return torch.randn(2 * PROCESSES, 3, 40, 33, generator=torch.Generator().manual_seed(7))


def own_images(rank: int) -> Tensor:
    return images().chunk(PROCESSES)[rank]


def step(model: nn.Module, x: Tensor) -> None:
    """Of SGD, whose size is that of the gradient; Adam's first one has the same size whatever the gradient is."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()


def expected() -> dict[str, Tensor]:
    model = build()
    step(model, images())
    return model.state_dict()


def same(found: dict[str, Any], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def sharded(model: STViT, every_leaf: bool = False) -> STViT:
    """Each block's parameters shared out over the processes, or those of each convolution and norm by itself."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    blocks = [block for stage in model.layers for block in stage.blocks]
    leaves = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.LayerNorm, nn.Linear))]
    for module in leaves if every_leaf else blocks:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fully_shard_steps(rank: int, folder: Path) -> None:
    for every_leaf in (False, True):
        model = sharded(build(), every_leaf)
        step(model, own_images(rank))
        found, wanted = get_model_state_dict(model, options=WHOLE), expected()
        if rank == 0:
            same(found, wanted)


def fully_shard_state_dicts(rank: int, folder: Path) -> None:
    """PyTorch's own functions both ways, and a file of the whole in one process."""
    model, other = sharded(build()), build(1).eval()
    set_model_state_dict(model, other.state_dict(), options=WHOLE)
    assert torch.equal(model.eval()(images()), other(images()))
    whole = get_model_state_dict(model, options=WHOLE)
    if rank == 0:
        stvit.save_checkpoint(folder / "whole.pth", model=whole)
        same(stvit.load_checkpoint(build(), folder / "whole.pth").state_dict(), other.state_dict())


def checkpoints_load_into_shards(rank: int, folder: Path) -> None:
    """Each process keeps its own parts, whether the parameters were real before or on the meta device."""
    other = build(1)
    torch.save({"model": other.state_dict()}, folder / f"{rank}.pth")
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = build()
        model = stvit.load_checkpoint(sharded(model), folder / f"{rank}.pth")
        assert model.head.weight.to_local().shape[0] < 5
        assert torch.equal(model.eval()(images()), other.eval()(images()))


def parts_are_not_a_checkpoint(rank: int, folder: Path) -> None:
    parts = sharded(build()).state_dict()
    with pytest.raises(TypeError, match=r"^contents: expected whole tensors.*full_state_dict=True"):
        stvit.save_checkpoint(folder / f"parts{rank}.pth", model=parts)
    torch.save(parts, folder / f"parts{rank}.pth")
    with pytest.raises(stvit.CheckpointError, match=r"parts\d.pth: expected whole tensors.*full_state_dict=True"):
        stvit.load_checkpoint(build(), folder / f"parts{rank}.pth")


def fully_sharded_data_parallel(rank: int, folder: Path) -> None:
    """FSDP's first form."""
    model = FullyShardedDataParallel(build(), device_id=torch.device("cpu"), use_orig_params=True)
    step(model, own_images(rank))
    with FullyShardedDataParallel.summon_full_params(model):
        found = {name: value.detach().clone() for name, value in model.named_parameters()}
    wanted = expected()
    same(found, {name: wanted[name] for name in found})


def distributed_data_parallel(rank: int, folder: Path) -> None:
    model = nn.parallel.DistributedDataParallel(build())
    step(model, own_images(rank))
    same(model.module.state_dict(), expected())


def dtensors_take_the_reference(rank: int, folder: Path) -> None:
    """Of pixels, whole in each process or shared out by image; a backend by name says that it doesn't know them."""
    mesh, x = init_device_mesh("cpu", (PROCESSES,)), torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    wanted, association = stvit.super_token_sampling(x, 2)
    for placement in (Replicate(), Shard(0)):
        pixels = distribute_tensor(x, mesh, [placement])
        stokens, found = stvit.super_token_sampling(pixels, 2)
        torch.testing.assert_close(stokens.full_tensor(), wanted)  # type: ignore[attr-defined]
        y = stvit.token_upsampling(stokens, found)
        torch.testing.assert_close(y.full_tensor(), stvit.token_upsampling(wanted, association))  # type: ignore[attr-defined]
        with pytest.raises(stvit.BackendError, match=r"^backend='triton' can't run: .*DTensor.*'reference'"):
            stvit.super_token_sampling(pixels, 2, backend="triton")


CASES: dict[str, Callable[[int, Path], None]] = {
    case.__name__: case
    for case in (
        fully_shard_steps,
        fully_shard_state_dicts,
        checkpoints_load_into_shards,
        parts_are_not_a_checkpoint,
        fully_sharded_data_parallel,
        distributed_data_parallel,
        dtensors_take_the_reference,
    )
}


def _process(rank: int, folder: Path) -> None:
    """All cases in one of the processes; what one raises is left in a file for the test of its name."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    for name, case in CASES.items():
        try:
            case(rank, folder)
        except BaseException:
            (folder / f"{name}.{rank}").write_text(traceback.format_exc())
        dist.barrier()
    dist.destroy_process_group()


def run(folder: Path) -> None:
    torch.multiprocessing.spawn(_process, (folder,), nprocs=PROCESSES)
