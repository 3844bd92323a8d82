"""Scenes to pictures: signed distance functions, drawn for a whole batch at once, anti-aliased, at any size.

A thing's coverage of a pixel is the clamped signed distance of the pixel's centre to the outline, in pixels: exact for a
straight edge along an axis, and within a few percent of the true area elsewhere.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mezzotint.worlds.scene import BACKGROUNDS, COLOURS, LIGHTS, SHAPES, SIZES, STYLES, Scene

OUTLINE = 0.034  # width of the outline, half of it outside the shape, as a share of the picture's side
INK = 0.08  # grey level of the outline
EXTENT = 1.12  # how far the farthest shape, the star, reaches from its centre, in radii
FALL_OFF = 0.15  # how much darker the picture is on the side away from the lamp
SHADING = 0.55  # how much the shaded style brightens and darkens a thing, towards and away from the lamp
PIXELS_AT_ONCE = 1 << 22  # bounds the memory of one pass


def render(scenes: Sequence[Scene], size: int) -> Tensor:
    """Draw scenes. Returns (B, 3, size, size) float32 in [-1, 1]."""
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    step = max(1, PIXELS_AT_ONCE // (size * size))
    return (
        torch.cat([_render(scenes[i : i + step], size) for i in range(0, len(scenes), step)]) if scenes else torch.empty(0, 3, size, size)
    )


def _render(scenes: Sequence[Scene], size: int) -> Tensor:
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    lamp = torch.tensor([LIGHTS[s.light] for s in scenes])
    image = torch.tensor([BACKGROUNDS[s.background] for s in scenes]).mT[..., None, None].repeat(1, 1, size, size)
    if rows := _by_shape(scenes):
        _paint(image, rows, lamp, axis)
    # Distance from the lamp's side, 0..1, along the axis that the lamp is on.
    away = 0.5 + 0.5 * (lamp[:, 0, None, None] * (1 - 2 * axis)[None, None, :] + lamp[:, 1, None, None] * (1 - 2 * axis)[None, :, None])
    return (image * (1 - FALL_OFF * away)).clamp_(0, 1).mul_(2).sub_(1).transpose(0, 1).contiguous()


Row = tuple[int, float, float, float, float, float, float, int]  # scene, x, y, radius, red, green, blue, style


def _by_shape(scenes: Sequence[Scene]) -> dict[str, list[Row]]:
    """The things of all scenes, sorted by shape, so that each distance function runs once, on just its own things."""
    rows: dict[str, list[Row]] = {shape: [] for shape in SHAPES}
    for number, scene in enumerate(scenes):
        style = STYLES.index(scene.style)
        for thing in scene.things:
            rows[thing.shape].append((number, thing.x, thing.y, SIZES[thing.size], *COLOURS[thing.colour], style))
    return {shape: of_shape for shape, of_shape in rows.items() if of_shape}


def _paint(image: Tensor, rows: dict[str, list[Row]], lamp: Tensor, axis: Tensor) -> None:
    """Paint all things into the pictures (3, B, H, W) they belong to. Things never overlap, so order is free."""
    size = len(axis)
    table = torch.tensor([row for of_shape in rows.values() for row in of_shape])
    owner, style = table[:, 0].long(), table[:, 7, None, None]
    x, y, radius, colour = table[:, 1], table[:, 2], table[:, 3], table[:, 4:7]
    # Only the square of pixels around a thing can change: cut it out, paint it, put it back.
    reach = min(size, math.ceil(size * 2 * (EXTENT * max(SIZES.values()) + 1.6 * OUTLINE)) + 3)  # 1.6: ink runs past a tip
    corner = torch.stack([y, x], 1).mul(size).sub(reach / 2).round().long().clamp_(0, size - reach)
    span = torch.arange(reach)
    row, column = corner[:, 0, None] + span, corner[:, 1, None] + span
    px = (axis[column] - x[:, None]).div(radius[:, None])[:, None, :].expand(-1, reach, -1)
    py = (axis[row] - y[:, None]).div(radius[:, None])[:, :, None].expand(-1, -1, reach)
    lengths = [len(of_shape) for of_shape in rows.values()]
    parts = zip(rows, px.split(lengths), py.split(lengths), strict=True)
    distance = torch.cat([DISTANCE[shape](u, v) for shape, u, v in parts]) * (radius * size)[:, None, None]  # pixels
    outlined = style == STYLES.index("outlined")
    inked = distance.abs().sub(OUTLINE * size / 2)  # distance to the band of ink
    coverage = (0.5 - torch.where(outlined, torch.minimum(distance, inked), distance)).clamp_(0, 1)

    towards = lamp[owner]
    shade = SHADING * (px * towards[:, 0, None, None] + py * towards[:, 1, None, None])
    shade = torch.where(style == STYLES.index("shaded"), shade, 0.0)
    fill = colour.mT[..., None, None] * (1 + shade.clamp(-1, 0))
    fill = fill.lerp_(torch.ones(()), shade.clamp_(0, 1))
    fill = fill.lerp_(torch.full((), INK), (0.5 - inked).clamp_(0, 1) * outlined)

    pixels = image.flatten(1)
    where = ((owner[:, None, None] * size + row[:, :, None]) * size + column[:, None, :]).flatten()
    # The squares of two things may overlap where neither covers anything: add what changes instead of overwriting.
    pixels.index_add_(1, where, (fill.flatten(1) - pixels.index_select(1, where)) * coverage.flatten())


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.86


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    """An equilateral triangle, point up: the farthest of its three edges."""
    edge = x.abs() * math.cos(math.pi / 6) - (y + 0.08) * 0.5
    return torch.maximum(edge, y + 0.08) - 0.58


def _star(x: Tensor, y: Tensor) -> Tensor:
    """A five-pointed star, point up, folded into one half of a point; distance to the line through that half's edge."""
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (angle - sector * torch.round(angle / sector)).abs()
    length = torch.hypot(x, y)
    u, v = length * torch.cos(folded), length * torch.sin(folded)
    tip, notch = EXTENT, 0.46
    # The edge runs from the tip (tip, 0) to the notch at half a sector.
    nx, ny = notch * math.cos(sector / 2), notch * math.sin(sector / 2)
    norm = math.hypot(nx - tip, ny)
    return (-(u - tip) * -ny - v * (nx - tip)) / norm


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """A plus sign: two bars, exact inside and along the edges."""
    long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(long - 1.0, short - 0.32)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.72).abs() - 0.28


DISTANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
