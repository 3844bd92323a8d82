"""Whether the native engine and a Ray cluster of two nodes make the same table, row for row, and how long each took.

python bench/data_engines.py [--rows 24]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mezzotint.curation.cuts import curate
from mezzotint.curation.stage import EngineName
from mezzotint.data import table as tables
from mezzotint.data.table import Table
from mezzotint.recipes.curation import photos

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "curation"))

import dirty

ENGINES: dict[str, tuple[EngineName, int]] = {"one": ("native", 1), "ray": ("ray", 2)}  # and workers


def curated(place: str, engine: EngineName, workers: int) -> float:
    """Seconds that the recipe took in this process, where no other engine has been at work."""
    recipe = photos()
    recipe.optional = ()
    start = time.perf_counter()
    curate(Table.open(place), recipe, engine, workers)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--curate", nargs=2, metavar=("TABLE", "ENGINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.curate:
        place, name = options.curate
        print(curated(place, *ENGINES[name]))
        return
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # it is 15: on cores that others have, processes take minutes to start
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    tables.ROWS = 8  # several fragments
    samples = dirty.dirty(dirty.photos(options.rows // 3), max(1, options.rows // 18))
    made, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ENGINES:
            place = f"{folder}/{name}.lance"
            Table.create(place, dirty.rows(samples))
            command = [sys.executable, __file__, "--curate", place, name]
            seconds[name] = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])
            table = Table.open(place)
            made[name] = table.read([column for column in table.columns if column != "content"])
    same = made["one"].equals(made["ray"])
    print(json.dumps({"rows": len(samples), "nodes": 2, "same": same, **{f"seconds.{name}": value for name, value in seconds.items()}}))
    cluster.shutdown()
    sys.exit(not same)


if __name__ == "__main__":
    main()
