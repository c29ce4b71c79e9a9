"""``python -m stvit.train``."""

import sys

from stvit.train.cli import main

sys.exit(main())
