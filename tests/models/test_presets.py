"""Published sizes, by name."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from parity import Network

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
from mezzotint.models.cost import FORMULAS
from mezzotint.models.published import PUBLISHED, parameters

MODULES = (unet, uvit, simple_uvit, class_dit, pixart, sana, mmdit, flux, lumina2, hidream, transfusion, fuse_dit)


def test_no_two_presets_have_one_name() -> None:
    assert len(PRESETS) == sum(len(module.PRESETS) for module in MODULES)


def test_what_must_be_true_of_every_architecture_is_tested_of_each() -> None:
    """One graph a block, blocks computed again, memory, eight samples learned, and the rest of `parity.Network`."""
    tested = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for value in vars(importlib.import_module(path.stem)).values():
            if isinstance(value, type) and issubclass(value, Network) and value.__module__ == path.stem:
                tested |= {type(config) for config in value.configs.values()}
    assert tested == FORMULAS.keys()


def test_every_preset_says_what_it_was_made_for() -> None:
    assert PUBLISHED.keys() == PRESETS.keys()
    for name, made in PUBLISHED.items():
        side, rest = divmod(made.pixels, made.factor * PRESETS[name]().patch)  # type: ignore[attr-defined]
        assert side > 0, name
        assert rest == 0, name


def test_parameters_are_counted_without_a_start() -> None:
    config = PRESETS["dit-s-2"]()
    assert parameters(config) == sum(p.numel() for p in config.build().parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_stored_and_declare_what_they_are(name: str) -> None:
    config = PRESETS[name]()
    assert Config.from_data(json.loads(json.dumps(config.to_data()))) == config
    with torch.device("meta"):
        net = config.build()  # type: ignore[attr-defined]
    assert net.prediction == config.prediction  # type: ignore[attr-defined]
    beside_tables = sum(p.numel() for name, p in net.named_parameters() if "token" not in name)  # of a vocabulary
    assert sum(p.numel() for block in net.blocks for p in block.parameters()) > 0.8 * beside_tables
