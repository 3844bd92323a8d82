"""Files of weights, read tensor by tensor. What is refused, and whole pipelines, are in `tests/test_exchange.py`."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARDS, SIDE = 8, 1600  # of 10 MB each
MEASURE = """
import resource, sys
from pathlib import Path
import torch
from mezzotint.weights.files import read_folder, write_folder

torch.zeros(1).clone()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kept = {name: tensor for name, tensor in read_folder(Path(sys.argv[1]), "model").items()}
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sizes = {name: x.nbytes for name, x in kept.items()}
write_folder(Path(sys.argv[1]) / "written", "model", kept, sizes, sum(sizes.values()) // 8)
last = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024, (last - after) * 1024, sum(sizes.values()))
"""


def test_shards_are_read_and_written_with_one_of_them_in_memory_beside_what_is_kept(tmp_path: Path) -> None:
    # Their index names them in another order than their files.
    for shard in range(SHARDS):
        save_file({f"{part}.{shard}": torch.full((SIDE // 2, SIDE), float(shard)) for part in "ab"}, tmp_path / f"{shard}.safetensors")
    index = {"weight_map": {f"{part}.{shard}": f"{shard}.safetensors" for part in "ab" for shard in range(SHARDS)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, for_writing, kept = map(int, run.stdout.split())
    assert kept == SHARDS * SIDE**2 * 4
    assert grown < kept + 2.5 * kept / SHARDS, "all files at once would be twice the weights"
    assert len(list((tmp_path / "written").glob("*.safetensors"))) == SHARDS
    assert for_writing < kept / 2, "a copy of all would be another of the weights"
