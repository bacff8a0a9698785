"""Runtimes behind Polygraphy's runner interface: PyTorch (the reference), ONNX Runtime."""
