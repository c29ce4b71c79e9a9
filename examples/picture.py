"""The picture of the README: super tokens of a photograph's own colours, without a network.

python examples/picture.py --output docs/assets/super_tokens.jpg
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.datasets import load_sample_image

import stvit
from stvit.visualize import Block, borders, mean_colours, owners


def main(argv: list[str] | None = None) -> Block:
    """Returns the super tokens that were drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="super_tokens.jpg")
    parser.add_argument("--tile", type=int, default=32, help="pixels a super token covers at first")
    parser.add_argument("--point", type=float, nargs=2, default=(0.32, 0.33), help="whose super token is shown alone")
    args = parser.parse_args(argv)
    picture = load_sample_image("china.jpg")[:416, :640].astype(np.float32) / 255
    block = _sample(_features(picture, args.tile), args.tile)
    owner, share = block.owner.numpy(), block.membership(block.token_at(tuple(args.point))).numpy()
    _draw(picture, owner, share, args.output)
    return block


def _features(picture: np.ndarray, tile: int, count: int = 48) -> torch.Tensor:
    """(1, 2 * count, H, W) whose inner products are a Gaussian kernel of distances, by random Fourier features.

    Distances are of colours, and of places in tiles, so that super tokens stay in one piece.
    """
    height, width = picture.shape[:2]
    rows, columns = torch.meshgrid(torch.arange(height) / tile, torch.arange(width) / tile, indexing="ij")
    colours = torch.from_numpy(picture).permute(2, 0, 1)
    seen = torch.cat([0.7 * colours / colours.std((1, 2), keepdim=True), rows[None], columns[None]])  # (5, H, W)
    frequencies = torch.randn(count, 5, generator=torch.Generator().manual_seed(0))
    angles = torch.einsum("fc,chw->fhw", frequencies, seen)
    return torch.cat([angles.cos(), angles.sin()])[None] / count**0.5


def _sample(x: torch.Tensor, tile: int) -> Block:
    _, association = stvit.super_token_sampling(x, tile, n_iter=4, scale=12.0, backend="reference")
    gh, gw = association.mass.shape[-2:]
    return Block("colours", owners(association)[0], (gh, gw), association, None)


def _draw(picture: np.ndarray, owner: np.ndarray, share: np.ndarray, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.7), layout="constrained")
    outlined = np.where(borders(owner)[..., None], np.array([1.0, 0.9, 0.1], np.float32), picture)
    part = (share / share.max())[..., None]
    alone = (0.35 + 0.25 * part) * picture + 0.4 * part * np.array([1.0, 0.9, 0.1], np.float32)
    for panel, image in zip(figure.subplots(1, 3), (outlined, mean_colours(picture, owner), alone), strict=True):
        panel.imshow(image)
        panel.set_axis_off()
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 85} if path.endswith(".jpg") else None)


if __name__ == "__main__":
    main()
