"""The models in timm's registry, so that ``timm.create_model("stvit_small")`` works after ``import stvit``.

stvit doesn't import timm. Where timm is already there the models are registered at once; otherwise a hook registers
them right after timm's own import, whenever that comes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from .model import CONFIGS, STViT

# timm's register_model looks for both in the module that defines an entry point.
__all__: list[str] = []
default_cfgs: dict[str, Any] = {}

logger = logging.getLogger("stvit")


def register() -> None:
    """Registers the models with timm now, or as soon as timm is imported."""
    if sys.modules.get("timm") is not None:
        _register_now()
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())


class _AfterTimm(MetaPathFinder):
    """Finds timm as the other finders do, and has its loader register the models after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        finders = iter(sys.meta_path)
        any(finder is self for finder in finders)  # on to those behind: another hook of this kind may be in front
        for finder in finders:
            find = getattr(finder, "find_spec", None)
            spec = find and find(fullname, path, target)
            if spec:
                if hasattr(spec.loader, "exec_module"):
                    self._extend(spec)
                return spec
        return None

    def _extend(self, spec: ModuleSpec) -> None:
        # Only this one loader object is touched. The hook stays until timm has really been imported: many packages
        # call find_spec to see whether timm is installed.
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _register_now()

        loader.exec_module = exec_module


def _register_now() -> None:
    try:
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        from timm.models import generate_default_cfgs, is_model, register_model
    except ImportError as error:  # a timm too old: importing it must not fail because of stvit
        logger.warning("the models are not registered with timm: %s", error)
        return
    if is_model("stvit_small"):
        return
    cfg = {
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
    default_cfgs.update(generate_default_cfgs(dict.fromkeys(CONFIGS, cfg)))
    for name in CONFIGS:
        register_model(_entry_point(name))


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        from timm.models import build_model_with_cfg

        if pretrained:
            raise ValueError(
                f"pretrained: no weights of {name} can be downloaded; create the model without and load the authors' "
                "file with stvit.load_checkpoint(model, path)"
            )
        feature_cfg = {"out_indices": tuple(range(len(CONFIGS[name]["depths"]))), "feature_cls": StageFeatures}
        return build_model_with_cfg(STViT, name, False, feature_cfg=feature_cfg, **{**CONFIGS[name], **options})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name}; takes the arguments of stvit.STViT."
    return create


class StageFeatures(nn.Module):
    """What ``timm.create_model(..., features_only=True)`` returns: images -> the feature maps of chosen stages."""

    def __init__(self, model: STViT, out_indices: int | Sequence[int]) -> None:
        from timm.models import FeatureInfo

        super().__init__()
        stages = len(model.feature_info)
        wanted = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices
        self.out_indices = [index % stages for index in wanted]
        self.feature_info = FeatureInfo(model.feature_info, self.out_indices)
        model.reset_classifier(0, "")
        model.proj = model.norm = nn.Identity()  # unused here; DistributedDataParallel wants every parameter used
        self.model = model

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.model.forward_stages(x)
        return [maps[index] for index in self.out_indices]
