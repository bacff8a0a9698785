"""Labelled images that the package makes itself: real handwritten digits on real textures.

Names load on first use, so that class names come without torch.
"""

from typing import TYPE_CHECKING

from stm.lazy import lazy_names

if TYPE_CHECKING:
    from .digit_pairs import SPLITS as SPLITS
    from .digit_pairs import VARIANTS as VARIANTS
    from .digit_pairs import DigitPairs as DigitPairs
    from .digit_pairs import Scene as Scene
    from .names import CLASS_NAMES as CLASS_NAMES
    from .names import NUM_CLASSES as NUM_CLASSES

_HOMES = {
    "CLASS_NAMES": "names",
    "DigitPairs": "digit_pairs",
    "NUM_CLASSES": "names",
    "SPLITS": "digit_pairs",
    "Scene": "digit_pairs",
    "VARIANTS": "digit_pairs",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
