"""Parity on the real engine: t/s/b, rates 0, 0.2, 0.4, three precisions, batch 1, 7, 64, three sizes."""

import numpy as np
import onnx
import pytest

from exporter.engine import require_gpu
from exporter.images import parity_inputs, varied_inputs
from exporter.parity import judge_against, run
from exporter.passes.fuse_linear import HOPPER
from exporter.passes.tensorrt import plugin_nodes
from exporter.runtimes.pytorch import TorchRunner
from exporter.runtimes.trt import tensorrt_runner

from .conftest import PRECISIONS, cases

BATCHES = (1, 7, 64)


def logits(runner, feeds):
    ((_, iterations),) = run([runner], feeds).items()
    return [np.asarray(iteration["logits"]) for iteration in iterations]


@pytest.mark.parametrize("case", cases(), ids=lambda c: f"{c[0]}-{c[1]}-{c[2][0]}x{c[2][1]}")
def test_parity(case, builder, torch_model, record):
    """All precisions against one run of PyTorch float32: photographs at 1 and 7, noise at 1 and 64."""
    model = torch_model(case)
    config = model.config
    photos_1, noise_1, photos_7, _, _, noise_64 = parity_inputs(config.image_size, config.mean, config.std, BATCHES)
    feeds = [photos_1, noise_1, photos_7, noise_64]
    wanted = logits(TorchRunner(model), feeds)
    failed = []
    for precision in PRECISIONS:
        engine, lowered, info, _, _ = builder(case, precision)
        report = judge_against(tensorrt_runner(engine), feeds, wanted, precision, "pytorch")
        row = {"model": case[0], "rate": case[1], "size": case[2], "precision": precision, "seconds": info.seconds}
        record("parity", **row, metrics=report.metrics, passed=bool(report))
        assert sorted(info.plugin_layers) == sorted(plugin_nodes(lowered))
        if not report:
            failed += report.lines()
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("case", [case for case in cases() if case[2] == (224, 224)], ids=lambda c: f"{c[0]}-{c[1]}")
def test_parity_of_few_tokens(case, builder, torch_model, record):
    """Engines for one or two images, where products and norms are kernels of ours as far as they are small."""
    model = torch_model(case)
    config = model.config
    varied = varied_inputs(config.image_size, config.mean, config.std, 32)  # with few images, one more or less in bf16's top 5 decides
    feeds = [*parity_inputs(config.image_size, config.mean, config.std, (1, 2)), *varied.reshape(-1, 2, *varied.shape[1:])]
    wanted = logits(TorchRunner(model), feeds)
    failed = []
    for precision in ("fp16", "bf16"):
        engine, lowered, info, _, _ = builder(case, precision, batch=(1, 1, 2))
        linears = [node for node in lowered.graph.node if node.op_type == "StmLinear"]
        if require_gpu().sm == HOPPER:  # published sizes in batches of two are small there
            assert len(linears) == 2 * config.depth + 1
            assert sum(node.op_type == "StmAddMergeNorm" for node in lowered.graph.node) == 2  # before the first layer, after the last
            assert any(onnx.helper.get_node_attr_value(node, "left") for node in linears) == (case[1] > 0)
        report = judge_against(tensorrt_runner(engine), feeds, wanted, precision, "pytorch")
        row = {"model": case[0], "rate": case[1], "size": case[2], "precision": f"{precision}, 2 images", "seconds": info.seconds}
        record("parity", **row, metrics=report.metrics, passed=bool(report))
        assert sorted(info.plugin_layers) == sorted(plugin_nodes(lowered))
        if not report:
            failed += report.lines()
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("case", [case for case in cases() if case[1:] == (0.2, (224, 224))], ids=lambda c: c[0])
def test_fp16_agrees_on_512_varied_images(case, builder, torch_model, record):
    """fp16 top-1 agreement with PyTorch float32 on 512 crops, flips and brightness changes of the photographs."""
    model = torch_model(case)
    images = list(varied_inputs((224, 224), model.config.mean, model.config.std, 512).reshape(8, 64, 3, 224, 224))
    wanted = logits(TorchRunner(model), images)
    runner = tensorrt_runner(builder(case, "fp16")[0])
    report = judge_against(runner, images, wanted, "fp16", "pytorch")
    got = logits(runner, images)
    same = float(np.mean(np.argmax(np.concatenate(got), 1) == np.argmax(np.concatenate(wanted), 1)))  # near ties counted too
    record("agreement", model=case[0], rate=case[1], images=512, top1=same, metrics=report.metrics)
    assert report, "\n".join(report.lines())
    assert same >= 0.97
