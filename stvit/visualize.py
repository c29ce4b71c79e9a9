"""``python -m stvit.visualize``: pictures of the super tokens that a model sees in an image.

For each block that samples super tokens, every pixel takes the mean colour of the super token that it belongs to most,
and the borders between super tokens are outlined. With ``--point`` the picture is of one super token of each block: how
much of it every pixel holds, and how much it attends to every other one. `figure` draws either in a notebook. Needs
matplotlib and Pillow.
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
from stvit.modules import Attention
from stvit.train.errors import UserError

LARGEST = 8192  # pixels a side of a picture
OUTLINE = (1.0, 0.9, 0.1)
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in training
EXAMPLES = """\
examples:
  python -m stvit.visualize photo.jpg --checkpoint stvit-small-224.pth --output photo.png
  python -m stvit.visualize photos/ --checkpoint stvit-small-224.pth --output drawn/   every image of a folder
  python -m stvit.visualize photo.jpg --point 100 60      the super tokens at row 100, column 60
  python -m stvit.visualize                 a photograph that comes with scikit-learn, random weights
"""


class Block(NamedTuple):
    """The super tokens of one block."""

    name: str  # "layers.0.blocks.0"
    owner: Tensor  # (H, W) int64: index into the grid, row by row, of the super token with the largest weight
    grid: tuple[int, int]  # (gh, gw)
    association: Association  # of the one image, on the CPU
    attention: Tensor | None  # (T, T), T = gh * gw: the refinement's, mean over heads; None where it is no attention

    def token_at(self, point: tuple[float, float]) -> int:
        """The index of the super token that owns a point, (0, 0) the upper left of the image and (1, 1) its end."""
        height, width = self.owner.shape
        row, column = (min(int(part * size), size - 1) for part, size in zip(point, (height, width), strict=True))
        return int(self.owner[row, column])

    def membership(self, token: int) -> Tensor:
        """How much of each pixel belongs to a super token: (H, W), 0 outside its 3 x 3 tiles."""
        _, places = _places(self.association)
        return self.association.weights[0].where(places == token, 0.0).sum(0)


def _places(association: Association) -> tuple[Tensor, Tensor]:
    """For the 9 weights of every pixel: whether the neighbour is inside the grid, and its index; both (9, H, W)."""
    weights, (h, w) = association.weights, association.stoken_size
    gh, gw = association.mass.shape[-2:]
    k = torch.arange(9, device=weights.device).reshape(9, 1, 1)
    row = torch.arange(weights.shape[2], device=weights.device).reshape(1, -1, 1) // h + k // 3 - 1
    column = torch.arange(weights.shape[3], device=weights.device).reshape(1, 1, -1) // w + k % 3 - 1
    inside = (row >= 0) & (row < gh) & (column >= 0) & (column < gw)
    return inside, (row * gw + column).where(inside, -1)


def owners(association: Association) -> Tensor:
    """The most-weighted super token of every pixel: (B, H, W) int64, an index into the grid row by row.

    Neighbours outside the grid hold weight but no super token, and are left out.
    """
    inside, places = _places(association)
    best = association.weights.masked_fill(~inside, -1.0).argmax(dim=1, keepdim=True)
    return places.expand_as(association.weights).gather(1, best).squeeze(1)


@torch.no_grad()
def super_tokens(model: nn.Module, image: Tensor) -> list[Block]:
    """The super tokens of every sampling block of ``model``, in order, for one normalised image (3, H, W)."""
    blocks: list[Block] = []
    hooks: list[Any] = []

    def watch(name: str, attention: stvit.StokenAttention) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            stokens, found = stvit.super_token_sampling(
                inputs[0], attention.stoken_size, attention.n_iter, attention.scale, backend=attention.backend
            )
            found = found._replace(weights=found.weights.float().cpu(), mass=found.mass.float().cpu())
            refine = attention.stoken_refine
            attended = refine.weights(stokens)[0].mean(0).float().cpu() if isinstance(refine, Attention) else None
            gh, gw = found.mass.shape[-2:]
            blocks.append(Block(name.removesuffix(".attn"), owners(found)[0], (gh, gw), found, attended))

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


def figure(model: nn.Module, image: Tensor, point: tuple[float, float] | None = None) -> Any:
    """A matplotlib Figure of the super tokens that `model` sees in `image`; notebooks need `%matplotlib inline`.

    Args:
        model: a model of this package; it is put into evaluation mode.
        image: (3, H, W), normalised with ImageNet's mean and deviation.
        point: (row, column) as parts of the height and width, each from 0 to 1. Then the figure shows, of the super
            token there, the soft association of every pixel, and the refinement's attention over the grid.
    """
    mean, deviation = (torch.tensor(values, device=image.device)[:, None, None] for values in (MEAN, STD))
    picture = (image * deviation + mean).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return _figure(picture, super_tokens(model, image), point)


def _figure(picture: np.ndarray, blocks: Sequence[Block], point: tuple[float, float] | None) -> Any:
    """The picture (H, W, 3) in 0..1, and beside it two panels for each block, one above the other."""
    from matplotlib.figure import Figure

    columns = min(4, len(blocks) + 1)
    rows = math.ceil((len(blocks) + 1) / columns)
    drawn = Figure(figsize=(3 * columns, 6.4 * rows), layout="constrained")
    axes = drawn.subplots(2 * rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.set_axis_off()
    axes[0, 0].imshow(picture)
    axes[0, 0].set_title("image", fontsize="small")
    if point is not None:
        axes[0, 0].plot(point[1] * picture.shape[1], point[0] * picture.shape[0], "o", color=OUTLINE, markersize=8)
    for place, block in enumerate(blocks, 1):
        upper, column = 2 * (place // columns), place % columns
        panels = (axes[upper, column], axes[upper + 1, column])
        panels[0].set_title(f"{block.name}: {block.grid[0]} x {block.grid[1]}", fontsize="small")
        if point is None:
            _draw_tessellation(panels, picture, block)
        else:
            _draw_token(panels, picture, block, block.token_at(point))
    return drawn


def _draw_tessellation(panels: Sequence[Any], picture: np.ndarray, block: Block) -> None:
    """Outlines of the super tokens, and their mean colours."""
    owner = _enlarged(block.owner.numpy(), picture)
    panels[0].imshow(np.where(borders(owner)[..., None], np.array(OUTLINE), picture))
    panels[1].imshow(mean_colours(picture, owner))


def _draw_token(panels: Sequence[Any], picture: np.ndarray, block: Block, token: int) -> None:
    """How much of every pixel belongs to the super token, and how much it attends to every other one."""
    share = _enlarged(block.membership(token).numpy(), picture)
    panels[0].imshow(picture * (0.15 + 0.85 * share / max(float(share.max()), 1e-12))[..., None])
    if block.attention is not None:
        panels[1].imshow(block.attention[token].reshape(block.grid).numpy(), cmap="magma")
        panels[1].plot(token % block.grid[1], token // block.grid[1], "s", color=OUTLINE, fillstyle="none")
        panels[1].set_title("attends to", fontsize="small")


def _enlarged(values: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """`values` of a feature map (H, W) at the picture's size, each pixel the nearest one's."""
    rows = np.arange(picture.shape[0]) * values.shape[0] // picture.shape[0]
    columns = np.arange(picture.shape[1]) * values.shape[1] // picture.shape[1]
    return values[rows][:, columns]


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
    named = name
    try:
        contents = read_checkpoint(checkpoint) if checkpoint else {}
        saved = contents.get("args", {})
        saved = saved if isinstance(saved, dict) else vars(saved)
        named = name = name or saved.get("model")
        name = name or "stvit_small"
        if name not in CONFIGS:
            raise UserError(f"--model {name}: expected one of {', '.join(CONFIGS)}")
        head = contents.get("model", contents).get("head.weight")
        classes = head.shape[0] if isinstance(head, Tensor) else 1000
        model = stvit.STViT(**CONFIGS[name], num_classes=classes, backend=check_backend(backend, "--backend"))
        if checkpoint:
            stvit.load_checkpoint(model, checkpoint)
    except ValueError as error:  # a CheckpointError too
        guessed = isinstance(error, stvit.CheckpointError) and named is None
        raise UserError(f"{error} (name the model with --model)" if guessed else str(error)) from error
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
    add("image", nargs="?", metavar="IMAGE", help="an image, or a folder of them (default: one of scikit-learn's)")
    add("--checkpoint", metavar="FILE", help="a checkpoint, published or ours (default: random weights)")
    add("--model", metavar="NAME", help=f"{', '.join(CONFIGS)} (default: the checkpoint's, or stvit_small)")
    add("--input-size", type=int, default=224, metavar="PIXELS", help="side of the square input image (default: 224)")
    add(
        "--output",
        default="super_tokens.png",
        metavar="FILE",
        help="the PNG, or folder, to write (default: super_tokens.png)",
    )
    add("--point", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="show the super tokens at this pixel alone")
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


def _pairs(image: str | None, output: str) -> list[tuple[str | None, Path]]:
    """(image, PNG to write) for one image, or for each of a folder's, whose pictures go into the folder `output`."""
    if image is None or not Path(image).is_dir():
        return [(image, Path(output))]
    found = sorted(path for path in Path(image).iterdir() if path.suffix.lower() in IMAGES)
    if not found:
        raise UserError(f"{image}: no image in this folder (expected files that end in {', '.join(IMAGES)})")
    folder = Path(output).with_suffix("")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error}") from error
    return [(str(path), folder / f"{path.stem}.png") for path in found]


def _run(args: argparse.Namespace) -> None:
    if not 1 <= args.input_size <= LARGEST:
        raise UserError(f"--input-size must be at least 1 and at most {LARGEST}, not {args.input_size}")
    point = None if args.point is None else (args.point[0] / args.input_size, args.point[1] / args.input_size)
    if point is not None and not all(0 <= part < 1 for part in point):
        raise UserError(f"--point must be a row and a column below --input-size {args.input_size}, not {args.point}")
    if not -(2**63) <= args.seed < 2**64:
        raise UserError(f"--seed must be a number of 64 bits, not {args.seed}")
    pairs = _pairs(args.image, args.output)
    torch.manual_seed(args.seed)
    model, name = build_model(args.model, args.checkpoint, args.backend)
    for photo, path in pairs:
        picture = read_picture(photo, args.input_size)
        image = torch.from_numpy((picture - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).permute(2, 0, 1)
        try:
            blocks = super_tokens(model.to(args.device), image.to(args.device))
        except (RuntimeError, ValueError) as error:  # a backend or device that can't run here
            raise UserError(str(error).splitlines()[0]) from error
        try:
            _figure(picture, blocks, point).savefig(path, dpi=110)
        except (OSError, ValueError) as error:  # no such folder, an ending that is no image format
            raise UserError(f"--output {path}: {error}") from error
        weights = args.checkpoint or "random weights"
        print(f"{path}: {len(blocks)} blocks of {name} ({weights}) on {photo or 'china.jpg of scikit-learn'}")


if __name__ == "__main__":
    sys.exit(main())
