import sys

from bench.predict.run import main

if __name__ == "__main__":
    sys.exit(main())
