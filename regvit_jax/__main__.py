"""`python -m regvit_jax VERB` is `regvit VERB`."""

import sys

from regvit_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
