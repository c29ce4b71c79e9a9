"""Train and evaluate Super Token Vision Transformers; the same program as ``python -m stvit.train``."""

import sys

if __name__ == "__main__":
    try:
        from stvit.train import main

        sys.exit(main())
    except KeyboardInterrupt:  # while the imports above still run: nothing has started yet
        sys.exit(130)
