"""Ratings of pictures as a column, by tiny networks with random weights."""

from pathlib import Path

import dirty
import pyarrow as pa
import pytest
import torch
from rewards import published

from mezzotint.curation.scores import Score
from mezzotint.data.decode import square
from mezzotint.rewards import AestheticConfig, CLIPRewardConfig, RewardConfig


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    published.clip(folder)
    published.head(folder / "head.safetensors", 12)
    return folder


def batch(samples: list[tuple[bytes | None, str, list[str]]]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(column) for column in zip(*samples, strict=True)], names=["content", "media", "captions"])


def pictures() -> list[bytes]:
    return [sample.content for sample in dirty.photos(3)]


def rated(reward: RewardConfig, contents: list[bytes], captions: list[str]) -> list[float]:
    pixels = torch.stack([torch.from_numpy(square(content, 16)) for content in contents])
    return reward.build()(pixels.float().div(127.5).sub(1), captions).tolist()  # type: ignore[no-any-return]


def test_a_column_has_the_ratings_of_the_reward_whatever_stands_beside(clip: Path) -> None:
    contents = pictures()
    for captioned, reward in (
        (True, CLIPRewardConfig(str(clip), scale=2.5)),
        (False, AestheticConfig(str(clip), str(clip / "head.safetensors"))),
    ):
        stage = Score("rating", reward, side=16, captioned=captioned)
        texts = ["a tree", "the sea", "no"]
        rows = [(content, "image", [text, "another"]) for content, text in zip(contents, texts, strict=True)]
        rows[1:1] = [(b"junk", "image", ["a"]), (None, "image", ["a"]), (contents[0], "clip", ["a"])]
        found = stage.open()(batch(rows))
        assert found.schema == stage.writes
        ratings = found["rating"].to_pylist()
        assert ratings[1:4] == [None, None, None]
        assert [ratings[0], *ratings[4:]] == pytest.approx(rated(reward, contents, texts), abs=1e-5)
        assert stage.open()(batch(rows[-1:]))["rating"].to_pylist() == pytest.approx(ratings[-1:], abs=1e-5)


def test_alignment_wants_a_caption_and_beauty_does_not(clip: Path) -> None:
    rows = batch([(pictures()[0], "image", [])])
    assert Score("alignment", CLIPRewardConfig(str(clip)), side=16).open()(rows)["alignment"].to_pylist() == [None]
    beauty = Score("beauty", AestheticConfig(str(clip), str(clip / "head.safetensors")), side=16, captioned=False)
    assert beauty.open()(rows)["beauty"][0].is_valid
