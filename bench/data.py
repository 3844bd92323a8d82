"""What the data engine does in a second, and how well: its programs one after another, and their numbers in one JSON object.

Each is a program of its own, `python bench/data_NAME.py --help`, with the sizes of the levels as its defaults or flags:

`scan`     `scan_per_s`: files of a folder of small images whose size is read in a second, from a warm cache; `scan_per_cpu_s`: in one of
           processor time; `pillow_per_s`: by Pillow, in one thread.
`curate`   `curate_ratio`: the time of a script of PIL, numpy and a pool of processes for the same work, over ours.
`loader`   `loader_ratio.PEER`: images a second from a table, over a peer's loader of the same images.
`dedup`    `dedup_recall`: share of the planted copies that are found; `dedup_false_per_10k`: of 10,000 reported pairs, those that are none.
`fuzz`     what spoilt files do: `fuzz_usable`, `fuzz_cpu_s`, `fuzz_grown_mb`.

    python bench/data.py [--quick] [--only scan loader]
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WHOLE: dict[str, list[str]] = {
    "scan": ["--files", "100000"],
    "curate": ["--rows", "20000", "--tenfold"],
    "loader": [],
    "dedup": ["--originals", "1000", "--rows", "100000", "--flat-rows", "0"],
    "fuzz": [],
}
QUICK: dict[str, list[str]] = {
    "scan": ["--files", "10000", "--rounds", "3"],
    "curate": ["--rows", "160"],
    "loader": ["--images", "96", "--rounds", "3"],
    "dedup": ["--originals", "50", "--rows", "1000", "--flat-rows", "0"],
    "fuzz": [],
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="sizes that end in minutes")
    parser.add_argument("--only", nargs="+", default=list(WHOLE), choices=list(WHOLE), metavar="NAME")
    options = parser.parse_args(arguments)
    result: dict[str, object] = {}
    for name in options.only:
        program = [sys.executable, str(Path(__file__).parent / f"data_{name}.py"), *(QUICK if options.quick else WHOLE)[name]]
        said = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True).stdout
        result |= json.loads(said.splitlines()[-1])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
