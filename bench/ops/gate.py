"""What the correctness gate (bench/harness/gate.py) holds an op to, and the calls that are timed.

Truth is the reference in float64 on the first and the last image of the batch; where images don't mix, a contender runs
the very call that is timed, at full batch, and answers for those two. For the gradients the incoming ones are zero
at every other image, which makes those of parameters the two images' own. BatchNorm mixes images: there it is all.

Errors are largest absolute ones; the slack is eps * max|truth|, two roundings of the largest value, for where the
reference happens to be exact. Baselines (the authors' formulation, the reference itself) may be off by
BASELINE_TOLERANCE * max|truth|: rounding more than ours is no reason to hide a baseline's speed, so for them the rule's
verdict is shown and decides nothing; computing something else is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.harness.gate import Verdict, distances, judge
from bench.ops.cases import PASSES, Contender, Implementation, Op, Problem, in_layout, out_of_layout

BASELINE_TOLERANCE = 0.05
Named = dict[str, Tensor]
Calls = dict[str, Callable[[], Sequence[Tensor]]]  # pass -> a call of it; outputs, then gradients of all that has one


class Data(NamedTuple):
    """Inputs of an op and the gradients of its outputs, (B, C, H, W) each."""

    inputs: Named
    gradients: Named


class Truth(NamedTuple):
    """Outputs and gradients ("d x") of some images in float64, and the reference's largest error in the dtype."""

    images: list[int]
    values: Named
    reference_errors: dict[str, float]


def draw(op: Op, problem: Problem, seed: int) -> Data:
    """Random data: normal pixels and tokens, weights that sum to 1, the same for the same seed."""
    generator = torch.Generator(problem.device).manual_seed(seed)

    def random(name: str) -> Tensor:
        return torch.randn(problem.sizes(name), generator=generator, device=problem.device)

    inputs = {name: random(name).softmax(1) if name == "weights" else random(name) for name in op.inputs(problem)}
    return Data(
        {name: tensor.to(problem.dtype) for name, tensor in inputs.items()},
        {name: random(name).to(problem.dtype) for name in op.outputs},
    )


def prepare(op: Op, problem: Problem, family: str, implementation: Implementation, data: Data) -> Calls:
    """The calls to time, on copies of the data in the family's own layout."""
    inputs = [
        in_layout(name, tensor, problem, family).clone().requires_grad_(op.inputs(problem)[name])
        for name, tensor in data.inputs.items()
    ]
    leaves = [t for t in inputs if t.requires_grad] + list(implementation.parameters.values())
    gradients = [in_layout(name, tensor, problem, family) for name, tensor in data.gradients.items()]

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return implementation.run(*inputs)

    def both() -> Sequence[Tensor]:
        outputs = implementation.run(*inputs)
        wanted = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
        return *outputs, *torch.autograd.grad([o for o, _ in wanted], leaves, [g for _, g in wanted])

    return dict(zip(PASSES, (forward, both), strict=True))


def truth(op: Op, problem: Problem, data: Data) -> Truth:
    """What is right for the first and the last image, or all where the op mixes them, and how far the reference is from
    it in the problem's dtype."""
    images = list(range(problem.batch)) if op.mixes_images else sorted({0, problem.batch - 1})
    few = problem._replace(batch=len(images))
    exact = few._replace(dtype=torch.float64)
    chosen = Data(*({name: tensor[images] for name, tensor in named.items()} for named in data))
    values = _run(op, exact, Data(*({name: t.double() for name, t in named.items()} for named in chosen)))
    near = _run(op, few, chosen)
    return Truth(images, values, distances(near, values, math.inf))


def _run(op: Op, problem: Problem, data: Data) -> Named:
    """Outputs and gradients by the reference."""
    implementation = op.implement(problem, "reference", None)
    calls = prepare(op, problem, "reference", implementation, data)
    return name_results(op, problem, implementation, calls["forward+backward"]())


def name_results(op: Op, problem: Problem, implementation: Implementation, results: Sequence[Tensor]) -> Named:
    """What `forward` or `both` returned, by name; "d x" is the gradient with respect to x."""
    differentiated = [name for name, wanted in op.inputs(problem).items() if wanted]
    names = [*op.outputs, *(f"d {name}" for name in (*differentiated, *implementation.parameters))]
    return dict(zip(names, results, strict=False))  # without autograd the outputs alone


def only(images: Sequence[int], data: Data) -> Data:
    """The data with gradients that are zero at every other image."""
    gradients = {}
    for name, tensor in data.gradients.items():
        gradients[name] = torch.zeros_like(tensor)
        gradients[name][images] = tensor[images]
    return data._replace(gradients=gradients)


def check(
    op: Op, problem: Problem, contender: Contender, implementation: Implementation, results: Sequence[Tensor],
    right: Truth,
) -> Verdict:  # fmt: skip
    """Holds what a contender's `forward` or `both` returned on `only(right.images, data)` against the truth."""
    found: Named = {}
    for name, got in name_results(op, problem, implementation, results).items():
        plain = name.removeprefix("d ")
        if plain not in implementation.parameters:
            got = out_of_layout(plain, got[right.images], problem, contender.family)
        found[name] = got
    largest = {name: right.values[name].abs().max().item() for name in found}
    errors = distances(found, {name: right.values[name] for name in found}, math.inf)
    eps = torch.finfo(problem.dtype).eps
    verdict = judge(errors, right.reference_errors, {name: eps * value for name, value in largest.items()})
    if contender.baseline:
        near = all(error <= BASELINE_TOLERANCE * largest[name] for name, error in errors.items())
        verdict = verdict._replace(passed=near)
    return verdict
