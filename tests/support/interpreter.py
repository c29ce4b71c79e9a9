"""Triton's interpreter, a third faster."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def quicken() -> None:
    """Lets the interpreter put its own functions in the place of triton.language's where it has to, and no more.

    It does so at each launch and takes it back at its end. It does so again at each call of a function by a kernel,
    which finds them in place: but for those of modules that kernels don't import, put there by the first call for good.
    """
    seen = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in seen:
            seen.add(self.fn)
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
