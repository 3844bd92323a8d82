"""Tensors to pictures and back."""

import io
import math

import pytest
import torch
from PIL import Image

from mezzotint.pictures import from_pil, grid, png_bytes, to_pil

ALL_BYTES = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(3, 16, 16)


def test_every_byte_survives_the_way_to_a_tensor_and_back() -> None:
    picture = Image.fromarray(ALL_BYTES.permute(1, 2, 0).contiguous().numpy())
    image = from_pil(picture)
    assert image.shape == (3, 16, 16)
    assert (image.min(), image.max()) == (-1, 1)
    assert to_pil(image).tobytes() == picture.tobytes()


def test_rounding_and_clamping() -> None:
    row = torch.tensor([-7.0, -1.0, 0.0, 0.5, 1.0, 3.0]).reshape(1, 1, 6)
    picture = to_pil(row)
    assert picture.mode == "L"
    assert list(picture.tobytes()) == [0, 0, 128, 191, 255, 255]
    assert to_pil(row.bfloat16().requires_grad_()).tobytes() == picture.tobytes()


def test_from_pil_gives_three_channels() -> None:
    assert from_pil(Image.new("L", (5, 4), 255)).equal(torch.ones(3, 4, 5))
    assert from_pil(Image.new("RGBA", (5, 4), (255, 0, 0, 0)))[:, 0, 0].tolist() == [1, -1, -1]


def test_png_decodes_to_the_same_pixels() -> None:
    image = torch.rand(3, 7, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    decoded = Image.open(io.BytesIO(png_bytes(image)))
    assert decoded.format == "PNG"
    assert decoded.tobytes() == to_pil(image).tobytes()


def test_grid_places_row_by_row() -> None:
    images = torch.linspace(-0.5, 1, 5)[:, None, None, None].expand(5, 3, 2, 4)
    sheet = grid(images, columns=3, scale=2)
    assert sheet.size == (3 * 4 * 2, 2 * 2 * 2)
    corners = [sheet.getpixel((8 * (i % 3), 4 * (i // 3))) for i in range(6)]
    assert corners == [to_pil(image).getpixel((0, 0)) for image in images] + [(0, 0, 0)]
    assert sheet.getpixel((7, 3)) == corners[0]
    assert sheet.getpixel((8, 3)) == corners[1]


def test_grid_keeps_the_picture_upright() -> None:
    image = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert grid(image[None], columns=1).tobytes() == to_pil(image).tobytes()


@pytest.mark.parametrize("image", [torch.zeros(2, 4, 4), torch.zeros(4, 4), torch.zeros(3, 0, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_to_pil_refuses_what_is_no_picture(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="image must be floating point"):
        to_pil(image)


def test_non_finite_pixels_are_refused() -> None:
    image = torch.zeros(3, 4, 4)
    image[1, 2, 3] = math.nan
    with pytest.raises(ValueError, match="1 of its values"):
        png_bytes(image)


def test_grid_refuses_impossible_layouts() -> None:
    with pytest.raises(ValueError, match="columns and scale"):
        grid(torch.zeros(2, 3, 4, 4), columns=0)
    with pytest.raises(ValueError, match="columns and scale"):
        grid(torch.zeros(2, 3, 4, 4), columns=1, scale=0)
    with pytest.raises(ValueError, match="N at least 1"):
        grid(torch.zeros(0, 3, 4, 4), columns=2)
