"""What tests of several techniques share."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model


@pytest.fixture(scope="session")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny vision transformer with random weights, in a folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 2}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    return str(folder)
