"""A writer of longer prompts, from pairs of a short and a long caption (next bytes, as Radford et al. 2018 fine-tune; eq. 3).

    L = -E 1/n sum_i log p(y_i | x, y_<i)

over the n bytes of the long caption y and its end; nothing is learned of the short one x. ln 256 at first.

The long captions are the data's; the short ones say less of the same scene (`worlds.caption.shorten`), drawn from the names of the samples.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from mezzotint.data.batch import Batch, Loader
from mezzotint.errors import UserError
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.pipeline import Pipeline
from mezzotint.text.writer import ByteWriter, ByteWriterConfig
from mezzotint.worlds.caption import parse, shorten, write


@dataclass
class EnhanceConfig(MethodConfig, kind="enhance"):
    """writer: what is trained."""

    writer: ByteWriterConfig = field(default_factory=ByteWriterConfig)

    def build(self, pipeline: Pipeline) -> "Enhance":
        return Enhance(self, pipeline)


@dataclass(kw_only=True)
class Captions(Batch):
    """`prompts` are short, and these are the long ones."""

    longer: list[str]


class Enhance(Method):
    """Roles: the writer; a student that stays as it is, the pipeline whose prompts are made longer."""

    def __init__(self, config: EnhanceConfig, pipeline: Pipeline) -> None:
        self.roles = {"student": Role(pipeline, trained=False), "writer": Role(config.writer.build(), averaged=True)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [("writer",)]

    def experience(self, loader: Loader, step: int) -> list[Batch]:
        batch = next(loader)
        given: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
        return [Captions(**given | {"prompts": list(map(shorter, batch.prompts, batch.ids))}, longer=batch.prompts)]

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        assert isinstance(batch, Captions)
        writer = self.roles["writer"].module
        assert isinstance(writer, ByteWriter)
        tokens, written = writer.texts(batch.prompts, batch.longer)
        of_texts = -(writer.log_prob(tokens) * written).sum(1)
        return (of_texts / written.sum(1)).mean(), {"nats": of_texts.detach()}  # of whole captions


def shorter(caption: str, name: str) -> str:
    """A caption that says less than a caption of Worlds, a function of the sample's name. UserError for another text."""
    rng = random.Random(f"shorter-{name}")
    try:
        return write(shorten(parse(caption), rng), rng)
    except ValueError as error:
        raise UserError(f"a writer learns here from captions of Worlds, and this is none: {caption[:60]!r}") from error
