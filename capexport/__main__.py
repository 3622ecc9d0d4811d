"""`python -m capexport`, the `capexport` command."""

import sys

from capexport.cli import main

if __name__ == "__main__":
    sys.exit(main())
