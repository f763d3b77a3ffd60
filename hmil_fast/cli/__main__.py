"""`python -m hmil_fast.cli` is the command `hmil-fast`."""

import sys

from hmil_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
