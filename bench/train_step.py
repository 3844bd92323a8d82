"""How much of the machine's matrix rate a training step of the tiny recipe reaches.

Step and peer (a square sgemm) are timed alternately in one run, because the clock and the neighbours of a machine change
from second to second. `sgemm_share` is the median over rounds of (model FLOPs of a step / its time) / (rate of the peer
around it). Model FLOPs are those of the matrix products and attention, forward and backward, as torch counts them;
everything else that a step does (norms, activations, the optimizer, the average, drawing the data) only costs time.

    python bench/train_step.py [--size s] [--rounds 15]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.recipes import tiny
from mezzotint.train.trainer import Trainer

SQUARE = 1024


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def sgemm_rate(a: torch.Tensor, b: torch.Tensor, times: int = 8) -> float:
    """FLOPs per second of the best of a few square products."""
    return 2 * SQUARE**3 / min(timed(lambda: torch.mm(a, b)) for _ in range(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="s", choices=list(tiny.SIZES))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    config = tiny.worlds(options.size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder))
    a, b = torch.randn(SQUARE, SQUARE), torch.randn(SQUARE, SQUARE)
    shares, rates, seconds, images = [], [], [], []
    for number in range(options.rounds + 2):
        trainer.step = number
        counter = FlopCounterMode(display=False)
        before = sgemm_rate(a, b)
        step = timed(trainer._train_step)
        after = sgemm_rate(a, b)
        # The same batch again, for its FLOPs: counting slows a step down, so it is not done while timing.
        trainer.loader.position -= 1
        with counter:
            trainer._train_step()
        if number < 2:  # the first steps allocate
            continue
        rate = (before + after) / 2
        shares.append(counter.get_total_flops() / step / rate)
        rates.append(rate)
        seconds.append(step)
        images.append(config.train.batch / step)
    result = {
        "sgemm_share": statistics.median(shares),
        "sgemm_gflops": statistics.median(rates) / 1e9,
        "step_ms": 1e3 * statistics.median(seconds),
        "images_per_second": statistics.median(images),
        "threads": torch.get_num_threads(),
        "size": options.size,
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
