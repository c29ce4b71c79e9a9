"""The models in timm's registry: ``import stvit.timm_models``, then ``timm.create_model("stvit_small")``.

This module imports timm, which ``import stvit`` must not. Where timm is imported already, ``import stvit`` imports this
module too. timm's own scripts, unmodified, find the models through ``python -m stvit.timm_models SCRIPT ARGUMENTS``.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_act_layer
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from torch import nn

from .checks import check_images
from .model import CONFIGS, STViT
from .modules import SuperTokenBlock

# timm's register_model looks for both in the module that defines an entry point.
__all__: list[str] = ["main", "register"]
CONFIG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.proj.0",
    "classifier": "head",
    "license": "mit",
    "paper_ids": "arXiv:2211.11167",
}
default_cfgs: dict[str, Any] = generate_default_cfgs(dict.fromkeys(CONFIGS, CONFIG))


def register() -> None:
    """Registers the models with timm; done when this module is imported, and harmless when done again."""
    register_notrace_module(SuperTokenBlock)  # feature_cls="fx" takes a block as one step,
    register_notrace_function(check_images)  # and can't know the shapes that are checked
    for name in CONFIGS:
        if not is_model(name):
            register_model(_entry_point(name))


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        options = {**CONFIGS[name], **options}
        size = options.pop("img_size", None)
        if isinstance(options.get("act_layer"), str):
            options["act_layer"] = get_act_layer(options["act_layer"])
        stages = tuple(range(len(options["depths"])))
        feature_cfg = {"out_indices": stages, "feature_cls": "getter"}
        try:
            model = build_model_with_cfg(STViT, name, pretrained, feature_cfg=feature_cfg, **options)
        except RuntimeError as error:
            if "No pretrained weights exist" not in str(error):
                raise
            raise ValueError(
                f"pretrained: no weights of {name} can be downloaded; name a file, "
                "pretrained_cfg_overlay=dict(file=path), or create the model without and load the authors' file with "
                "stvit.load_checkpoint(model, path)"
            ) from error
        if size is not None:  # the model takes every size; this is the one that timm's data configuration asks for
            height, width = (size, size) if isinstance(size, int) else size
            model.pretrained_cfg["input_size"] = (model.pretrained_cfg["input_size"][0], height, width)
        return model

    create.__name__ = create.__qualname__ = name
    create.__module__ = "stvit.timm_models"
    create.__doc__ = f"{name}; takes the arguments of stvit.STViT, and img_size as timm's data configuration wants it."
    return create


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a Python script, such as timm's validate.py, with the models registered."""
    parser = argparse.ArgumentParser(
        prog="python -m stvit.timm_models",
        description="Run one of timm's scripts, unmodified, with the models of this package registered.",
        epilog="example: python -m stvit.timm_models validate.py --model stvit_small --checkpoint small.pth /imagenet",
    )
    parser.add_argument("script", help="the script's path, such as train.py, validate.py or benchmark.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the script")
    args = parser.parse_args(argv)
    sys.argv = [args.script, *args.arguments]
    sys.path.insert(0, str(Path(args.script).resolve().parent))  # as `python SCRIPT` does
    runpy.run_path(args.script, run_name="__main__")


if __name__ == "__main__":
    from stvit.timm_models import main as run  # the module proper, which registers; this one is its copy

    run()
else:
    register()
