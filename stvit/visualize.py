"""``python -m stvit.visualize``: a picture of the super tokens that a model sees in an image.

For each block that samples super tokens, every pixel takes the mean colour of the super token that it belongs to most,
and the borders between super tokens are outlined. Needs matplotlib and Pillow.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import stvit
from stvit.backends.dispatch import check_backend
from stvit.checkpoint import read_checkpoint
from stvit.geometry import Association
from stvit.model import CONFIGS
from stvit.train.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in training
EXAMPLES = """\
examples:
  python -m stvit.visualize photo.jpg --checkpoint stvit-small-224.pth --output photo.png
  python -m stvit.visualize                 a photograph that comes with scikit-learn, random weights
"""


class Block(NamedTuple):
    """The super tokens of one block."""

    name: str  # "layers.0.blocks.0"
    owner: Tensor  # (H, W) int64: index into the grid, row by row, of the super token with the largest weight
    grid: tuple[int, int]  # (gh, gw)


def owners(association: Association) -> Tensor:
    """The most-weighted super token of every pixel: (B, H, W) int64, an index into the grid row by row.

    Neighbours outside the grid hold weight but no super token, and are left out.
    """
    weights, (h, w) = association.weights, association.stoken_size
    gh, gw = association.mass.shape[-2:]
    k = torch.arange(9, device=weights.device).reshape(9, 1, 1)
    row = torch.arange(weights.shape[2], device=weights.device).reshape(1, -1, 1) // h + k // 3 - 1
    column = torch.arange(weights.shape[3], device=weights.device).reshape(1, 1, -1) // w + k % 3 - 1
    inside = (row >= 0) & (row < gh) & (column >= 0) & (column < gw)  # (9, H, W)
    best = weights.masked_fill(~inside, -1.0).argmax(dim=1, keepdim=True)
    return (row * gw + column).expand_as(weights).gather(1, best).squeeze(1)


@torch.no_grad()
def super_tokens(model: nn.Module, image: Tensor) -> list[Block]:
    """The super tokens of every sampling block of ``model``, in order, for one normalised image (3, H, W)."""
    blocks: list[Block] = []
    hooks: list[Any] = []

    def watch(name: str, attention: stvit.StokenAttention) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            _, association = stvit.super_token_sampling(
                inputs[0], attention.stoken_size, attention.n_iter, attention.scale, backend=attention.backend
            )
            gh, gw = association.mass.shape[-2:]
            blocks.append(Block(name.removesuffix(".attn"), owners(association)[0].cpu(), (gh, gw)))

        return attention.register_forward_pre_hook(hook)

    for name, module in model.named_modules():
        if isinstance(module, stvit.StokenAttention) and module.stoken_size != (1, 1):
            hooks.append(watch(name, module))
    try:
        model.eval()(image[None])
    finally:
        for handle in hooks:
            handle.remove()
    return blocks


def mean_colours(picture: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """``picture`` (H, W, 3) with each pixel replaced by the mean colour of all pixels of the same owner (H, W)."""
    count = np.bincount(owner.ravel())
    sums = np.stack([np.bincount(owner.ravel(), picture[..., c].ravel()) for c in range(3)], axis=-1)
    return (sums / np.maximum(count, 1)[:, None])[owner]


def borders(owner: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels whose right or lower neighbour belongs to another super token."""
    edge = np.zeros(owner.shape, bool)
    edge[:, :-1] |= owner[:, :-1] != owner[:, 1:]
    edge[:-1] |= owner[:-1] != owner[1:]
    return edge


def draw(picture: np.ndarray, blocks: Sequence[Block], path: Path) -> None:
    """Write a PNG: the picture (H, W, 3) in 0..1, then for each block its outlines and its mean colours."""
    from matplotlib.figure import Figure

    columns = min(4, len(blocks) + 1)
    rows = math.ceil((len(blocks) + 1) / columns)
    figure = Figure(figsize=(3 * columns, 6.4 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.set_axis_off()
    axes[0, 0].imshow(picture)
    axes[0, 0].set_title("image", fontsize="small")
    height, width = picture.shape[:2]
    for place, block in enumerate(blocks, 1):
        upper = 2 * (place // columns)
        y = np.arange(height) * block.owner.shape[0] // height  # nearest pixel of the feature map
        x = np.arange(width) * block.owner.shape[1] // width
        owner = block.owner.numpy()[y][:, x]
        outlined = np.where(borders(owner)[..., None], np.array([1.0, 0.9, 0.1]), picture)
        axes[upper, place % columns].imshow(outlined)
        axes[upper, place % columns].set_title(f"{block.name}: {block.grid[0]} x {block.grid[1]}", fontsize="small")
        axes[upper + 1, place % columns].imshow(mean_colours(picture, owner))
    figure.savefig(path, dpi=110)


def read_picture(path: str | None, size: int) -> np.ndarray:
    """The image in 0..1, its shorter side scaled to ``size`` pixels and the middle square cut out: (size, size, 3).

    None stands for a photograph that comes with scikit-learn.

    Raises:
        UserError: naming the file, where it can't be read.
    """
    from PIL import Image, ImageOps

    try:
        if path is None:
            from sklearn.datasets import load_sample_image

            image = Image.fromarray(load_sample_image("china.jpg"))
        else:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
    except ModuleNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise UserError(f"{path}: not a readable image ({error})") from error
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def build_model(name: str | None, checkpoint: str | None, backend: str) -> tuple[nn.Module, str]:
    """The model, with the checkpoint's weights if there is one, and its name (default: the checkpoint's, stvit_small).

    Raises:
        UserError: for an unknown name or backend, or a checkpoint that doesn't fit.
    """
    try:
        contents = read_checkpoint(checkpoint) if checkpoint else {}
        saved = contents.get("args", {})
        saved = saved if isinstance(saved, dict) else vars(saved)
        name = name or saved.get("model", "stvit_small")
        if name not in CONFIGS:
            raise UserError(f"--model {name}: expected one of {', '.join(CONFIGS)}")
        head = contents.get("model", contents).get("head.weight")
        classes = head.shape[0] if isinstance(head, Tensor) else 1000
        model = stvit.STViT(**CONFIGS[name], num_classes=classes, backend=check_backend(backend, "--backend"))
        if checkpoint:
            stvit.load_checkpoint(model, checkpoint)
    except ValueError as error:  # a CheckpointError too
        raise UserError(str(error)) from error
    return model, name


@contextmanager
def _installed(names: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{names} is needed, and {error.name} is missing: pip install 'stvit[train]'") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 where a flag or file is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m stvit.visualize",
        description="Draw the super tokens of an image, block by block.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="default: a photograph that comes with scikit-learn")
    add("--checkpoint", metavar="FILE", help="a checkpoint, published or ours (default: random weights)")
    add("--model", metavar="NAME", help=f"{', '.join(CONFIGS)} (default: the checkpoint's, or stvit_small)")
    add("--input-size", type=int, default=224, metavar="PIXELS", help="side of the square input image (default: 224)")
    add("--output", default="super_tokens.png", metavar="FILE", help="the PNG to write (default: super_tokens.png)")
    add("--backend", default="auto", metavar="NAME", help="auto, reference, triton or cuda")
    add("--device", default="cpu", help="cpu (the default) or cuda")
    add("--seed", type=int, default=0, help="seed of random weights")
    args = parser.parse_args(argv)
    try:
        with _installed("the picture's drawing"):
            _run(args)
    except UserError as error:
        print(f"python -m stvit.visualize: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(args: argparse.Namespace) -> None:
    if args.input_size < 1:
        raise UserError(f"--input-size must be at least 1, not {args.input_size}")
    torch.manual_seed(args.seed)
    picture = read_picture(args.image, args.input_size)
    model, name = build_model(args.model, args.checkpoint, args.backend)
    image = torch.from_numpy((picture - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).permute(2, 0, 1)
    try:
        blocks = super_tokens(model.to(args.device), image.to(args.device))
    except (RuntimeError, ValueError) as error:  # a backend or device that can't run here
        raise UserError(str(error).splitlines()[0]) from error
    path = Path(args.output)
    try:
        draw(picture, blocks, path)
    except (OSError, ValueError) as error:  # no such folder, an ending that is no image format
        raise UserError(f"--output {path}: {error}") from error
    weights = args.checkpoint or "random weights"
    print(f"{path}: {len(blocks)} blocks of {name} ({weights}) on {args.image or 'china.jpg of scikit-learn'}")


if __name__ == "__main__":
    sys.exit(main())
