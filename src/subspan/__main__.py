"""The command line as ``python -m subspan``."""

import sys

from subspan.cli import main

if __name__ == "__main__":
    sys.exit(main())
