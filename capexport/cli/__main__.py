"""`python -m capexport.cli`, as `python -m capexport`."""

import sys

from capexport.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
