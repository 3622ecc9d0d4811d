"""`python -m capexport`, the `capexport` command."""

import sys

try:
    from capexport.cli import main
except KeyboardInterrupt:  # `main` answers any later one
    print("capexport: interrupted", file=sys.stderr)
    sys.exit(130)

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
