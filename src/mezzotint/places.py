"""Where pipelines are found: what a folder of one has in it, and which folder a name means. Answers before torch is imported."""

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
