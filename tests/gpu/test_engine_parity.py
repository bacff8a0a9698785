"""Parity on the real engine: t/s/b, rates 0, 0.2, 0.4, three precisions, batch 1, 7, 64, three sizes."""

import numpy as np
import pytest

from exporter.images import parity_inputs, varied_inputs
from exporter.parity import judge
from exporter.runtimes.trt import tensorrt_runner

from .conftest import PRECISIONS, cases

BATCHES = (1, 7, 64)


@pytest.mark.parametrize("case", cases(), ids=lambda c: f"{c[0]}-{c[1]}-{c[2][0]}x{c[2][1]}")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_parity(case, precision, builder, torch_model, record):
    model = torch_model(case)
    engine, _, info, _, _ = builder(case, precision)
    config = model.config
    photos_1, noise_1, photos_7, _, _, noise_64 = parity_inputs(config.image_size, config.mean, config.std, BATCHES)
    report = judge(tensorrt_runner(engine), model, precision, [photos_1, noise_1, photos_7, noise_64])
    record(
        "parity", model=case[0], rate=case[1], size=case[2], precision=precision, metrics=report.metrics, seconds=info.seconds, passed=bool(report)
    )
    assert report, "\n".join(report.lines())
    assert len(info.plugin_layers) == 3 * config.depth


@pytest.mark.parametrize("name", ["vim-t", "vim-s", "vim-b"])
def test_fp16_agrees_on_512_varied_images(name, builder, torch_model, record):
    """fp16 top-1 agreement with PyTorch float32 on 512 crops, flips and brightness changes of the photographs."""
    case = (name, 0.2, (224, 224))
    model = torch_model(case)
    engine = builder(case, "fp16")[0]
    images = varied_inputs((224, 224), model.config.mean, model.config.std, 512)
    report = judge(tensorrt_runner(engine), model, "fp16", list(images.reshape(8, 64, 3, 224, 224)))
    same = top1_agreement(engine, model, images)
    record("agreement", model=name, images=512, top1=same, metrics=report.metrics)
    assert report, "\n".join(report.lines())
    assert same >= 0.97


def top1_agreement(engine, model, images):
    """Share of images with the same best class, near ties counted too."""
    from exporter.parity import run
    from exporter.runtimes.pytorch import TorchRunner

    results = run([tensorrt_runner(engine), TorchRunner(model)], list(images.reshape(8, 64, 3, 224, 224)))
    (_, got), (_, want) = results.items()
    hits = [np.argmax(a["logits"], 1) == np.argmax(b["logits"], 1) for a, b in zip(got, want, strict=True)]
    return float(np.mean(np.concatenate(hits)))
