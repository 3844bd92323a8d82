"""Pictures to scenes: what a picture shows, read back with the renderer's own distance functions, or None.

A picture is read in four steps, vectorised over a batch:

1. Ground. Of the known backgrounds under the known lights, the pair that explains most pixels. Dividing by that light's
   falloff leaves a plain colour behind the things.
2. Parts. What stands out from the ground, cut where two things touch: cores that survive an erosion are grown back.
3. Explanation. In one style, a thing of given shape, size and centre changes the ground by a sum of maps that is linear
   in the thing's colour. So the best colour and its error have a closed form: every shape, size and style is tried at the
   part's centroid, the best few are moved by Gauss-Newton, and the style that explains all parts best is the picture's.
4. Verdict. A part that its best explanation leaves too far from, or whose colour is near no known one, is no known thing,
   and a picture with such a part shows no scene.

The thresholds of the verdict were set between two sets of 32 x 32 pictures. To be accepted: 3,000 renders with a blur of
sigma 0.5 pixels, noise of 0.05 and colours off by up to 0.05 (on the scale from -1 to 1); 99.8% are. To be refused: equal
blends of two shapes, colours, sizes or styles, ghosts, things half drawn, in two colours, or fused; above 99% are, save
blends that differ in a few pixels only (circle and square 61%, square and cross 92%, star and cross 96%). The mean of red
and yellow is orange to the judge. A picture that mixes styles shows no scene.

Pictures whose side is a multiple of 32 pixels or more are averaged down to between 32 and 63 pixels: neither speed nor
tolerance depends on the size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.worlds.caption import parse
from mezzotint.worlds.render import DISTANCE, FALL_OFF, INK, OUTLINE, SHADING
from mezzotint.worlds.scene import BACKGROUNDS, COLOURS, LIGHTS, SHAPES, SIZES, STYLES, Scene, Thing
from mezzotint.worlds.splits import PREFERRED_LIGHT, PREFERRED_STYLE, is_centred

SMALLEST = 24  # side of the smallest picture that can be read
MOST_THINGS = 8  # more things than any scene has, so that a wrong count is seen as one
UNEXPLAINED = 0.05  # squared error of an explanation, as a share of the part's squared contrast, at most
WORST = 0.18  # error of an explanation in its worst pixel, as a share of the part's strongest contrast, at most
COLOUR_OFF = 0.16  # distance in RGB from a thing's colour to the named one, at most: 0.09 is 5% in each channel
SEEN = 0.85  # share of a thing that must be in the picture and not behind another part: those of scenes show 0.95 and more

READ_AT = 32  # the lengths in pixels below are for pictures of this side
PLAIN_WITHIN = 0.14  # how far a channel of a plain pixel may be from the background's
LEAST_PLAIN = 0.3  # share of the picture that must be plain: eight large things leave more
STANDS_OUT = 0.16  # distance in RGB from the ground at which a pixel belongs to a part
SOLID = 0.3  # contrast of a core's pixels, as a share of the strongest two pixels around; 0.2 joins things, 0.4 breaks crosses
SPECK = 6  # parts of fewer pixels are ignored: the smallest thing has 30
LITTER = 0.03  # share of the picture that specks may cover
WINDOW = 0.28  # half the side of the square around a part's centroid that an explanation must explain: every thing fits
IN_WINDOW = 0.95  # share of a part that its window must hold: the tips of large outlined stars may reach out of it
CANDIDATES = 3  # shapes and sizes that are moved to their best place
AT_ONCE = 32  # pictures read together: what fits the processor's cache

_KINDS = [(shape, size) for shape in SHAPES for size in SIZES]
_RADII = torch.tensor([SIZES[size] for _, size in _KINDS])
_CENTRE_BELOW = _RADII * torch.tensor([0.08 if shape == "triangle" else 0.0 for shape, _ in _KINDS])  # below the centroid
_RASTER = (torch.arange(256) + 0.5) / 256 * 3 - 1.5
_AREAS = _RADII**2 * torch.tensor([(DISTANCE[shape](_RASTER[None, :], _RASTER[:, None]) < 0).float().mean() * 9 for shape, _ in _KINDS])
_COLOURS = torch.tensor(list(COLOURS.values()))
_BACKGROUNDS = torch.tensor(list(BACKGROUNDS.values()))
_LAMPS = torch.tensor(list(LIGHTS.values()))
# What a thing adds to the ground in each style, from the five maps of `_maps`: one in its own colour, one in a grey of
# known level, less the ground where it hides it.
_OWN = torch.tensor([[1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0], [0, 0, 0, 1.0, 0]])
_GREY = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1.0, 0, 0], [0, 0, 0, 0, INK]])
_HIDES = torch.tensor([[1.0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0], [0, 0, 0, 1.0, 1.0]])


def read(images: Tensor) -> list[Scene | None]:
    """The scenes that pictures (B, 3, S, S) in [-1, 1] show; None for one that shows none.

    None: nothing on the ground, more than MOST_THINGS things, anything that is no thing of Worlds, a background or light
    that is not, values that are not finite. ValueError for another shape or a side below SMALLEST.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or images.shape[3] < SMALLEST:
        raise ValueError(f"pictures must be (B, 3, S, S) with S at least {SMALLEST}, got {tuple(images.shape)}")
    with torch.no_grad(), torch.device("cpu"):
        pixels = images.to("cpu", torch.float32)
        return [scene for some in pixels.split(AT_ONCE) for scene in _read(some)]


def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Which pictures (B, 3, S, S) show what their prompts say: (B,) of 1 and 0. ValueError for a prompt that is no caption."""
    asked = [parse(prompt) for prompt in prompts]
    shown = [scene is not None and description.holds(scene) for scene, description in zip(read(images), asked, strict=True)]
    return torch.tensor(shown, dtype=torch.float32)


def credit(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """(B,) `score` with partial credit: half is for `score`, half for the share of the caption's claims that hold. 0 for no scene."""
    credits = []
    for scene, description in zip(read(images), map(parse, prompts), strict=True):
        claims = description.claims(scene) if scene else [False]
        credits.append((sum(claims) / len(claims) + (scene is not None and description.holds(scene))) / 2)
    return torch.tensor(credits, dtype=torch.float32)


def preference(images: Tensor) -> Tensor:
    """Which parts of the preferred look pictures (B, 3, S, S) have: (B, 3) of 1 and 0 for style, light, centred composition.

    The mean over the three is `splits.preference` of the scene. All 0 for a picture that shows none.
    """
    looks = [
        (scene.style == PREFERRED_STYLE, scene.light == PREFERRED_LIGHT, is_centred(scene)) if scene else (False, False, False)
        for scene in read(images)
    ]
    return torch.tensor(looks, dtype=torch.float32).view(-1, 3)


def _read(images: Tensor) -> list[Scene | None]:
    """`read` for a few pictures."""
    finite = images.isfinite().flatten(1).all(1)
    shares = images.where(finite[:, None, None, None], torch.zeros(())).clamp(-1, 1).add(1).div(2)
    fine = max(n for n in range(1, max(1, shares.shape[-1] // READ_AT) + 1) if shares.shape[-1] % n == 0)
    ground = _ground(F.avg_pool2d(shares, fine))
    parts, clear = _cut_out(ground, _segment(ground.offset.square().sum(1).sqrt() * (ground.found & finite)[:, None, None]))
    if not len(parts.owner):
        return [None] * len(images)
    guess = _choose(parts, _nudge(parts, _shortlist(parts)), len(images))
    guess = _nudge(parts, guess, fine)
    colour, known = _verdict(parts, guess, fine)
    clear[parts.owner[~known]] = False
    things: list[list[Thing]] = [[] for _ in images]
    style = torch.zeros(len(images), dtype=torch.long).index_put_((parts.owner,), guess.style).tolist()
    for owner, kind, hue, x, y in zip(*(v.tolist() for v in (parts.owner, guess.kind, colour, guess.x, guess.y)), strict=True):
        things[owner].append(Thing(_KINDS[kind][0], list(COLOURS)[hue], _KINDS[kind][1], x, y))
    setting = zip(ground.background.tolist(), style, ground.light.tolist(), strict=True)
    return [
        Scene(tuple(shown), list(BACKGROUNDS)[b], STYLES[s], list(LIGHTS)[li]) if shown and fit else None
        for shown, fit, (b, s, li) in zip(things, clear.tolist(), setting, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Ground:
    """What is behind the things. background, light: (B,) numbers. colour: (B, 3), as it is in the picture, which may be
    a little off. offset: (B, 3, S, S) picture less colour, the light's falloff undone. found: (B,) whether there is one."""

    background: Tensor
    light: Tensor
    colour: Tensor
    offset: Tensor
    found: Tensor


def _ground(images: Tensor) -> _Ground:
    """The background and light that most pixels of each picture (B, 3, S, S) in [0, 1] agree with."""
    ahead = 1 - 2 * _axis(images.shape[-1])
    away = 0.5 + 0.5 * (_LAMPS[:, 0, None, None] * ahead[None, None, :] + _LAMPS[:, 1, None, None] * ahead[None, :, None])
    lit = 1 - FALL_OFF * away
    some = images[:, None, :, ::2, ::2] / lit[:, None, ::2, ::2]  # a quarter of the pixels is enough to choose
    off = torch.stack([_plain_error(some, colour[:, None, None]) for colour in _BACKGROUNDS], 2)
    best = off.flatten(1).argmin(1)
    light, background = best // len(BACKGROUNDS), best % len(BACKGROUNDS)
    images = images / lit[light][:, None]
    plain = _plain(images, _BACKGROUNDS[background][:, :, None, None])
    colour = (images * plain).sum((2, 3)) / plain.sum((2, 3)).clamp(min=1)
    return _Ground(background, light, colour, images - colour[:, :, None, None], plain.mean((1, 2, 3)) >= LEAST_PLAIN)


def _axis(side: int) -> Tensor:
    """Where the centres of pixels are, as shares of the side."""
    return (torch.arange(side) + 0.5) / side


def _plain(images: Tensor, colour: Tensor) -> Tensor:
    """1.0 for pixels (..., 1, H, W) that are near a colour, else 0.0."""
    return ((images - colour).abs().amax(-3, keepdim=True) < PLAIN_WITHIN).float()


def _plain_error(images: Tensor, colour: Tensor) -> Tensor:
    """(...,) mean square distance of pictures (..., 3, H, W) from a colour, pixels that are not plain counting alike."""
    return (images - colour).abs().amax(-3).clamp(max=PLAIN_WITHIN).square().mean((-2, -1))


def _segment(contrast: Tensor) -> Tensor:
    """The parts of pictures: a number above 0 for each, unique in the batch, at its pixels (B, S, S); 0 elsewhere.

    contrast: (B, S, S) distance from the ground. The pictures lie in one long row with an empty border after each line, so
    that a neighbour is a shift of the row.
    """
    batch, side, _ = contrast.shape
    by = max(1, round(side / READ_AT))
    line = side + 2 * by
    row = F.pad(contrast, (0, 2 * by, 0, 2 * by)).flatten()
    nearby = row
    for _ in range(2 * by):
        nearby = _grow(nearby, line)
    part = (row > STANDS_OUT).int()
    solid = (row > STANDS_OUT) & (row > SOLID * nearby)
    # All that the border reaches without crossing solid pixels, between corners that touch too, is outside: the hole of a ring is not,
    # nor the inside of a faint thing with a strong outline. What is left after the outside has grown into it is a core, one for each thing.
    outside = F.pad(contrast.new_zeros(batch, side, side, dtype=torch.int32), (0, 2 * by, 0, 2 * by), value=1).flatten()
    outside = _spread(outside, (~solid).int(), line)
    for _ in range(by):
        outside = _grow(outside, line)
    number = torch.arange(1, len(row) + 1, dtype=torch.int32)
    core = 1 - outside
    parts = _spread(number * core, core, line)
    while not torch.equal(parts, grown := torch.where(parts > 0, parts, _grow(parts, line) * part)):
        parts = grown
    coreless = part * (parts == 0)
    parts = parts + _spread(number * coreless, coreless, line)
    return parts.view(batch, line, line)[:, :side, :side]


def _reach(row: Tensor, step: int) -> Tensor:
    """The largest of each value and of those a step before and after it."""
    grown = row.clone()
    torch.maximum(grown[step:], row[:-step], out=grown[step:])
    torch.maximum(grown[:-step], row[step:], out=grown[:-step])
    return grown


def _grow(row: Tensor, line: int) -> Tensor:
    """The largest value among each pixel and its eight neighbours."""
    return _reach(_reach(row, 1), line)


def _spread(row: Tensor, within: Tensor, line: int) -> Tensor:
    """`_grow` within a mask of 0 and 1 until nothing changes: every connected region takes its largest value."""
    while not torch.equal(row, grown := _grow(row, line) * within):
        row = grown
    return row


@dataclass(frozen=True, slots=True)
class _Parts:
    """Parts of pictures, each in a square window of h x h pixels. side: of the pictures, in pixels. owner: (n,) picture.
    y, x: (n,) centroid. rows, columns: (n, h) where the window's pixels are. offset: (n, 3, h, h) from the ground, 0 where
    weight is. weight: (n, h, h), 0 on and next to other parts. ground: (n, 3) colour. lamp: (n, 2). whole: (n,) whether the
    window holds all of the part."""

    side: int
    owner: Tensor
    y: Tensor
    x: Tensor
    rows: Tensor
    columns: Tensor
    offset: Tensor
    weight: Tensor
    ground: Tensor
    lamp: Tensor
    whole: Tensor


def _cut_out(ground: _Ground, labels: Tensor) -> tuple[_Parts, Tensor]:
    """The parts that are no specks, of pictures with few enough; and which pictures (B,) are free of litter."""
    side = labels.shape[-1]
    image, row, column = labels.nonzero(as_tuple=True)
    label, which, area = torch.unique(labels[image, row, column], return_inverse=True, return_counts=True)
    owner = torch.zeros_like(label, dtype=torch.long).scatter_(0, which, image)
    y = torch.bincount(which, (row + 0.5) / side, len(label)).div(area).float()
    x = torch.bincount(which, (column + 0.5) / side, len(label)).div(area).float()
    speck = area < SPECK * (side / READ_AT) ** 2
    clear = torch.bincount(owner, area * speck, len(labels)) <= LITTER * side**2
    keep = ~speck & (torch.bincount(owner[~speck], minlength=len(labels)) <= MOST_THINGS)[owner]
    label, owner, y, x, area = label[keep], owner[keep], y[keep], x[keep], area[keep]

    reach = min(side, 2 * round(WINDOW * side) + 1)
    corner = torch.stack([y, x], 1).mul(side).sub(reach / 2).round().long().clamp(0, side - reach)
    rows, columns = corner[:, 0, None] + torch.arange(reach), corner[:, 1, None] + torch.arange(reach)
    at = (owner[:, None, None], rows[:, :, None], columns[:, None, :])
    around = labels[at]
    mine = around == label[:, None, None]
    # Where two things touch, the pixels next to the other one show a mixture of both.
    weight = 1 - F.max_pool2d(((around > 0) & ~mine).float()[:, None], 3, 1, 1)
    offset = ground.offset.permute(0, 2, 3, 1)[at].permute(0, 3, 1, 2) * weight
    whole = mine.sum((1, 2)) >= IN_WINDOW * area
    places = (_axis(side)[rows], _axis(side)[columns])
    return _Parts(side, owner, y, x, *places, offset, weight[:, 0], ground.colour[owner], _LAMPS[ground.light[owner]], whole), clear


@dataclass(frozen=True, slots=True)
class _Guess:
    """What parts may be. part: (m,) number of the part. kind: of shape and size. style: number. y, x: centre."""

    part: Tensor
    kind: Tensor
    style: Tensor
    y: Tensor
    x: Tensor


def _maps(parts: _Parts, guess: _Guess, fine: int = 1) -> Tensor:
    """What the guessed things cover in their parts' windows: (m, 5, h * h), for `_OWN`, `_GREY`, `_HIDES`.

    The renderer's formulas, parted by what multiplies the thing's colour. Maps: the thing without an outline; that, shaded,
    less the light on it; the light on it; an outlined thing less its ink; the ink. fine: how many times finer the renderer's
    pixels are than the parts'.
    """
    radius, pixel = _RADII[guess.kind], parts.side * fine
    within = (_axis(fine) - 0.5) / parts.side
    px = ((parts.columns[guess.part][:, :, None] + within).flatten(1) - guess.x[:, None]) / radius[:, None]
    py = ((parts.rows[guess.part][:, :, None] + within).flatten(1) - guess.y[:, None]) / radius[:, None]
    distance = torch.empty(*py.shape, px.shape[1])
    for number, shape in enumerate(SHAPES):
        at = (guess.kind // len(SIZES) == number).nonzero()[:, 0]
        if len(at):
            distance[at] = DISTANCE[shape](*torch.broadcast_tensors(px[at][:, None, :], py[at][:, :, None]))
    distance *= (radius * pixel)[:, None, None]
    weight = parts.weight[guess.part].repeat_interleave(fine, 1).repeat_interleave(fine, 2)
    towards = parts.lamp[guess.part]
    shade = SHADING * (px[:, None, :] * towards[:, 0, None, None] + py[:, :, None] * towards[:, 1, None, None])
    inked = distance.abs().sub_(OUTLINE * pixel / 2)
    outlined = torch.minimum(distance, inked).neg_().add_(0.5).clamp_(0, 1).mul_(weight)
    ink = (0.5 - inked).clamp_(0, 1).mul_(outlined)
    cover = distance.neg_().add_(0.5).clamp_(0, 1).mul_(weight)
    light = cover * shade.clamp(0, 1)
    maps = torch.stack([cover, (cover - light) * (1 + shade.clamp_(-1, 0)), light, outlined - ink, ink], 1)
    return (F.avg_pool2d(maps, fine) if fine > 1 else maps).flatten(2)


def _paint(gram: Tensor, dots: Tensor, ground: Tensor) -> Tensor:
    """The least-squares paint of each style: what to multiply the maps with, (m, 3 styles, 5 maps, 3 channels).

    gram: (m, 5, 5) products of the maps with each other. dots: (m, 5, 3) with the offset. ground: (m, 3).
    """
    known = _GREY[:, :, None] - _HIDES[:, :, None] * ground[:, None, None, :]
    own = _OWN @ gram
    power = (own * _OWN).sum(2).clamp(min=1e-6)
    colour = (_OWN @ dots - (own[:, :, None] @ known)[:, :, 0]) / power[:, :, None]
    return known + _OWN[:, :, None] * colour[:, :, None]


def _errors(maps: Tensor, offset: Tensor, ground: Tensor) -> Tensor:
    """Squared error of the best paint in each style, (..., 3 styles).

    maps: (n, k, 5, p) of k guesses about each part. offset: (n, 3, p). ground: (n, 3).
    """
    n, k = maps.shape[:2]
    gram = (maps @ maps.transpose(2, 3)).flatten(0, 1)
    dots = (maps.flatten(1, 2) @ offset.transpose(1, 2)).view(n * k, 5, 3)
    paint = _paint(gram, dots, ground.repeat_interleave(k, 0))
    fitted = (paint * (gram[:, None] @ paint - 2 * dots[:, None])).sum((2, 3))
    return fitted.view(n, k, 3) + offset.square().sum((1, 2))[:, None, None]


def _shortlist(parts: _Parts) -> _Guess:
    """The CANDIDATES best shapes and sizes of every part (part by part), each in its best style, at the part's centroid."""
    n, k = len(parts.owner), len(_KINDS)
    part, kind = torch.arange(n).repeat_interleave(k), torch.arange(k).repeat(n)
    guess = _Guess(part, kind, torch.zeros_like(kind), parts.y[part] + _CENTRE_BELOW[kind], parts.x[part])
    errors = _errors(_maps(parts, guess).view(n, k, 5, -1), parts.offset.flatten(2), parts.ground)
    best = errors.amin(2).topk(CANDIDATES, dim=1, largest=False).indices + k * torch.arange(n)[:, None]
    return _pick(replace(guess, style=errors.argmin(2).flatten()), best.flatten())


def _pick(guess: _Guess, at: Tensor) -> _Guess:
    return _Guess(guess.part[at], guess.kind[at], guess.style[at], guess.y[at], guess.x[at])


def _nudge(parts: _Parts, guess: _Guess, fine: int = 1) -> _Guess:
    """The guesses moved to where they explain their parts better: one step of Gauss-Newton, of at most a pixel."""
    step = 0.5 / parts.side
    offset = parts.offset.flatten(2)[guess.part]
    maps = _maps(parts, guess, fine)
    paint = _paint(maps @ maps.transpose(1, 2), maps @ offset.transpose(1, 2), parts.ground[guess.part])
    paint = paint[torch.arange(len(guess.part)), guess.style].transpose(1, 2)
    error = offset - paint @ maps
    slopes = []
    for dy, dx in ((step, 0.0), (0.0, step)):
        after = _maps(parts, replace(guess, y=guess.y + dy, x=guess.x + dx), fine)
        before = _maps(parts, replace(guess, y=guess.y - dy, x=guess.x - dx), fine)
        slopes.append(paint @ (after - before) / (2 * step))
    down, right = slopes
    yy, xx, xy = (down * down).sum((1, 2)), (right * right).sum((1, 2)), (down * right).sum((1, 2))
    ey, ex = (down * error).sum((1, 2)), (right * error).sum((1, 2))
    determinant = (yy * xx - xy * xy).clamp(min=1e-9)
    move_y = ((ey * xx - ex * xy) / determinant).clamp(-1 / parts.side, 1 / parts.side)
    move_x = ((ex * yy - ey * xy) / determinant).clamp(-1 / parts.side, 1 / parts.side)
    return replace(guess, y=guess.y + move_y, x=guess.x + move_x)


def _choose(parts: _Parts, guess: _Guess, pictures: int) -> _Guess:
    """One guess for each part, all of a picture in the style that explains the whole picture best."""
    n = len(parts.owner)
    maps = _soften(_maps(parts, guess), parts.side).view(n, CANDIDATES, 5, -1)
    errors = _errors(maps, _soften(parts.offset.flatten(2), parts.side), parts.ground)
    total = torch.zeros(pictures, len(STYLES)).index_add_(0, parts.owner, errors.amin(1))
    style = total.argmin(1)[parts.owner]
    best = errors[torch.arange(n), :, style].argmin(1)
    return replace(_pick(guess, best + CANDIDATES * torch.arange(n)), style=style)


def _verdict(parts: _Parts, guess: _Guess, fine: int) -> tuple[Tensor, Tensor]:
    """The number of each part's named colour (n,) and whether the part is the thing guessed (n,)."""
    some = torch.arange(len(parts.owner))
    maps = _maps(parts, guess, fine)
    seen = maps[:, 0].sum(1) / (_AREAS[guess.kind] * parts.side**2)
    maps, offset = _soften(maps, parts.side), _soften(parts.offset.flatten(2), parts.side)
    paint = _paint(maps @ maps.transpose(1, 2), maps @ offset.transpose(1, 2), parts.ground)[some, guess.style]
    error = (offset - paint.transpose(1, 2) @ maps).square().sum(1)
    contrast = offset.square().sum(1)
    own = _OWN[guess.style][:, :, None]
    colour = (own * (paint + _HIDES[guess.style][:, :, None] * parts.ground[:, None])).sum(1)
    off = torch.cdist(colour, _COLOURS).min(1)
    known = parts.whole & (seen > SEEN) & (off.values < COLOUR_OFF)
    known &= error.sum(1) < UNEXPLAINED * contrast.sum(1)
    known &= error.amax(1) < WORST**2 * contrast.amax(1)
    return off.indices, known


def _soften(maps: Tensor, side: int) -> Tensor:
    """Maps (m, c, h * h) of pictures with that side, blurred: what a slightly soft or noisy picture lacks matters less.

    By a sigma of 0.7 pixels at READ_AT, and as much of the side elsewhere.
    """
    width = math.isqrt(maps.shape[-1])
    maps = maps.unflatten(-1, (width, width))
    for _ in range(max(1, round((side / READ_AT) ** 2))):
        wide = F.pad(maps, (1, 1, 1, 1))
        wide = (wide[..., :-2] + 2 * wide[..., 1:-1] + wide[..., 2:]) / 4
        maps = (wide[..., :-2, :] + 2 * wide[..., 1:-1, :] + wide[..., 2:, :]) / 4
    return maps.flatten(2)
