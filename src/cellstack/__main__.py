"""Run the command `cellstack`, for `python -m cellstack` and `torchrun -m cellstack`."""

import sys

from cellstack.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
