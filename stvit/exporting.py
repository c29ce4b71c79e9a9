"""A trained model as a file for other programs: torch.export, ONNX, AOTInductor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backends.dispatch import check_backend
from .swap.folding import optimize_for_inference

FORMATS = ("pt2", "onnx", "aoti")
TOLERANCE = 1e-4  # of the largest output: what an export may differ from the model that it was made from


class ExportError(RuntimeError):
    """An exported model that does not compute what the model computes, or a format whose packages are missing."""


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str = "pt2",
    dynamic: bool = True,
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
        dynamic: whether the file takes any batch size from 1, or that of `example` alone. Height and width are those of
            `example` either way.
        example: images (B, C, H, W) on the model's device and in its dtype; random ones, 2 x C x 224 x 224, by default.
        backend: "reference", whose file runs anywhere, or "triton" or "cuda", whose file calls the ops of this package
            and is loaded by a process that has imported stvit. ONNX knows the reference alone.

    Returns:
        The path.

    Raises:
        ValueError, TypeError: naming the argument and what was expected.
        ExportError: the file's numbers, checked at other batch sizes where it takes them, are not the model's.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if check_backend(backend) == "auto" or (format == "onnx" and backend != "reference"):
        raise ValueError(f"backend: expected reference{', triton or cuda' * (format != 'onnx')}, got {backend!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    path = Path(path)
    folded = _with_backend(optimize_for_inference(model), backend)
    example = _example(folded) if example is None else example
    sizes = [tuple(example.shape)]
    if dynamic:
        sizes += [(1, *example.shape[1:]), (3, *example.shape[1:])]
    with torch.no_grad():
        program = _program(folded, example, dynamic)
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


def _program(model: nn.Module, example: Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    if dynamic and example.shape[0] < 2:  # torch.export takes a size of 1 for a constant
        raise ValueError(f"example: expected at least 2 images (or dynamic=False), got shape {tuple(example.shape)}")
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    return torch.export.export(model, (example,), dynamic_shapes=shapes)


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
