"""`python -m aegis_jax` is the `aegis` command."""

import sys

from aegis_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
