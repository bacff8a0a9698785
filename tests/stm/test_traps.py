"""Each known mistake, built into the reference, must make the parity check fail.

A mistake whose effect stays below the tolerance would pass unseen in the model too. The input
side's traps (the timm default normalisation, interpolation of pos_embed) are tested where the
preprocessing and the checkpoint loader are.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import stm
from tests.reference.vim_reference import TRAPS, vim_reference
from tests.reference.weights import as_arrays, trained_like_

from .test_model_parity import FLOAT32_TOLERANCE, FLOAT64_TOLERANCE, images, logits, small_config

# On this model 1e-6 for 1e-5 hides inside the float32 tolerance: only the float64 logits tell.
FLOAT64_ONLY = {"eps_1e-6"}


@pytest.fixture(scope="module")
def model_logits():
    # Non-square and with an odd number of patches, so that no reversal or grid symmetry hides.
    config = small_config(image_size=(48, 80))
    model = trained_like_(stm.VisionMamba(config), seed=2).eval().to(torch.float64)
    image = images(2, config.image_size)
    return as_arrays(model), image.numpy(), logits(model, image)


def gap(model_logits, trap: str | None) -> float:
    params, image, got = model_logits
    with np.errstate(over="ignore", invalid="ignore"):  # without softplus the state explodes
        return float(np.abs(vim_reference(params, image, trap=trap) - got).max())


def test_no_trap_passes(model_logits):
    assert gap(model_logits, None) <= FLOAT64_TOLERANCE


@pytest.mark.parametrize("trap", TRAPS)
def test_trap_fails_the_parity_check(model_logits, trap):
    difference = gap(model_logits, trap)
    assert not difference <= FLOAT64_TOLERANCE  # a NaN fails the check as well
    if trap in FLOAT64_ONLY:
        assert difference <= FLOAT32_TOLERANCE  # else the comment above is out of date
    else:
        assert not difference <= 100 * FLOAT32_TOLERANCE


def test_unknown_trap_is_refused(model_logits):
    with pytest.raises(ValueError, match="unknown trap"):
        gap(model_logits, "no_such_trap")
