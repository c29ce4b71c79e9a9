"""The training and evaluation program: ``python main.py`` or ``torchrun ... -m stvit.train``.

Needs the extra packages of ``pip install 'stvit[train]'``; ``import stvit`` never imports this package.
"""

from stvit.train.cli import main

__all__ = ["main"]
