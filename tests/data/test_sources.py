"""Folders and tars as heaps: what becomes an item, with which words, and what is set aside."""

import json
import os
import tarfile
from pathlib import Path

import pytest
from heaps import drawn, encoded, moving, tar

from mezzotint.data.sources import Item, Notes, folder, kohya, noted, tars
from mezzotint.data.survey import Bad, identity

PNG = encoded(drawn())


def split(found: list[Item | Bad]) -> tuple[dict[str, Item], dict[str, str]]:
    """Items by id, and reasons by file."""
    items = [item for item in found if isinstance(item, Item)]
    assert len({item.id for item in items}) == len(items)
    return {item.id: item for item in items}, {bad.file: bad.reason for bad in found if isinstance(bad, Bad)}


# What a row says.


@pytest.mark.parametrize(
    ("row", "notes"),
    [
        ({}, Notes()),
        ({"text": " a "}, Notes(("a",))),
        ({"TEXT": "a", "URL": "http://a", "LICENSE": "CC0"}, Notes(("a",), "http://a", "CC0")),
        ({"caption": ["a", " ", "b"], "licence": "", "copyright": "me"}, Notes(("a", "b"), None, "me")),
        ({"text": "", "caption": "b", "opt_out": "True"}, Notes(("b",), opt_out=True)),
        ({"text": float("nan"), "opt_out": 0}, Notes(opt_out=False)),
        ({"text": 7}, Notes(fault="bad caption: not a string")),
        ({"text": ["a", 7]}, Notes(fault="bad caption: not a string")),
        ({"text": "\ud800"}, Notes(fault="bad caption: not UTF-8")),
    ],
)
def test_the_columns_of_others_are_understood(row: dict[str, object], notes: Notes) -> None:
    assert noted(row) == notes


def test_ids_are_utf8_of_one_line_and_stay_different() -> None:
    names = [
        b"a.png",
        b"a\n.png",
        b"a%0A.png",
        b"a%250A.png",
        b"\xff.png",
        b"%FF.png",
        b"100%.png",
        "ü\u2028.png".encode(),
        b"%\xff",
        b"%%FF",
    ]
    ids = [identity(os.fsdecode(name)) for name in names]
    assert len(set(ids)) == len(names)
    assert all(len(id.encode().splitlines()) == 1 for id in ids)
    assert ids[:3] == ["a.png", "a%0A.png", "a%250A.png"]
    assert identity("100%.png") == "100%.png"


# Folders.


def test_every_file_of_a_folder_is_an_item_or_is_set_aside(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name in (b"a.png", b"sub/b.GIF", b"new\nline.png", b"\xff.png", b"c.mp4", b"notes.pdf", b"alone.txt", b".hidden.png"):
        with open(os.fsencode(root) + b"/" + name, "wb") as file:
            file.write(PNG)
    (root / "a.txt").write_text("one\ntwo")
    (root / "loop.png").symlink_to("loop.png")
    (root / "out.png").symlink_to("/etc/passwd")
    (root / "again").symlink_to(root)
    items, bad = split(list(folder(str(root))))
    assert list(items) == ["a.png", "c.mp4", "loop.png", "new%0Aline.png", "out.png", "sub/b.GIF", "%FF.png"]
    assert items["a.png"].notes.captions == ("one", "two")
    assert items["loop.png"].fault == "not a regular file"
    assert items["out.png"].fault == "a link out of the folder"
    assert items["out.png"].content is None
    assert bad == {
        "again": "a link to a folder",
        "notes.pdf": "not an image or a clip, by its ending: '.pdf'",
        "alone.txt": "a caption without an image",
    }


def test_more_columns_of_metadata_say_where_an_image_is_from(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(PNG)
    rows = [{"file_name": "a.png", "text": "x", "url": "http://a", "license": "CC0", "opt_out": True}, {"file_name": "b.png", "text": 1}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    items, bad = split(list(folder(str(tmp_path))))
    assert items["a.png"].notes == Notes(("x",), "http://a", "CC0", True)
    assert items["b.png"].fault == "bad caption: metadata.jsonl:2 is not a string"
    assert items["b.png"].content == tmp_path / "b.png"
    assert bad == {}


def test_a_caption_that_never_ends_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(1 << 40)  # a hole
    items, _ = split(list(folder(str(tmp_path))))
    assert items["a.png"].fault == "bad caption: 'a.txt' is larger than a megabyte"


def test_folders_of_kohya_give_repeats_and_words(tmp_path: Path) -> None:
    for name in ("10_sks dog/a.png", "10_sks dog/b.png", "1_dog/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "10_sks dog" / "b.txt").write_text("a dog in the sun")
    items, _ = split(list(kohya(str(tmp_path))))
    assert {id: (item.notes.repeats, *item.notes.captions) for id, item in items.items()} == {
        "10_sks dog/a.png": (10, "sks dog"),
        "10_sks dog/b.png": (10, "a dog in the sun"),
        "1_dog/c.png": (1, "dog"),
    }


# Tars.


def member(kind: bytes, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, to
    return info


def test_the_members_of_a_tar_are_grouped_by_their_keys(tmp_path: Path) -> None:
    said = json.dumps({"caption": "from img2dataset", "url": "http://a", "license": "CC0", "width": 3}).encode()
    tar(
        tmp_path / "0.tar",
        {"d/1.jpg": PNG, "d/1.txt": b"one\ntwo\n", "d/2.jpg": PNG, "d/2.json": said, "d/2.cls": b"7", "d/3.seg.png": PNG},
    )
    tar(tmp_path / "1.tar", {"d/1.gif": moving(), "d/1.txt": b""})
    (tmp_path / "0_stats.json").write_text("{}")
    items, bad = split(list(tars(str(tmp_path))))
    assert list(items) == ["0.tar/d/1.jpg", "0.tar/d/2.jpg", "0.tar/d/3.seg.png", "1.tar/d/1.gif"]
    assert items["0.tar/d/1.jpg"].notes.captions == ("one", "two")
    assert items["0.tar/d/1.jpg"].content == PNG
    assert items["0.tar/d/2.jpg"].notes == Notes(("from img2dataset",), "http://a", "CC0")
    assert items["0.tar/d/2.jpg"].source == "0.tar"
    assert bad == {
        "0.tar/d/2.cls": "not an image, a clip or a caption, by its ending: '.cls'",
        "0_stats.json": "not a file of this source, by its ending: '.json'",
    }
    assert list(split(list(tars(str(tmp_path / "1.tar"))))[0]) == ["1.tar/d/1.gif"]


def test_what_a_tar_must_not_hold_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mezzotint.data.sources.LIMIT", 1000)
    members: dict[str, bytes | tarfile.TarInfo] = {
        "/abs.png": PNG,
        "a/../../up.png": PNG,
        "link.png": member(tarfile.SYMTYPE, "/etc/passwd"),
        "hard.png": member(tarfile.LNKTYPE, "large.png"),
        "tty.png": member(tarfile.CHRTYPE),
        "pipe.png": member(tarfile.FIFOTYPE),
        "large.png": bytes(1001),
        "words.png": PNG,
        "words.txt": b"caf\xe9",
        "json.png": PNG,
        "json.json": b"[" * 100_000,
        "list.png": PNG,
        "list.json": b"[1]",
        "alone.txt": b"a caption",
        "good.png": PNG,
    }
    monkeypatch.setattr("mezzotint.data.sources.LIMIT", 200_000)
    members["large.png"] = bytes(200_001)
    items, bad = split(list(tars(str(tar(tmp_path / "a.tar", members)))))
    assert {id.removeprefix("a.tar/"): item.fault for id, item in items.items()} == {
        "/abs.png": "path out of the tar",
        "a/../../up.png": "path out of the tar",
        "link.png": "a link",
        "hard.png": "a link",
        "tty.png": "not a regular file",
        "pipe.png": "not a regular file",
        "large.png": "too large: more than 0.2 megabytes",
        "words.png": "bad caption: not UTF-8",
        "json.png": "bad caption: not JSON",
        "list.png": "bad caption: not a JSON object",
        "good.png": "",
    }
    assert {id for id, item in items.items() if item.content} == {f"a.tar/{name}.png" for name in ("words", "json", "list", "good")}
    assert bad == {"a.tar/alone": "a caption without an image"}


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_a_damaged_tar_gives_what_comes_before_the_damage(tmp_path: Path, keep: float) -> None:
    path = tar(tmp_path / "a.tar", {f"{number}.png": PNG for number in range(10)})
    content, at = path.read_bytes(), int(10 * 1024 * keep)  # a member takes two blocks
    for damaged in (content[: at - 100], content[:at] + b"x" * 512 + content[at:]):
        path.write_bytes(damaged)
        items, bad = split(list(tars(str(path))))
        assert 10 * keep - 2 <= len(items) <= 10 * keep
        assert all(item.content == PNG for item in items.values())
        assert bad["a.tar"].startswith("damaged tar: ")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_name_that_would_fill_the_memory_is_not_read(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("long")
    info.type, info.size = kind, 1 << 40
    path = tar(tmp_path / "a.tar", {"a.png": PNG})
    with open(path, "r+b") as file:
        file.seek(512 + len(PNG) // 512 * 512 + 512 * bool(len(PNG) % 512))
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 40)
    items, bad = split(list(tars(str(path))))
    assert list(items) == ["a.tar/a.png"]
    assert bad["a.tar"].startswith("damaged tar: a name of")


def test_what_is_no_tar_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar" * 1000)
    assert split(list(tars(str(tmp_path))))[1]["a.tar"].startswith("damaged tar: ")
