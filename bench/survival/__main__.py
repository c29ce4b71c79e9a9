import sys

from bench.survival.run import main

if __name__ == "__main__":
    sys.exit(main())
