"""The safety nets of conftest.py are themselves in place."""

import os

import pytest
import torch

MAKERS = {
    "empty": lambda x: torch.empty(5, dtype=x.dtype, device=x.device),
    "new_empty": lambda x: x.new_empty(5),
    "empty_like": torch.empty_like,
    "empty_strided": lambda x: torch.empty_strided((2, 3), (3, 1), dtype=x.dtype, device=x.device),
    "resize_": lambda x: x.new_zeros(0).resize_(5),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("maker", MAKERS)
def test_fresh_memory_is_nan(maker, dtype, device):
    fresh = MAKERS[maker](torch.zeros(2, 3, dtype=dtype, device=device))
    assert fresh.isnan().all()


def test_fresh_integers_are_the_largest(device):
    assert (torch.empty(5, dtype=torch.int32, device=device) == torch.iinfo(torch.int32).max).all()


def test_triton_is_interpreted_without_a_gpu(device):
    assert device == "cuda" or os.environ["TRITON_INTERPRET"] == "1"
    triton = pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    interpreted = isinstance(triton.jit(_kernel), InterpretedFunction)
    assert interpreted == (os.environ.get("TRITON_INTERPRET") == "1")


def _kernel(x):
    pass


def test_children_do_not_interpret(run_python):
    assert run_python("-c", "import os; print('TRITON_INTERPRET' in os.environ)").stdout == "False\n"
    with pytest.raises(AssertionError, match="exit code 3"):
        run_python("-c", "raise SystemExit(3)")
    assert run_python("-c", "raise SystemExit(3)", check=False).returncode == 3
