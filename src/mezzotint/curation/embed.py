"""Pictures to vectors by any vision network of transformers (CLIP, SigLIP, DINOv2, ...), for what compares them by what they show."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from mezzotint.curation.stage import Compute, Stage
from mezzotint.data.decode import UnusableError, square
from mezzotint.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass
class Embed(Stage, kind="embed"):
    """The unit vector of each picture's centred square, in half precision; null where it cannot be decoded.

    path: a folder or hub id in transformers' format. Of a network of two towers it is what is compared with texts, else the pooled
    output, else the mean over patches.
    """

    path: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    reads: ClassVar[tuple[str, ...]] = ("content",)

    @cached_property
    def _config(self) -> Any:
        from mezzotint.rewards.published import pretrained

        if not self.path:
            raise UserError("an embedding needs a model; set path to a folder with a vision network of transformers")
        return pretrained("AutoConfig", self.path)

    @property
    def stamp(self) -> dict[str, Any]:
        """A device changes nothing."""
        settings = {name: value for name, value in self.to_data().items() if name != "device"}
        return {"stage": settings, "revision": self.revision}

    @property
    def writes(self) -> "pa.Schema":
        import pyarrow as pa

        tower = self._config.vision_config if hasattr(self._config, "vision_config") else self._config
        width = self._config.projection_dim if hasattr(self._config, "projection_dim") else tower.hidden_size
        return pa.schema([pa.field("embedding", pa.list_(pa.float16(), width))])

    def open(self) -> Compute:
        import pyarrow as pa
        import torch

        from mezzotint.pipeline import find_device
        from mezzotint.rewards.published import Eye, network

        tower = self._config.vision_config if hasattr(self._config, "vision_config") else self._config
        model, eye = network("AutoModel", self.path).to(find_device(self.device)), Eye(self.path, tower.image_size)
        kind = self.writes.field("embedding").type

        @torch.no_grad()
        def compute(batch: pa.RecordBatch) -> pa.RecordBatch:
            seen = [_square(content, eye.side) for content in batch["content"].to_pylist()]
            pictures = [torch.from_numpy(x).float().div(127.5).sub(1) for x in seen if x is not None]
            found: list[Any] = [None] * len(seen)
            if pictures:
                vectors = iter(_embedding(model, eye(torch.stack(pictures).to(model.device))).cpu().numpy().astype(np.float16))
                found = [None if x is None else next(vectors) for x in seen]
            return pa.record_batch([pa.array(found, kind)], names=["embedding"])

        return compute


def _embedding(model: Any, pixels: Any) -> Any:
    """(B, D) unit vectors."""
    import torch.nn.functional as F

    out = model.get_image_features(pixel_values=pixels) if hasattr(model, "get_image_features") else model(pixel_values=pixels)
    if not hasattr(out, "shape"):
        out = out.last_hidden_state.mean(1) if out.pooler_output is None else out.pooler_output
    return F.normalize(out.float(), dim=1)


def _square(content: bytes | None, side: int) -> Any:
    try:
        return square(content, side) if content else None
    except UnusableError:
        return None
