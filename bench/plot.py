"""python -m bench.plot: the program of bench/report."""

import sys

from bench.report.run import main

if __name__ == "__main__":
    sys.exit(main())
