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


def model_flops(trainer: Trainer, size: int) -> int:
    """The FLOPs of the last step's forward and backward pass; counted apart, since counting takes time."""
    batch = trainer.source.batch(trainer.loader.position - 1, size)
    with FlopCounterMode(display=False) as counter:
        trainer._accumulate([batch], ("student",), 1, {})
    for optimizer in trainer.optimizers["student"]:
        optimizer.zero_grad()
    return counter.get_total_flops()


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
        before = sgemm_rate(a, b)
        step = timed(trainer._train_step)
        after = sgemm_rate(a, b)
        if number < 2:  # the first steps allocate
            continue
        rate = (before + after) / 2
        shares.append(model_flops(trainer, config.train.batch) / step / rate)
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
