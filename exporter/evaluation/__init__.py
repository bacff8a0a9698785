"""stm eval: accuracy on labelled images, several plans and rivals in one pass, resumable, on one GPU or many.

`evaluate(...)` measures and returns an `Evaluation`.
"""

from .results import Accuracy, Evaluation, Share
from .runner import evaluate

__all__ = ["Accuracy", "Evaluation", "Share", "evaluate"]
