"""``python -m vitxr.cli``."""

import sys

from vitxr.cli import main

if __name__ == "__main__":
    sys.exit(main())
