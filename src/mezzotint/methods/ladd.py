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
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.data.batch import Batch
from mezzotint.flow.domain import within
from mezzotint.flow.path import from_velocity, interpolate
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.methods.teacher import block_features, teacher_of
from mezzotint.models.embed import TimeEmbedding
from mezzotint.pipeline import Pipeline

HIDDEN = 64  # width of the heads


@dataclass
class LADDConfig(MethodConfig, kind="ladd"):
    """steps: network calls of the student, sampled with `consistency`. shift: of their times. r1: weight of the penalty. times: of the
    noise that the critic sees. teacher: see `methods.teacher`.
    """

    steps: int = 4
    shift: float = 1.0
    r1: float = 1e-2
    times: TimeDensity = field(default_factory=lambda: TimeDensity(mean=1.0))
    teacher: str = ""

    def build(self, pipeline: Pipeline) -> "LADD":
        return LADD(self, pipeline)


class Critic(nn.Module):
    """Tokens of every block, list of (B, N, D), at time t (B,) with a pooled text (B, P) -> logits (B, tokens of all blocks).

    widths: D of every block. Each logit sees its own token only.
    """

    def __init__(self, widths: list[int], pooled: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(width, HIDDEN) for width in widths)
        self.outer = nn.ModuleList(nn.Linear(HIDDEN, 1) for _ in widths)
        self.embed_time = TimeEmbedding(HIDDEN)
        self.embed_pooled = nn.Linear(pooled, HIDDEN)

    def forward(self, features: list[Tensor], t: Tensor, pooled: Tensor) -> Tensor:
        c = (self.embed_time(t) + self.embed_pooled(pooled))[:, None]
        heads = zip(self.inner, self.outer, features, strict=True)
        return torch.cat([outer(F.silu(inner(F.layer_norm(f, f.shape[-1:])) + c))[..., 0] for inner, outer, f in heads], dim=1)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """(B,) the critic's loss from logits (B, N) of real and of fake samples; zero where they are beyond 1 and -1."""
    return F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1)


def gradient_penalty(logits: Tensor, features: list[Tensor]) -> Tensor:
    """R1 (Mescheder et al. 2018, eq. 9): (B,) squared gradients of logits (B, N) by the tokens that they see, averaged over logits."""
    gradients = torch.autograd.grad(logits.sum(), features, create_graph=True)
    return torch.stack([g.square().flatten(1).sum(1) for g in gradients]).sum(0) / logits.shape[1]


class LADD(Method):
    """Roles: the student; its frozen teacher, which has the features; the critic that reads them."""

    def __init__(self, config: LADDConfig, pipeline: Pipeline) -> None:
        within(1, 1000, steps=config.steps)
        self.config = config
        teacher = teacher_of(pipeline, config.teacher)
        self.roles = {
            "student": Role(pipeline, averaged=True),
            "teacher": Role(teacher, trained=False),
            "critic": Role(Critic(*_widths(teacher))),
        }

    def turns(self, step: int) -> list[Turn]:
        return [("critic",), ("student",)]

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
        real, features = self._judged(x0, eps, t, batch.prompts)
        penalty = gradient_penalty(real, features)
        loss = hinge(real, fake) + self.config.r1 * penalty
        right = ((real > 0).float().mean(1) + (fake < 0).float().mean(1)) / 2
        return loss.mean(), {"t": t, "loss": loss.detach(), "accuracy": right, "penalty": penalty.detach()}

    def _drawn(self, x0: Tensor, prompts: list[str]) -> Tensor:
        """One jump of the student to data, from x0 noised to one of its times."""
        times = self.student.config.path.times(self.config.steps, self.config.shift)
        t = times[torch.randperm(len(x0)) % self.config.steps]
        x_t = interpolate(x0, torch.randn_like(x0), t)
        return from_velocity(self.student.velocity(x_t, t, self.student.encode(prompts)), "data", x_t, t)

    def _judged(self, x: Tensor, eps: Tensor, t: Tensor, prompts: list[str]) -> tuple[Tensor, list[Tensor]]:
        """The critic's logits of x, and the features they are of; these have gradients to x, or start one where x has none."""
        teacher, critic = self.pipeline("teacher"), self.roles["critic"].module
        cond = teacher.encode(prompts)
        features = block_features(teacher, interpolate(x, eps, t), t, cond)
        if not x.requires_grad:
            features = [f.detach().requires_grad_() for f in features]
        return critic(features, t, cond.pooled), features


@torch.no_grad()
def _widths(teacher: Pipeline) -> tuple[list[int], int]:
    """Widths of the teacher's blocks and of its pooled text, by asking it once."""
    cond = teacher.encode([""])
    latent = torch.zeros(1, *teacher.codec.latent_shape(teacher.config.sampling.shape))
    features = block_features(teacher, latent, torch.full((1,), 0.5), cond)
    return [f.shape[-1] for f in features], cond.pooled.shape[-1]
