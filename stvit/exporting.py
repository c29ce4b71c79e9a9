"""A trained model as a file for other programs: torch.export, ONNX, AOTInductor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backends.dispatch import check_backend
from .model import STViT, unpadded_steps
from .swap.folding import optimize_for_inference

FORMATS = ("pt2", "onnx", "aoti")
TOLERANCE = 1e-4  # of the largest output: what an export may differ from the model that it was made from


class ExportError(RuntimeError):
    """An exported model that does not compute what the model computes, or a format whose packages are missing."""


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str = "pt2",
    dynamic: bool | str = True,
    *,
    example: Tensor | None = None,  # (B, C, H, W)
    backend: str = "reference",
) -> Path:
    """Writes `model`, in evaluation mode and folded by `optimize_for_inference`, as a file for another program.

    Args:
        model: of this package; it stays as it is.
        path: the file to write; the usual endings are .pt2 (for "pt2" and "aoti") and .onnx.
        format: "pt2" for `torch.export.load`, "onnx" for ONNX runtimes and TensorRT (needs `stvit[export]`), or "aoti"
            for `torch._inductor.aoti_load_package` and C++ (needs a C++ compiler, for CUDA a toolkit), which is bound
            to the device and kind of machine.
        dynamic: True, for a file that takes any batch size from 1; False, for that of `example` alone. Height and width
            are those of `example`; or "size", for any batch size, height and width at which no tile is padded: of STViT
            as published, multiples of 32 from 64.
        example: images (B, C, H, W) on the model's device and in its dtype; random ones, 2 x C x 224 x 224, by default.
        backend: "reference", whose file runs anywhere, or "triton" or "cuda", whose file calls the ops of this package
            and is loaded by a process that has imported stvit. ONNX knows the reference alone.

    Returns:
        The path.

    Raises:
        ValueError, TypeError: naming the argument and what was expected.
        ExportError: the file's numbers, checked at other batches and sizes where it takes them, are not the model's.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if check_backend(backend) == "auto" or (format == "onnx" and backend != "reference"):
        raise ValueError(f"backend: expected reference{', triton or cuda' * (format != 'onnx')}, got {backend!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(dynamic, bool) and dynamic != "size":
        raise ValueError(f"dynamic: expected True, False or 'size', got {dynamic!r}")
    path = Path(path)
    folded = _with_backend(optimize_for_inference(model), backend)
    example = _example(folded) if example is None else example
    if dynamic == "size" and not isinstance(folded, STViT):
        raise ValueError(f"dynamic: 'size' is for models of stvit.STViT, got {type(folded).__name__}")
    steps = unpadded_steps(folded) if dynamic == "size" else None
    sizes = [tuple(example.shape)]
    if dynamic:
        _, channels, height, width = sizes[0]
        other = (height, width) if steps is None else (2 * steps[0], width + steps[1])
        sizes += [(1, channels, *other), (3, channels, height, width)]
    with torch.no_grad():
        program = _program(folded, example, bool(dynamic), steps)
        run = {"pt2": _write_pt2, "onnx": _write_onnx, "aoti": _write_aoti}[format](program, path)
        for size in sizes:
            _check(folded, run, example.new_empty(size).normal_(), path)
    return path


def _with_backend(model: Any, backend: str) -> Any:
    for part in model.modules():
        if hasattr(part, "backend"):
            part.backend = backend
    return model


def _example(model: nn.Module) -> Tensor:
    place = next(model.parameters())
    return torch.randn(2, getattr(model, "in_chans", 3), 224, 224, device=place.device, dtype=place.dtype)


def _program(
    model: nn.Module, example: Tensor, dynamic: bool, steps: tuple[int, int] | None
) -> torch.export.ExportedProgram:
    if not dynamic:
        return torch.export.export(model, (example,))
    if example.shape[0] < 2:  # torch.export takes a size of 1 for a constant
        raise ValueError(f"example: expected at least 2 images (or dynamic=False), got shape {tuple(example.shape)}")
    sides: dict[int, Any] = {0: torch.export.Dim("batch")}
    if steps is not None:
        for side, name, step in zip((2, 3), ("rows", "columns"), steps, strict=True):
            if example.shape[side] % step or example.shape[side] < 2 * step:  # the last stage's map has 2 at least
                raise ValueError(
                    f"example: expected multiples of {steps[0]} x {steps[1]} from {2 * steps[0]} x {2 * steps[1]}, "
                    f"got shape {tuple(example.shape)}"
                )
            sides[side] = step * torch.export.Dim(name, min=2)
    return torch.export.export(model, (example,), dynamic_shapes=(sides,))


def _write_pt2(program: Any, path: Path) -> Any:
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _write_aoti(program: Any, path: Path) -> Any:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    aoti_compile_and_package(program, package_path=str(path))
    return aoti_load_package(str(path))


def _write_onnx(program: Any, path: Path) -> Any:
    try:
        import onnxruntime
        import onnxscript.optimizer
    except ModuleNotFoundError as error:
        raise ExportError(f"format='onnx' needs {error.name}: pip install 'stvit[export]'") from error
    # Without torch's optimizer, for a rule that is wrong: onnxscript 0.7 takes MatMul(Reshape(a), b) for MatMul(a, b)
    # wherever the static shapes would fit, whatever the reshape did. Folding constants is exact, and is most of it.
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"]}
    written = torch.onnx.export(program, (), dynamo=True, optimize=False, verbose=False, **names)
    assert written is not None
    onnxscript.optimizer.fold_constants(written.model)
    onnxscript.optimizer.remove_unused_nodes(written.model)
    written.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        (y,) = session.run(None, {"x": x.cpu().numpy()})
        return torch.from_numpy(y).to(x.device)

    return run


def _check(model: nn.Module, run: Any, x: Tensor, path: Path) -> None:
    expected = model(x)
    error = (run(x) - expected).abs().max().item()
    if not error <= TOLERANCE * expected.abs().max().item():
        raise ExportError(
            f"{path}: differs from the model by {error:.2g} at shape {tuple(x.shape)}, whose largest output is "
            f"{expected.abs().max().item():.2g}"
        )
