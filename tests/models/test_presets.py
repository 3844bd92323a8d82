"""Published sizes, by name."""

import json

import pytest
import torch

from mezzotint.config import Config
from mezzotint.models import (
    PRESETS,
    class_dit,
    flux,
    fuse_dit,
    hidream,
    lumina2,
    mmdit,
    pixart,
    sana,
    simple_uvit,
    transfusion,
    unet,
    uvit,
)

MODULES = (unet, uvit, simple_uvit, class_dit, pixart, sana, mmdit, flux, lumina2, hidream, transfusion, fuse_dit)


def test_no_two_presets_have_one_name() -> None:
    assert len(PRESETS) == sum(len(module.PRESETS) for module in MODULES)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_stored_and_declare_what_they_are(name: str) -> None:
    config = PRESETS[name]()
    assert Config.from_data(json.loads(json.dumps(config.to_data()))) == config
    with torch.device("meta"):
        net = config.build()  # type: ignore[attr-defined]
    assert net.prediction == config.prediction  # type: ignore[attr-defined]
    beside_tables = sum(p.numel() for name, p in net.named_parameters() if "token" not in name)  # of a vocabulary
    assert sum(p.numel() for block in net.blocks for p in block.parameters()) > 0.8 * beside_tables
