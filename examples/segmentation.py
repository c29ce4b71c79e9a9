"""STViT with a small segmentation head, trained for a few steps to find rectangles that it draws itself.

python examples/segmentation.py --steps 30
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stvit
from stvit.model import CONFIGS


class Segmenter(nn.Module):
    """Images (B, 3, H, W) -> class scores (B, classes, H, W): the four maps brought to stride 4, joined and mixed."""

    def __init__(self, model: stvit.STViT, classes: int, width: int = 64) -> None:
        super().__init__()
        channels = [info["num_chs"] for info in model.feature_info]
        model.prune_intermediate_layers(len(channels), prune_norm=True)
        self.body = model
        self.reduce = nn.ModuleList(nn.Conv2d(dim, width, 1) for dim in channels)
        self.head = nn.Sequential(nn.Conv2d(width * len(channels), width, 1), nn.GELU(), nn.Conv2d(width, classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        maps = [reduce(m) for reduce, m in zip(self.reduce, self.body.forward_stages(images), strict=True)]
        joined = torch.cat([F.interpolate(m, maps[0].shape[2:], mode="bilinear") for m in maps], 1)
        return F.interpolate(self.head(joined), images.shape[2:], mode="bilinear")


def rectangles(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Noisy images (count, 3, size, size), each with one bright rectangle, and where it is (count, size, size)."""
    images, where = 0.3 * torch.randn(count, 3, size, size), torch.zeros(count, size, size, dtype=torch.long)
    for image, mask in zip(images, where, strict=True):
        top, left = torch.randint(0, size // 2, (2,)).tolist()
        bottom, right = top + size // 3, left + size // 3
        image[:, top:bottom, left:right] += 1.5
        mask[top:bottom, left:right] = 1
    return images, where


def main(argv: list[str] | None = None) -> list[float]:
    """Returns the losses of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stvit_tiny", choices=CONFIGS)
    parser.add_argument("--checkpoint", help="a published file, or one of ours")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = stvit.STViT(**CONFIGS[args.model], num_classes=0)
    if args.checkpoint:
        stvit.load_checkpoint(model, args.checkpoint, head="skip")
    segmenter = Segmenter(model, classes=2).to(device)
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=1e-3)
    losses = []
    for step in range(args.steps):
        images, where = (t.to(device) for t in rectangles(4, args.size))
        loss = F.cross_entropy(segmenter(images), where)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
