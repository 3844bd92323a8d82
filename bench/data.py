"""What the data engine does in a second, and how well.

Each file `bench/data_NAME.py` is a part: `measure(options)` gives its keys. Those of all parts, where they are there:

`scan_per_s`           files of a folder of small images whose size is read in a second, from a warm cache; `scan_per_cpu_s` in
                       one of processor time; `pillow_per_s` beside it, of one thread.
`curate_ratio`         images a second through the stages of curation, over the peer's.
`loader_ratio.PEER`    images a second from a table, over a peer's loader of the same images.
`dedup_recall`         share of the planted copies that are found; `dedup_false_per_10k`: of others that are taken for copies.

    python bench/data.py [--only scan] [--files 100000] [--rounds 5]
"""

import argparse
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

PARTS = sorted(file.stem.removeprefix("data_") for file in Path(__file__).parent.glob("data_*.py"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, metavar="NAME")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    result: dict[str, float | int | str] = {"cores": os.cpu_count() or 1, "files": options.files}
    for name in options.only:
        result |= importlib.import_module(f"data_{name}").measure(options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
