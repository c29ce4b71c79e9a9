"""The correctness gate: no speed is reported for a contender whose numbers are wrong.

Truth is the reference in float64 on the first and the last image of the batch; images don't mix, so a contender runs
the very call that is timed, at full batch, and answers for those two. For the gradients the incoming ones are zero
at every other image, which makes those of parameters the two images' own.

Two rules, for each output and each gradient, e being the largest absolute error:
  * ours (triton, cuda): e <= 2 e_reference + eps * max|truth|, e_reference that of the reference in the same dtype
    (the second term, two roundings of the largest value, is for where the reference happens to be exact);
  * baselines (the authors' formulation, the reference itself): e <= BASELINE_TOLERANCE * max|truth|. Rounding more than
    ours is no reason to hide a baseline's speed, so the first rule's verdict is shown and decides nothing; computing
    something else is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.ops.cases import Contender, Implementation, Op, Problem, in_layout, out_of_layout

BASELINE_TOLERANCE = 0.05
Named = dict[str, Tensor]


class Data(NamedTuple):
    """Inputs of an op and the gradients of its outputs, (B, C, H, W) each."""

    inputs: Named
    gradients: Named


class Prepared(NamedTuple):
    """`forward()` gives the outputs, without autograd; `both()` outputs, then gradients of inputs and parameters."""

    forward: Callable[[], Sequence[Tensor]]
    both: Callable[[], Sequence[Tensor]]


class Truth(NamedTuple):
    """Outputs and gradients ("d x") of some images in float64, and the reference's largest error in the dtype."""

    images: list[int]
    values: Named
    reference_errors: dict[str, float]


class Verdict(NamedTuple):
    """passed: the contender may be timed. errors: name -> largest error. worst: largest error / limit of rule one."""

    passed: bool
    errors: dict[str, float]
    worst: float
    worst_name: str

    def as_row(self) -> dict[str, Any]:
        worst = self.worst if math.isfinite(self.worst) else None  # JSON has no infinity
        errors = {name: error if math.isfinite(error) else None for name, error in self.errors.items()}
        return {"passed": self.passed, "worst": worst, "worst_name": self.worst_name, "errors": errors}


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


def prepare(op: Op, problem: Problem, family: str, implementation: Implementation, data: Data) -> Prepared:
    """The calls to time, on copies of the data in the family's own layout."""
    inputs = [
        in_layout(name, tensor, problem, family).clone().requires_grad_(op.inputs(problem)[name])
        for name, tensor in data.inputs.items()
    ]
    leaves = [t for t in inputs if t.requires_grad] + list(implementation.parameters.values())
    gradients = [in_layout(name, tensor, problem, family) for name, tensor in data.gradients.items()]

    def run() -> tuple[Tensor, ...]:
        if not problem.autocast:
            return implementation.run(*inputs)
        with torch.autocast(problem.device.type, problem.dtype):
            return implementation.run(*inputs)

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return run()

    def both() -> Sequence[Tensor]:
        outputs = run()
        wanted = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
        return *outputs, *torch.autograd.grad([o for o, _ in wanted], leaves, [g for _, g in wanted])

    return Prepared(forward, both)


def truth(op: Op, problem: Problem, data: Data) -> Truth:
    """What is right for the first and the last image, and how far the reference is from it in the problem's dtype."""
    images = sorted({0, problem.batch - 1})
    few = problem._replace(batch=len(images))
    exact = few._replace(dtype=torch.float64, autocast=False)
    chosen = Data(*({name: tensor[images] for name, tensor in named.items()} for named in data))
    values = _run(op, exact, Data(*({name: t.double() for name, t in named.items()} for named in chosen)))
    near = _run(op, few, chosen)
    return Truth(images, values, {name: _error(near[name], value) for name, value in values.items()})


def _run(op: Op, problem: Problem, data: Data) -> Named:
    """Outputs and gradients by the reference."""
    implementation = op.implement(problem, "reference", None)
    return name_results(op, problem, implementation, prepare(op, problem, "reference", implementation, data).both())


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
    op: Op,
    problem: Problem,
    contender: Contender,
    implementation: Implementation,
    results: Sequence[Tensor],
    right: Truth,
) -> Verdict:
    """Holds what a contender's `forward` or `both` returned on `only(right.images, data)` against the truth."""
    errors: dict[str, float] = {}
    passed, worst, worst_name = True, -1.0, ""
    for name, got in name_results(op, problem, implementation, results).items():
        plain = name.removeprefix("d ")
        if plain not in implementation.parameters:
            got = out_of_layout(plain, got[right.images], problem, contender.family)
        errors[name] = error = _error(got, right.values[name])
        largest = right.values[name].abs().max().item()
        limit = 2 * right.reference_errors[name] + torch.finfo(problem.dtype).eps * largest
        share = _share(error, limit)
        if share > worst:
            worst, worst_name = share, name
        passed = passed and (error <= BASELINE_TOLERANCE * largest if contender.baseline else share <= 1)
    return Verdict(passed, errors, worst, worst_name)


def _error(got: Tensor, right: Tensor) -> float:
    """The largest absolute error; infinite for NaN and for another shape."""
    if got.shape != right.shape:
        return math.inf
    error = (got.detach().double() - right.detach()).abs().max().item()
    return math.inf if math.isnan(error) else error


def _share(error: float, limit: float) -> float:
    return error / limit if limit > 0 else (0.0 if error == 0 else math.inf)
