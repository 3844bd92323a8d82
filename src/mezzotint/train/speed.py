"""How fast a run is beside what its device can do: the operations of the networks, and the rate of the device's own matrix product."""

import time
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.models import Cond, DenoiserConfig
from mezzotint.models.cost import FORMULAS, flops, masked_flops

SIDES = {"cpu": 512, "cuda": 8192}  # of the square matrices: large enough that the rate no longer grows
TIMES = 4


@lru_cache
def matmul_rate(kind: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of a square matrix product on a kind of device: the best of a few, measured once a process.

    What a data sheet promises differs from this by the clock, the power limit and the neighbours, which a training step shares.
    """
    side = SIDES.get(kind, 4096)
    a = torch.ones(side, side, device=kind, dtype=dtype)
    seconds = []
    for _ in range(TIMES + 1):  # the first one warms up
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds[1:])


class Operations:
    """Counts the operations of denoisers by the closed formulas of `models.cost`, call by call, whatever a method calls them for.

    A call whose output has a gradient costs three times its forward: backward makes two products for every one. What a checkpoint
    computes twice counts once. Text encoders and codecs are left out, and networks without a formula.
    """

    def __init__(self) -> None:
        self.total = 0

    def watch(self, net: nn.Module, config: DenoiserConfig) -> None:
        """Count the calls of a network from now on."""
        if type(config) not in FORMULAS:
            return

        def count(module: nn.Module, inputs: tuple[Tensor, Tensor, Cond], output: Any) -> None:
            x, _, cond = inputs
            frames, tokens = prod(x.shape[2:-2]), prod(config.grid(*x.shape[-2:]))
            text = (cond.text if cond.tokens is None else cond.tokens).shape[1]
            tokens *= frames
            work = flops(config, tokens, text) if cond.keep is None else masked_flops(config, tokens, text, cond.keep.shape[1])
            self.total += len(x) * work * (3 if output.requires_grad else 1)

        net.register_forward_hook(count)
