"""Latents and states that are made beforehand: that they are what the networks would make, and that nothing else is taken for them."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from mezzotint.cli import main
from mezzotint.codecs.kl import KLConfig
from mezzotint.curation.cache import LatentsConfig, StatesConfig
from mezzotint.curation.stage import done, run
from mezzotint.data import table as tables
from mezzotint.data.rows import TableConfig
from mezzotint.data.table import Table
from mezzotint.errors import UserError
from mezzotint.models.lora import LoRAConfig
from mezzotint.pipeline import Pipeline, PipelineConfig, load
from mezzotint.train.log import read
from mezzotint.train.trainer import RunConfig, Trainer

SIDE = 32


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Sixteen pictures, wide and tall ones."""
    rows = []
    for seed in range(16):
        file, size = io.BytesIO(), (48, 32) if seed % 2 else (32, 40)
        pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        captions = [f"a picture number {seed}", f"{seed}"] if seed != 9 else []
        known = {"id": f"{seed}", "content": file.getvalue(), "media": "image", "captions": captions, "format": "PNG", "source": "here"}
        rows.append({**known, "width": size[0], "height": size[1], "sha256": f"{seed * 2**60:016x}", "fault": ""})
    return Table.create(tmp_path_factory.mktemp("cache") / "t.lance", [pa.RecordBatch.from_pylist(rows, schema=tables.schema())])


def tiny(seed: int) -> Pipeline:
    """A pipeline with a small autoencoder, whose weights are the seed's."""
    torch.manual_seed(seed)
    config = PipelineConfig(codec=KLConfig(widths=(8, 8), layers=1, groups=4, attention=False, channels=4))
    config.denoiser = config.denoiser.replace(width=32, depth=1, heads=2, patch=2, stride=0, channels=4, text_width=32)
    config.text = config.text.replace(width=32, depth=1, heads=2)
    return config.replace(sampling=config.sampling.replace(size=SIDE, steps=2)).build().eval()


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pipelines of one form."""
    folders = [tmp_path_factory.mktemp("pipelines") / f"{seed}" for seed in range(2)]
    for seed, folder in enumerate(folders):
        tiny(seed).save(folder)
    return folders


def latents(pipeline: Path, **fields: object) -> LatentsConfig:
    return LatentsConfig(str(pipeline), SIDE, dtype="float32", device="cpu").replace(**fields)


@pytest.fixture(scope="module")
def cached(table: Table, pipelines: list[Path]) -> Table:
    """The table with latents, those of buckets, and states."""
    table = run(table, latents(pipelines[0]), workers=1)
    table = run(table, latents(pipelines[0], multiple=4, column="shaped"), workers=1)
    return run(table, StatesConfig(str(pipelines[0]), dtype="float32", device="cpu"), workers=1)


def source(table: Table, **fields: object) -> TableConfig:
    return TableConfig(str(table.path), size=SIDE, held_out=0.2).replace(**fields)


@pytest.mark.parametrize(("column", "multiple"), [("latents", 0), ("shaped", 4)])
def test_latents_are_what_the_codec_makes_of_the_pictures(cached: Table, pipelines: list[Path], column: str, multiple: int) -> None:
    pictures, made = source(cached, multiple=multiple).build(), source(cached, multiple=multiple, latents=column).build()
    pipeline = load(pipelines[0])
    for number in range(3):
        one, other = pictures.batch(number, 3), made.batch(number, 3)
        assert other.latents is not None
        assert one.ids == other.ids
        assert torch.allclose(one.x0(pipeline), other.x0(pipeline), atol=1e-5)
    assert len({made.batch(number, 3).x0(pipeline).shape for number in range(8)}) == (2 if multiple else 1)
    assert made.held_out(8).latents is not None


def test_states_are_what_the_encoder_makes_of_the_captions(cached: Table, pipelines: list[Path]) -> None:
    batch, pipeline = source(cached, states="states").build().batch(0, 26), load(pipelines[0])
    assert batch.cond is not None
    assert {"", "5", "a picture number 5"} <= set(batch.prompts)
    one, other = batch.cond.masked(), pipeline.encode(batch.prompts).masked()
    length = other.text.shape[1]
    assert torch.allclose(one.text[:, :length], other.text, atol=1e-5)
    assert not one.text[:, length:].any()
    assert torch.equal(one.mask[:, :length], other.mask)  # type: ignore[index]
    assert torch.allclose(one.pooled, other.pooled, atol=1e-5)


def test_training_on_them_is_training_on_the_pictures(
    cached: Table, pipelines: list[Path], run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    losses = {}
    for name, fields in {"pictures": {}, "cached": {"latents": "latents", "states": "states"}}.items():
        config = run_config(steps=3, preview_prompts=())
        config.pipeline, config.init, config.adapter = load(pipelines[0]).config, str(pipelines[0]), LoRAConfig(rank=2)
        config = replace(config, data=source(cached, **fields))
        Trainer(config, tmp_path / name).run()
        losses[name] = [line.get("loss", line.get("held_out")) for line in read(tmp_path / name / "metrics.jsonl")]
    assert losses["cached"] == pytest.approx(losses["pictures"], rel=1e-4)


def test_a_column_of_other_weights_is_refused_and_due_again(cached: Table, pipelines: list[Path]) -> None:
    assert done(cached, latents(pipelines[0]))
    assert not done(cached, latents(pipelines[1]))
    rows = source(cached, latents="latents").build()
    rows.check(load(pipelines[0]))
    with pytest.raises(UserError, match=r"'latents' of .* was made with another weights") as error:
        rows.check(load(pipelines[1]))
    assert "\n" not in str(error.value)
    frozen = [load(folder).requires_grad_(False) for folder in pipelines]
    told = source(cached, states="states").build()
    told.check(frozen[0])
    with pytest.raises(UserError, match="another weights"):
        told.check(frozen[1])
    with pytest.raises(UserError, match="trains its text encoder"):
        told.check(load(pipelines[0]))


def test_a_column_of_other_shapes_or_captions_is_refused(cached: Table, pipelines: list[Path]) -> None:
    pipeline = load(pipelines[0]).requires_grad_(False)
    for fields in ({"size": 16}, {"multiple": 4}):
        with pytest.raises(UserError, match=r"another (size|multiple)"):
            source(cached, latents="latents", **fields).build().check(pipeline)
    with pytest.raises(UserError, match="has no states of 'source'"):
        source(cached, states="states", captions={"source": 1.0}).build().check(pipeline)
    with pytest.raises(UserError, match="does not say what made it"):
        source(cached, latents="content").build().check(pipeline)


def test_what_cannot_be_decoded_has_no_latents(table: Table, pipelines: list[Path], tmp_path: Path) -> None:
    (broken,) = table.take([1], tables.schema().names).to_pylist()
    (whole,) = table.take([2], tables.schema().names).to_pylist()
    rows = [{**broken, "content": broken["content"][:200]}, {**broken, "content": None, "id": "none"}, whole]
    made = run(Table.create(tmp_path / "t.lance", [pa.RecordBatch.from_pylist(rows, schema=tables.schema())]), latents(pipelines[0]))
    assert [value is None for value in made.read(["latents"])["latents"].to_pylist()] == [True, True, False]


def test_the_verb_says_what_it_did_and_how_to_train(
    table: Table, pipelines: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Table.create(tmp_path / "t.lance", table.batches(table.columns)).path
    words = ["data", "cache", str(place), "--multiple", "4", "--dtype", "float32", "--device", "cpu", "--pipeline"]
    for pipeline, told in ((0, "made;"), (0, "there already;"), (1, "made again, since")):
        assert main([*words, str(pipelines[pipeline])]) == 0
        out = capsys.readouterr().out
        assert f"latents: {told}" in out
        assert f"states: {told}" in out
        assert "16 of 16 rows" in out
    (line,) = [line for line in out.splitlines() if line.startswith("train: ")]
    fields = line.split(f"--data {place} ")[1].split()
    assert fields == ["--data.size", f"{SIDE}", "--data.latents", "latents", "--data.states", "states", "--data.multiple", "4"]
    source(Table.open(place), latents="latents", states="states", multiple=4).build().check(load(pipelines[1]).requires_grad_(False))
    with pytest.raises(UserError, match="another weights"):
        source(Table.open(place), latents="latents", multiple=4).build().check(load(pipelines[0]))


def test_pictures_are_the_latents_of_a_model_of_pixels(table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Table.create(tmp_path / "t.lance", table.batches(table.columns)).path
    assert main(["data", "cache", str(place), "--pipeline", "starter", "--what", "latents"]) == 0
    assert "latents: left out" in capsys.readouterr().out
    assert "latents" not in Table.open(place).columns
