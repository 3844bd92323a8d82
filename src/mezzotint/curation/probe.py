"""What is true of a picture, and what is cheap to measure, from decoding it once, which costs most."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image

from mezzotint.curation.measures import measure
from mezzotint.curation.rows import Row, by_row
from mezzotint.curation.stage import Compute, Stage
from mezzotint.data.decode import UnusableError, bounded, opened

if TYPE_CHECKING:
    import pyarrow as pa

UPRIGHT = 0x0112  # the tag of EXIF that says how a camera was held
TURNED = (5, 6, 7, 8)  # its values by which width and height change places


@dataclass
class Probe(Stage, kind="probe"):
    """side: pixels of the longer side at which is measured.

    decode_fault: why the picture cannot be decoded whole, "" if it can. wide, high: upright, as stored. short_side: the smaller.
    aspect: longer over shorter, at least 1. animated: has more frames. alpha: has transparency. And `measures.Measures`.
    Null for clips; after a fault, all but the fault.
    """

    side: int = 512
    reads: ClassVar[tuple[str, ...]] = ("content", "media")
    revision: ClassVar[int] = 2

    @property
    def writes(self) -> "pa.Schema":
        import pyarrow as pa

        text, number, truth, measured = pa.string(), pa.int32(), pa.bool_(), pa.float32()
        facts = {"decode_fault": text, "wide": number, "high": number, "short_side": number, "aspect": measured}
        facts |= {"animated": truth, "alpha": truth}
        names = ("sharpness", "edge", "entropy", "flatness", "brightness", "contrast", "colour", "tiling")
        return pa.schema([*facts.items(), *((name, measured) for name in names)])

    def open(self) -> Compute:
        return by_row(self.writes, self._row)

    def _row(self, row: Row) -> Row:
        if row["media"] != "image":
            return {}
        if row["content"] is None:
            return {"decode_fault": "no content"}
        try:
            with opened(row["content"]) as image:
                image.verify()  # the checksums of PNG, which decoding does not look at
            with opened(row["content"]) as image:
                known = facts(image)
                picture = bounded(image, self.side)
        except UnusableError as error:
            return {"decode_fault": str(error)}
        return {"decode_fault": "", **known, **asdict(measure(picture))}


def facts(image: Image.Image) -> dict[str, Any]:
    """What the header of an opened image says: the size upright, whether it has more frames or transparency."""
    wide, high = image.size
    if image.getexif().get(UPRIGHT) in TURNED:
        wide, high = high, wide
    return {
        "wide": wide,
        "high": high,
        "short_side": min(wide, high),
        "aspect": max(wide, high) / min(wide, high),
        "animated": bool(getattr(image, "is_animated", False)),  # formats without frames have no such attribute
        "alpha": image.has_transparency_data,
    }
