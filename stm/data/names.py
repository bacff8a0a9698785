"""Classes of the digit pairs; without torch."""

NUM_CLASSES = 100
CLASS_NAMES = tuple(f"large {label // 10}, small {label % 10}" for label in range(NUM_CLASSES))
