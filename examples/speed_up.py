"""A model that holds the authors' kind of modules, before and after `stvit.accelerate`: same numbers, other kernels.

python examples/speed_up.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import stvit


class ResDWC(nn.Module):
    """As in the authors' file; yours would be imported from it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def main() -> float:
    """Returns the largest difference."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), ResDWC(16), nn.GELU(), ResDWC(16))
    model.to(memory_format=torch.channels_last)  # first: on a CPU it is most of the gain
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    before = model(x)
    stvit.accelerate(model)
    print(stvit.accelerate_report(model))
    return (model(x) - before).abs().max().item()


if __name__ == "__main__":
    print(f"largest difference {main():.2g}")
