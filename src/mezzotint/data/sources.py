"""Where it fits: the kinds of heaps that a table is made from. Each is a reader: a function from a path to items, one after another.

In: a folder of images and clips with captions, kohya's folders, tars of WebDataset, tables of Arrow (`data.records`).
Out: an `Item` for each image and clip, also for one that cannot be read; a `Bad` for everything else that lies there.
Gotchas: nothing is opened that a link, a `..` or an absolute name places outside the source. Whoever reads on gets the same items in
the same order, as long as the files are the same.
"""

import hashlib
import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from mezzotint.data.decode import UnusableError
from mezzotint.data.header import CLIPS, LIMIT, Header, header, moves, read, too_large
from mezzotint.data.survey import LONGEST, METADATA, SUFFIXES, Bad, Contents, identity, is_utf8, sidecar, survey

SEEN = (*SUFFIXES, *CLIPS)
KOHYA = re.compile(r"(\d{1,6})_([^/]+)/")  # a folder's repeats and, where there is no caption, its words
CAPTIONS = ("text", "caption", "captions", "prompt", "txt")  # columns, in whatever case; the first that is not empty
LICENCES = ("licence", "license", "copyright")


@dataclass(frozen=True)
class Notes:
    """What a source says of an image beside its pixels. fault: why that cannot be used."""

    captions: tuple[str, ...] = ()
    url: str | None = None
    licence: str | None = None
    opt_out: bool | None = None
    repeats: int | None = None
    fault: str = ""


@dataclass(frozen=True)
class Item:
    """A row before the file is looked into.

    content: the file, or where it lies; None if there is none, and then `fault` says why. source: where it was read from.
    """

    id: str
    content: bytes | Path | None
    source: str
    notes: Notes = field(default_factory=Notes)
    fault: str = ""

    @property
    def size(self) -> int:
        """Of the content, in bytes."""
        try:
            return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content or b"")
        except OSError:  # which its reader will be told
            return 0


Reader = Callable[[str], Iterator[Item | Bad]]


def as_row(item: Item, limit: int = LIMIT) -> dict[str, Any]:
    """The columns of an item in a table, also of one that cannot be read, or has more bytes than `limit`."""
    content, found, fault = None, Header(0, 0, ""), item.fault or item.notes.fault
    try:
        content = read(item.content, limit) if isinstance(item.content, Path) else item.content
        if content is not None and len(content) > limit:
            content = None
            raise UnusableError(too_large(limit))
        if content is not None:
            found = header(content)
    except UnusableError as error:
        fault = fault or str(error)
    clip = (content is not None and moves(content, found.format)) or item.id.lower().endswith(CLIPS)
    return {
        "id": item.id,
        "content": content,
        "media": "clip" if clip else "image",
        "captions": list(item.notes.captions),
        "width": found.width,
        "height": found.height,
        "format": found.format,
        "sha256": "" if content is None else hashlib.sha256(content).hexdigest(),
        "source": item.source,
        "url": item.notes.url,
        "licence": item.notes.licence or found.rights or None,
        "opt_out": item.notes.opt_out,
        "repeats": item.notes.repeats,
        "fault": fault,
    }


def noted(row: Mapping[str, Any]) -> Notes:
    """What the columns of a row say: names as img2dataset, Hugging Face and we write them, in whatever case."""
    cells = {str(key).lower(): value for key, value in row.items()}
    captions = next((cells[name] for name in CAPTIONS if cells.get(name)), ())
    captions = [captions] if isinstance(captions, str) else captions
    if isinstance(captions, float) and math.isnan(captions):  # as pandas writes what is missing
        captions = ()
    if not isinstance(captions, list | tuple) or not all(isinstance(caption, str) for caption in captions):
        return Notes(fault="bad caption: not a string")
    opt_out = cells.get("opt_out")
    if isinstance(opt_out, str):
        opt_out = {"true": True, "1": True, "false": False, "0": False}.get(opt_out.strip().lower())
    licence = next((cells[name] for name in LICENCES if cells.get(name)), None)
    notes = Notes(
        tuple(caption.strip() for caption in captions if caption.strip()),
        _speakable(cells.get("url")),
        _speakable(licence),
        None if opt_out is None else bool(opt_out),
    )
    return notes if all(map(is_utf8, notes.captions)) else Notes(fault="bad caption: not UTF-8")


def _speakable(value: object) -> str | None:
    return str(value).encode("utf-8", "backslashreplace").decode() if value not in (None, "") else None


# Folders.


def folder(path: str) -> Iterator[Item | Bad]:
    """Images and clips with captions in `name.txt` beside them, or in columns `file_name` and `text` of `metadata.jsonl` or `metadata.csv`.

    A caption's column may have another name of `CAPTIONS`. More columns there, `url`, `licence` or `license`, and `opt_out`, say where an
    image is from and what may be done with it.
    """
    contents = survey(path)
    yield from contents.bad
    captions = {PurePosixPath(name).with_suffix(".txt").as_posix() for name in contents.files if _is_seen(contents, name)}
    for name in sorted(contents.files):
        if _is_seen(contents, name):
            yield of_folder(contents, name)
        elif name not in captions and name not in METADATA:
            yield Bad(name, _strange(name))


def _is_seen(contents: Contents, name: str) -> bool:
    return name.lower().endswith(SEEN) or name in contents.captions


def _strange(name: str) -> str:
    if name.lower().endswith(".txt"):
        return "a caption without an image"
    return f"not an image or a clip, by its ending: {PurePosixPath(name).suffix!r}"


def of_folder(contents: Contents, name: str) -> Item:
    """An image or clip of a folder that has been surveyed."""
    fault = contents.files[name] or contents.faults.get(name, "")
    captions = tuple(contents.captions.get(name, ()))
    if not captions and not fault:
        try:
            captions = sidecar(contents, name)
        except UnusableError as error:
            fault = str(error)
    notes = noted({**contents.columns.get(name, {}), "text": captions})
    content = None if contents.files[name] else contents.root / name
    return Item(identity(name), content, identity(str(contents.root)), notes, fault)


def kohya(path: str) -> Iterator[Item | Bad]:
    """A folder whose subfolders are named `10_words`: how often an epoch shows their images, and what an image without a caption shows."""
    for found in folder(path):
        match = KOHYA.match(found.id) if isinstance(found, Item) else None
        if isinstance(found, Item) and match:
            captions = found.notes.captions or (match[2].strip(),)
            found = replace(found, notes=replace(found.notes, captions=captions, repeats=int(match[1])))
        yield found


def is_kohya(path: str) -> bool:
    """Whether a folder has subfolders, all of them named so, and no image beside them."""
    with os.scandir(path) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    folders = [entry.name for entry in visible if entry.is_dir(follow_symlinks=False)]
    return bool(folders) and all(KOHYA.match(f"{name}/") for name in folders) and not any(e.name.lower().endswith(SEEN) for e in visible)


# WebDataset's tars.


class _Member(tarfile.TarInfo):
    """A member whose name cannot fill the memory: tarfile reads those of GNU and PAX whole, however long they say they are."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _NAMING and self.size > LONGEST:
            raise tarfile.ReadError(f"a name of {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


_NAMING = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


@dataclass
class _Group:
    """The members of a tar that have a key in common, which follow one another. A member is its bytes, or why it has none."""

    key: str = ""
    members: dict[str, bytes | str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(len(content) for content in self.members.values())


def tars(path: str) -> Iterator[Item | Bad]:
    """WebDataset: `key.jpg` beside `key.txt` or `key.json`, in one tar or a folder of them, not compressed.

    The JSON's keys are the columns of `folder`, as img2dataset writes them.
    """
    for name, place in shards(path, (".tar",)):
        yield from _tar(place, name) if isinstance(place, Path) else [Bad(name, place)]


def shards(path: str, endings: tuple[str, ...]) -> Iterator[tuple[str, Path | str]]:
    """The names of the files of a source, in order, with the places of those of these endings, and why the others are none."""
    if os.path.isfile(path):
        yield os.path.basename(path), Path(path)
        return
    contents = survey(path)
    yield from ((bad.file, bad.reason) for bad in contents.bad)
    for name in sorted(contents.files):
        strange = "" if name.endswith(endings) else f"not a file of this source, by its ending: {PurePosixPath(name).suffix!r}"
        yield name, contents.files[name] or strange or contents.root / name


def _tar(path: Path, shard: str) -> Iterator[Item | Bad]:
    group = _Group()
    try:
        with tarfile.open(path, "r:", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # which tarfile would keep, all of them
                key = _key(member.name)
                if key != group.key:
                    yield from _grouped(group, shard)
                    group = _Group(key)
                if member.name in group.members:
                    yield Bad(f"{shard}/{member.name}", "a second file of this name")
                elif not member.isdir():
                    group.members[member.name] = _content(tar, member, LIMIT - group.size)
            rest = _rest(tar)
    except (tarfile.TarError, OSError, ValueError) as error:
        rest = str(error)
    yield from _grouped(group, shard)
    if rest:
        yield Bad(shard, f"damaged tar: {rest}; what follows is lost")


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes | str:
    """A member's bytes, or why they are not taken."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "path out of the tar"
    if not member.isreg():
        return "a link" if member.issym() or member.islnk() else "not a regular file"
    if member.size > limit:
        return too_large(LIMIT)
    file = tar.extractfile(member)
    assert file is not None  # it is regular
    return file.read()


def _rest(tar: tarfile.TarFile) -> str:
    """What is wrong where tarfile stopped without a word: there should be nothing or zeros."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    left = tar.fileobj.read(tarfile.BLOCKSIZE)
    return f"no header at byte {tar.offset:,}" if left.strip(b"\0") else ""


def _grouped(group: _Group, shard: str) -> Iterator[Item | Bad]:
    """The items of a group, each with what its captions say."""
    said, images = [], []
    for name, content in group.members.items():
        ending = PurePosixPath(name).suffix.lower()
        if ending in SEEN:
            images.append(name)
        elif ending in (".txt", ".json"):
            said.append(_said(ending, content))
        else:
            yield Bad(f"{shard}/{name}", f"not an image, a clip or a caption, by its ending: {ending!r}")
    if said and not images:
        yield Bad(f"{shard}/{group.key}", "a caption without an image")
    wrong = next((f"bad caption: {words}" for words in said if isinstance(words, str)), "")
    notes = noted({key: value for words in said if isinstance(words, dict) for key, value in words.items()})
    for name in images:
        content = group.members[name]
        known, fault = (None, content) if isinstance(content, str) else (content, wrong)
        yield Item(identity(f"{shard}/{name}"), known, identity(shard), notes, fault)


def _said(ending: str, content: bytes | str) -> dict[str, Any] | str:
    """The columns that a caption gives, or why it gives none."""
    if isinstance(content, str):
        return content
    if len(content) > LONGEST:
        return "larger than a megabyte"
    try:
        text = content.decode("utf-8-sig")
        row = json.loads(text) if ending == ".json" else {"text": text.splitlines()}
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "not JSON"
    return row if isinstance(row, dict) else "not a JSON object"
