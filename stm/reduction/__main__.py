"""`python -m stm.reduction [MODEL]`: print every preset's schedule."""

import sys

from stm.errors import StmError
from stm.registry import model_config

from .registry import schedules_table

if __name__ == "__main__":
    try:
        print(schedules_table(model_config(sys.argv[1] if len(sys.argv) > 1 else "vim-t")))
    except StmError as error:
        sys.exit(f"error: {error}")
