"""Published sizes on a GPU, in bfloat16, beside diffusers' classes: time, memory, and the share of the GPU's own rate of products.

DiT-XL/2 takes training steps (256 tokens, batches of 128); SD3 medium and FLUX dev draw (4,096 tokens, one picture). Ours and the
peer are timed alternately in one run, eager and compiled whole by torch.compile into one graph each, both with random weights, none of
them zero: products of zeros draw less power and are faster. That outputs agree is what the parity tests are for. `ratio` is the peer's
time over ours. `share` is what our operations (`mezzotint.models.cost`; a step is three forwards) and time make of the rate of a large
bfloat16 product, measured before each. `memory_gib` is the most allocated, with the weights of both there and the gradients of one.

    python bench/models_gpu.py [--only dit-xl-2 sd3-medium flux-dev] [--rounds 9] [--tiny]
"""

import argparse
import gc
import importlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models import inputs
from parity import scatter
from torch import Tensor, nn

from mezzotint.models import PRESETS
from mezzotint.models.cost import flops

SQUARE = 8192


@dataclass(frozen=True)
class Case:
    """A published network: its parity test, the side of its latents, pictures a batch, tokens of a text, and whether it trains."""

    module: str
    parity: str
    side: int
    batch: int
    text: int
    trains: bool


CASES = {
    "dit-xl-2": Case("test_class_dit", "TestClassDiT", 32, 128, 0, trains=True),
    "sd3-medium": Case("test_mmdit", "TestMMDiT", 128, 1, 333, trains=False),
    "flux-dev": Case("test_flux", "TestFlux", 128, 1, 512, trains=False),
}


def seconds(function: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def product_rate(device: torch.device, square: int) -> float:
    """Operations per second of a square bfloat16 product, the best of a few."""
    a = torch.randn(square, square, device=device, dtype=torch.bfloat16)
    return 2 * square**3 / min(seconds(lambda: a @ a, device) for _ in range(8))


def work(call: Callable[[], Tensor], trains: bool) -> Callable[[], object]:
    """A forward, or a forward and backward."""

    def draw() -> None:
        with torch.no_grad():
            call()

    def train() -> None:
        call().float().square().mean().backward()

    return train if trains else draw


def measured(name: str, rounds: int, tiny: bool, device: torch.device) -> dict[str, float]:
    """What there is to say of a network, eager and compiled."""
    case = CASES[name]
    parity: Any = getattr(importlib.import_module(case.module), case.parity)()
    config: Any = next(iter(parity.configs.values())) if tiny else PRESETS[name]()
    side, batch = (8, 2) if tiny else (case.side, case.batch)
    x, t, cond = inputs(parity, config, side, batch, case.text or 1)
    x, t, cond = x.to(device, torch.bfloat16), t.to(device), cond.to(device).in_precision(torch.bfloat16)
    nets: dict[str, nn.Module] = {}
    for who, build in (("ours", config.build), ("theirs", lambda: parity.peer(config))):
        with device:
            nets[who] = scatter(build().to(device, torch.bfloat16))  # one after the other: they start in float32
    calls = {"ours": lambda net: net(x, t, cond), "theirs": lambda net: parity.call(net, x, t.to(torch.bfloat16), cond)}
    operations = flops(config, (side // config.patch) ** 2, case.text) * batch * (3 if case.trains else 1)
    result: dict[str, float] = {}
    for mode in ("eager", "compiled"):
        rate = product_rate(device, 256 if tiny else SQUARE)
        run = {}
        for who, net in nets.items():
            forward = torch.compile(net, fullgraph=True) if mode == "compiled" else net
            run[who] = work(lambda who=who, forward=forward: calls[who](forward), case.trains)  # type: ignore[misc]
        times: list[dict[str, float]] = []
        memory: dict[str, float] = {}
        for number in range(rounds + 2):  # the first two compile and allocate
            row = {}
            for who in sorted(run, reverse=bool(number % 2)):
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                row[who] = seconds(run[who], device)
                memory[who] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
                nets[who].zero_grad()
            times.append(row)
        ours = statistics.median(row["ours"] for row in times[2:])
        result |= {
            f"ratio.{mode}.{name}": statistics.median(row["theirs"] / row["ours"] for row in times[2:]),
            f"ms.{mode}.{name}": 1e3 * ours,
            f"share.{mode}.{name}": operations / ours / rate,
            f"memory_gib.{mode}.{name}": memory["ours"],
            f"memory_gib_theirs.{mode}.{name}": memory["theirs"],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="the parity tests' first configurations, on any machine, to see that it runs")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("this machine has no GPU; --tiny shows on any that it runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, float | str] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    for name in options.only:
        result |= measured(name, options.rounds, options.tiny, device)
        torch.compiler.reset()  # graphs keep their networks
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
