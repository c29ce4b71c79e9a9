"""Rounding of BatchNorm folded into a 1x1 convolution beside the two one after the other, in bfloat16; no kernels.

    python -m tests.support.fold_errors

prints the table of docs/performance.md: relative errors as a whole, the mean of three draws. A model: float32 with the
roundings of bfloat16 where pixels, weights and products are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIXELS, CHANNELS, OUTPUTS, EPS = 4096, 64, 256, 1e-5
Results = dict[str, Tensor]


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def apart(x: Tensor, conv: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, grad: Tensor) -> Results:
    """The norm is written, then convolved; x (N, C), conv (K, C), grad (N, K)."""
    rstd = (x.var(0, unbiased=False) + EPS).rsqrt()
    n = (x - x.mean(0)) * rstd
    normed = rounded(n * gamma + beta)
    slope = rounded(grad @ rounded(conv))
    sums = slope.sum(0), (slope * n).sum(0)
    dx = rounded((slope - (sums[0] + n * sums[1]) / len(x)) * rstd * gamma)
    return {"y": rounded(normed @ rounded(conv).T) + bias, "dx": dx, "dW": rounded(grad.T @ normed), "dgamma": sums[1]}


def folded(
    x: Tensor, conv: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, grad: Tensor,
    split: bool = True, wide: bool = True,
) -> Results:  # fmt: skip
    """split: b' in two parts, the second added behind the rounding; wide: the gradient of W' isn't rounded."""
    mean, rstd = x.mean(0), (x.var(0, unbiased=False) + EPS).rsqrt()
    weight = rounded(conv * (rstd * gamma))
    shift = bias + conv @ beta - weight @ mean
    near = rounded(shift)
    y = rounded(x @ weight.T + near) + (shift - near if split else 0)
    dweight, dshift = grad.T @ x if wide else rounded(grad.T @ x), grad.sum(0)
    sum_b = conv.T @ dshift
    sum_w = rstd * ((conv * dweight).sum(0) - mean * sum_b)
    common = (sum_b + (x - mean) * rstd * sum_w) / len(x)
    dconv = rounded(gamma * rstd * (dweight - dshift[:, None] * mean) + beta * dshift[:, None])
    return {"y": y, "dx": rounded(rounded(grad @ weight) - common * rstd * gamma), "dW": dconv, "dgamma": sum_w}


def truth(x: Tensor, conv: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, grad: Tensor) -> Results:
    leaves = [tensor.double().requires_grad_() for tensor in (x, conv, gamma)]
    n = (leaves[0] - leaves[0].mean(0)) * (leaves[0].var(0, unbiased=False) + EPS).rsqrt()
    y = (n * leaves[2] + beta.double()) @ leaves[1].T + bias.double()
    dx, dconv, dgamma = torch.autograd.grad(y, leaves, grad.double())
    return {"y": y.detach(), "dx": dx, "dW": dconv, "dgamma": dgamma}


FORMS = {
    "the norm, then fc1": apart, "folded": folded,
    "folded, b' not split": lambda *given: folded(*given, split=False),
    "folded, dW' rounded": lambda *given: folded(*given, wide=False),
}  # fmt: skip


def errors(deviations: float, seed: int) -> dict[str, dict[str, float]]:
    """Each form's error of each result, where every channel's mean is so many deviations, of either sign."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=random)  # noqa: E731
    spread = 10 ** (torch.rand(CHANNELS, generator=random) - 0.5)
    x = rounded(draw(PIXELS, CHANNELS) * spread + deviations * spread * draw(CHANNELS).sign())
    conv, bias, gamma = draw(OUTPUTS, CHANNELS) / CHANNELS**0.5, 0.1 * draw(OUTPUTS), 0.5 + draw(CHANNELS).abs()
    given = x, conv, bias, gamma, 0.3 * draw(CHANNELS), rounded(draw(PIXELS, OUTPUTS) + 0.3 * draw(OUTPUTS))
    right = truth(*given)
    found = {name: form(*given) for name, form in FORMS.items()}
    return {
        name: {key: ((each[key] - value).norm() / value.norm()).item() for key, value in right.items()}
        for name, each in found.items()
    }


def main() -> None:
    print(f"| | mean | {' | '.join(FORMS)} |")
    draws = {mean: [errors(mean, seed) for seed in range(3)] for mean in (0, 3, 30)}
    for result in ("y", "dx", "dW", "dgamma"):
        for mean, each in draws.items():
            cells = (sum(draw[form][result] for draw in each) / len(each) for form in FORMS)
            print(f"| {result} | {mean} | {' | '.join(f'{cell:.1e}' for cell in cells)} |")


if __name__ == "__main__":
    main()
