"""What 10,000 spoilt files do to the door by which files come in: how many were shown and had a header, the
time, and what the process took of the memory for it. It ends, or something is wrong.

    python bench/data_fuzz.py
"""

import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "data"))

INPUTS = 10_000


def main() -> None:
    from test_header import feed

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    usable = feed(seed=1, count=INPUTS)
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"fuzz_inputs": INPUTS, "fuzz_usable": usable, "fuzz_cpu_s": seconds, "fuzz_grown_mb": grown}))


if __name__ == "__main__":
    main()
