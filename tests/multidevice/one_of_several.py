"""The `aegis` command with small tensors split over devices too, as in large models. Run by test_processes.py."""

import sys

from aegis_jax import cli
from aegis_jax.parallel import mesh

mesh._SMALL = 256  # elements
if __name__ == "__main__":
    sys.exit(cli.main())
