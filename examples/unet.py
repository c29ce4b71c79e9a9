"""STViT as the encoder of segmentation_models_pytorch's U-Net: one training step and one prediction.

pip install segmentation-models-pytorch
python examples/unet.py --model stvit_small --checkpoint stvit-small-224.pth --size 512
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

import stvit.timm_models  # registers the models with timm, where segmentation_models_pytorch looks for "tu-" names
from stvit.model import CONFIGS

try:
    import segmentation_models_pytorch as smp
except ModuleNotFoundError as error:
    raise SystemExit("segmentation_models_pytorch is missing: pip install segmentation-models-pytorch") from error


def build(name: str, checkpoint: str | None, classes: int) -> smp.Unet:
    """Images (B, 3, H, W), H and W multiples of 32 -> class scores (B, classes, H, W)."""
    unet = smp.Unet(f"tu-{name}", encoder_weights=None, classes=classes)
    if checkpoint:
        stvit.load_checkpoint(unet.encoder.model, checkpoint)
    return unet


def main(argv: list[str] | None = None) -> Tensor:
    """Returns the class of each pixel, (2, H, W)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stvit_tiny", choices=CONFIGS)
    parser.add_argument("--checkpoint", help="a published file, or one of ours")
    parser.add_argument("--size", type=int, default=64, help="of the square images, a multiple of 32 (default: 64)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = build(args.model, args.checkpoint, classes=2).to(device)
    images = torch.randn(2, 3, args.size, args.size, device=device)
    wanted = (images.mean(1) > 0).long()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    loss = F.cross_entropy(unet(images), wanted)
    loss.backward()
    assert all(parameter.grad is not None for parameter in unet.encoder.parameters())
    optimizer.step()
    with torch.no_grad():
        found = unet.eval()(images).argmax(1)
    print(f"loss {loss.item():.3f}, classes of shape {tuple(found.shape)}")
    return found


if __name__ == "__main__":
    main()
