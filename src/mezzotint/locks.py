"""Folders that one run at a time writes in."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mezzotint.errors import UserError


@contextmanager
def alone(folder: Path, what: Path | None = None) -> Iterator[None]:
    """Make a folder; while this lasts, a second run that would write there (to `what`, if that is elsewhere) is told so by a UserError.

    A lock ends with its process, however that ends. On file systems without locks nobody is told. UserError, too, where the folder
    cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from error
    try:
        if not _locked(held, folder):
            raise UserError(f"another run is at work on {what or folder}; wait until it has ended")
        yield
    finally:
        os.close(held)


def _locked(held: int, folder: Path) -> bool:
    """Take the lock of an open folder, if there are locks; whether nobody else has it."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return folder.exists() and os.path.samestat(os.fstat(held), os.stat(folder))  # not removed by a run that ended just now
