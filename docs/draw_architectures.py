"""The tables of docs/architectures.md: operations of a forward, and the activations that it keeps for its gradients. Prints them.

Operations are the closed formulas of `models/cost.py`. Activations are measured on the meta device, where nothing is computed: what
autograd keeps, each storage once, weights and the picture aside. Every attention is counted as a fused one, which keeps its
queries, keys, values and answer, and for each query the logarithm of its sum.

python docs/draw_architectures.py
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.models import PRESETS, Cond, FuseDiTConfig
from mezzotint.models.cost import flops
from mezzotint.models.published import PUBLISHED, parameters

SIDES = (256, 512, 1024, 2048, 4096)
SHOWN = (
    "sd1.5",
    "sdxl",
    "simple-uvit-512",
    "uvit-h-2",
    "dit-xl-2",
    "pixart-alpha-1024",
    "sana-1600m",
    "sd3.5-medium",
    "flux-dev",
    "lumina-image-2",
    "hidream-i1",
    "transfusion-7b",
    "fuse-dit-2b",
)


class Fused(torch.autograd.Function):
    """Fused attention as far as memory goes."""

    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        answer, sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        context.save_for_backward(q, k, v, answer, sums)
        return answer


@contextmanager
def fused() -> Iterator[None]:
    """Within, every attention is `Fused`."""
    kept = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Any:
        return Fused.apply(q, k, v)

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = kept


def said(config: Any, text: int) -> Cond:
    """Every condition that a network may ask for, for one picture, in bfloat16."""
    width = vars(config).get
    layers, states = 32, width("states_width", 0)
    if isinstance(config, FuseDiTConfig):
        layers, states = config.depth, 2 * config.kv_heads * config.head
    return Cond(
        text=torch.randn(1, text, width("text_width", 0), dtype=torch.bfloat16),
        mask=None,
        pooled=torch.randn(1, width("pooled_width", 0), dtype=torch.bfloat16),
        label=torch.zeros(1, dtype=torch.int64),
        guidance=torch.randn(1),
        size=torch.randn(1, 2),
        states=torch.randn(1, layers, text, states, dtype=torch.bfloat16),
        tokens=torch.zeros(1, text, dtype=torch.int64),
    )


def kept(forward: Callable[[], object], weights: Any) -> int:
    """Bytes that autograd keeps of a forward, apart from weights."""
    known, sizes = {p.untyped_storage()._cdata for p in weights}, dict[int, int]()

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:
            sizes[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        graph = forward()  # holds on to what it keeps, so that no storage gets another's number
    del graph
    return sum(sizes.values())


@cache
def network(name: str) -> Any:
    """A preset's network on the meta device, in bfloat16."""
    config: Any = PRESETS[name]()
    with torch.device("meta"):
        return config.build().to(torch.bfloat16)


def activations(name: str, side: int) -> int:
    """Bytes that a forward of a preset keeps for its gradients: one picture of `side` pixels, bfloat16, no checkpoints."""
    net, made = network(name), PUBLISHED[name]
    config = net.config
    with torch.device("meta"), fused():
        cond = said(config, made.text)
        x = torch.randn(1, config.channels, side // made.factor, side // made.factor, dtype=torch.bfloat16)
        return kept(lambda: net(x, torch.rand(1), cond), [*net.parameters(), *net.buffers(), x])


def operations(name: str, side: int) -> int:
    """Operations of one forward of a preset for a picture of `side` pixels."""
    config: Any = PRESETS[name]()
    return flops(config, (side // PUBLISHED[name].factor // config.patch) ** 2, PUBLISHED[name].text)


def row(name: str, numbers: list[float]) -> str:
    """A line of a table."""
    config: Any = PRESETS[name]()
    cells = [f"`{name}`", config.kind, f"{parameters(config) / 1e9:.3g}B", *(f"{float(f'{number:.3g}'):,g}" for number in numbers)]
    return f"| {' | '.join(cells)} |"


def work_row(name: str) -> str:
    """Its line of the table of operations, in units of 10^12."""
    return row(name, [operations(name, side) / 1e12 for side in SIDES])


def memory_row(name: str) -> str:
    """Its line of the table of activations, in units of 10^9 bytes."""
    return row(name, [activations(name, side) / 1e9 for side in SIDES])


def table(line: Callable[[str], str]) -> str:
    """A table of all that are shown."""
    sides = " | ".join(f"{side} px" for side in SIDES)
    return "\n".join([f"| preset | architecture | parameters | {sides} |", "|---" * (3 + len(SIDES)) + "|", *map(line, SHOWN)])


def main() -> None:
    for line in (work_row, memory_row):
        print(table(line), end="\n\n")


if __name__ == "__main__":
    main()
