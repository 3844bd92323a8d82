"""DreamBooth (Ruiz et al. 2022, eq. 2): a subject from a few pictures, bound to a rare word, and its class kept as it was.

    L = E ||v(x_t, t, "a RARE ring") - u||^2 + prior E ||v(x'_t, t, "a ring") - u'||^2

The x' are pictures of the class that the original model drew. Without the second term the class turns into the subject (language
drift). The captions of the data say the rare word.

With `word` it is textual inversion (Gal et al. 2022): everything is frozen but the embedding of that word.

Where we differ: the class pictures are drawn when they are first needed, from fixed seeds, and kept in memory: they are a function of
the original's weights, which the checkpoint holds.
"""

from dataclasses import dataclass, field, fields
from functools import cached_property

import torch
from torch import Tensor

from mezzotint.data.batch import Batch, Loader
from mezzotint.errors import UserError
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.denoise import flow_error
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn, twin
from mezzotint.models.cond import sent
from mezzotint.pipeline import Pipeline
from mezzotint.text import ByteEncoder


@dataclass
class DreamBoothConfig(MethodConfig, kind="dreambooth"):
    """prior: weight of the second term, 0 for none. class_prompt: the class. pictures: how many the original draws of it.

    word: the only thing that learns, if given; its letters should stand where they stand in no other word. times: of training.
    """

    class_prompt: str = ""
    prior: float = 1.0
    pictures: int = 64
    word: str = ""
    times: TimeDensity = field(default_factory=TimeDensity)

    def build(self, pipeline: Pipeline) -> "DreamBooth":
        return DreamBooth(self, pipeline)


@dataclass(kw_only=True)
class WithPrior(Batch):
    """Pictures of the subject, and (B, C, H, W) as many of the class."""

    prior: Tensor


class DreamBooth(Method):
    """Roles: the student; the original, frozen, which draws the class."""

    def __init__(self, config: DreamBoothConfig, pipeline: Pipeline) -> None:
        self.config = config
        if config.word:
            _only_word(pipeline, config.word)
        self.roles = {
            "student": Role(pipeline, averaged=True, dropout=True),
            "original": Role(twin(pipeline), trained=False),
        }

    def experience(self, loader: Loader, step: int) -> list[Batch]:
        batch = next(loader)
        if not self.config.prior:
            return [batch]
        rows = torch.randint(len(self._class), (len(batch),), device="cpu")
        given = {f.name: getattr(batch, f.name) for f in fields(batch)}
        return [WithPrior(**given, prior=sent(self._class[rows], batch.images.device))]

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        subject, t = self._error(batch.x0(self.student), batch.prompts)
        metrics = {"t": t, "subject": subject.detach()}
        if not isinstance(batch, WithPrior):
            return subject.mean(), metrics
        kept, _ = self._error(self.student.codec.pixels.encode(batch.prior), [self.config.class_prompt] * len(batch))
        return (subject + self.config.prior * kept).mean(), metrics | {"prior": kept.detach()}

    def _error(self, x0: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """(B,) flow errors of the student on the ends of flows, and their times."""
        t = self.config.times.sample(len(x0))
        return flow_error(self.student, x0, torch.randn_like(x0), t, self.student.encode(prompts)), t

    @cached_property
    def _class(self) -> Tensor:
        """Pictures of the class by the original, on the CPU."""
        original = self.pipeline("original")
        return original(self.config.class_prompt, self.config.pictures)


def _only_word(pipeline: Pipeline, word: str) -> None:
    """Freeze a pipeline but for the embedding of a word. UserError for text encoders that are never trained."""
    if not isinstance(pipeline.text, ByteEncoder):
        raise UserError("textual inversion needs a text encoder that is trained here; those of published models are frozen")
    pipeline.requires_grad_(False)
    table = pipeline.text.embed.weight.requires_grad_(True)
    rows = torch.zeros(len(table), 1, device=table.device)
    rows[pipeline.text.tokens([word]).flatten()] = 1
    rows[0] = 0  # stands for no letter
    table.register_hook(lambda gradient: gradient * rows.to(gradient))
