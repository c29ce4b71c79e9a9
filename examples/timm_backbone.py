"""STViT as transformers' TimmBackbone: feature maps, and a DETR with it underneath.

pip install transformers
python examples/timm_backbone.py --model stvit_small --checkpoint stvit-small-224.pth --size 800 1344
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import stvit.timm_models  # registers the models with timm, where transformers looks for them
from stvit.model import CONFIGS

try:
    from transformers import DetrConfig, DetrForObjectDetection, TimmBackbone, TimmBackboneConfig
except ModuleNotFoundError as error:
    raise SystemExit("transformers is missing: pip install transformers") from error


def build(name: str, checkpoint: str | None, stages: tuple[int, ...] = (0, 1, 2, 3)) -> TimmBackbone:
    """Images (B, 3, H, W) -> an output whose feature_maps are those of the stages."""
    backbone = TimmBackbone(TimmBackboneConfig(backbone=name, out_indices=list(stages)))
    if checkpoint:
        stvit.load_checkpoint(backbone._backbone, checkpoint)
    return backbone


def detector(name: str, checkpoint: str | None, classes: int) -> DetrForObjectDetection:
    """A small DETR over the last stage; its BatchNorms are frozen, as transformers does."""
    backbone = TimmBackboneConfig(backbone=name, out_indices=[3])
    small = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 10}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = DetrConfig(backbone_config=backbone, use_timm_backbone=False, num_labels=classes, **small, **heads)
    model = DetrForObjectDetection(config)
    if checkpoint:
        timms = next(part for part in model.modules() if isinstance(getattr(part, "model", None), stvit.STViT))
        stvit.load_checkpoint(timms, checkpoint)
    return model


def main(argv: list[str] | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
    """Returns the feature maps of two images, and DETR's boxes (2, 10, 4)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stvit_tiny", choices=CONFIGS)
    parser.add_argument("--checkpoint", help="a published file, or one of ours")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 96), metavar=("HEIGHT", "WIDTH"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    images = torch.randn(2, 3, *args.size)
    backbone = build(args.model, args.checkpoint)
    maps = backbone(images).feature_maps
    print("feature maps", [tuple(features.shape) for features in maps])
    boxes = detector(args.model, args.checkpoint, classes=5)(pixel_values=images).pred_boxes
    print("boxes", tuple(boxes.shape))
    return maps, boxes


if __name__ == "__main__":
    main()
