"""Adapters (LoRA, DoRA) as files, in the four dialects of the field, both ways.

- ``peft``: a folder with adapter_model.safetensors and adapter_config.json, as peft writes it. The layers have our names; a folder
  with diffusers' names is read, too.
- ``diffusers``: "transformer.X.lora_A.weight" or "unet.X..." with diffusers' names. Alpha stands in the file's header as JSON, where
  other readers do not look; written, it is folded into B, so that alpha is the rank and nobody can go wrong.
- ``kohya`` (sd-scripts): "lora_unet_X.lora_down.weight", "lora_up", "alpha", with dots as underscores; FLUX and SD3 under their
  original names, SDXL too, SD 1.5 under diffusers'.
- ``comfyui``: "diffusion_model.X.lora_A.weight" and "alpha", under the original names.

FLUX, SD3 and the UNets have all four. PixArt, SANA, Lumina 2 and HiDream have the first two, since `weights` knows no original names
of theirs; networks that nobody else has, the first. Adapters of text encoders are not read: their keys are left over, an error.

**Layers that one side keeps as one and the other as several.** A rule of `weights.names` says how the tensors of a layer are
rearranged, and its change says whether it moves rows or columns. The rows of B A are those of B, and its columns those of A: a
change of rows is done to B, a change of columns (a convolution over patches, its channels) to A. From this follows:

- one layer to several (qkv to q, k, v): all get the same A, and B is cut. Exact; every rank stays r.
- several layers to one: A one below the other, B block-diagonal. Exact; the rank is the sum of the ranks, 3r for q, k, v. Where all
  have the same A, it is kept once and the rank stays. A layer without an adapter is rows of zeros in B.
- back again: columns of B that are zero in a part are left out with their rows of A, so a block-diagonal B gives back the ranks it
  was made of, and a layer with nothing left gets no adapter.

Where alpha / r differs among layers that become one, B takes up the ratio. A DoRA's lengths m are moved like rows. To become one,
either all layers have a length or none: those of a layer without an adapter would be known from the network only.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mezzotint.errors import listed
from mezzotint.models.flux import FluxConfig
from mezzotint.models.hidream import HiDreamConfig
from mezzotint.models.lora import adapter_config, layers
from mezzotint.models.lumina2 import Lumina2Config
from mezzotint.models.mmdit import MMDiTConfig
from mezzotint.models.pixart import PixArtConfig
from mezzotint.models.sana import SanaConfig
from mezzotint.models.unet import UNetConfig
from mezzotint.weights import flux, hidream, lumina2, mmdit, pixart, sana, unet
from mezzotint.weights.names import SAME, Change, Move, Names, Side

Dialect = Literal["peft", "diffusers", "kohya", "comfyui"]
Header = dict[str, str]

PREFIXES: dict[Dialect, tuple[str, ...]] = {
    "peft": ("base_model.model.",),
    "diffusers": ("transformer.", "unet."),
    "kohya": ("lora_unet_",),
    "comfyui": ("diffusion_model.",),
}
OWN = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
LEAVES: dict[Dialect, tuple[str, str, str]] = {
    "peft": OWN,
    "diffusers": OWN,
    "kohya": ("lora_down.weight", "lora_up.weight", "dora_scale"),
    "comfyui": ("lora_A.weight", "lora_B.weight", "dora_scale"),
}
# Read in every dialect; some trainers leave the adapter's name in.
LEAF = re.compile(
    r"(?P<layer>.+)\.(?:(?P<A>lora_(?:A|down)(?:\.default)?\.weight)|(?P<B>lora_(?:B|up)(?:\.default)?\.weight)|(?P<alpha>alpha)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.default)?(?:\.weight)?|dora_scale))"
)
ADAPTER_HEADER = "lora_adapter_metadata"  # where diffusers keeps peft's description of the adapter


@dataclass(frozen=True)
class LowRank:
    """An adapter of one layer: A (r, in, ...), B (out, r), alpha, and a DoRA's lengths (out,)."""

    A: Tensor
    B: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return len(self.A)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def folded(self) -> "LowRank":
        """The same change with an alpha that is the rank."""
        return replace(self, B=_times(self.B, self.scale), alpha=float(self.rank))

    def named(self, layer: str, leaves: tuple[str, str, str]) -> dict[str, Tensor]:
        """Its tensors in a file."""
        kernel = (1,) * (self.A.ndim - 2)
        a, b, magnitude = (f"{layer}.{leaf}" for leaf in leaves)
        tensors = {a: self.A, b: self.B.reshape(*self.B.shape, *kernel), f"{layer}.alpha": torch.tensor(self.alpha)}
        if self.magnitude is not None:
            # Others keep one number a row of the weight; peft a vector, or with a convolution one number a channel of a picture.
            own = (1, -1, *kernel) if kernel else (-1,)
            tensors[magnitude] = self.magnitude.reshape(own if leaves == OWN else (-1, 1, *kernel))
        return tensors


Adapters = dict[str, LowRank]
Alpha = Callable[[str, int], float]
Shapes = dict[str, torch.Size]


def read(path: Path, config: Any) -> tuple[dict[str, Tensor], Header]:
    """A file or, in peft's dialect, a folder -> a state as in `models.lora`, and the file's header.

    config: of the network that the adapter is for. ValueError where the file is no safetensors, where layers fit nothing in this
    network, or where their sizes are others; it lists them all.
    """
    weights = path / "adapter_model.safetensors" if path.is_dir() else path
    if weights.suffix != ".safetensors":
        raise ValueError(f"path must be a .safetensors file or a folder with adapter_model.safetensors, got {path}")
    try:
        with safe_open(weights, "pt") as file:
            tensors, header = {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path must be a safetensors file, and {weights} is damaged or none: {error}") from error
    told = json.loads(header.pop(ADAPTER_HEADER, "{}"))
    if path.is_dir():
        settings = json.loads((path / "adapter_config.json").read_text())
    else:  # a prefix tells the parts of a pipeline apart
        prefix = _prefix(config, "diffusers")
        settings = {key.removeprefix(prefix): value for key, value in told.items() if key.startswith(prefix)}
    return to_ours(tensors, config, settings), header


def write(path: Path, state: Mapping[str, Tensor], config: Any, dialect: Dialect, header: Mapping[str, str] | None = None) -> None:
    """A state -> a file or, in peft's dialect, a folder; it replaces what is there.

    header: kept in the file, as `read` gave it. ValueError where no files of this architecture are known in this dialect.
    """
    weights = path / "adapter_model.safetensors" if dialect == "peft" else path
    if weights.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    tensors, settings = to_theirs(state, config, dialect)
    about = {"format": "pt", **(header or {})}
    if dialect == "diffusers":
        about[ADAPTER_HEADER] = json.dumps({f"{_prefix(config, dialect)}{key}": value for key, value in settings.items()})
    weights.parent.mkdir(parents=True, exist_ok=True)
    if dialect == "peft":
        (path / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    save_file(tensors, weights, about)


def dialect_of(keys: Iterable[str]) -> Dialect:
    """The dialect of a file by its keys. ValueError where they are of none or of several."""
    keys = list(keys)
    found = [dialect for dialect, prefixes in PREFIXES.items() if any(key.startswith(prefixes) for key in keys)]
    if len(found) != 1:
        known = ", ".join(f"{prefix}..." for prefixes in PREFIXES.values() for prefix in prefixes)
        raise ValueError(f"the keys of an adapter must begin in one way of {known}; got {listed(keys)}")
    return found[0]


def to_ours(tensors: Mapping[str, Tensor], config: Any, settings: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The tensors of a file, whatever its dialect -> a state. ValueError as in `read`.

    settings: peft's description of the adapter, if there is one. An alpha that is told neither there nor beside the layer is the rank.
    """
    dialect = dialect_of(tensors)
    given = _parsed(tensors, _alpha(settings or {}, _prefix(config, dialect)))
    candidates = [_moves(config, dialect, names) for names in _published(config, dialect)]
    moves, sizes = max(candidates, key=lambda candidate: len(given.keys() & candidate[1].keys()))
    carried = _carried(given, moves, sizes, "theirs")
    return {key: x for layer, pair in carried.items() for key, x in pair.named(layer, OWN).items()}


def to_theirs(state: Mapping[str, Tensor], config: Any, dialect: Dialect) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state -> the tensors of a file, and peft's description of the adapter, under the names of the dialect."""
    given = _parsed(state, _alpha({}))
    moves, sizes = _moves(config, dialect, _published(config, dialect)[0])
    carried = _carried(given, moves, sizes, "ours")
    if dialect == "diffusers":
        carried = {layer: pair.folded() for layer, pair in carried.items()}
    tensors = {key: x for layer, pair in carried.items() for key, x in pair.named(layer, LEAVES[dialect]).items()}
    if dialect in ("peft", "diffusers"):  # alpha is in the description
        tensors = {key: x for key, x in tensors.items() if not key.endswith(".alpha")}
    # Layers that were one share their A; a file keeps no shared memory.
    tensors = {key: x.detach().clone(memory_format=torch.contiguous_format) for key, x in tensors.items()}
    bare = {layer.removeprefix(_prefix(config, dialect)): pair for layer, pair in carried.items()}
    dora = any(pair.magnitude is not None for pair in bare.values())
    return tensors, adapter_config({k: pair.rank for k, pair in bare.items()}, {k: pair.alpha for k, pair in bare.items()}, dora)


def _one(make: Callable[[Any], Names]) -> Callable[[Any], list[Names]]:
    return lambda config: [make(config)]


def _kohya_unet(config: UNetConfig) -> list[Names]:
    """sd-scripts trains SDXL as Stability wrote it and SD 1.5 as diffusers did; other tools write either in both names."""
    both = [unet.diffusers(config), unet.original(config)]
    return both[::-1] if config.pooled_width else both


# The names under which the files of an architecture know its layers. The first ones are written, all are read.
PUBLISHED: dict[type, dict[Dialect, Callable[[Any], list[Names]]]] = {
    FluxConfig: {"diffusers": _one(flux.diffusers), "kohya": _one(flux.original), "comfyui": _one(flux.original)},
    MMDiTConfig: {"diffusers": _one(mmdit.diffusers), "kohya": _one(mmdit.original), "comfyui": _one(mmdit.original)},
    UNetConfig: {"diffusers": _one(unet.diffusers), "kohya": _kohya_unet, "comfyui": _one(unet.original)},
    PixArtConfig: {"diffusers": _one(pixart.diffusers)},
    SanaConfig: {"diffusers": _one(sana.diffusers)},
    Lumina2Config: {"diffusers": _one(lumina2.diffusers)},
    HiDreamConfig: {"diffusers": _one(hidream.diffusers)},
}


def _published(config: Any, dialect: Dialect) -> list[Names | None]:
    """None stands for our own names."""
    known = PUBLISHED.get(type(config), {})
    if dialect == "peft":
        return [None, *(known["diffusers"](config) if known else [])]
    if dialect not in known:
        raise ValueError(f"the names of {config.kind} in the dialect {dialect!r} are not known here; known: {', '.join(['peft', *known])}")
    return list(known[dialect](config))


def _prefix(config: Any, dialect: Dialect) -> str:
    return PREFIXES[dialect][isinstance(config, UNetConfig) if dialect == "diffusers" else 0]


def _moves(config: Any, dialect: Dialect, names: Names | None) -> tuple[list[Move], Shapes]:
    """What becomes of every layer that can have an adapter, and the shapes of their weights, by the layers' names on both sides."""
    with torch.device("meta"):
        weights = {f"{layer}.weight": module.weight for layer, module in layers(config.build()).items()}
    plan = [Move((key,), (key,), SAME) for key in weights] if names is None else names.plan(weights, "ours")

    def spelt(key: str) -> str:
        layer = key.removesuffix(".weight")
        return _prefix(config, dialect) + (layer.replace(".", "_") if dialect == "kohya" else layer)

    moves: list[Move] = []
    sizes: Shapes = {}
    for move in plan:
        ours, theirs = tuple(key.removesuffix(".weight") for key in move.ours), tuple(map(spelt, move.theirs))
        moves.append(Move(ours, theirs, move.change))
        sizes |= {layer: weights[key].shape for layer, key in zip(ours, move.ours, strict=True)}
        turned = move.change.to_theirs([weights[key] for key in move.ours])
        sizes |= {layer: x.shape for layer, x in zip(theirs, turned, strict=True)}
    return moves, sizes


def _alpha(settings: Mapping[str, Any], prefix: str = "") -> Alpha:
    """What peft's description says of a layer: the first pattern that fits its name or the end of it, or what is said of all."""
    patterns = settings.get("alpha_pattern") or {}

    def alpha(layer: str, rank: int) -> float:
        found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer.removeprefix(prefix)))
        value = float(next(found, settings.get("lora_alpha", rank)))
        return value * rank**0.5 if settings.get("use_rslora") else value

    return alpha


def _parsed(tensors: Mapping[str, Tensor], alpha: Alpha) -> Adapters:
    """Tensors of a file or of a state, by layer."""
    parts: dict[str, dict[str, Tensor]] = {}
    left = []
    for key, x in tensors.items():
        if match := LEAF.fullmatch(key):
            parts.setdefault(match["layer"], {})[str(match.lastgroup)] = x
        else:
            left.append(key)
    left += [layer for layer, part in parts.items() if not {"A", "B"} <= part.keys()]
    if left:
        raise ValueError(f"{len(left)} keys belong to no pair of a LoRA: {listed(left)}")
    adapters = {}
    for layer, part in parts.items():
        told = float(part["alpha"]) if "alpha" in part else alpha(layer, len(part["A"]))
        magnitude = part["magnitude"].flatten() if "magnitude" in part else None
        adapters[layer] = LowRank(part["A"], part["B"].flatten(1), told, magnitude)
    return adapters


def _carried(given: Adapters, moves: Sequence[Move], sizes: Shapes, side: Side) -> Adapters:
    """The adapters of one side as those of the other. ValueError that lists what fits nothing or has another size."""
    known = {layer for move in moves for layer in getattr(move, side)}
    if left := [layer for layer in given if layer not in known]:
        raise ValueError(f"{len(left)} layers of the adapter fit nothing in this network: {listed(left)}")
    if wrong := [layer for layer, pair in given.items() if not _fits(pair, sizes[layer])]:
        raise ValueError(f"{len(wrong)} layers of the adapter have another size than the network's: {listed(wrong)}")
    given = {layer: replace(pair, A=pair.A.reshape(-1, *sizes[layer][1:])) for layer, pair in given.items()}
    carried: Adapters = {}
    for move in moves:
        here, there = (move.ours, move.theirs) if side == "ours" else (move.theirs, move.ours)
        parts = [given.get(layer) for layer in here]
        if any(part is not None for part in parts):
            change = move.change.reversed if side == "ours" else move.change
            try:
                turned = carry(parts, change, [sizes[layer][0] for layer in here])
            except ValueError as error:
                raise ValueError(f"{', '.join(here)} cannot become {', '.join(there)}: {error}") from error
            carried |= {layer: pair for layer, pair in zip(there, turned, strict=True) if pair is not None}
    return carried


def _fits(pair: LowRank, size: torch.Size) -> bool:
    rows, inputs = size[0], size[1:].numel()
    long = pair.magnitude is None or len(pair.magnitude) == rows
    return long and pair.B.shape == (rows, pair.rank) and pair.A.numel() == pair.rank * inputs


def carry(parts: Sequence[LowRank | None], change: Change, rows: Sequence[int]) -> list[LowRank | None]:
    """What a change of weights (to_ours) makes of their adapters. rows: of every weight; None: a layer without an adapter."""
    given = [part for part in parts if part is not None]
    if change.moves is None:
        raise ValueError("its rows and columns are mixed, which no low-rank pair follows")
    if change.moves == "columns":
        (pair,) = given
        return [replace(pair, A=change.to_ours([pair.A])[0])]
    magnitudes = [part.magnitude for part in given if part.magnitude is not None]
    if 0 < len(magnitudes) < len(parts):
        raise ValueError("either all of them are a DoRA or none")
    scale, a, blocks = _joined(parts, rows)
    turned = change.to_ours(blocks)
    lengths: Sequence[Tensor | None] = change.to_ours(magnitudes) if magnitudes else [None] * len(turned)
    pairs = [LowRank(a, b, scale * len(a), m) for b, m in zip(turned, lengths, strict=True)]
    return _trimmed(pairs) if len(pairs) > 1 else list(pairs)


def _joined(parts: Sequence[LowRank | None], rows: Sequence[int]) -> tuple[float, Tensor, list[Tensor]]:
    """The scale alpha / r, an A for all parts, and every part's B for it."""
    given = [part for part in parts if part is not None]
    scale, first = max((part.scale for part in given), key=abs), given[0].A
    shared = all(torch.equal(part.A, first) for part in given)
    a = first if shared else torch.cat([part.A for part in given])
    blocks, start = [], 0
    for part, count in zip(parts, rows, strict=True):
        if part is None:
            blocks.append(given[0].B.new_zeros(count, len(a)))
        else:
            blocks.append(F.pad(_times(part.B, part.scale / scale if scale else 1.0), (start, len(a) - start - part.rank)))
            start += 0 if shared else part.rank
    return scale, a, blocks


def _times(x: Tensor, factor: float) -> Tensor:
    """In float32 where its own type cannot hold the product."""
    exact = x.float() * factor
    short = exact.to(x.dtype)
    return short if torch.equal(short.float(), exact) else exact


def _trimmed(pairs: Sequence[LowRank]) -> list[LowRank | None]:
    """Without the columns of B that are zero, and without adapters that have no others; a fresh adapter is left as it is."""
    if not any(pair.B.any() for pair in pairs):
        return list(pairs)
    trimmed: list[LowRank | None] = []
    for pair in pairs:
        used = pair.B.any(dim=0)
        if used.any():
            trimmed.append(replace(pair, A=pair.A[used], B=pair.B[:, used], alpha=pair.scale * int(used.sum())))
        else:
            trimmed.append(pair if pair.magnitude is not None else None)
    return trimmed
