import sys

from bench.machine.report import main

if __name__ == "__main__":
    sys.exit(main())
