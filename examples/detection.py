"""STViT under torchvision's Mask R-CNN: one training step and one prediction on a made-up image.

python examples/detection.py --model stvit_small --checkpoint stvit-small-224.pth --size 800 1344
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import stvit
from stvit.model import CONFIGS


class Pyramid(nn.Module):
    """Images (B, 3, H, W) -> five maps of 256 channels, strides 4 to 64, as torchvision's detectors want them."""

    out_channels = 256

    def __init__(self, model: stvit.STViT) -> None:
        super().__init__()
        channels = [info["num_chs"] for info in model.feature_info]
        model.prune_intermediate_layers(len(channels), prune_norm=True)  # a detector has no use for the classifier
        self.body = model
        self.fpn = FeaturePyramidNetwork(channels, self.out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body.forward_stages(images)
        return self.fpn({str(stage): features for stage, features in enumerate(maps)})


def build(name: str, checkpoint: str | None, size: tuple[int, int], classes: int = 91) -> MaskRCNN:
    model = stvit.STViT(**CONFIGS[name], num_classes=0, drop_path_rate=0.1)
    if checkpoint:
        stvit.load_checkpoint(model, checkpoint, head="skip")
    anchors = AnchorGenerator(tuple((side,) for side in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
    return MaskRCNN(Pyramid(model), classes, min_size=min(size), max_size=max(size), rpn_anchor_generator=anchors)


def main(argv: list[str] | None = None) -> float:
    """Returns the loss of the step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stvit_tiny", choices=CONFIGS)
    parser.add_argument("--checkpoint", help="a published file, or one of ours")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 160), metavar=("HEIGHT", "WIDTH"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    detector = build(args.model, args.checkpoint, tuple(args.size)).to(device)
    height, width = args.size
    image = torch.rand(3, height, width, device=device)
    mask = torch.zeros(1, height, width, dtype=torch.uint8, device=device)
    mask[:, height // 4 : height // 2, width // 4 : width // 2] = 1
    box = torch.tensor([[width // 4, height // 4, width // 2, height // 2]], dtype=torch.float32, device=device)
    target = {"boxes": box, "labels": torch.ones(1, dtype=torch.int64, device=device), "masks": mask}
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-4)
    loss = sum(detector([image], [target]).values())
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        found = detector.eval()([image])[0]
    print(f"loss {loss.item():.3f}, {len(found['boxes'])} boxes")
    return loss.item()


if __name__ == "__main__":
    main()
