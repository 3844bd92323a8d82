"""Where it fits: what frozen networks make of rows, as columns, so that training need not make it again in every epoch.

In: content or captions, and a pipeline whose codec or text encoder is frozen. Out: columns that `TableConfig.latents` and `.states` name.
Gotchas: the stamp of a column holds a digest of the weights, the shapes of pictures and the precision. With other weights a stage is due
again, and a run refuses a column that its own networks would not have made.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mezzotint.curation.stage import Compute, Stage
from mezzotint.data import buckets
from mezzotint.data.batch import scaled
from mezzotint.data.cache import codec_stamp, pack, pack_states, text_stamp
from mezzotint.data.decode import UnusableError, fitted
from mezzotint.data.rows import texts
from mezzotint.pipeline import DeviceName, Pipeline, find_device, load

if TYPE_CHECKING:
    import pyarrow as pa

DTypeName = Literal["float16", "bfloat16", "float32"]


@dataclass
class LatentsConfig(Stage, kind="latents"):
    """Latents (c, h, w) of whole pictures, cut from the middle: what `Codec.encode` gives, the mode where the codec has a distribution.

    pipeline: whose codec (see `pipeline.load`). size, multiple: shapes of pictures, as in `TableConfig`. column: their name. dtype: their
    precision. A row that cannot be decoded has none.
    """

    reads: ClassVar[tuple[str, ...]] = ("content", "width", "height")
    rows: ClassVar[int] = 32

    pipeline: str = "starter"
    size: int = 256
    multiple: int = 0
    column: str = "latents"
    dtype: DTypeName = "float16"
    device: DeviceName = "auto"

    @property
    def writes(self) -> "pa.Schema":
        return _column(self.column)

    @cached_property
    def stamp(self) -> dict[str, Any]:
        made = codec_stamp(load(self.pipeline))
        return {"kind": self.kind, **made, "size": self.size, "multiple": self.multiple, "dtype": self.dtype, "revision": self.revision}

    def open(self) -> Compute:
        pipeline = load(self.pipeline).to(find_device(self.device))
        return lambda batch: _table(self.writes, self._latents(pipeline, batch))

    def _latents(self, pipeline: Pipeline, batch: "pa.RecordBatch") -> list[bytes | None]:
        """The latents of every row; pictures of one shape go through the codec together."""
        shapes = buckets.shapes(self.size, self.multiple) if self.multiple else [(self.size, self.size)]
        device = next(pipeline.parameters()).device
        pictures: dict[buckets.Shape, dict[int, NDArray[np.uint8]]] = defaultdict(dict)
        for row, found in enumerate(batch.to_pylist()):
            if found["content"] is None or min(found["width"], found["height"]) < 1:
                continue
            shape = shapes[int(buckets.assign([(found["width"], found["height"])], shapes))]
            try:
                pictures[shape][row] = fitted(found["content"], *shape)
            except UnusableError:
                continue
        values: list[bytes | None] = [None] * batch.num_rows
        for together in pictures.values():
            images = torch.from_numpy(np.stack(list(together.values()))).permute(0, 3, 1, 2).to(device)
            with torch.no_grad():
                latents = pipeline.codec.encode(scaled(images))
            for row, latent in zip(together, latents.to(getattr(torch, self.dtype)), strict=True):
                values[row] = pack({"latents": latent})
        return values


@dataclass
class StatesConfig(Stage, kind="states"):
    """The conditions that a frozen text encoder makes of all captions of a row.

    pipeline: whose encoder (see `pipeline.load`). captions: the columns. column: their name. dtype: their precision. The empty caption is
    among them, since a row may have no other.
    """

    reads: ClassVar[tuple[str, ...]] = ("captions",)
    rows: ClassVar[int] = 32

    pipeline: str = "starter"
    captions: tuple[str, ...] = ("captions",)
    column: str = "states"
    dtype: DTypeName = "float16"
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        self.reads = self.captions  # type: ignore[misc]  # of this one alone

    @property
    def writes(self) -> "pa.Schema":
        return _column(self.column)

    @cached_property
    def stamp(self) -> dict[str, Any]:
        made = text_stamp(load(self.pipeline))
        return {"kind": self.kind, **made, "captions": list(self.captions), "dtype": self.dtype, "revision": self.revision}

    def open(self) -> Compute:
        pipeline = load(self.pipeline).to(find_device(self.device))
        return lambda batch: _table(self.writes, self._states(pipeline, batch))

    def _states(self, pipeline: Pipeline, batch: "pa.RecordBatch") -> list[bytes | None]:
        """The states of every row, each caption encoded once."""
        captions = [{"", *(text for name in self.captions for text in texts(row[name]))} for row in batch.to_pylist()]
        different = sorted(set().union(*captions))
        with torch.no_grad():
            cond = pipeline.encode(different)
        said = {text: cond.index(slice(place, place + 1)) for place, text in enumerate(different)}
        return [pack_states({text: said[text] for text in own}, getattr(torch, self.dtype)) for own in captions]


def _column(name: str) -> "pa.Schema":
    import pyarrow as pa

    return pa.schema([pa.field(name, pa.large_binary())])


def _table(schema: "pa.Schema", values: list[bytes | None]) -> "pa.RecordBatch":
    import pyarrow as pa

    return pa.record_batch([pa.array(values, schema[0].type)], schema=schema)
