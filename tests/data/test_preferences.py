"""Preference pairs of one's own: the stream, the split, what is set aside, and runs that train on them."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from folders import SIDE, paint

from mezzotint.cli import main
from mezzotint.data.batch import Loader, Stored
from mezzotint.data.decode import square
from mezzotint.data.preferences import Preferences, PreferencesConfig, is_preferences
from mezzotint.errors import UserError
from mezzotint.recipes import RECIPES
from mezzotint.train.log import read

Row = dict[str, object]


def rows(count: int, captions: int = 0) -> list[Row]:
    """Pair k is of the pictures w-k.png and l-k.png, under one of so many captions; 0: each has its own."""
    return [{"winner": f"w-{k}.png", "loser": f"l/{k}.png", "text": f"thing {k % (captions or count)}"} for k in range(count)]


def fill(folder: Path, listed: list[Row]) -> Path:
    for number, row in enumerate(listed):
        for side, seed in (("winner", 2 * number), ("loser", 2 * number + 1)):
            paint(folder / str(row[side]), seed)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    return folder


def add(folder: Path, *lines: str) -> None:
    with (folder / "pairs.jsonl").open("a") as file:
        file.writelines(line + "\n" for line in lines)


def build(folder: Path, held_out: float = 0.3, max_bad: float = 0.0, seed: int = 0) -> Preferences:
    return PreferencesConfig(str(folder), SIDE, held_out, max_bad, seed).build()


def everything(source: Preferences) -> set[str]:
    return {*source.batch(0, len(source)).ids, *source.held_out(10**6).ids}


def pixels(folder: Path, name: str) -> torch.Tensor:
    return torch.from_numpy(square(folder / name, SIDE))


def test_a_batch_is_winners_and_losers_of_its_rows(images: Path) -> None:
    source = build(fill(images, rows(9)))
    assert isinstance(source, Stored)
    batch, stored = source.batch(1, 4), source.read(1, 4)
    assert batch.rejected is not None
    assert stored.rejected is not None
    for k, place in enumerate(batch.ids):
        row = rows(9)[int(place.partition(":")[2]) - 1]
        assert batch.prompts[k] == row["text"]
        assert torch.equal(stored.images[k], pixels(images, str(row["winner"])))
        assert torch.equal(stored.rejected[k], pixels(images, str(row["loser"])))
    for raw, scaled in ((stored.images, batch.images), (stored.rejected, batch.rejected)):
        assert torch.allclose(scaled, raw / 127.5 - 1, atol=1e-6)
    loaded = next(Loader(source, 4, stream=1, streams=2))
    assert loaded.ids == batch.ids
    assert loaded.rejected is not None
    assert torch.equal(loaded.rejected, batch.rejected)


def test_the_stream_is_a_function_of_the_seed_and_has_every_pair_once_an_epoch(images: Path) -> None:
    fill(images, rows(14))
    source, again, other = build(images), build(images), build(images, seed=1)
    n = len(source)
    whole = source.batch(0, 3 * n).ids
    assert whole == [name for number in range(n) for name in again.batch(number, 3).ids]
    assert all(Counter(whole[k * n : (k + 1) * n]) == Counter(set(whole)) for k in range(3))
    assert other.batch(0, n).ids != whole[:n]
    assert other.held_out(99).ids == source.held_out(99).ids


def test_pairs_of_a_caption_are_trained_on_or_held_out(images: Path) -> None:
    source = build(fill(images, rows(30, captions=10)))
    trained, held_out = source.batch(0, len(source)), source.held_out(99)
    assert not set(trained.prompts) & set(held_out.prompts)
    assert len(trained) + len(held_out) == 30
    assert held_out.rejected is not None
    assert len(held_out.rejected) == len(held_out) > 1
    add(images, json.dumps({"winner": "w-0.png", "loser": "w-1.png", "text": f"  {held_out.prompts[0].upper()} "}))
    assert "pairs.jsonl:31" in build(images).held_out(99).ids


@pytest.mark.parametrize("text", ["a cat", "", None])
def test_pairs_of_one_caption_are_split_by_their_pictures(images: Path, text: str | None) -> None:
    source = build(fill(images, [{**row, "text": text} for row in rows(12)]))
    assert set(source.batch(0, 4).prompts) == {text or ""}
    assert len(source) < 12
    assert len(everything(source)) == 12


def test_a_table_of_comma_separated_values_is_the_same(images: Path) -> None:
    before = build(fill(images, rows(6))).batch(0, 8)
    (images / "pairs.jsonl").unlink()
    with (images / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["winner", "loser", "text"])
        writer.writeheader()
        writer.writerows(rows(6))
    assert is_preferences(images)
    after = build(images).batch(0, 8)
    assert torch.equal(after.images, before.images)
    assert after.prompts == before.prompts
    (images / "pairs.jsonl").write_text("")
    with pytest.raises(UserError, match=r"holds both pairs.jsonl and pairs.csv"):
        build(images)


def test_what_cannot_be_used_is_listed_and_left_out(images: Path) -> None:
    fill(images, rows(5))
    paint(images.parent / "outside.png", 99)
    (images / "link.png").symlink_to(images.parent / "outside.png")
    (images / "broken.png").write_bytes((images / "w-0.png").read_bytes()[:90])
    wrong = {
        "../outside.png": "path out of the folder",
        str(images.parent / "outside.png"): "path out of the folder",
        "link.png": "a link out of the folder",
        "gone.png": "no such file",
        "broken.png": "unusable picture",
        "": "unreadable row",
    }
    add(images, *(json.dumps({"winner": "w-0.png", "loser": name, "text": "x"}) for name in wrong))
    add(images, '{"winner": "w-0.png"', *(f'{{"winner": "w-0.png", "loser": "l/0.png", "text": {text}}}' for text in ("7", '"\\ud800"')))
    source = build(images, max_bad=0.9)
    expected = [*wrong.values(), "unreadable row", "bad caption", "bad caption"]
    found = {bad.file: bad.reason.partition(":")[0] for bad in source.bad}
    assert found == {f"pairs.jsonl:{line}": reason for line, reason in enumerate(expected, 6)}
    assert everything(source) == {f"pairs.jsonl:{line}" for line in range(1, 6)}
    assert "9 set aside" in source.report()
    with pytest.raises(UserError, match=r"9 of 14 files and rows .* max_bad above 0.643"):
        build(images, max_bad=0.5)


def test_ties_are_kept(images: Path) -> None:
    fill(images, rows(4))
    add(images, '{"winner": "w-0.png", "loser": "w-0.png", "text": "tie"}')
    assert len(everything(build(images))) == 5


def test_pictures_too_many_for_memory_are_read_again(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = build(fill(images, rows(6)))
    monkeypatch.setattr("mezzotint.data.preferences.MEMORY", 0)
    source = build(images)
    assert torch.equal(source.batch(0, 8).images, kept.batch(0, 8).images)
    (images / "w-0.png").unlink()
    assert len(everything(kept)) == 6
    with pytest.raises(UserError, match="can no longer be read"):
        everything(source)


def test_the_version_is_that_of_pairs_pictures_and_captions(images: Path) -> None:
    fill(images, rows(4))
    versions = [build(images).version, build(images, seed=1).version]
    paint(images / "w-0.png", 99)
    versions.append(build(images).version)
    add(images, '{"winner": "w-0.png", "loser": "w-1.png", "text": "more"}')
    versions.append(build(images).version)
    assert versions[0] == versions[1]
    assert len(set(versions)) == 3


def test_folders_without_two_pairs_are_refused(images: Path) -> None:
    fill(images, rows(1))
    with pytest.raises(UserError, match="has 1 usable pairs; give two or more that differ"):
        build(images)
    (images / "pairs.jsonl").write_text("")
    with pytest.raises(UserError, match="has 0 usable pairs"):
        build(images)


@pytest.mark.parametrize(("recipe", "role"), [("tiny.dpo", "student"), ("tiny.reward", "reward")])
def test_runs_train_on_a_folder_of_pairs(recipe: str, role: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(images, rows(8))
    add(images, '{"winner": "w-0.png", "loser": "gone.png", "text": "x"}')
    RECIPES[recipe]("xs").pipeline.build().save(tmp_path / "start")
    words = ["train", recipe, "--size", "xs", "--init", str(tmp_path / "start"), "--data", str(images), "--out", str(tmp_path / "run")]
    few = ["--train.steps", "2", "--train.batch", "4", "--train.log", "1", "--data.max-bad", "0.2", "--data.held-out", "0.3"]
    assert main([*words, *few]) == 0
    assert "8 preference pairs" in capsys.readouterr().err
    lines = [line for line in read(tmp_path / "run" / "metrics.jsonl") if "accuracy" in line or f"{role}.accuracy" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert json.loads((tmp_path / "run" / "set-aside.jsonl").read_text())["reason"] == "no such file: 'gone.png'"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["kind"] == "preferences"
    assert main([*words, *few]) == 0, "a finished run goes on from its end"
