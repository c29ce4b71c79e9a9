"""``python -m stvit.hub_kernel FOLDER`` (`make hub-kernel`): the ops as a universal kernel for Hugging Face's Hub.

A universal kernel is plain Python: the Triton kernels, the reference, and what lies between. Loaded by
``kernels.get_local_kernel(FOLDER)``, from whatever path, it imports its own files alone and registers its ops in a
namespace of its own, so that two versions live in one process, beside an installed stvit too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
VARIANT = "build/torch-universal"
FILES = ("geometry.py", "tensors.py", "checks.py", "reference.py", "functional.py")
FOLDERS = ("backends", "kernels")
ENTRY = '''"""Super token sampling and upsampling, and the rest of the block of Super Token Vision Transformers."""

from . import layers
from .backends.dispatch import BackendError, available_backends, use_backend
from .functional import (
    channel_layer_norm,
    residual_branch,
    residual_depthwise,
    super_token_sampling,
    token_upsampling,
)
from .geometry import Association

__all__ = [
    "Association",
    "BackendError",
    "available_backends",
    "channel_layer_norm",
    "layers",
    "residual_branch",
    "residual_depthwise",
    "super_token_sampling",
    "token_upsampling",
    "use_backend",
]
'''
LAYERS = '''"""What `kernels.kernelize` puts in place of the forward of the authors' classes, under their names."""

import torch
from torch import nn

from . import functional


class ResDWC(nn.Module):
    """x + depthwise 3x3 convolution of x; the module has `conv`."""

    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.residual_depthwise(x, self.conv.weight, self.conv.bias)


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of each pixel; the module has `norm`."""

    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.channel_layer_norm(x, self.norm.weight, self.norm.bias, self.norm.eps)


class StokenAttention(nn.Module):
    """Super token attention; the module has `stoken_size`, `n_iter`, `scale`, `refine` and `stoken_refine`."""

    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(self.stoken_size) == (1, 1):
            return self.stoken_refine(x)
        stokens, association = functional.super_token_sampling(x, tuple(self.stoken_size), self.n_iter, self.scale)
        return functional.token_upsampling(self.stoken_refine(stokens) if self.refine else stokens, association)
'''


def write(folder: Path, namespace: str | None = None) -> Path:
    """Writes the kernel's repository into `folder`, in place of an older one; returns the variant's folder.

    Its ops are registered in `namespace`; the default is made of the sources, so other sources get another one.
    """
    kernels = PACKAGE / "kernels" if (PACKAGE / "kernels").is_dir() else PACKAGE.parent / "kernels"
    target = folder / VARIANT
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for name in FILES:
        shutil.copy(PACKAGE / name, target / name)
    for name in FOLDERS:
        source = kernels if name == "kernels" else PACKAGE / name
        shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "explain.py", "*.so"))
    (target / "__init__.py").write_text(ENTRY)
    (target / "layers.py").write_text(LAYERS)
    namespace = namespace or f"stvit_{_digest(target)[:12]}"
    registry = target / "backends" / "registry.py"
    registry.write_text(registry.read_text().replace('NAMESPACE = "stvit"', f'NAMESPACE = "{namespace}"'))
    metadata = {
        "id": namespace,  # the module's name too
        "name": "stvit",
        "version": 1,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return target


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stvit.hub_kernel", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/hub-kernel"), help="default: %(default)s")
    print(write(parser.parse_args(argv).folder))


if __name__ == "__main__":
    main()
