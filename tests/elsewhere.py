"""A stand-in for a GPU: a device that tensors say they are on while their numbers are on the CPU.

What would fail on a GPU fails here: an operation on tensors of both devices, a generator of the other one, numpy. And what would make
the host wait there is written down: a number that is asked for, a mask that is indexed with, a copy that is not told not to block.
The device is called meta, since torch has that one everywhere and asks no driver for it.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

HERE, THERE = torch.device("cpu"), torch.device("meta")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
LOOKING = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.multinomial.default,
)


class Away(Tensor):
    """A tensor of the device. numbers: what it is."""

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "Away":
        shape = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset()}
        away = Tensor._make_wrapper_subclass(cls, numbers.size(), dtype=numbers.dtype, device=THERE, **shape)  # type: ignore[attr-defined]
        away.numbers = numbers
        found: Away = away
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = Away(self.numbers.detach().clone())
        copied = torch.nn.Parameter(copied) if isinstance(self, torch.nn.Parameter) else copied
        return memo.setdefault(id(self), copied.requires_grad_(self.requires_grad))

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return computed(function, arguments, keywords or {}, Counter())


class Elsewhere(TorchDispatchMode):
    """While it lasts, `torch.device("meta")` is such a device. waits: how often the host waits for it, by the line that makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return computed(function, arguments, keywords or {}, self.waits)

    def __enter__(self) -> Self:
        self.made = _Made()
        self.made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.made.__exit__(*error)


class _Made(TorchFunctionMode):
    """Tensors of Python's numbers are made on the CPU and sent from there, as to a GPU."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if function in (torch.tensor, torch.as_tensor):
            target = keywords.get("device") or torch.get_default_device()
            if torch.device(target) == THERE:
                return function(*arguments, **{**keywords, "device": HERE}).to(THERE)
        return function(*arguments, **keywords)


def computed(function: Any, arguments: Any, keywords: Any, waits: Counter[str]) -> Any:
    """What a kernel of the device answers, by that of the CPU."""
    tensors = list(_tensors((arguments, keywords)))
    away = [x for x in tensors if isinstance(x, Away)]
    here = [x for x in tensors if not isinstance(x, Away)]
    target = keywords["device"] if keywords.get("device") is not None else THERE if away else HERE
    target = arguments[0].device if function is aten.copy_.default else torch.device(target)
    generators = [x for x in (*arguments, *keywords.values()) if isinstance(x, torch.Generator)]
    if generators and target == THERE:
        raise RuntimeError(f"{function}: a generator of the CPU cannot draw on the device")
    if away and function not in (*COPIES, *INDEXING) and any(x.ndim for x in here):
        raise RuntimeError(f"{function}: tensors on the device and on the CPU, of shapes {[tuple(x.shape) for x in here if x.ndim]}")
    if function in INDEXING and away and not isinstance(arguments[0], Away):
        raise RuntimeError(f"{function}: a tensor on the CPU is indexed from the device")
    if (away or target == THERE) and _waits(function, arguments, keywords, target):
        waits[_where()] += 1
    plain, named = tree_map(lambda x: x.numbers if isinstance(x, Away) else x, (arguments, keywords))
    if named.get("device") is not None:
        named = {**named, "device": HERE}
    answer = function(*plain, **named)
    if function is aten._to_copy.default and any(answer is x for x in plain):
        answer = answer.clone()
    changed = {id(x.numbers if isinstance(x, Away) else x): x for x in tensors} if function._schema.is_mutable else {}
    return tree_map(lambda x: _placed(x, changed, target) if isinstance(x, Tensor) else x, answer)


def _placed(x: Tensor, changed: dict[int, Tensor], target: torch.device) -> Tensor:
    return changed[id(x)] if id(x) in changed else Away(x) if target == THERE else x


def _waits(function: Any, arguments: Any, keywords: Any, target: torch.device) -> bool:
    """Whether the host would wait for the device."""
    if function in INDEXING:
        return any(x is not None and (x.dtype == torch.bool or not isinstance(x, Away)) for x in arguments[1])
    if function in COPIES[:2]:
        source = arguments[0] if function is COPIES[0] else arguments[1]
        return isinstance(source, Away) != (target == THERE) and not keywords.get("non_blocking")
    return function in LOOKING


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


def _where() -> str:
    """The innermost line of the package."""
    frames = [frame for frame in traceback.extract_stack() if "/mezzotint/" in frame.filename]
    return f"{frames[-1].filename.rsplit('/mezzotint/')[-1]} {frames[-1].name}" if frames else "?"
