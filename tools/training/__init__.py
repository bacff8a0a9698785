"""Training of our own ViM weights; not part of the package (docs/training.md)."""
