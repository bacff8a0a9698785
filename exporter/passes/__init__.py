"""Graph rewrites, one a file, each with a stated precondition and postcondition.

Export: fold_weights, name_tensors, strip_metadata (on the exporter's ModelProto, which alone holds module scopes), then
portable (onnx-graphsurgeon): bodies attached.
TensorRT: detach_bodies, fuse_patch_embed, fuse_mixer, fuse_add_norm, cast_precision (onnx-graphsurgeon), run and checked by tensorrt.
"""
