"""What 10,000 spoilt files do to the door by which files come in: a part of `bench/data.py`. It ends, or something is wrong."""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "data"))

INPUTS = 10_000


def measure(options: argparse.Namespace) -> dict[str, float]:
    """How many were shown and had a header, the time, and what the process took of the memory for it, in megabytes."""
    from test_header import feed

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    usable = feed(seed=1, count=INPUTS)
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"fuzz_inputs": INPUTS, "fuzz_usable": usable, "fuzz_cpu_s": seconds, "fuzz_grown_mb": grown}
