"""Pairs of noise and of what a teacher's flow carries it to, as a source of batches.

A pair is a seed, a caption and a latent, and a function of its number: noise is drawn from the seed alone, as in sampling. Pairs are
drawn when they are first asked for and kept in files of `SHARD`, each written whole or not at all, so that a run that is stopped goes
on with the same pairs, and that other runs find them there.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mezzotint import config
from mezzotint.data.batch import Batch, Source
from mezzotint.data.folder import FolderConfig
from mezzotint.data.worlds import WorldsConfig
from mezzotint.errors import UserError
from mezzotint.flow.solvers import randn_like
from mezzotint.pipeline import WEIGHTS_FILE, Pipeline, Sampling, find_device, load
from mezzotint.places import folder_of

SHARD = 256
DETERMINISTIC = ("euler", "heun", "edm", "dpmpp_2m", "unipc")
DESCRIPTION = "pairs.json"
PIECES, PIECE = 64, 1 << 16  # read for a fingerprint: their number, and bytes of each


@dataclass
class PairsConfig(config.Config, kind="pairs"):
    """folder: where pairs are kept. teacher: whose (see `pipeline.load`). captions: where theirs come from, and held-out pictures.

    number: of pairs. sampling: how the teacher draws, by a solver without fresh noise, and accurately: 25 calls or more. seed: of the
    first pair's noise; pair k has seed + k.
    """

    folder: str = "runs/pairs"
    teacher: str = "starter"
    number: int = 8192
    sampling: Sampling = field(default_factory=lambda: Sampling(solver="heun", steps=15, guidance=2.0))
    captions: WorldsConfig | FolderConfig = field(default_factory=WorldsConfig)
    seed: int = 0

    @property
    def size(self) -> int:
        """Side in pixels of the captions' pictures."""
        return self.captions.size

    def build(self) -> "Pairs":
        return Pairs(self)


def fingerprint(path: Path) -> str:
    """What tells a large file from others: a digest of its length, its beginning and pieces spread over the rest."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for piece in range(PIECES):
            file.seek(piece * size // PIECES)
            digest.update(file.read(PIECE))
    return digest.hexdigest()


class Pairs:
    """A `Source` of batches without pictures, whose latents and noise belong together. Their order is the same in every epoch."""

    def __init__(self, config: PairsConfig) -> None:
        if config.sampling.solver not in DETERMINISTIC:
            raise ValueError(f"solver must be one that draws no noise, one of {', '.join(DETERMINISTIC)}, got {config.sampling.solver!r}")
        if config.number < 1:
            raise ValueError(f"number must be at least 1, got {config.number}")
        self.config = config
        self.folder = Path(config.folder)
        self.captions: Source = config.captions.build()
        self._teacher: Pipeline | None = None
        self._recent: dict[int, tuple[Tensor, list[str]]] = {}
        self.version = self._describe()

    def _describe(self) -> str:
        """Write what the pairs of the folder are, and of which weights, and digest it. UserError where they are others."""
        config, weights = replace(self.config, folder=""), fingerprint(folder_of(self.config.teacher) / WEIGHTS_FILE)
        here = config.to_data() | {"weights": weights}
        path = self.folder / DESCRIPTION
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            there: dict[str, Any] = json.loads(path.read_text()) if path.exists() else dict(here)
            if there.pop("weights", "") != weights or PairsConfig.from_data(there) != config:
                raise UserError(
                    f"{self.folder} holds pairs of other settings or another teacher; choose another --data.folder, or remove it"
                )
            path.write_text(json.dumps(here, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; choose another folder with --data.folder") from error
        return hashlib.sha256(json.dumps(here).encode()).hexdigest()[:16]

    def batch(self, number: int, size: int) -> Batch:
        pairs = [(number * size + row) % self.config.number for row in range(size)]
        latents, prompts = zip(*(self._pair(pair) for pair in pairs), strict=True)
        stacked = torch.stack(latents).float()
        noise = randn_like(stacked, self._generators(pairs))
        nothing = torch.empty(size, 3, 0, 0)
        return Batch(nothing, list(prompts), [f"pair-{pair}" for pair in pairs], latents=stacked, noise=noise)

    def held_out(self, size: int) -> Batch:
        return self.captions.held_out(size)

    def _generators(self, pairs: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(self.config.seed + pair) for pair in pairs]

    def _pair(self, pair: int) -> tuple[Tensor, str]:
        shard, row = divmod(pair, SHARD)
        if shard not in self._recent:
            self._recent = dict(list(self._recent.items())[-1:]) | {shard: self._read(shard)}
        latents, prompts = self._recent[shard]
        return latents[row], prompts[row]

    def _read(self, shard: int) -> tuple[Tensor, list[str]]:
        path = self.folder / f"{shard:06d}.safetensors"
        if not path.exists():
            self._draw(shard, path)
        with safe_open(path, "pt") as file:
            return file.get_tensor("latents"), json.loads(file.metadata()["prompts"])

    @torch.no_grad()
    def _draw(self, shard: int, path: Path) -> None:
        """Let the teacher draw a shard, and keep it."""
        if self._teacher is None:
            self._teacher = load(self.config.teacher).to(find_device())
        settings = self.config.sampling
        size = min(SHARD, self.config.number - shard * SHARD)
        prompts, drawn = self.captions.batch(shard, size).prompts, []
        for start in range(0, size, settings.batch):
            pairs = range(shard * SHARD + start, shard * SHARD + min(start + settings.batch, size))
            cond = self._teacher.encode(prompts[start : start + len(pairs)])
            *_, last = self._teacher.steps(cond, self._generators(list(pairs)), settings)
            drawn.append(last.x.half().cpu())
        part = path.with_suffix(".part")
        save_file({"latents": torch.cat(drawn)}, part, metadata={"prompts": json.dumps(prompts)})
        part.replace(path)
