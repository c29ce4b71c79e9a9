"""A fault in a kernel of one backend: a sanitizer that misses it is of no use.

python -m tests.support.plant triton     one write 3 KiB past the end of a tensor of 1 KiB
python -m tests.support.plant cuda       memory of 64 pixels, read for 4096
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

from stvit.backends import registry


@triton.jit
def planted_kernel(target, offset, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(target + offset + tl.arange(0, LENGTH), 1.0)


def plant(backend: str, device: torch.device) -> None:
    if backend == "triton":
        planted_kernel[(1,)](torch.zeros(256, device=device), 1024, LENGTH=32)
        return
    weights = torch.zeros(1, 64, 64, 9, device=device).permute(0, 3, 1, 2)
    pixels = torch.zeros(1, 8, 64, 64, device=device)
    pixels.untyped_storage().resize_(8 * 64 * 4)  # behind the tensor's back
    registry.kernels("cuda", "upsampling").upsampling_backward(pixels, weights, 8, 8, False)


if __name__ == "__main__":
    plant(sys.argv[1], torch.device("cuda"))
    torch.cuda.synchronize()
