"""`python -m jaxmerge`: the command line."""

import sys

from jaxmerge import cli

if __name__ == "__main__":
  sys.exit(cli.main())
