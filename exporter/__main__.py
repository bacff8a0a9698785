"""`python -m exporter` is `stm`."""

import sys

from .cli import main

sys.exit(main())
