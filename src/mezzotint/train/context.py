"""Context parallelism: the tokens of one sample on several ranks (DeepSpeed-Ulysses, Jacobs et al. 2023).

Between attentions every rank of a group has its share of the tokens and all heads. Before an attention an all-to-all exchanges tokens
for heads, so that every rank attends over all tokens with its share of the heads, and another one after it exchanges them back.
Blocks are cut from outside: where tokens enter the first of a row of blocks of one kind they are split, and where they leave
the last one they are put together again; what is not in blocks is done by every rank of the group alike.

Gradients: the ranks of a group compute one graph together, whose loss is the mean of theirs. Every exchange has its adjoint for its
gradient (that of an all-to-all is one, that of a gathering is a sum that is scattered, that of a split is padded with zeros), so the sum
over all ranks of the gradients of a weight is right wherever it stands, before, in or after the blocks.

Where we differ: text is split like the image, so that no rank does the work of another; tokens that do not divide are padded, and masked
where they are keys.

P ranks of a group, B batch, N tokens, n = ceil(N / P) tokens of a rank, h heads, d channels of a head.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.errors import UserError
from mezzotint.methods.denoise import DenoiseConfig
from mezzotint.methods.ladd import LADDConfig
from mezzotint.methods.method import MethodConfig
from mezzotint.methods.reflow import ReflowConfig
from mezzotint.methods.repa import REPAConfig
from mezzotint.models.attention import Softmax, attending, softmax
from mezzotint.models.blocks import AdaBlock, JointBlock
from mezzotint.models.class_dit import AdaLNZeroBlock, InContextBlock
from mezzotint.models.denoiser import blocks
from mezzotint.models.dit_air import DiTAirBlock
from mezzotint.models.flux import SingleBlock
from mezzotint.models.fuse_dit import FuseDiTBlock
from mezzotint.models.pixart import PixArtBlock
from mezzotint.models.uvit import UViTBlock


@dataclass(frozen=True)
class Cut:
    """Which arguments of a block have tokens. tokens: those that it changes and returns, of which the first are the image's. beside: those
    that it only reads. rotation, mask: what these run over, one after the other.
    """

    tokens: tuple[str, ...] = ("x",)
    beside: tuple[str, ...] = ()
    rotation: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()


CUTS: dict[type[nn.Module], Cut] = {
    AdaBlock: Cut(beside=("context",), rotation=("context", "x"), mask=("context", "x")),
    JointBlock: Cut(("image", "text"), rotation=("text", "image"), mask=("text", "image")),
    SingleBlock: Cut(rotation=("x",), mask=("x",)),
    AdaLNZeroBlock: Cut(),
    InContextBlock: Cut(),
    PixArtBlock: Cut(beside=("text",), mask=("text",)),
    DiTAirBlock: Cut(rotation=("x",), mask=("x",)),
    UViTBlock: Cut(mask=("x",)),
    FuseDiTBlock: Cut(beside=("said",), rotation=("x",), mask=("said", "x")),
}


class Group:
    """The ranks that share a sample, of which this is number `place`. What they send each other is here, and nowhere else."""

    def __init__(self, size: int, place: int, processes: dist.ProcessGroup | None = None) -> None:
        self.size, self.place, self.processes = size, place, processes

    def exchange(self, x: Tensor) -> Tensor:
        """(P, ...) -> (P, ...): part i goes to rank i, and comes from it."""
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=self.processes)
        return out

    def collect(self, x: Tensor) -> Tensor:
        """(...) -> (P, ...) of all ranks."""
        out = x.new_empty(self.size, *x.shape)
        dist.all_gather([*out], x, group=self.processes)
        return out

    def add(self, x: Tensor) -> Tensor:
        """(P, ...) -> (...): the sum over the ranks of this one's part."""
        out = torch.empty_like(x[0])
        dist.reduce_scatter(out, [*x], group=self.processes)
        return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, group: Group) -> Tensor:
        context.group = group
        return group.exchange(x.contiguous())

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        return context.group.exchange(gradients[0].contiguous()), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, group: Group) -> Tensor:
        context.group = group
        return group.collect(x.contiguous())

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        return context.group.add(gradients[0].contiguous()), None


def own_share(x: Tensor, group: Group, axis: int = 1) -> Tensor:
    """This rank's n of the N tokens along an axis; zeros where there are no more."""
    length = math.ceil(x.shape[axis] / group.size)
    after = x.ndim - 1 - axis % x.ndim
    padded = F.pad(x, (0, 0) * after + (0, length * group.size - x.shape[axis]))
    return padded.narrow(axis, group.place * length, length)


def gathered(x: Tensor, group: Group, length: int) -> Tensor:
    """The inverse of `own_share` along axis 1: (B, n, D) -> (B, N, D)."""
    whole: Tensor = _Gather.apply(x, group)
    return whole.transpose(0, 1).flatten(1, 2)[:, :length]


def attend_spread(kernel: Softmax, group: Group, only: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """A kernel of attention, (B, h, n, d) tokens of a rank -> (B, h, n, d).

    mask: over the keys of all ranks, one rank's after the other's; where there is none, `only` is.
    """
    # In the type that autocast would have, which is less to send.
    q, k, v = _heads(q.to(v.dtype), group), _heads(k.to(v.dtype), group), _heads(v, group)
    attended = kernel(q, k, v, only if mask is None else mask)
    parts: Tensor = _Exchange.apply(attended.unflatten(2, (group.size, -1)).movedim(2, 0), group)  # (P, B, h / P, n, d)
    return parts.transpose(0, 1).flatten(1, 2)


def _heads(x: Tensor, group: Group) -> Tensor:
    """(B, h, n, d) -> (B, h / P, P n, d)."""
    parts: Tensor = _Exchange.apply(x.unflatten(1, (group.size, -1)).transpose(0, 1), group)  # (P, B, h / P, n, d)
    return parts.movedim(0, 2).flatten(2, 3)


def check(net: nn.Module, size: int) -> None:
    """UserError where the tokens of a network cannot be spread over so many ranks."""
    name = type(net).__name__
    if strange := sorted({type(block).__name__ for block in blocks(net) if type(block) not in CUTS}):
        able = ", ".join(kind.__name__ for kind in CUTS)
        raise UserError(
            f"parallel.context cannot spread the tokens of {name}, which has {', '.join(strange)} (it can those of {able}); set it to 1"
        )
    for field_name in ("heads", "kv_heads"):
        heads = vars(net.config).get(field_name, size)
        if heads % size:
            raise UserError(f"parallel.context must divide the {heads} {field_name} of {name}, got {size}")


def check_methods(methods: Iterable[MethodConfig]) -> None:
    """UserError where a technique reads what single blocks say, of which a rank has a part only, or leaves tokens out between them."""
    for method in methods:
        if isinstance(method, REPAConfig | LADDConfig) or (isinstance(method, ReflowConfig) and method.perceptual):
            raise UserError(f"parallel.context cannot be used with {method.kind}, which reads features of blocks; set it to 1")
        if isinstance(method, DenoiseConfig) and method.mask:
            raise UserError("parallel.context cannot be used with method.mask, which leaves patches out between blocks; set it to 1")


def share_attention(net: nn.Module, group: Group) -> None:
    """Attentions of a network's blocks are over the tokens of all ranks; done before anything repeats or compiles a block.

    A block's forward gets one more argument, the first: the mask of attentions that have none.
    """
    for block in blocks(net):
        block.forward = partial(_together, block.forward, group)


def _together(forward: Callable[..., Any], group: Group, only: Tensor | None, *args: Any) -> Any:
    with attending(partial(attend_spread, softmax, group, only)):
        return forward(*args)


def share_tokens(net: nn.Module, group: Group) -> None:
    """Tokens of a network are spread from the first to the last block of a kind; done after all else that wraps a block."""
    every = blocks(net)
    for number, block in enumerate(every):
        first = number == 0 or type(every[number - 1]) is not type(block)
        last = number == len(every) - 1 or type(every[number + 1]) is not type(block)
        if first:
            row = _Row(CUTS[type(block)], group)
        block.forward = partial(row.run, block.forward, inspect.signature(type(block).forward), first, last)


@dataclass
class _Row:
    """Blocks of one kind, between which tokens stay spread. lengths: N of every argument that has tokens, in the call that is going on."""

    cut: Cut
    group: Group
    lengths: dict[str, int] = field(default_factory=dict)

    def run(self, forward: Callable[..., Any], signature: inspect.Signature, first: bool, last: bool, *args: Any, **keywords: Any) -> Any:
        """A block's forward with arguments and results of all ranks, or of this one's share within the row."""
        bound = signature.bind(None, *args, **keywords)  # None for the block itself
        bound.apply_defaults()
        given = bound.arguments
        for name in (*(self.cut.tokens if first else ()), *self.cut.beside):
            self.lengths[name] = given[name].shape[1]
            given[name] = own_share(given[name], self.group)
        if self.cut.rotation and given["rotation"] is not None:
            given["rotation"] = self._rotation(given["rotation"])
        image, device = self.cut.tokens[0], given[self.cut.tokens[0]].device
        padded = any(length % self.group.size for length in self.lengths.values())
        if self.cut.mask and (given["mask"] is not None or padded):
            given["mask"] = self._mask(given["mask"], self.cut.mask, device)
        only = self._mask(None, (image,), device) if self.lengths[image] % self.group.size else None
        out = forward(only, *list(given.values())[1:])
        return self._whole(out) if last else out

    def _rotation(self, rotation: Tensor) -> Tensor:
        """(..., N, d / 2, 2) over several tokens, one after the other -> this rank's shares of them."""
        parts = rotation.split([self.lengths[name] for name in self.cut.rotation], dim=-3)
        return torch.cat([own_share(part, self.group, axis=-3) for part in parts], dim=-3)

    def _mask(self, mask: Tensor | None, names: Sequence[str], device: torch.device) -> Tensor:
        """(B, K) over several tokens -> (B, P k) over what the ranks have of them, one rank after the other. None: all but padding."""
        lengths = [self.lengths[name] for name in names]
        if mask is None:
            mask = torch.ones(1, sum(lengths), dtype=torch.bool, device=device)
        shares = [math.ceil(length / self.group.size) for length in lengths]
        pairs = zip(mask.split(lengths, dim=1), shares, strict=True)
        padded = [F.pad(part, (0, self.group.size * n - part.shape[1])).unflatten(1, (self.group.size, n)) for part, n in pairs]
        return torch.cat(padded, dim=2).flatten(1)

    def _whole(self, out: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(out, Tensor):
            return gathered(out, self.group, self.lengths[self.cut.tokens[0]])
        return tuple(gathered(x, self.group, self.lengths[name]) for x, name in zip(out, self.cut.tokens, strict=True))
