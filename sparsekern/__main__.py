"""`python -m sparsekern` is the same as the command `sparsekern`."""

import sys

from sparsekern.cli import main

if __name__ == "__main__":
    sys.exit(main())
