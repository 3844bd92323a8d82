"""Maps between two sets of names for the same weights, read both ways from one list of rules.

A rule says which name of ours holds the numbers of which names of theirs. In a name ``*`` stands for a block's number and is
carried over; a name of a layer stands for its weight and its bias. Where a name fits several rules, the first one counts. Where
the two sides cut or turn their tensors differently, the rule has a `Change`:

    Rule("blocks.*.image.out", "transformer_blocks.*.attn.to_out.0")
    Rule("blocks.*.image.qkv.linear", ("blocks.*.to_q", "blocks.*.to_k", "blocks.*.to_v"), fuse(1, 1, 1))
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mezzotint.errors import listed

Side = Literal["ours", "theirs"]
Axis = Literal["rows", "columns"]
OTHER: dict[Side, Side] = {"ours": "theirs", "theirs": "ours"}
Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Change:
    """A reversible rearrangement: tensors of theirs -> tensors of ours, and back.

    moves: "rows" where it moves whole rows (slices of the first axis), whatever is in them; "columns" where it does the same to
    every row, and maps one tensor to one; None where it does neither. It says how a product B A is rearranged by its factors.
    """

    to_ours: Callable[[Tensors], Tensors]
    to_theirs: Callable[[Tensors], Tensors]
    moves: Axis | None = None

    @property
    def reversed(self) -> "Change":
        """The same with the sides exchanged."""
        return Change(self.to_theirs, self.to_ours, self.moves)

    def then(self, after: "Change") -> "Change":
        """This one first on the way to ours, and last on the way back."""
        return Change(lambda parts: after.to_ours(self.to_ours(parts)), lambda parts: self.to_theirs(after.to_theirs(parts)))


def each(to_ours: Callable[[Tensor], Tensor], to_theirs: Callable[[Tensor], Tensor], moves: Axis | None = None) -> Change:
    """A change of one tensor into one."""
    return Change(lambda parts: [to_ours(x) for x in parts], lambda parts: [to_theirs(x) for x in parts], moves)


def fuse(*shares: int) -> Change:
    """Several tensors of theirs, one below the other, are one of ours; their rows are in the ratio of `shares`."""

    def split(parts: Tensors) -> Tensors:
        (whole,) = parts
        share = len(whole) // sum(shares)
        return whole.split([share * n for n in shares])

    return Change(lambda parts: [torch.cat(list(parts))], split, "rows")


def stack(count: int, parts: int = 1) -> Change:
    """`count` times `parts` tensors of theirs: parts one below the other, counts along a new axis in front."""
    return Change(
        lambda given: [torch.cat(list(given)).unflatten(0, (count, -1))],
        lambda given: given[0].flatten(0, 1).chunk(count * parts),
    )


def copies(count: int) -> Change:
    """Theirs holds the same tensor `count` times; ours once. ValueError where the copies differ."""

    def first(parts: Tensors) -> Tensors:
        if not parts[0].is_meta and not all(torch.equal(parts[0], x) for x in parts[1:]):
            raise ValueError(f"{count} tensors that must be copies of each other differ, of shape {tuple(parts[0].shape)}")
        return parts[:1]

    return Change(first, lambda parts: list(parts) * count, "rows")


def _swap(x: Tensor) -> Tensor:
    return x.roll(len(x) // 2, dims=0)


SAME = each(lambda x: x, lambda x: x, "rows")
SWAP = each(_swap, _swap, "rows")
"""The two halves of the rows exchanged: (scale, shift) for (shift, scale)."""


def conv(patch: int) -> Change:
    """A convolution over patches (D, C, p, p) is a linear layer over them (D, p p C), channels last."""
    return each(
        lambda x: x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x,
        lambda x: x.unflatten(1, (patch, patch, -1)).permute(0, 3, 1, 2) if x.ndim == 2 else x,
        "columns",
    )


def columns(patch: int) -> Change:
    """A linear layer over patches with channels first (D, C p p) has them last (D, p p C)."""
    return each(
        lambda x: x.unflatten(1, (-1, patch * patch)).mT.flatten(1) if x.ndim == 2 else x,
        lambda x: x.unflatten(1, (patch * patch, -1)).mT.flatten(1) if x.ndim == 2 else x,
        "columns",
    )


def rows(patch: int) -> Change:
    """A linear layer to patches with channels first, rows (C p p), has them last, rows (p p C)."""
    return each(
        lambda x: x.unflatten(0, (-1, patch * patch)).transpose(0, 1).flatten(0, 1),
        lambda x: x.unflatten(0, (patch * patch, -1)).transpose(0, 1).flatten(0, 1),
        "rows",
    )


def reshape(ours: tuple[int, ...], theirs: tuple[int, ...]) -> Change:
    """The same numbers in the same order, under another shape."""
    return each(lambda x: x.reshape(ours), lambda x: x.reshape(theirs))


@dataclass(frozen=True)
class Rule:
    """Which names of ours hold the numbers of which names of theirs; see the module. One name may be given as a string."""

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    change: Change = SAME

    def side(self, side: Side) -> tuple[str, ...]:
        """The names of one side."""
        names = self.ours if side == "ours" else self.theirs
        return (names,) if isinstance(names, str) else names


@dataclass(frozen=True)
class Move:
    """A rule at one place: with block numbers, and for the weight or the bias."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    change: Change


class Names:
    """A map between our names and theirs."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._patterns: dict[Side, list[tuple[Rule, re.Pattern[str]]]] = {
            side: [(rule, _pattern(name)) for rule in self.rules for name in rule.side(side)] for side in ("ours", "theirs")
        }

    def plan(self, names: Iterable[str], side: Side, wanted: Collection[str] | None = None) -> list[Move]:
        """What becomes of names of one side, in their order. Needs no tensors, so that files can be read piece by piece.

        wanted: names of the other side, all of which must come out and no others. ValueError that lists, as this side calls them,
        names that no rule knows or that are not wanted, and those that are needed beside the given ones.
        """
        names, other = list(names), OTHER[side]
        moves: dict[tuple[str, ...], Move] = {}
        left = []
        for name in names:
            move = self._move(name, side)
            if move is None or (wanted is not None and any(made not in wanted for made in getattr(move, other))):
                left.append(name)
            else:
                moves.setdefault(move.ours, move)
        known, needed = set(names), [name for move in moves.values() for name in getattr(move, side)]
        made = {name for move in moves.values() for name in getattr(move, other)}
        for name in (name for name in wanted or () if name not in made):
            move = self._move(name, other)
            needed += [name] if move is None else getattr(move, side)
        _complain(left, [name for name in dict.fromkeys(needed) if name not in known])
        return list(moves.values())

    def knows(self, names: Iterable[str], side: Side = "theirs") -> bool:
        """Whether there is a rule for every name."""
        return all(self._move(name, side) for name in names)

    def to_ours(self, state: Mapping[str, Tensor], wanted: Collection[str] | None = None) -> dict[str, Tensor]:
        """A state dict of theirs under our names, those that are wanted. ValueError as in `plan`."""
        result: dict[str, Tensor] = {}
        for move in self.plan(state, "theirs", wanted):
            result |= zip(move.ours, move.change.to_ours([state[name] for name in move.theirs]), strict=True)
        return result

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of ours under their names. ValueError as in `plan`."""
        result: dict[str, Tensor] = {}
        for move in self.plan(state, "ours"):
            result |= zip(move.theirs, move.change.to_theirs([state[name] for name in move.ours]), strict=True)
        return result

    def _move(self, name: str, side: Side) -> Move | None:
        for rule, pattern in self._patterns[side]:
            if match := pattern.fullmatch(name):
                *numbers, leaf = match.groups()
                ours = tuple(_numbered(n, numbers) + leaf for n in rule.side("ours"))
                theirs = tuple(_numbered(n, numbers) + leaf for n in rule.side("theirs"))
                return Move(ours, theirs, rule.change)
        return None


class Renamed(Mapping[str, Tensor]):
    """A state dict of ours under their names; each tensor is made when it is asked for. ValueError as in `Names.plan`."""

    def __init__(self, state: Mapping[str, Tensor], names: Names) -> None:
        self._state = state
        self._moves = {name: move for move in names.plan(state, "ours") for name in move.theirs}

    def __getitem__(self, name: str) -> Tensor:
        move = self._moves[name]
        return move.change.to_theirs([self._state[ours] for ours in move.ours])[move.theirs.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moves)

    def __len__(self) -> int:
        return len(self._moves)


def fill(net: nn.Module, state: Mapping[str, Tensor], names: Names) -> None:
    """Fill a network of ours with their weights. ValueError that lists what is missing, left over or of another shape."""
    own = net.state_dict()
    given = names.to_ours(state, own)
    _check_shapes(own, given)
    net.load_state_dict(given)


def stream(net: nn.Module, state: Mapping[str, Tensor], meta: Mapping[str, Tensor], names: Names) -> None:
    """As `fill`, but tensors of `state` are read, put in place and let go of one by one; `meta` are the same without numbers.

    They take the place of the network's own, which may be on the meta device, in the precision that they come in.
    """
    own = net.state_dict()
    _check_shapes(own, names.to_ours(meta, own))
    for move in names.plan(state, "theirs"):
        for name, tensor in zip(move.ours, move.change.to_ours([state[n] for n in move.theirs]), strict=True):
            put(net, name, tensor.contiguous())


def put(net: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the parameter or the buffer of this name; whether it is trained stays."""
    place, _, leaf = name.rpartition(".")
    module = net.get_submodule(place)
    if (old := module._parameters.get(leaf)) is not None:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = tensor


def _check_shapes(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    shapes = {name: (tuple(given[name].shape), tuple(own[name].shape)) for name in own}
    wrong = [f"{name} is {a} instead of {b}" for name, (a, b) in shapes.items() if a != b]
    if wrong:
        raise ValueError(f"{len(wrong)} weights have another shape: {listed(wrong)}")


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*", r"(\d+)") + r"((?:\.weight|\.bias)?)")


def _numbered(name: str, numbers: Sequence[str]) -> str:
    for number in numbers:
        name = name.replace("*", number, 1)
    return name


def _complain(left: Sequence[str], missing: Sequence[str]) -> None:
    parts = [f"{len(names)} {what}: {listed(names)}" for what, names in (("left over", left), ("missing", missing)) if names]
    if parts:
        raise ValueError(f"the weights do not fit this architecture; {'; '.join(parts)}")
