"""`python -m prefkern`: the command line."""

import sys

from prefkern.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
