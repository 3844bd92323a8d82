"""Running code where nothing is computed: on the meta device, with everything that it would allocate and multiply written down.

Tensors on the meta device have a shape and no numbers. Small tensors that code looks at (times, rows, lengths of captions) stay on
the CPU with their numbers; whatever meets a meta tensor becomes one. Code that asks for a number that is not there gets a 1, so that
all that may be asked of a picture (is it finite, is guidance on) is answered with yes. Attention counts as a fused kernel, which keeps
queries, keys, values, answer, and one logarithm of a sum for each query. What the meta device answers is a function of the arguments'
shapes and not of their numbers, and slow; so a kernel that comes again with arguments alike, as in the next block, is not asked again.

Not seen: what kernels allocate inside, and what an allocator keeps back.
"""

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from mezzotint.train.context import Group

META = torch.device("meta")
Made = tuple[torch.Size, tuple[int, ...], torch.dtype]
LARGE = 1 << 16  # elements; nobody looks at the numbers of what is larger
FACTORIES = (
    torch.ops.aten.randn,
    torch.ops.aten.rand,
    torch.ops.aten.zeros,
    torch.ops.aten.ones,
    torch.ops.aten.empty,
    torch.ops.aten.full,
)


class Rehearsal(TorchDispatchMode):
    """Within, new storages and their ends are written down, in order, and so is the work that kernels do.

    steps: (number of a storage, bytes), negative at its end. work: for every kernel its operations, a multiplication and its addition
    being two, and the bytes that it reads and writes. now: bytes held.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, int]] = []
        self.work: list[tuple[int, int]] = []
        self.now = 0
        self.casts: set[int] = set()
        self._half = False
        self._numbers: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._count = 0
        self._answers: dict[Any, list[Made] | None] = {}

    def __enter__(self) -> "Rehearsal":
        self._kernel = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self._attention  # type: ignore[assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        F.scaled_dot_product_attention = self._kernel

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Within, types are those of torch's autocast to bfloat16, which has none for the meta device. `casts` are copies of weights."""
        self._half = True
        try:
            with _Autocast(self):
                yield
        finally:
            self._half = False

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        if self._half:
            q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        if q.device != META:
            return self._kernel(q, k, v, **keywords)
        answer: Tensor = _Attention.apply(self, q, k.to(META), v.to(META))
        return answer

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        read = list(_tensors((*arguments, *keywords.values())))
        if any(x.device == META for x in read):
            if function is torch.ops.aten._local_scalar_dense.default:
                return torch.ones((), dtype=arguments[0].dtype).item()
            if any(x.device != META for x in read):
                arguments, keywords = tree_map(lambda x: x.to(META) if isinstance(x, Tensor) else x, (arguments, keywords))
            if keywords.get("device") is not None:
                keywords = {**keywords, "device": META}
        elif function.overloadpacket in FACTORIES and math.prod(arguments[0]) > LARGE:
            keywords = {key: value for key, value in keywords.items() if key != "generator"} | {"device": META}
            function, arguments = torch.ops.aten.empty.memory_format, arguments[:1]
        out = self._answer(function, arguments, keywords)
        made, known = list(_tensors(out if isinstance(out, tuple | list) else (out,))), self._count
        for x in made:
            self.number(x)
        if self._count > known or function._schema.is_mutable:  # not for views
            count = COUNTS.get(function.overloadpacket)
            flops = count(*arguments, **keywords, out_val=out) if count else 0
            self.work.append((flops, sum(map(_size, (*read, *made)))))
        return out

    def _answer(self, function: Any, arguments: Any, keywords: Any) -> Any:
        """What a kernel gives: new tensors where it is known what it makes of such arguments."""
        if function._schema.is_mutable:
            return function(*arguments, **keywords)
        key = function, _alike(arguments), _alike(tuple(keywords.items()))
        known = self._answers.get(key)
        if known is not None:
            made = [torch.empty_strided(size, stride, dtype=dtype, device=META) for size, stride, dtype in known]
            return made[0] if len(function._schema.returns) == 1 else tuple(made)
        out = function(*arguments, **keywords)
        if key not in self._answers:
            self._answers[key] = _description(out, [*_tensors((*arguments, *keywords.values()))])
        return out

    def number(self, x: Tensor) -> int:
        """The number of a tensor's storage, from its first sight to its end."""
        storage = x.untyped_storage()
        known = self._numbers.get(storage._cdata)
        if known is not None:
            return known
        self._count += 1
        number, size, address = self._count, storage.nbytes(), storage._cdata
        self._numbers[address] = number
        self._step(number, size)

        def ended(reference: object) -> None:
            del self._numbers[address], self._references[number]
            self._step(number, -size)

        self._references[number] = weakref.ref(storage, ended)
        return number

    def _step(self, number: int, size: int) -> None:
        self.steps.append((number, size))
        self.now += size

    def held(self, shares: Mapping[int, float]) -> float:
        """Bytes of some storages, by their numbers, of each so much for a byte."""
        return sum(size * shares[number] for number, size in self.steps if size > 0 and number in shares)

    def peak(self, start: int, end: int, shares: Mapping[int, float]) -> float:
        """The most bytes held at once from one step to another. shares: of storages that count for more or less than their size."""
        now, most = 0.0, 0.0
        for place, (number, size) in enumerate(self.steps[:end]):
            now += size * shares.get(number, 1.0)
            most = max(most, now) if place >= start else now
        return most


class Deserted(Group):
    """A group whose others are not there. sent: bytes that this rank has sent them; nothing comes back, in the right shape."""

    def __init__(self, size: int) -> None:
        super().__init__(size, 0)
        self.sent = 0

    def exchange(self, x: Tensor) -> Tensor:
        self.sent += _size(x) - _size(x) // self.size
        return torch.empty_like(x)

    def collect(self, x: Tensor) -> Tensor:
        self.sent += _size(x) * (self.size - 1)
        return x.new_empty(self.size, *x.shape)

    def add(self, x: Tensor) -> Tensor:
        self.sent += _size(x) - _size(x) // self.size
        return torch.empty_like(x[0])


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among the arguments or answers of a kernel, which may be in lists."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple | list):
            yield from (y for y in x if isinstance(y, Tensor))


def _alike(x: Any) -> Any:
    """What arguments of a kernel have in common that make it answer alike; numbers have their type beside them, since 1 equals 1.0."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device
    if isinstance(x, tuple | list):
        return tuple(map(_alike, x))
    return type(x), x


def _description(out: Any, read: Sequence[Tensor]) -> list[Made] | None:
    """Sizes, strides and types from which an answer can be made anew; None where storages are shared, or have numbers."""
    made = list(out) if isinstance(out, tuple) else [out]
    if not all(isinstance(x, Tensor) and x.device == META for x in made):
        return None
    storages = {x.untyped_storage()._cdata for x in made}
    apart = len(storages) == len(made) and storages.isdisjoint(x.untyped_storage()._cdata for x in read)
    whole = all(x.untyped_storage().nbytes() == x.numel() * x.itemsize for x in made)
    return [(x.shape, x.stride(), x.dtype) for x in made] if apart and whole else None


def _size(x: Tensor) -> int:
    """Bytes of a tensor's elements, each once."""
    return min(x.numel() * x.itemsize, x.untyped_storage().nbytes())


# What autocast computes in bfloat16, and in float32, of what networks here use; in between, the wider type of the arguments decides.
LOWER = {
    "linear",
    "matmul",
    "__matmul__",
    "bmm",
    "mm",
    "addmm",
    "einsum",
    "conv1d",
    "conv2d",
    "conv_transpose2d",
    "grouped_mm",
    "_grouped_mm",
}
UPPER = {"layer_norm", "group_norm", "rms_norm", "softmax", "norm", "pow", "exp", "rsqrt", "sum"}


class _Autocast(TorchFunctionMode):
    """`Rehearsal.autocast`. A backward pass suspends it, as it suspends all modes of its kind. copies: of weights that have gradients,
    which autocast makes once and keeps until it is left, also where a block is computed again for its gradient.
    """

    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__()
        self.rehearsal = rehearsal
        self.copies: dict[Tensor, Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        name = getattr(function, "__name__", "")
        if name in LOWER:
            arguments, keywords = tree_map(partial(self._cast, torch.bfloat16), (arguments, keywords))
        elif name in UPPER:
            arguments, keywords = tree_map(partial(self._cast, torch.float32), (arguments, keywords))
        return function(*arguments, **keywords)

    def _cast(self, dtype: torch.dtype, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if x in self.copies:
            return self.copies[x]
        cast = x.to(dtype)
        if isinstance(x, torch.nn.Parameter):
            self.rehearsal.casts.add(self.rehearsal.number(cast))
            if x.requires_grad and torch.is_grad_enabled():
                self.copies[x] = cast
        return cast


class _Attention(torch.autograd.Function):
    """Fused attention as far as memory and operations go: two products forward, five backward, as torch counts them."""

    @staticmethod
    def forward(context: Any, rehearsal: Rehearsal, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        answer, sums = q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)
        context.save_for_backward(q, k, v, answer, sums)
        flops = 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        context.work = rehearsal, flops, sum(map(_size, (q, k, v, answer)))
        rehearsal.work.append(context.work[1:])
        return answer

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        rehearsal, flops, size = context.work
        rehearsal.work.append((flops * 5 // 2, 2 * size))
        return (None, *(torch.empty_like(x) for x in context.saved_tensors[:3]))


def _grouped_products(tokens: Tensor, weights: Tensor, *rest: Any, **keywords: Any) -> int:
    """Every token meets the weights of one expert; torch does not count it."""
    return 2 * tokens.numel() * weights.shape[-1]


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any, **keywords: Any) -> int:
    """As many as forward for each of the two gradients; torch counts those of grouped convolutions as if they had one group."""
    *_, transposed, _, _, asked = rest[:8]
    forward = 2 * (x if transposed else gradient).numel() * weight[0].numel()
    return forward * sum(asked[:2])


COUNTS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten._grouped_mm: _grouped_products,
    torch.ops.aten.convolution_backward: _convolution_backward,
}
