"""Super Token Vision Transformers (Huang et al., CVPR 2023) with fused kernels and a plain PyTorch reference."""

import logging as _logging
import sys as _sys
from pathlib import Path as _Path

# A wheel holds stvit/kernels; in a checkout the kernels lie at the top level, one folder up.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from .backends.dispatch import BackendError, available_backends, use_backend
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .exporting import ExportError, export
from .functional import super_token_sampling, token_upsampling
from .geometry import Association
from .graphs import cuda_graph
from .model import STViT, stvit_base, stvit_large, stvit_small, stvit_tiny
from .modules import StokenAttention
from .swap.accelerate import Report, accelerate, accelerate_report, restore
from .swap.folding import optimize_for_inference

__version__ = "0.1.0"
__all__ = [
    "Association",
    "BackendError",
    "CheckpointError",
    "ExportError",
    "Report",
    "STViT",
    "StokenAttention",
    "accelerate",
    "accelerate_report",
    "available_backends",
    "cuda_graph",
    "export",
    "load_checkpoint",
    "optimize_for_inference",
    "restore",
    "save_checkpoint",
    "stvit_base",
    "stvit_large",
    "stvit_small",
    "stvit_tiny",
    "super_token_sampling",
    "token_upsampling",
    "use_backend",
]

if _sys.modules.get("timm") is not None:  # else `import stvit.timm_models` registers the models: it imports timm
    try:
        from . import timm_models as timm_models
    except ImportError as _error:  # a timm too old must not keep stvit from being imported
        _logging.getLogger("stvit").warning("the models are not registered with timm: %s", _error)
