"""What is cheap to know of a clip: where shots begin, how much moves, how much the camera shakes, which frames say nothing.

Classical measures on small grey frames, one pass, two frames in memory. OpenCV decodes.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mezzotint.curation.rows import Row, by_row
from mezzotint.curation.stage import Compute, Stage
from mezzotint.data.decode import UnusableError

if TYPE_CHECKING:
    import pyarrow as pa

Frame = NDArray[np.uint8]  # (H, W), grey
# Where and how a file of a container begins. No other is opened: FFmpeg also reads play lists, which name other files and addresses.
CONTAINERS = {"MP4": (4, b"ftyp"), "Matroska or WebM": (0, b"\x1a\x45\xdf\xa3"), "AVI": (8, b"AVI "), "GIF": (0, b"GIF8")}
SMALL = 160  # pixels of the longer side
BLACK, SAME = 24, 0.5  # levels: the brightest of a black frame (all but 1% of it), and the mean change below which frames are one
JUMP, TIMES, AROUND = 12.0, 2.0, 2  # a cut: a mean change in levels, so many times any of the changes just before and after


@dataclass
class Clips(Stage, kind="clips"):
    """clip_fault: why the clip cannot be decoded, "" if it can. frames, seconds: its length. shots: the first frame of each.
    shot_count: how many.

    motion: mean length of the optical flow, in longer sides of the picture a second. shake: mean change of the camera's motion from frame
    to frame, in longer sides; a steady pan has none. black_share: frames that are black. duplicate_share: frames like the one before.
    Null for pictures; after a fault, all but the fault.
    """

    rows: ClassVar[int] = 4
    reads: ClassVar[tuple[str, ...]] = ("content", "media")
    needs: ClassVar[tuple[str, ...]] = ("cv2",)
    extra: ClassVar[str] = "filters"

    @property
    def writes(self) -> "pa.Schema":
        import pyarrow as pa

        measured = ("seconds", "motion", "shake", "black_share", "duplicate_share")
        counted = {"clip_fault": pa.string(), "frames": pa.int32(), "shots": pa.list_(pa.int32()), "shot_count": pa.int32()}
        return pa.schema([*counted.items(), *((name, pa.float32()) for name in measured)])

    def open(self) -> Compute:
        import cv2

        cv2.setNumThreads(1)
        return by_row(self.writes, self._row)

    def _row(self, row: Row) -> Row:
        if row["media"] != "clip":
            return {}
        if row["content"] is None:
            return {"clip_fault": "no content"}
        try:
            return {"clip_fault": "", **measure(row["content"])}
        except UnusableError as error:
            return {"clip_fault": str(error)}


def measure(content: bytes) -> Row:
    """The measures of a clip's file. UnusableError with the reason where it cannot be decoded."""
    import cv2

    if not any(content[at : at + len(begin)] == begin for at, begin in CONTAINERS.values()):
        raise UnusableError(f"not a clip: its header is none of {', '.join(CONTAINERS)}" if content else "empty file")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"
        path.write_bytes(content)
        try:
            capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
            rate = capture.get(cv2.CAP_PROP_FPS)
            return survey(_frames(capture), rate if 0 < rate < 1000 else 25.0)
        except cv2.error as error:
            raise UnusableError(f"cannot be decoded: {' '.join(str(error).split())}") from None


def _frames(capture: Any) -> Iterator[Frame]:
    """All frames that can be decoded, grey and small."""
    import cv2

    while True:
        there, frame = capture.read()
        if not there:
            return
        share = min(1.0, SMALL / max(frame.shape[:2]))
        size = [max(16, round(side * share)) for side in frame.shape[1::-1]]  # the flow needs so many pixels
        yield cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY)


def survey(frames: Iterable[Frame], rate: float) -> Row:
    """The measures of grey frames, `rate` of them a second. UnusableError if there is none."""
    pairs: list[tuple[float, ...]] = []
    black: list[bool] = []
    for before, frame in pairwise(_watched(frames, black)):
        pairs.append((float(np.abs(frame.astype(np.int16) - before).mean()), *flow(before, frame)))
    if not black:
        raise UnusableError("cannot be decoded: no frame, or a codec that is not there")
    change, speed, across, down = np.array(pairs, np.float64).reshape(-1, 4).T
    begins = cuts(change)
    inside = ~np.isin(np.arange(len(change)) + 1, begins)
    same = change < SAME
    moving = inside & ~same
    follows = moving[1:] & moving[:-1]
    jerk = np.hypot(np.diff(across), np.diff(down))[follows]
    return {
        "frames": len(black),
        "seconds": len(black) / rate,
        "shots": [0, *begins],
        "shot_count": 1 + len(begins),
        "motion": float(speed[inside].mean() * rate) if inside.any() else 0.0,
        "shake": float(jerk.mean()) if len(jerk) else 0.0,
        "black_share": float(np.mean(black)),
        "duplicate_share": float(same.mean()) if len(same) else 0.0,
    }


def _watched(frames: Iterable[Frame], black: list[bool]) -> Iterator[Frame]:
    """The same frames; notes of each whether it is black."""
    for frame in frames:
        black.append(bool(np.percentile(frame, 99) < BLACK))
        yield frame


def flow(before: Frame, after: Frame) -> tuple[float, float, float]:
    """Farnebäck's optical flow (2003): its mean length, and the median to the right and down, which is the camera's. In longer sides."""
    import cv2

    still = np.zeros((*before.shape, 2), np.float32)
    field = np.asarray(cv2.calcOpticalFlowFarneback(before, after, still, 0.5, 3, 15, 2, 5, 1.1, 0)) / max(before.shape)
    across, down = np.median(field, axis=(0, 1))
    return float(np.hypot(field[..., 0], field[..., 1]).mean()), float(across), float(down)


def cuts(change: NDArray[np.float64]) -> list[int]:
    """The frames at which a shot begins, from the change to each frame from the one before; the first frame apart.

    A change counts against those around it, so that neither fast motion nor a flash is a cut (PySceneDetect's adaptive detector has the
    mean of those around it). A shot of less than three frames is not seen.
    """
    found = []
    for number, value in enumerate(change):
        around = np.concatenate([change[max(0, number - AROUND) : number], change[number + 1 : number + 1 + AROUND]])
        if value >= JUMP and value >= TIMES * around.max(initial=0.0):
            found.append(number + 1)
    return found
