"""`python -m retinanet_ext` is the command `retinanet-ext`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
