"""`python -m stvit.info`: what is installed, which GPUs torch sees, and which backends run here, or why not.

This is what to read first when a backend was not chosen, and what to paste into a bug report.
"""

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

import stvit
from stvit.backends import dispatch, explain, extension

EXAMPLES = """\
examples:
  python -m stvit.info                          for reading
  python -m stvit.info --json > info.json       for a bug report or a script
  STVIT_BACKEND=reference python -m stvit.info  with another default backend
  python -m stvit.info --build                  build the CUDA extension now, not at first use
  python -m stvit.info --explain 128x64x56x56/8x8
                                                which kernels stage 1 of stvit_small gets at batch 128, on the GPU here
  python -m stvit.info --explain 32x96x56x56/8x8 --dtype fp16 --gpu a100 --json
"""
OPTIONAL = ("triton", "numpy", "safetensors", "timm", "torchvision")


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """The NVIDIA driver's version, from nvidia-smi; None where there is no driver or nvidia-smi does not answer."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] if answer else None


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory (GiB) of every GPU that torch can use; empty without one."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def default() -> dict[str, str | None]:
    """The backend that calls without an explicit one get, and what "auto" picks for float32 tensors on this machine.

    Where STVIT_BACKEND names no backend, every such call raises; `default_backend` is then None and `error` says why.
    """
    log_off, dispatch.logger.disabled = dispatch.logger.disabled, True  # the reasons are printed here anyway
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        picked = dispatch.resolve("auto", device, torch.float32)
        return {"default_backend": dispatch.default_backend(), "auto_picks": picked, "error": None}
    except ValueError as error:
        return {"default_backend": None, "auto_picks": picked, "error": str(error)}
    finally:
        dispatch.logger.disabled = log_off


def collect() -> dict[str, Any]:
    """Everything the program prints, as plain data that json can write.

    `backends` maps each backend to the reasons why it can't run here; no reasons means that it can. See `default` for
    `default_backend`, `auto_picks` and `error`.
    `extension` is what `stvit.backends.extension.describe` says of the compiled extension.
    """
    return {
        "versions": {
            "stvit": stvit.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **{name: installed_version(name) for name in OPTIONAL},
        },
        "platform": platform.platform(),
        "torch_cuda": torch.version.cuda,
        "driver": driver_version(),
        "gpus": gpus(),
        "backends": stvit.available_backends(),
        **default(),
        "extension": extension.describe(),
    }


def extension_rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the extension is from, and what it was built with; else why there is none, and what the first use does."""
    rows = [("extension", told["origin"] or "none")]
    if told["built"]:
        rows.append(("built with", ", ".join(f"{name} {value}" for name, value in told["built"].items())))
    rows += [("", reason) for reason in told["reasons"]]
    if told["builds_for"]:
        rows.append(("", f'backend="cuda" builds it at first use, for {", ".join(told["builds_for"])}'))
    return rows


def as_text(info: dict[str, Any]) -> str:
    """`info`, as returned by `collect`, for reading: one fact a line."""
    rows = [(name, version or "not installed") for name, version in info["versions"].items()]
    rows += [
        ("platform", info["platform"]),
        ("torch's CUDA", info["torch_cuda"] or "none (a CPU build of torch)"),
        ("driver", info["driver"] or "none found"),
    ]
    for index, gpu in enumerate(info["gpus"]):
        what = f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB"
        rows.append((f"GPU {index}", what))
    if not info["gpus"]:
        rows.append(("GPU", "none that torch can use"))
    rows += extension_rows(info["extension"])
    rows.append(("default backend", info["default_backend"] or f"none: {info['error']}"))
    rows.append(("auto picks", info["auto_picks"]))
    lines = [f"{name:<16} {value}" for name, value in rows]
    lines += ["", "backends"]
    for name, reasons in info["backends"].items():
        lines.append(f"  {name:<14} {'no' if reasons else 'available'}")
        lines += [f"  {'':<14} - {reason}" for reason in reasons]
    return "\n".join(lines)


def shape(text: str) -> explain.Shape:
    """A shape on the command line."""
    try:
        return explain.parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the information; `arguments` are those of the command line, the process's own by default."""
    parser = argparse.ArgumentParser(
        prog="python -m stvit.info",
        description="Print versions, GPUs, and each backend of stvit with the reasons why it can't run here.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print the same as one JSON object")
    add("--build", action="store_true", help="build the CUDA extension first, where there is none yet")
    add("--explain", metavar="BxCxHxW/hxw", type=shape, help="print instead which kernels pixels of this shape get")
    add("--dtype", choices=explain.DTYPES, default="bf16", help="of the pixels to explain (default: %(default)s)")
    add("--gpu", choices=explain.GPUS, help="to explain for (default: the GPU here, else h100)")
    options = parser.parse_args(arguments)
    if options.build:
        try:
            extension.load()
        except extension.ExtensionError as error:
            sys.exit(f"error: {error}")
    if options.explain:
        gpu = explain.GPUS[options.gpu] if options.gpu else explain.default_gpu()
        told = explain.explain(options.explain, options.dtype, gpu)
    else:
        told = collect()
    text = explain.as_text if options.explain else as_text
    print(json.dumps(told, indent=2) if options.json else text(told))


if __name__ == "__main__":
    main()
