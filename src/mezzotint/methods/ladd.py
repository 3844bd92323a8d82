"""Latent adversarial diffusion distillation (LADD, Sauer et al. 2024): a student whose samples a critic cannot tell from its teacher's.

The student jumps from a noised sample to data at one of its `steps` times s, x = x_s - s v(x_s, s). The critic D reads what the blocks
of the frozen teacher say of a latent that is noised again, y = (1 - t) x + t eps, through a small head on each token of every block:

    L_D = E max(0, 1 - D(y_real)) + max(0, 1 + D(y_fake)) + r1 E |grad D(y_real)|^2;    L = -E D(y_fake)

More noise in y teaches layout, less teaches texture (`times`). The gradient of the penalty is by the features, which costs no pass
through the teacher. Real samples are the teacher's own, guided, if the data are pairs (`data.pairs`), as in the paper, and pictures
otherwise.

Where we differ: heads see single tokens instead of neighbourhoods; all times of the student are equally common from the start.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mezzotint.data.batch import Batch
from mezzotint.flow.domain import within
from mezzotint.flow.path import interpolate
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.adversarial import HIDDEN, Heads, accuracy, hinge, jumped, turns
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.methods.teacher import block_features, teacher_of
from mezzotint.models.embed import TimeEmbedding
from mezzotint.pipeline import Pipeline


@dataclass
class LADDConfig(MethodConfig, kind="ladd"):
    """steps: network calls of the student, sampled with `consistency`. shift: of their times. r1: weight of the penalty. alone,
    critic_rate: see `methods.adversarial`. times: of the noise that the critic sees. teacher: see `methods.teacher`.
    """

    steps: int = 4
    shift: float = 1.0
    r1: float = 1e-2
    alone: int = 0
    critic_rate: float = 1.0
    times: TimeDensity = field(default_factory=lambda: TimeDensity(mean=1.0))
    teacher: str = ""

    def build(self, pipeline: Pipeline) -> "LADD":
        return LADD(self, pipeline)


class Critic(nn.Module):
    """Tokens of every block, list of (B, N, D), at time t (B,) with a pooled text (B, P) -> logits and slopes (`Heads`).

    widths: D of every block.
    """

    def __init__(self, widths: list[int], pooled: int) -> None:
        super().__init__()
        self.heads = Heads(widths)
        self.embed_time = TimeEmbedding(HIDDEN)
        self.embed_pooled = nn.Linear(pooled, HIDDEN)

    def forward(self, features: list[Tensor], t: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        read: tuple[Tensor, Tensor] = self.heads(features, self.embed_time(t) + self.embed_pooled(pooled))
        return read


class LADD(Method):
    """Roles: the student; its frozen teacher, which has the features; the critic that reads them."""

    def __init__(self, config: LADDConfig, pipeline: Pipeline) -> None:
        within(1, 1000, steps=config.steps)
        self.config = config
        teacher = teacher_of(pipeline, config.teacher)
        self.roles = {
            "student": Role(pipeline, averaged=True),
            "teacher": Role(teacher, trained=False),
            "critic": Role(Critic(*_widths(teacher)), rate=config.critic_rate),
        }

    def turns(self, step: int) -> list[Turn]:
        return turns(step, self.config.alone)

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        x0 = batch.x0(self.student)
        eps, t = torch.randn_like(x0), self.config.times.sample(len(batch))
        if turn == ("student",):
            logits, _ = self._judged(self._drawn(x0, batch.prompts), eps, t, batch.prompts)
            loss = -logits.mean(1)
            return loss.mean(), {"t": t, "loss": loss.detach()}
        with torch.no_grad():
            x = self._drawn(x0, batch.prompts)
        fake, _ = self._judged(x, eps, t, batch.prompts)
        real, slopes = self._judged(x0, eps, t, batch.prompts)
        penalty = slopes.mean(1)
        loss = hinge(real, fake) + self.config.r1 * penalty
        return loss.mean(), {"t": t, "loss": loss.detach(), "accuracy": accuracy(real, fake), "penalty": penalty.detach()}

    def _drawn(self, x0: Tensor, prompts: list[str]) -> Tensor:
        """One jump of the student to data."""
        x, _ = jumped(self.student, x0, prompts, self.config.steps, self.config.shift)
        return x

    def _judged(self, x: Tensor, eps: Tensor, t: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """The critic's logits of x, with gradients to x, and their slopes."""
        teacher = self.pipeline("teacher")
        cond = teacher.encode(prompts)
        judged: tuple[Tensor, Tensor] = self.roles["critic"].module(
            block_features(teacher, interpolate(x, eps, t), t, cond), t, cond.pooled
        )
        return judged


@torch.no_grad()
def _widths(teacher: Pipeline) -> tuple[list[int], int]:
    """Widths of the teacher's blocks and of its pooled text, by asking it once."""
    cond = teacher.encode([""])
    latent = cond.text.new_zeros(1, *teacher.codec.latent_shape(teacher.config.sampling.shape))
    features = block_features(teacher, latent, latent.new_full((1,), 0.5), cond)
    return [f.shape[-1] for f in features], cond.pooled.shape[-1]
