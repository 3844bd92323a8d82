"""Where it fits: what a folder of images holds, before any image is opened.

In: a folder, searched with its subfolders. Captions follow the image-folder convention: `metadata.jsonl` or `metadata.csv` in
the folder with columns `file_name` (relative to the folder) and `text`, several rows for one image being variants of its
caption; an image without a `text` there takes its variants from the non-empty lines of `name.txt` beside `name.png`.
Out: the names of files with the reason why one must not be opened, captions, the other columns, and what was set aside.
Gotchas: files and folders whose names begin with a dot are not read, nor is anything that a link places outside the folder. A name
that is not UTF-8 is as Python has it, with surrogates: `identity` makes an id of it.
"""

import csv
import io
import json
import os
import posixpath
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mezzotint.data.decode import UnusableError
from mezzotint.errors import UserError

# The last four are here so that such images are reported, not passed over.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".heic", ".heif", ".jxl")
METADATA = ("metadata.jsonl", "metadata.csv")
LONGEST = 1 << 20  # bytes of a file of captions

_UNSPEAKABLE = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]|%(?=[0-9A-Fa-f]{2})")


@dataclass(frozen=True)
class Bad:
    """Something set aside.

    file: path relative to the folder; for a row of metadata, the metadata file and the line ("metadata.csv:7").
    reason: its kind, then often a colon and the details.
    """

    file: str
    reason: str


def write_bad(bad: Iterable[Bad], path: str | Path) -> None:
    """Write what was set aside as JSON lines with `file` and `reason`."""
    Path(path).write_text("".join(json.dumps(asdict(each)) + "\n" for each in bad), encoding="utf-8")


@dataclass
class Contents:
    """files: every visible file below `root`, by relative path -> why it must not be opened, "" if it may.

    captions: of every image that a row of metadata names. columns: the other columns of the last such row. faults: images whose row
    has a bad caption -> the reason. bad: what was set aside.
    """

    root: Path
    files: dict[str, str] = field(default_factory=dict)
    captions: dict[str, list[str]] = field(default_factory=dict)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    bad: list[Bad] = field(default_factory=list)


def survey(path: str) -> Contents:
    """The names and captions in a folder."""
    try:
        os.scandir(path).close()
    except FileNotFoundError:
        raise UserError(f"there is no folder {path!r}; check the path") from None
    except NotADirectoryError:
        raise UserError(f"{path!r} is a file; give the folder that holds the images") from None
    except PermissionError:
        raise UserError(f"no permission to read the folder {path!r}; allow it or choose another folder") from None
    contents = Contents(Path(os.path.realpath(path)))
    _list(contents)
    _read_metadata(contents)
    return contents


def _list(contents: Contents) -> None:
    """Fill in `files`. Subfolders that are links or cannot be listed go to `bad`."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        subfolders = []
        try:
            with os.scandir(contents.root / folder) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        name = f"{folder}{entry.name}"
                        if entry.is_dir(follow_symlinks=False):
                            subfolders.append(f"{name}/")
                        elif entry.is_symlink() and os.path.isdir(entry.path):
                            contents.bad.append(Bad(name, "a link to a folder"))
                        else:
                            contents.files[name] = _objection(contents.root, entry)
        except OSError as error:
            contents.bad.append(Bad(folder.rstrip("/"), f"folder cannot be listed: {error.strerror}"))
        waiting += sorted(subfolders, reverse=True)


def _objection(root: Path, entry: "os.DirEntry[str]") -> str:
    """Why a file must not be opened; "" if it may."""
    if not entry.is_symlink():
        return "" if entry.is_file() else "not a regular file"
    if not Path(os.path.realpath(entry.path)).is_relative_to(root):
        return "a link out of the folder"
    return "" if os.path.isfile(entry.path) else "not a regular file"


def _read_metadata(contents: Contents) -> None:
    """Fill in `captions`, `columns` and `faults` from the folder's metadata file, if it has one. Bad rows go to `bad`."""
    for where, row in listed(contents, METADATA):
        problem = row if isinstance(row, str) else _add_row(contents, where, row)
        if problem:
            contents.bad.append(Bad(where, problem))


Row = dict[str, Any] | str  # the columns, or why they cannot be read


def listed(contents: Contents, names: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Places ("metadata.csv:7") and rows of the one file of these names, JSON lines or CSV, that the folder has, if it has one."""
    found = [file for file in names if file in contents.files]
    if not found:
        return
    file, path = found[0], str(contents.root / found[0])
    if len(found) > 1:
        raise UserError(f"{str(contents.root)!r} holds both {' and '.join(names)}; remove one")
    if contents.files[file]:
        raise UserError(f"{path!r} is {contents.files[file]}; put the file itself there")
    try:
        # Bytes that are not UTF-8 pass as surrogates, so that only the rows which hold them are lost.
        text = Path(path).read_bytes().decode("utf-8-sig", "surrogateescape")
    except PermissionError:
        raise UserError(f"no permission to read {path!r}; allow it or remove the file") from None
    # Not splitlines(): it would also split at line separators that JSON allows within a string.
    rows = json_rows(text.split("\n")) if file.endswith(".jsonl") else csv_rows(io.StringIO(text, newline=""))
    yield from ((f"{file}:{line}", row) for line, row in rows)


def json_rows(lines: Iterable[str]) -> Iterator[tuple[int, Row]]:
    """Line numbers and rows of JSON lines."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) else "unreadable row: not a JSON object"


def csv_rows(lines: Iterable[str], delimiter: str = ",") -> Iterator[tuple[int, Row]]:
    """Line numbers and rows of comma-separated values with a header."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    header: list[str] = []
    while True:
        before = reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A quote that is not closed swallows the lines after it: each of them is a row lost.
            yield from ((line, f"unreadable row: {error}") for line in range(before + 1, reader.line_num + 1))
            continue
        if not header:
            header = cells
        elif len(cells) == len(header):
            yield reader.line_num, dict(zip(header, cells, strict=True))
        elif cells:
            yield reader.line_num, f"unreadable row: {len(cells)} cells under a header of {len(header)}"


def _add_row(contents: Contents, where: str, row: dict[str, Any]) -> str:
    """Note the caption that a row gives. Returns what is wrong with the row as a whole, "" if nothing is."""
    name, text = row.get("file_name"), row.get("text")
    if not isinstance(name, str) or not name:
        return "unreadable row: no file_name"
    image = posixpath.normpath(name)
    if image not in contents.files:
        return absence(contents.root, name)
    captions = contents.captions.setdefault(image, [])
    contents.columns[image] = {key: value for key, value in row.items() if key not in ("file_name", "text")}
    if text is None:
        return ""
    if not isinstance(text, str) or not is_utf8(text):
        contents.faults[image] = f"bad caption: {where} is not {'UTF-8' if isinstance(text, str) else 'a string'}"
    elif text.strip():
        captions.append(text.strip())
    return ""


def is_utf8(text: str) -> bool:
    """Whether a text is UTF-8: what is not comes as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def absence(root: Path, name: str) -> str:
    """Why the name of a file in a row is none of the folder's files."""
    with suppress(ValueError):  # raised for a name that no file can have, such as one with a NUL
        if os.path.isabs(name) or not Path(os.path.realpath(root / name)).is_relative_to(root):
            return f"path out of the folder: {name!r}"
    return f"no such file: {name!r}"


def sidecar(contents: Contents, name: str) -> tuple[str, ...]:
    """The captions in `name.txt` beside `name.png`, one a line; () if there is no such file."""
    file = PurePosixPath(name).with_suffix(".txt").as_posix()
    if file not in contents.files:
        return ()
    if contents.files[file]:
        raise UnusableError(f"bad caption: {file!r} is {contents.files[file]}")
    try:
        with open(contents.root / file, "rb") as opened:
            content = opened.read(LONGEST + 1)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnusableError(f"bad caption: {file!r} is not UTF-8") from None
    except OSError as error:
        raise UnusableError(f"bad caption: {file!r} cannot be read, {error.strerror}") from None
    if len(content) > LONGEST:
        raise UnusableError(f"bad caption: {file!r} is larger than a megabyte")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def reasons(bad: Sequence[Bad]) -> list[str]:
    """Lines for a person: how much was set aside, and for which reasons."""
    kinds = Counter(each.reason.partition(":")[0] for each in bad)
    first = {each.reason.partition(":")[0]: each.file for each in reversed(bad)}
    return [f"{len(bad):,} set aside", *(f"  {count:,} {kind} (first: {first[kind]!r})" for kind, count in kinds.most_common(4))]


def refusal(path: str, bad: Sequence[Bad], used: int) -> UserError:
    """The error for a folder of which too much was set aside, one thing at least; all of it is listed in a temporary file."""
    total, worst = len(bad) + used, bad[0]
    with tempfile.NamedTemporaryFile(prefix="mezzotint-bad-", suffix=".jsonl", delete=False) as file:
        listing = file.name
    write_bad(bad, listing)
    raising = f", or go on without them with max_bad above {len(bad) / total:.3f}" if used else ""
    return UserError(
        f"{len(bad)} of {total} files and rows in {path!r} cannot be used, the first being {worst.file!r} "
        f"({worst.reason}); mend or remove what {listing} lists{raising}"
    )


def identity(name: str) -> str:
    """A name as a row's id: UTF-8 of one line, another one for each name.

    Bytes that are not UTF-8 and control characters become %XX, and so does the % of what looks like one of these already.
    """
    return _UNSPEAKABLE.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogateescape")), name)
