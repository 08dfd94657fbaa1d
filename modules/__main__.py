"""`python -m litflora` is `litflora`."""

import sys

from .cli import main

sys.exit(main())
