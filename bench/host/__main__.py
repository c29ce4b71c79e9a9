import sys

from bench.host.run import main

if __name__ == "__main__":
    sys.exit(main())
