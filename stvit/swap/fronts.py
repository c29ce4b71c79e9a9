"""Putting a class in front of a module's own, and taking it away.

The module stays the same object with the same parameters, submodules, hooks and state dict; only its class becomes a
subclass of its own class with another forward in front. So isinstance, deepcopy, pickling, DDP and torch.compile go on
as before.
"""

from __future__ import annotations

import copyreg
import types
from functools import cache
from typing import Any

from torch import nn


class Subclassed(nn.Module):
    """Base of what is put in front of a module's own class; see `put_in_front`."""

    prefix: str  # of the generated class's name

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A generated class can't be imported, so a pickle names what it is made of.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        function, arguments, *rest = reduced
        if function is copyreg.__newobj__ and arguments == (type(self),):  # type: ignore[attr-defined]
            function, arguments = _empty_instance, _lineage(type(self))
        return (function, arguments, *rest)


@cache
def _subclass(front: Any, original: Any) -> type:
    body = {"__module__": front.__module__, "__doc__": front.__doc__, "stvit_original": original, "stvit_front": front}
    name = f"{front.prefix}{original.__name__}"
    return types.new_class(name, (front, original), {}, lambda namespace: namespace.update(body))


def put_in_front(front: type[Subclassed], module: nn.Module) -> None:
    """Makes `module` an instance of a subclass of (front, its own class)."""
    classes: Any = (front, type(module))
    module.__class__ = _subclass(*classes)


def _lineage(generated: type) -> tuple[type, ...]:
    """(the importable class, what was put in front of it, first to last)."""
    if "stvit_original" not in vars(generated):
        return (generated,)
    return (*_lineage(vars(generated)["stvit_original"]), vars(generated)["stvit_front"])


def front_of(module: nn.Module) -> type[Subclassed] | None:
    """What was put in front of the module's class last; None if its class isn't one of ours."""
    return vars(type(module)).get("stvit_front")


def take_away(module: nn.Module) -> None:
    """Undoes `put_in_front`, and forgets the settings that went with it."""
    module.__class__ = vars(type(module))["stvit_original"]
    for name in [name for name in vars(module) if name.startswith("_stvit_")]:
        delattr(module, name)


def _empty_instance(original: Any, *fronts: Any) -> Any:
    for front in fronts:
        original = _subclass(front, original)
    return original.__new__(original)
