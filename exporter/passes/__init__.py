"""Graph rewrites, one a file, each with a stated precondition and postcondition.

Export: fold_weights, name_tensors, strip_metadata (on the exporter's ModelProto, which alone holds module scopes), then
portable (onnx-graphsurgeon): bodies attached.
TensorRT (onnx-graphsurgeon): detach_bodies, fuse_patch_embed, fuse_aligned, fuse_mixer, gather_rows, fuse_add_norm,
cast_precision, run and checked by tensorrt.
"""
