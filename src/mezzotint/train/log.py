"""The diary of a run: one JSON object per line."""

import json
import os
from pathlib import Path
from typing import Any


class Log:
    """`metrics.jsonl` of a run. Opened at a step, it forgets what a killed run had written beyond it."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read(path) if line["step"] <= step]
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(part, path)
        self.file = path.open("a", buffering=1)

    def write(self, step: int, **values: Any) -> None:
        """Add a line."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        self.file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a kill cut short is left out. An absent file has none."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
