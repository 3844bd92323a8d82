"""Numbers to vectors: times, positions, patches. Angles are computed in float32 or better whatever the model runs in.

B batch, N tokens, D width, F frames, H and W rows and columns, p patch side.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(value: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """(...,) -> (..., dim): cosines, then sines, at dim / 2 geometric frequencies from 1 to 1 / max_period."""
    half = dim // 2
    frequency = max_period ** (-torch.arange(half, dtype=torch.float32, device=value.device) / half)
    angle = value.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class VectorEmbedding(nn.Sequential):
    """(B, inputs) -> (B, D): two layers with a SiLU between, in the precision of their weights."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__(nn.Linear(inputs, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = super().forward(x.to(next(self.parameters()).dtype))
        return features


class TextEmbedding(nn.Sequential):
    """(B, L, inputs) -> (B, L, D): two layers with a GELU (tanh) between."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__(nn.Linear(inputs, dim), nn.GELU("tanh"), nn.Linear(dim, dim))


class TimeEmbedding(nn.Module):
    """t in [0, 1] -> (B, D): a sinusoid of 1000 t through a two-layer MLP (Peebles & Xie 2023).

    Other numbers are embedded likewise; scale: what they are multiplied by instead of 1000.
    """

    def __init__(self, dim: int, frequencies: int = 256, scale: float = 1000) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.scale = scale
        self.mlp = VectorEmbedding(frequencies, dim)

    def forward(self, t: Tensor) -> Tensor:
        features: Tensor = self.mlp(sinusoid(self.scale * t, self.frequencies))
        return features


class SizeEmbedding(nn.Module):
    """(B, 2) height and width in pixels -> (B, D): height, width and height / width, a third each (Chen et al. 2023)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 3:
            raise ValueError(f"dim must be a multiple of 3, got {dim}")
        self.side = TimeEmbedding(dim // 3, scale=1)
        self.aspect = TimeEmbedding(dim // 3, scale=1)

    def forward(self, size: Tensor) -> Tensor:
        return torch.cat([self.side(size).flatten(1), self.aspect(size[:, 0] / size[:, 1])], dim=1)


def image_positions(frames: int, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """(F H W, 3) positions (frame, row, column) of patches in reading order. A picture is a video of one frame."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in (frames, rows, columns)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def spanning_positions(rows: int, columns: int, span: float, device: torch.device | None = None) -> Tensor:
    """(rows columns, 3) as `image_positions`, but row and column run from 0 to `span`, however many there are."""
    frame, row, column = image_positions(1, rows, columns, device).unbind(-1)
    return torch.stack([frame, row * (span / rows), column * (span / columns)], dim=-1)


def sincos_2d(positions: Tensor, dim: int) -> Tensor:
    """(N, 3) positions -> (N, dim) fixed features of row and column, half the channels each. The frame is left to RoPE."""
    return torch.cat([sinusoid(positions[:, 1], dim // 2), sinusoid(positions[:, 2], dim // 2)], dim=-1)


def sincos_2d_mae(positions: Tensor, dim: int) -> Tensor:
    """(N, 3) positions -> (N, dim): as `sincos_2d`, in the order that DiT, PixArt and SD3 have from MAE (He et al. 2021).

    The column comes before the row, and sines before cosines.
    """
    return torch.cat([sinusoid(positions[:, axis], dim // 2).roll(dim // 4, dims=-1) for axis in (2, 1)], dim=-1)


def rope_axes(head: int) -> tuple[int, int, int]:
    """How many of a head's channels turn with frame, row and column: about 1 : 3.5 : 3.5, as FLUX's (16, 56, 56) of 128."""
    if head % 2:
        raise ValueError(f"a head must have an even number of channels, got {head}")
    side = (head - head // 8) // 4 * 2
    return head - 2 * side, side, side


def rope(positions: Tensor, axes: tuple[int, ...], theta: float = 10_000.0) -> Tensor:
    """Rotations of n-axis rotary embedding (Su et al. 2021; axes split as in FLUX).

    positions (..., n) and channels per axis (each even) -> (..., sum(axes) / 2, 2): cosine and sine for each pair of channels.
    """
    angles = []
    for axis, dim in enumerate(axes):
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim)
        angles.append(positions[..., axis, None] * frequency)
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs (2i, 2i + 1) of x (B, heads, N, d) by `rotation` (N, d / 2, 2) or (B, 1, N, d / 2, 2)."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # compilers make one kernel of real arithmetic, and none of complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:  # one kernel instead of seven
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).to(x.dtype)


def patch_grid(side: int, patch: int, stride: int) -> int:
    """How many patches stand along a side. ValueError where they do not end with the picture."""
    if side < patch or (side - patch) % stride:
        sides = f"a multiple of {patch}" if stride == patch else f"{patch} and a multiple of {stride} more"
        raise ValueError(f"a side must be {sides} pixels, got {side}")
    return (side - patch) // stride + 1


def as_video(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) or (B, C, F, H, W) -> the latter. ValueError where height or width is no multiple of the patch."""
    height, width = x.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(f"height and width must be multiples of the patch {patch}, got {height}x{width}")
    return x if x.ndim == 5 else x[:, :, None]


def as_picture(x: Tensor, patch: int) -> Tensor:
    """As `as_video`, for networks that know no time: ValueError where there is more than one frame."""
    video = as_video(x, patch)
    if video.shape[2] != 1:
        raise ValueError(f"this network draws pictures, videos of one frame, got {video.shape[2]} frames")
    return video


def patchify(x: Tensor, patch: int, stride: int | None = None) -> Tensor:
    """(B, C, F, H, W) -> (B, F h w, p p C): patches in reading order, channels last within a patch.

    stride: from one patch to the next, the patch itself if not given; a smaller one makes patches overlap.
    """
    x = x.unfold(3, patch, stride or patch).unfold(4, patch, stride or patch)  # B C F h w p p
    return x.permute(0, 2, 3, 4, 5, 6, 1).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, patch: int, shape: torch.Size, stride: int | None = None) -> Tensor:
    """Patches back onto a video of `shape` (B, C, F, H, W); where they overlap they add up. Without overlap, the inverse of `patchify`."""
    b, c, f, h, w = shape
    columns = tokens.reshape(b * f, -1, patch * patch, c).permute(0, 3, 2, 1).flatten(1, 2)
    frames = F.fold(columns, (h, w), patch, stride=stride or patch)
    return frames.reshape(b, f, c, h, w).transpose(1, 2)


def chosen(tokens: Tensor, keep: Tensor) -> Tensor:
    """Those of the tokens (B, N, D) that `keep` (B, K) numbers: (B, K, D)."""
    return tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))


def put_back(tokens: Tensor, keep: Tensor, number: int) -> Tensor:
    """The inverse of `chosen`, among `number` tokens of which the others are zero."""
    return tokens.new_zeros(len(tokens), number, tokens.shape[-1]).scatter(1, keep[..., None].expand_as(tokens), tokens)


def chosen_rotation(rotation: Tensor, keep: Tensor, context: int) -> Tensor:
    """Rotations (L + N, d / 2, 2) of a context of L tokens and of those chosen among the N after it: (B, 1, L + K, d / 2, 2)."""
    return torch.cat([rotation[:context].expand(len(keep), -1, -1, -1), rotation[context:][keep]], dim=1)[:, None]


def resample(table: Tensor, rows: int, columns: int) -> Tensor:
    """Learned positions (n^2, D) of a square map, for one of another size: (rows columns, D), bicubic (Dosovitskiy et al. 2021).

    At rows = columns = n they are the table itself.
    """
    side = math.isqrt(len(table))
    grid = table.unflatten(0, (side, side)).permute(2, 0, 1)[None]
    return F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)[0].flatten(1).mT
