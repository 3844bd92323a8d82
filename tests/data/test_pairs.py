"""Pairs of noise and samples: a function of their numbers, kept once they are drawn."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mezzotint.data.pairs import PairsConfig
from mezzotint.errors import UserError
from mezzotint.pipeline import Pipeline, Sampling


@pytest.fixture
def pairs(pipeline: Pipeline, tmp_path: Path) -> PairsConfig:
    pipeline.save(tmp_path / "teacher")
    sampling = Sampling(solver="euler", steps=3, guidance=2.0, batch=4)
    return PairsConfig(folder=str(tmp_path / "pairs"), teacher=str(tmp_path / "teacher"), number=10, sampling=sampling, seed=7)


def test_a_pair_is_what_the_teacher_draws_from_its_seed(pairs: PairsConfig, pipeline: Pipeline) -> None:
    batch = pairs.build().batch(0, 6)
    assert batch.latents is not None
    assert batch.noise is not None
    assert torch.allclose(pipeline(batch.prompts, seed=7, settings=pairs.sampling), batch.latents.clamp(-1, 1), atol=2e-3)  # half precision
    assert torch.equal(batch.noise[2], torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(9)))
    assert len(set(batch.prompts)) > 1
    assert batch.images.isfinite().flatten(1).all(1).tolist() == [True] * 6


def test_pairs_are_drawn_once_and_are_the_same_in_any_order(pairs: PairsConfig, tmp_path: Path) -> None:
    first = pairs.build()
    late, early = first.batch(1, 4), first.batch(0, 4)
    files = sorted((tmp_path / "pairs").glob("*.safetensors"))
    written = [file.stat().st_mtime_ns for file in files]
    again = pairs.build()
    for number, batch in ((0, early), (1, late)):
        same = again.batch(number, 4)
        assert torch.equal(same.latents, batch.latents)  # type: ignore[arg-type]
        assert torch.equal(same.noise, batch.noise)  # type: ignore[arg-type]
        assert same.prompts == batch.prompts
    assert [file.stat().st_mtime_ns for file in files] == written
    elsewhere = replace(pairs, folder=str(tmp_path / "others")).build().batch(1, 4)
    assert torch.equal(elsewhere.latents, late.latents)  # type: ignore[arg-type]
    wrapped = first.batch(2, 4)  # of ten pairs: 8, 9, 0, 1
    assert wrapped.ids == ["pair-8", "pair-9", "pair-0", "pair-1"]
    assert torch.equal(wrapped.latents[2:], early.latents[:2])  # type: ignore[index]


def test_several_files_hold_what_one_does(pairs: PairsConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mezzotint.data.pairs.SHARD", 4)
    batch = pairs.build().batch(0, 10)
    assert len(list((tmp_path / "pairs").glob("*.safetensors"))) == 3
    assert batch.latents is not None
    assert len(set(batch.ids)) == 10
    assert len(batch.latents.flatten(1).unique(dim=0)) == 10


def test_pairs_from_before_a_setting_existed_are_still_theirs(pairs: PairsConfig) -> None:
    drawn = pairs.build().batch(0, 4)
    path = Path(pairs.folder) / "pairs.json"
    described = json.loads(path.read_text())
    del described["captions"]["mistaken"], described["sampling"]["rule"]
    path.write_text(json.dumps(described))
    assert torch.equal(pairs.build().batch(0, 4).latents, drawn.latents)  # type: ignore[arg-type]
    assert json.loads(path.read_text())["sampling"]["rule"] == "cfg"


def test_bad_settings_are_refused(pairs: PairsConfig, pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="solver must be one that draws no noise, one of euler"):
        replace(pairs, sampling=Sampling(solver="consistency")).build()
    with pytest.raises(ValueError, match="number must be at least 1"):
        replace(pairs, number=0).build()
    pairs.build()
    with pytest.raises(UserError, match="holds pairs of other settings or another teacher"):
        replace(pairs, seed=8).build()
    pairs.build()
    with torch.no_grad():
        pipeline.denoiser.head.weight[0, 0] += 1  # type: ignore[operator, union-attr]
    pipeline.save(pairs.teacher)
    with pytest.raises(UserError, match="another teacher"):
        pairs.build()
    with pytest.raises(UserError, match="no pipeline at nowhere"):
        replace(pairs, teacher="nowhere", folder=pairs.folder + "-more").build()
