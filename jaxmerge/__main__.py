"""`python -m jaxmerge`: the command line."""

import sys

from jaxmerge.cli import main

if __name__ == "__main__":
  sys.exit(main.main())
