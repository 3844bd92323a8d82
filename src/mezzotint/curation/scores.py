"""How good pictures look, and how well captions fit them: any reward of `rewards`, as a column.

The aesthetic predictor of LAION is `AestheticConfig`, the alignment of CLIP `CLIPRewardConfig`; each names the folder of its network.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from mezzotint.curation.rows import Row
from mezzotint.curation.stage import Compute, Stage
from mezzotint.data.decode import UnusableError, square
from mezzotint.rewards import CLIPRewardConfig, RewardConfig

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass
class Score(Stage, kind="score"):
    """name: of the column, float32. reward: what rates the pictures. side: pixels of the centred square that it is given.

    captioned: it rates the picture under the row's first caption, and rows without one are null; otherwise it needs none. Clips and what
    cannot be decoded are null, and so is a rating that is not finite.
    """

    name: str = "alignment"
    reward: RewardConfig = field(default_factory=CLIPRewardConfig)
    side: int = 224
    captioned: bool = True
    rows: ClassVar[int] = 16
    reads: ClassVar[tuple[str, ...]] = ("content", "media", "captions")
    needs: ClassVar[tuple[str, ...]] = ("transformers",)
    extra: ClassVar[str] = "text"

    @property
    def writes(self) -> "pa.Schema":
        import pyarrow as pa

        return pa.schema([(self.name, pa.float32())])

    def open(self) -> Compute:
        import pyarrow as pa
        import torch

        rate = self.reward.build()

        def compute(batch: pa.RecordBatch) -> pa.RecordBatch:
            rows = {number: self._input(row) for number, row in enumerate(batch.to_pylist())}
            ready = {number: row for number, row in rows.items() if row is not None}
            ratings: list[float | None] = [None] * len(rows)
            if ready:
                pixels, captions = zip(*ready.values(), strict=True)
                images = torch.from_numpy(np.stack(pixels)).float().div(127.5).sub(1)
                with torch.no_grad():
                    rated = rate(images, captions).tolist()
                for number, rating in zip(ready, rated, strict=True):
                    ratings[number] = rating if np.isfinite(rating) else None
            return pa.record_batch([pa.array(ratings, pa.float32())], schema=self.writes)

        return compute

    def _input(self, row: Row) -> tuple[NDArray[np.uint8], str] | None:
        captions = row["captions"]
        if row["content"] is None or row["media"] != "image" or (self.captioned and not captions):
            return None
        try:
            return square(row["content"], self.side), captions[0] if self.captioned else ""
        except UnusableError:
            return None
