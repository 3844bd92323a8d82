"""What the solver loop costs beside the network.

A pipeline of the tiny recipe draws a batch in 20 steps; the calls of the network (both branches of guidance in one) are
timed within it, and `overhead` is the rest of the loop's time as a share of the whole: the median over rounds.

    python bench/sampler.py [--solver euler] [--rounds 9]
"""

import argparse
import json
import statistics
import time

import torch

from mezzotint.flow.solvers import SOLVERS
from mezzotint.recipes import tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--solver", default="euler", choices=sorted(SOLVERS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    pipeline = tiny.worlds("s").pipeline.build().eval()
    settings = pipeline.config.sampling.replace(solver=options.solver, steps=options.steps)
    network, inside = pipeline.denoiser.forward, [0.0]

    def watched(*arguments: object) -> torch.Tensor:
        start = time.perf_counter()
        out = network(*arguments)
        inside[0] += time.perf_counter() - start
        return out

    pipeline.denoiser.forward = watched
    with torch.no_grad():
        cond = pipeline.encode([tiny.PREVIEWS[k % len(tiny.PREVIEWS)] for k in range(options.batch)])
        overheads, seconds = [], []
        for _ in range(options.rounds + 1):
            generators = [torch.Generator().manual_seed(k) for k in range(options.batch)]
            inside[0] = 0.0
            start = time.perf_counter()
            for step in pipeline.steps(cond, generators, settings):
                assert step.x.isfinite().all()
            seconds.append(time.perf_counter() - start)
            overheads.append(1 - inside[0] / seconds[-1])
    result = {
        "overhead": statistics.median(overheads[1:]),
        "seconds": statistics.median(seconds[1:]),
        "solver": options.solver,
        "steps": options.steps,
        "batch": options.batch,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
