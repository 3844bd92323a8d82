"""Stages that look at pictures: what they find, and that no content makes them raise."""

import io
import random
from functools import cache

import dirty
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from mezzotint.curation.clips import Clips
from mezzotint.curation.nsfw import Nsfw
from mezzotint.curation.overlay import Overlay, writing
from mezzotint.curation.probe import Probe
from mezzotint.curation.stage import Compute, Stage

STAGES = (Probe(), Overlay(), Nsfw(), Clips())


@cache
def computation(number: int) -> Compute:
    return STAGES[number].open()


def run(stage: Stage, *contents: bytes | None, media: str = "image") -> list[dict]:
    batch = pa.record_batch([pa.array(contents, pa.large_binary()), pa.array([media] * len(contents))], names=["content", "media"])
    result = computation(STAGES.index(stage))(batch)
    assert result.schema == stage.writes
    return result.to_pylist()  # type: ignore[no-any-return]


def file(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    kept = io.BytesIO()
    picture.save(kept, form, **options)
    return kept.getvalue()


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.frombytes("RGB", size, np.random.default_rng(0).bytes(3 * size[0] * size[1]))


def test_facts_are_those_of_the_whole_upright_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    turned, clear, moving = run(
        Probe(),
        file(dirty.photo(1, 1200, 300), "JPEG", exif=exif),
        file(Image.new("RGBA", (30, 20), (255, 0, 0, 99))),
        file(Image.new("L", (9, 9)), "GIF", save_all=True, append_images=[Image.new("L", (9, 9), 200)]),
    )
    assert (turned["wide"], turned["high"], turned["short_side"], turned["aspect"]) == (300, 1200, 300, 4.0)
    assert (turned["alpha"], turned["animated"], turned["decode_fault"]) == (False, False, "")
    assert (clear["alpha"], clear["animated"]) == (True, False)
    assert (moving["alpha"], moving["animated"], moving["colour"]) == (False, True, 0.0)


def test_a_row_without_a_picture_has_a_fault_or_is_a_clip() -> None:
    missing, words, empty = run(Probe(), None, b"no picture", b"")
    assert missing["decode_fault"] == "no content"
    assert words["decode_fault"].startswith("not an image")
    assert empty["decode_fault"] == "empty file"
    assert words["sharpness"] is words["wide"] is None
    assert set(run(Probe(), file(Image.new("L", (9, 9))), media="clip")[0].values()) == {None}


def test_a_changed_byte_is_found_where_there_are_checksums() -> None:
    whole = file(noise((40, 30)), compress_level=0)
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1  # a pixel: it can be decoded all the same
    good, bad = run(Probe(), whole, bytes(changed))
    assert good["decode_fault"] == ""
    assert bad["decode_fault"].startswith("cannot be decoded: broken PNG file")


def test_words_on_a_picture_are_read_and_their_area_counted() -> None:
    picture = dirty.photo(4, 400, 240)
    clean = file(picture)
    ImageDraw.Draw(picture).text((30, 90), "FREE DELIVERY", "white", ImageFont.load_default(40), stroke_width=3, stroke_fill="black")
    none, some, broken = run(Overlay(), clean, file(picture), b"")
    assert (none["text_area"], none["text_words"], none["text_score"]) == (0.0, 0, 0.0)
    assert 0.08 < some["text_area"] < 0.2
    assert 1 <= some["text_words"] <= 2
    assert some["text_score"] > 0.8
    assert broken["text_area"] is None


def test_the_area_of_boxes_that_overlap_counts_once() -> None:
    boxes = [([[0, 0], [49, 0], [49, 99], [0, 99]], "left half", 0.9), ([[25, 0], [49, 0], [49, 99], [25, 99]], "again", 0.7)]
    row = writing(boxes, (100, 100))
    assert row["text_area"] == pytest.approx(0.5, abs=0.01)
    assert (row["text_words"], row["text_score"]) == (3, 0.9)


def test_a_picture_of_nobody_is_decent() -> None:
    row, broken = run(Nsfw(), file(Image.new("RGB", (64, 64), "teal")), b"GIF89a")
    assert row == {"nsfw": 0.0, "nsfw_part": ""}
    assert broken == {"nsfw": None, "nsfw_part": None}


class Sure:
    """A detector that has found what it is told."""

    def detect(self, pixels: np.ndarray) -> list[dict]:
        assert pixels.shape == (8, 12, 3)
        found = {"FACE_FEMALE": 0.9, "BUTTOCKS_EXPOSED": 0.4, "FEMALE_BREAST_EXPOSED": 0.7}
        return [{"class": name, "score": score} for name, score in found.items()]


def test_the_surest_naked_part_counts_and_a_face_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nudenet.NudeDetector", Sure)
    batch = pa.record_batch([[file(Image.new("RGB", (12, 8)))], ["image"]], names=["content", "media"])
    (row,) = Nsfw().open()(batch).to_pylist()
    assert row == {"nsfw": pytest.approx(0.7), "nsfw_part": "FEMALE_BREAST_EXPOSED"}


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]), st.data())
def test_no_content_makes_the_probe_raise(junk: bytes, form: str, data: st.DataObject) -> None:
    whole = file(noise((40, 30)), form)
    at = data.draw(st.integers(0, len(whole)))
    for content in (junk, whole[:at] + junk, whole[:at] + junk + whole[at + len(junk) :], whole[:at]):
        (row,) = run(Probe(), content)
        assert row["decode_fault"] or row["sharpness"] is not None


def test_no_content_makes_another_stage_raise() -> None:
    rng = random.Random(0)
    starts = (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0AVI ", b"\0\0\0\x18ftypmp42", b"\x1a\x45\xdf\xa3", b"GIF89a")
    junk = [start + rng.randbytes(200) for start in starts]
    thin = [file(noise(size)) for size in ((1, 1), (1, 400), (900, 2), (3, 3))]
    for stage in STAGES:
        for media in ("image", "clip"):
            assert len(run(stage, None, *junk, *thin, media=media)) == 1 + len(junk) + len(thin)


def test_a_play_list_is_not_followed() -> None:
    (row,) = run(Clips(), b"#EXTM3U\n#EXTINF:1,\nhttp://example.org/a.ts\n", media="clip")
    assert row["clip_fault"].startswith("not a clip")
