"""How often the judge reads a clean picture back into the scene it was drawn from, and how fast Worlds draws.

python bench/worlds.py [--scenes 10000]
"""

import argparse
import json
import random
import time

import torch

from mezzotint.worlds import judge
from mezzotint.worlds.render import render
from mezzotint.worlds.scene import Scene
from mezzotint.worlds.splits import draw

NEAR = 0.03  # how far a thing may be read from where it is, as a share of the picture's side
AT_ONCE = 1000


def same(read: Scene | None, truth: Scene) -> bool:
    """Whether the setting and every thing are right. Things are matched in order of kind and place."""
    if read is None or (read.background, read.style, read.light) != (truth.background, truth.style, truth.light):
        return False
    pairs = zip(*(sorted(s.things, key=lambda t: (t.shape, t.colour, t.size, round(8 * t.x), t.y)) for s in (read, truth)), strict=False)
    return len(read.things) == len(truth.things) and all(
        (a.shape, a.colour, a.size) == (b.shape, b.colour, b.size) and abs(a.x - b.x) < NEAR and abs(a.y - b.y) < NEAR for a, b in pairs
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=10_000)
    options = parser.parse_args()
    result: dict[str, float] = {"scenes": options.scenes}
    for size in (32, 64):
        rng, right = random.Random(size), 0
        for _ in range(0, options.scenes, AT_ONCE):
            truth = [draw(rng, "any") for _ in range(AT_ONCE)]
            right += sum(map(same, judge.read(render(truth, size)), truth))
        result[f"judge_accuracy.{size}"] = right / options.scenes
    torch.set_num_threads(1)
    start = time.perf_counter()
    render(truth, 32)
    result["renders_per_second_and_core"] = len(truth) / (time.perf_counter() - start)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
