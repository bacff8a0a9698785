"""stm bench accuracy: what merging costs and buys, for our plans and for what one would use instead, in one table.

`measure(...)` measures and returns a `Run`; `read_run` reads an earlier one back; `update_document` writes tables and plots into a
Markdown file.
"""

from typing import TYPE_CHECKING

from stm.lazy import lazy_names

if TYPE_CHECKING:
    from .records import read_run as read_run
    from .report import update_document as update_document
    from .results import Run as Run
    from .runner import measure as measure

_HOMES = {"Run": "results", "measure": "runner", "read_run": "records", "update_document": "report"}

__all__ = list(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
