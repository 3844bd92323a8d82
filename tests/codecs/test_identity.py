"""The codec of pixel models."""

import torch

from mezzotint.codecs import IdentityConfig


def test_latents_are_pixels_and_pictures_end_at_their_range() -> None:
    codec, images = IdentityConfig().build(), torch.randn(2, 3, 5, 7) * 2
    assert codec.factor == 1
    assert codec.latent_shape((5, 7)) == codec.encode(images).shape[1:] == (3, 5, 7)
    assert torch.equal(codec.encode(images), images)
    assert torch.equal(codec.decode(images), images.clamp(-1, 1))
