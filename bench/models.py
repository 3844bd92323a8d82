"""Every architecture beside diffusers' class of it, with the same weights: the time of a forward pass and of forward and backward.

Ours and the peer are timed alternately in one run, in float32 on one thread of the CPU, one picture a batch, with about 50M parameters
and 576 or 1,024 tokens. The time is that of the processor, which a neighbour on the machine changes less than the clock's. `forward` and
`step` are the peer's time over ours, the median over rounds; `ratio` is their geometric mean, and `geomean` that of all ratios. The
peers, and where their weights go, are those of the parity tests; that outputs agree is checked before anything is timed.

    python bench/models.py [--only flux unet] [--rounds 9] [--tiny]
"""

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.models import (
    ClassDiTConfig,
    Cond,
    FluxConfig,
    HiDreamConfig,
    Lumina2Config,
    MMDiTConfig,
    PixArtConfig,
    SanaConfig,
    UNetConfig,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "models"))

TEXT = 77  # tokens
EQUAL = 1e-4


@dataclass(frozen=True)
class Case:
    """An architecture: its parity test, a configuration of medium size, and the side of the picture."""

    parity: str
    config: Any
    side: int


WIDTHS = {"text_width": 768, "pooled_width": 512}
CASES = {
    "unet": Case("TestUNet", UNetConfig(widths=(128, 256, 320), depths=(1, 1, 1), heads=(2, 4, 5), linear=True), 32),
    "class_dit": Case("TestClassDiT", ClassDiTConfig(width=512, depth=11, heads=8, span=24.0), 48),
    "pixart": Case("TestPixArt", PixArtConfig(width=576, depth=9, heads=8, text_width=768, span=24.0), 48),
    "sana": Case("TestSana", SanaConfig(width=576, depth=9, heads=18, cross_heads=8, text_width=768), 24),
    "mmdit": Case("TestMMDiT", MMDiTConfig(width=512, depth=6, heads=8, table=64, base=24, **WIDTHS), 48),
    "flux": Case("TestFlux", FluxConfig(width=512, joint=3, single=6, heads=8, axes=(16, 24, 24), **WIDTHS), 48),
    "lumina2": Case(
        "TestLumina2",
        Lumina2Config(width=576, depth=7, refiners=1, heads=8, kv_heads=4, axes=(24, 24, 24), hidden=2304, time_width=576, text_width=768),
        48,
    ),
    "hidream": Case(
        "TestHiDream",
        HiDreamConfig(
            width=384,
            joint=2,
            single=4,
            layers=(0, 1, 2, 2, 2, 2),
            heads=6,
            axes=(32, 16, 16),
            hidden=1024,
            shared=512,
            states_width=768,
            **WIDTHS,
        ),
        48,
    ),
}


def inputs(parity: Any, config: Any, side: int, rows: int = 1, length: int = TEXT) -> tuple[Tensor, Tensor, Cond]:
    """Pictures, times, and the conditions of the parity test with texts of usual length."""
    x, t, cond = parity.inputs(config, (side, side), rows)
    text = torch.randn(rows, length, cond.text.shape[2]) if cond.text.numel() else cond.text
    states = None if cond.states is None else torch.randn(*cond.states.shape[:2], length, cond.states.shape[3])
    return x, t, replace(cond, text=text, states=states, mask=None, states_mask=None)


def timed(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def forward(call: Callable[[], Tensor]) -> float:
    with torch.no_grad():
        return timed(call)


def step(call: Callable[[], Tensor], net: nn.Module) -> float:
    net.zero_grad()
    return timed(lambda: call().square().mean().backward())


def measured(case: Case, name: str, rounds: int) -> dict[str, float]:
    """What there is to say of an architecture."""
    parity = getattr(importlib.import_module(f"test_{name}"), case.parity)()
    ours, theirs = parity.pair(case.config)
    x, t, cond = inputs(parity, case.config, case.side)
    nets = {"ours": ours, "theirs": theirs}
    calls: dict[str, Callable[[], Tensor]] = {"ours": lambda: ours(x, t, cond), "theirs": lambda: parity.call(theirs, x, t, cond)}
    with torch.no_grad():
        expected, difference = calls["theirs"](), calls["ours"]() - calls["theirs"]()
    if difference.norm() > EQUAL * expected.norm():
        raise RuntimeError(f"{name} and its peer differ: there is nothing to compare")
    seconds: dict[str, list[dict[str, float]]] = {"forward": [], "step": []}
    for number in range(rounds + 1):  # the first round allocates
        order = sorted(calls, reverse=bool(number % 2))
        seconds["forward"].append({who: forward(calls[who]) for who in order})
        seconds["step"].append({who: step(calls[who], nets[who]) for who in order})
    result = {f"{what}.{name}": statistics.median(s["theirs"] / s["ours"] for s in rows[1:]) for what, rows in seconds.items()}
    result |= {f"{what}_ms.{name}": 1e3 * statistics.median(s["ours"] for s in rows[1:]) for what, rows in seconds.items()}
    ratio = statistics.geometric_mean([result[f"forward.{name}"], result[f"step.{name}"]])
    parameters = sum(p.numel() for p in ours.parameters())
    return {f"ratio.{name}": ratio, **result, f"parameters.{name}": parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="the parity tests' first configurations, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, float | str] = {}
    for name in options.only:
        case = CASES[name]
        if options.tiny:
            parity = getattr(importlib.import_module(f"test_{name}"), case.parity)
            case = replace(case, config=next(iter(parity.configs.values())), side=8)
        result |= measured(case, name, options.rounds)
    ratios = [float(value) for key, value in result.items() if key.startswith("ratio.")]
    result |= {"geomean": statistics.geometric_mean(ratios), "torch": torch.__version__}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
