"""Remove what the torch exporter notes about the machine it ran on.

Before: nodes, values and graph carry metadata_props and doc strings, among them stack traces with local paths.
After: none of them is left.
"""

from __future__ import annotations

import onnx


def strip_metadata(model: onnx.ModelProto) -> onnx.ModelProto:
    """Strip in place."""
    graph = model.graph
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, *model.functions):
        del item.metadata_props[:]
        item.doc_string = ""
    del model.metadata_props[:]
    model.doc_string = ""
    return model
