"""What a solver costs outside the network, against the scheduler of diffusers that does the same.

Both step through 20 steps with a velocity (diffusers' DDIM: noise) that is already there, and are timed alternately in one run;
`<solver>.<small|large>` is the median over rounds of ours over theirs, per step, at (4, 4, 8, 8) and (4, 16, 128, 128), and `ratio`
the geometric mean of all. Stochastic solvers draw the same noise on both sides. One thread; what a solver does once, before
its first step, counts as a part of its steps, and theirs (`set_timesteps`) is left out.

    python bench/solvers.py [--rounds 15]

Levels: small at most 0.5; large at most 1.05 for euler, 0.4 for ddim, dpmpp_2m and unipc.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from mezzotint.flow import solvers
from mezzotint.flow.time import grid

STEPS = 20
SHAPES = {"small": (4, 4, 8, 8), "large": (4, 16, 128, 128)}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
PEERS: dict[str, Callable[[], Any]] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "heun": FlowMatchHeunDiscreteScheduler,
    "dpmpp_2m": lambda: DPMSolverMultistepScheduler(**FLOW),
    "dpmpp_2m_sde": lambda: DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
}
OURS = {**solvers.SOLVERS, "ddim": solvers.ddim}


def ours(name: str, x: torch.Tensor, v: torch.Tensor) -> float:
    """Seconds per network call of a whole run."""
    times, generator = grid(STEPS), torch.Generator().manual_seed(0)
    start = time.process_time()
    for _ in OURS[name](lambda x, t: v, x, times, generator=generator):
        pass
    return (time.process_time() - start) / (solvers.network_calls(name, STEPS))


def theirs(name: str, x: torch.Tensor, v: torch.Tensor) -> float:
    scheduler, generator = PEERS[name](), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(STEPS)
    extra = {"generator": generator} if name == "dpmpp_2m_sde" else {}
    start = time.process_time()
    for t in scheduler.timesteps:
        x = scheduler.step(v, t, x, return_dict=False, **extra)[0]
    return (time.process_time() - start) / len(scheduler.timesteps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    result: dict[str, float] = {}
    microseconds: dict[str, list[float]] = {}
    with torch.no_grad():
        for size, shape in SHAPES.items():
            x, v = torch.randn(shape), torch.randn(shape)
            for name in PEERS:
                pairs = [(ours(name, x, v), theirs(name, x, v)) for _ in range(options.rounds + 1)][1:]
                result[f"{name}.{size}"] = statistics.median(a / b for a, b in pairs)
                microseconds[f"{name}.{size}"] = [round(1e6 * statistics.median(side), 1) for side in zip(*pairs, strict=True)]
    ratio = math.exp(statistics.fmean(math.log(value) for value in result.values()))
    print(json.dumps({"ratio": ratio, **result, "microseconds_ours_theirs": microseconds}))


if __name__ == "__main__":
    main()
