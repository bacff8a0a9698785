"""Graph rewrites, one a file, each with a stated precondition and postcondition.

Export: name_tensors, strip_metadata (on the exporter's ModelProto, which alone holds module scopes), then
portable (onnx-graphsurgeon): bodies attached. The result is checked by `check_portable`.
"""
