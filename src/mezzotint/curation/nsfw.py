"""Naked bodies, found by NudeNet (320n: a YOLOv8n of 18 parts of bodies), whose package brings the weights.

Gotchas: the package's metadata says MIT, the licence files in it are the AGPL 3.0. So it has an extra of its own, and no recipe insists
on it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL import Image

from mezzotint.curation.rows import Row, by_picture
from mezzotint.curation.stage import Compute, Stage

if TYPE_CHECKING:
    import pyarrow as pa

SIDE = 320  # pixels that the network sees
NAKED = (
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "ANUS_EXPOSED",
    "BUTTOCKS_EXPOSED",
)


@dataclass
class Nsfw(Stage, kind="nsfw"):
    """nsfw: confidence of the surest of what `parts` names, 0 to 1; the detector tells of nothing below 0.2. nsfw_part: its name, ""
    if there is none. Both null for clips and for what cannot be decoded."""

    parts: tuple[str, ...] = NAKED
    reads: ClassVar[tuple[str, ...]] = ("content", "media")
    needs: ClassVar[tuple[str, ...]] = ("nudenet",)
    extra: ClassVar[str] = "nsfw"

    @property
    def writes(self) -> "pa.Schema":
        import pyarrow as pa

        return pa.schema([("nsfw", pa.float32()), ("nsfw_part", pa.string())])

    def open(self) -> Compute:
        from nudenet import NudeDetector

        detector = NudeDetector()

        def compute(picture: Image.Image) -> Row:
            found = detector.detect(np.ascontiguousarray(np.asarray(picture)[..., ::-1]))
            score, part = max(((one["score"], one["class"]) for one in found if one["class"] in self.parts), default=(0.0, ""))
            return {"nsfw": score, "nsfw_part": part}

        return by_picture(self.writes, 2 * SIDE, compute)
