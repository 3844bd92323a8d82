"""Clips with known shots, motion and faults; frames are drawn, one file is written by OpenCV."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import dirty
import numpy as np
import pytest

from mezzotint.curation.clips import Frame, cuts, measure, survey
from mezzotint.data.decode import UnusableError

RATE = 25.0
STEP = 2  # pixels that the camera moves from frame to frame


@pytest.fixture(scope="module")
def scenes() -> list[Frame]:
    return [np.asarray(dirty.photo(seed, 256, 160).convert("L")) for seed in (1, 2)]


def pan(scene: Frame, frames: int, step: int = STEP) -> list[Frame]:
    return [scene[20:116, 10 + step * n : 138 + step * n] for n in range(frames)]


def test_a_steady_pan_moves_and_does_not_shake(scenes: list[Frame]) -> None:
    row = survey(pan(scenes[0], 10), RATE)
    assert row["shots"] == [0]
    assert row["motion"] == pytest.approx(STEP / 128 * RATE, rel=0.1)
    assert row["shake"] < 0.001
    assert (row["frames"], row["seconds"], row["black_share"], row["duplicate_share"]) == (10, 0.4, 0.0, 0.0)


def test_a_camera_that_trembles_shakes(scenes: list[Frame]) -> None:
    places = np.random.default_rng(0).integers(-5, 6, (10, 2))
    row = survey([scenes[0][20 + y : 116 + y, 20 + x : 148 + x] for x, y in places], RATE)
    assert row["shots"] == [0]
    expected = np.hypot(*np.diff(places, n=2, axis=0).T).mean() / 128
    assert row["shake"] == pytest.approx(expected, rel=0.3)


def test_a_still_is_all_duplicates(scenes: list[Frame]) -> None:
    row = survey(pan(scenes[0], 8, step=0), RATE)
    assert (row["shake"], row["duplicate_share"]) == (0.0, 1.0)
    assert row["motion"] < 0.001


def test_shots_begin_where_scenes_do(scenes: list[Frame]) -> None:
    row = survey(pan(scenes[0], 6) + pan(scenes[1], 5) + pan(scenes[0], 5), RATE)
    assert (row["shots"], row["shot_count"]) == ([0, 6, 11], 3)
    assert row["motion"] == pytest.approx(STEP / 128 * RATE, rel=0.15)  # what lies between shots is no motion


def test_frames_that_are_black_or_shown_twice_are_counted(scenes: list[Frame]) -> None:
    black = [np.full((96, 128), 16, np.uint8)] * 4
    assert survey(black + pan(scenes[0], 4), RATE)["black_share"] == 0.5
    twice = [frame for frame in pan(scenes[0], 6) for _ in range(2)]
    row = survey(twice, RATE)
    assert row["duplicate_share"] == pytest.approx(6 / 11)
    assert (row["shots"], row["shake"]) == ([0], 0.0)


CHANGES: list[tuple[list[float], list[int]]] = [
    ([1, 1, 50, 1, 1], [3]),
    ([50, 1, 1], [1]),
    ([1, 1, 50], [3]),
    ([1, 50, 50, 1], []),
    ([20, 22, 19, 25], []),
    ([1, 9, 1], []),
    ([], []),
]


@pytest.mark.parametrize(("change", "expected"), CHANGES)
def test_a_cut_is_a_change_that_stands_alone(change: Sequence[float], expected: list[int]) -> None:
    assert cuts(np.array(change, float)) == expected


def test_a_file_is_decoded_and_a_broken_one_has_a_fault(scenes: list[Frame], tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (128, 96))
    for frame in pan(scenes[0], 5) + pan(scenes[1], 5):
        writer.write(cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_GRAY2BGR))
    writer.release()
    row = measure(path.read_bytes())
    assert (row["frames"], row["seconds"], row["shots"]) == (10, 1.0, [0, 5])
    with pytest.raises(UnusableError, match="no frame"):
        measure(path.read_bytes()[:200])
    with pytest.raises(UnusableError, match="empty file"):
        measure(b"")
