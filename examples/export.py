"""A model as a file for another program, and that file in use.

python examples/export.py --format pt2 --output model.pt2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import stvit
from stvit.model import CONFIGS


def main(argv: list[str] | None = None) -> Path:
    """Returns the file's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stvit_tiny", choices=CONFIGS)
    parser.add_argument("--checkpoint", help="a published file, or one of ours")
    parser.add_argument("--format", default="pt2", choices=("pt2", "onnx"))
    parser.add_argument("--output", default="model.pt2")
    parser.add_argument("--size", type=int, default=224, help="of the square images (default: 224)")
    args = parser.parse_args(argv)
    model = stvit.STViT(**CONFIGS[args.model], num_classes=1000)
    if args.checkpoint:
        stvit.load_checkpoint(model, args.checkpoint)
    example = torch.randn(2, 3, args.size, args.size)
    path = stvit.export(model, args.output, format=args.format, example=example)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    if args.format == "pt2":
        program = torch.export.load(path).module()  # needs torch alone
        print(tuple(program(torch.randn(4, 3, args.size, args.size)).shape))
    return path


if __name__ == "__main__":
    main()
