"""Watching the calls of modules without hooks: a hook on a part that a fused path passes over makes it be called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import nn


@contextmanager
def watched(
    names: Mapping[nn.Module, str], enter: Callable[[str, nn.Module], None], leave: Callable[[], None]
) -> Iterator[None]:
    """Within the block every call of these modules runs between enter(name, module) and leave()."""
    call = nn.Module.__call__

    def watching(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = names.get(module)
        if name is None:
            return call(module, *args, **kwargs)
        enter(name, module)
        try:
            return call(module, *args, **kwargs)
        finally:
            leave()

    with mock.patch.object(nn.Module, "__call__", watching):
        yield
