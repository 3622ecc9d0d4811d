"""`python -m capexport.cli`, the `capexport` command."""

import sys

try:
    from capexport.cli import main
except KeyboardInterrupt:  # `main` answers any later one
    print("capexport: interrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
