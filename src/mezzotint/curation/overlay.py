"""Writing that is laid over a picture: titles, dates, shop signs, and the marks of owners, as far as they are words.

The reader is PP-OCR v4 (PaddleOCR, 2023; Apache 2.0) through rapidocr-onnxruntime, which brings the weights. Marks without words that are
repeated all over a picture are `tiling` (`measures`), which costs a millisecond instead of a tenth of a second.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw

from mezzotint.curation.rows import Row, by_picture
from mezzotint.curation.stage import Compute, Stage

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass
class Overlay(Stage, kind="overlay"):
    """side: pixels of the longer side at which is read; letters below a dozen pixels are not seen. A reading counts if its confidence is at
    least `sure`, and it has at least so many `letters` or digits: a ring is an O to the reader.

    text_area: share of the picture that is within boxes around what was read. text_words: number of words. text_score: confidence of the
    surest, 0 if there is none. All null for clips and for what cannot be decoded.
    """

    side: int = 640
    sure: float = 0.6
    letters: int = 3
    reads: ClassVar[tuple[str, ...]] = ("content", "media")
    needs: ClassVar[tuple[str, ...]] = ("rapidocr_onnxruntime",)
    extra: ClassVar[str] = "filters"

    @property
    def writes(self) -> "pa.Schema":
        import pyarrow as pa

        return pa.schema([("text_area", pa.float32()), ("text_words", pa.int32()), ("text_score", pa.float32())])

    def open(self) -> Compute:
        from rapidocr_onnxruntime import RapidOCR

        # "max": do not enlarge small pictures, which would take six times as long.
        read = RapidOCR(det_limit_type="max", use_cls=False, text_score=self.sure, intra_op_num_threads=1)

        def compute(picture: Image.Image) -> Row:
            found, _ = read(np.asarray(picture)[..., ::-1], use_cls=False)
            return writing([one for one in found or [] if sum(map(str.isalnum, one[1])) >= self.letters], picture.size)

        return by_picture(self.writes, self.side, compute)


def writing(found: list[Any], size: tuple[int, int]) -> Row:
    """The columns of (box, text, confidence) that were read in a picture; boxes may overlap."""
    mask = Image.new("1", size)
    draw = ImageDraw.Draw(mask)
    for box, _, _ in found:
        draw.polygon([tuple(corner) for corner in box], fill=1)
    return {
        "text_area": float(np.asarray(mask).mean()),
        "text_words": sum(len(text.split()) for _, text, _ in found),
        "text_score": max((float(score) for *_, score in found), default=0.0),
    }
