"""Where pipelines are found, and where anything may be written. Answers before torch is imported."""

import os
from pathlib import Path

from mezzotint.errors import UserError

CONFIG_FILE = "pipeline.json"
STARTER = Path(__file__).parent / "starter"


def folder_of(source: Path | str) -> Path:
    """The folder of a pipeline that `load` knows by this name. UserError where there is none."""
    if str(source) == "starter":
        return STARTER
    folder = Path(source)
    for candidate in (folder, folder / "export"):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    if not folder.exists():
        raise UserError(f"no pipeline at {folder}: the folder does not exist (a packaged one is called 'starter')")
    raise UserError(f"no pipeline in {folder}: expected {CONFIG_FILE} there or in its folder 'export'")


def check_out(out: Path) -> None:
    """UserError where no file of this path can be written, so that nobody waits for work that cannot be kept."""
    above = next(folder for folder in out.parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"cannot write {out}: {above} is not a folder; choose another place with --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {out}: no permission to write in {above}; choose another place with --out")
