"""Distribution matching distillation to a few steps (DMD2, Yin et al. 2024, algorithm 1).

The student's samples x are renoised to y = (1 - t) x + t eps, and x is moved to where the teacher's clean estimate of y
differs from that of a critic trained on the student's own samples:

    g = (x0_critic(y) - x0_teacher(y)) / mean|x - x0_teacher(y)|;    L = 1/2 ||x - sg(x - g)||^2

The critic takes `critic_turns` optimizer steps for each of the student's (two time scales). The student's inputs are what
it meets when it samples (backward simulation): its own outputs, renoised, at one of its `steps` times drawn at random.

g is small where the student is half-way between two modes. With `adversarial` > 0 a head on the critic's features learns to tell
renoised samples from renoised pictures of the data (section 4.3): l(y) is its logit for "data", and with w = `adversarial`

    L_student += w softplus(-l(y));    L_critic += w (softplus(l(y)) + softplus(-l(y_data)))

Where we differ: the head reads the tokens of the critic's middle block, each by itself, and takes the mean of what it finds.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.data.batch import Batch
from mezzotint.flow.path import from_velocity, interpolate, like
from mezzotint.flow.time import TimeDensity, grid
from mezzotint.methods.denoise import levelled
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.models import Cond
from mezzotint.pipeline import Pipeline, load


@dataclass
class DMDConfig(MethodConfig, kind="dmd"):
    """steps: network calls of the student, sampled with `consistency`. guidance: of the teacher. times: of renoising.

    level: of the critic's loss, see `methods.denoise`. teacher: a pipeline as `load` takes it, from which the critic starts, too; none
    stands for the student at the start. A student that was distilled before by other means then goes on here. adversarial: w above.
    """

    steps: int = 4
    guidance: float = 2.5
    critic_turns: int = 4
    level: float = 0.0
    teacher: str = ""
    adversarial: float = 0.0
    times: TimeDensity = field(default_factory=lambda: TimeDensity(uniform=1.0))

    def build(self, pipeline: Pipeline) -> "DMD":
        return DMD(self, pipeline)


class Head(nn.Module):
    """Features (B, N, D) or (B, D, H, W) -> (B,) logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        tokens = features.flatten(2).mT if features.ndim > 3 else features
        logits: Tensor = self.net(tokens).mean((1, 2))
        return logits


class DMD(Method):
    """Roles: the student; its frozen teacher; a critic that denoises the student's samples; its head, where there is one."""

    def __init__(self, config: DMDConfig, pipeline: Pipeline) -> None:
        self.config = config
        teacher = load(config.teacher) if config.teacher else copy.deepcopy(pipeline)
        self.roles = {
            "student": Role(pipeline, averaged=True),
            "teacher": Role(teacher, trained=False),
            "critic": Role(copy.deepcopy(teacher)),
        }
        if config.adversarial:
            self.roles["head"] = Role(Head(self._width()))

    def turns(self, step: int) -> Sequence[Turn]:
        critic: Turn = ("critic", "head") if self.config.adversarial else ("critic",)
        return [critic] * self.config.critic_turns + [("student",)]

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        return self._student_loss(batch) if turn == ("student",) else self._critic_loss(batch)

    def _critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Flow matching on the student's samples, and telling them from data."""
        w, critic = self.config.adversarial, self._role("critic")
        with torch.no_grad():
            x = self._draw(batch)
        t = self.config.times.sample(len(batch))
        cond = critic.encode(batch.prompts)
        eps = torch.randn_like(x)
        v, features = self._read(interpolate(x, eps, t), t, cond)
        error = (v.float() - (eps - x)).square().flatten(1).mean(1)
        loss = (levelled(t, self.config.level) * error).mean()
        if w:
            data = critic.codec.encode(batch.images)
            _, known = self._read(interpolate(data, torch.randn_like(data), t), t, cond)
            head = self.roles["head"].module
            loss = loss + w * (F.softplus(head(features)) + F.softplus(-head(known))).mean()
        return loss, {"t": t, "loss": error.detach()}

    def _student_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Distribution matching, and passing for data."""
        w = self.config.adversarial
        x = self._draw(batch)
        t = self.config.times.sample(len(batch)).clamp(0.02, 0.98)
        y = interpolate(x, torch.randn_like(x), t)
        with torch.no_grad():
            direction = self._direction(x, y, t, batch.prompts)
        loss = (x - (x - direction).detach()).square().flatten(1).mean(1) / 2
        metrics = {"t": t, "loss": loss.detach(), "direction": direction.abs().flatten(1).mean(1)}
        if w:
            _, features = self._read(y, t, self._role("critic").encode(batch.prompts))
            logits = self.roles["head"].module(features)
            loss = loss + w * F.softplus(-logits)
            metrics["logits"] = logits.detach()
        return loss.mean(), metrics

    def _role(self, name: str) -> Pipeline:
        module = self.roles[name].module
        assert isinstance(module, Pipeline)
        return module

    def _read(self, y: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """The critic's velocity at (y, t), and the features of its middle block."""
        critic, seen = self._role("critic"), []
        blocks = list(critic.denoiser.blocks)
        hook = blocks[len(blocks) // 2].register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        with hook:
            v = critic.velocity(y, t, cond)
        return v, seen[0]

    @torch.no_grad()
    def _width(self) -> int:
        """Channels of the features."""
        critic = self._role("critic")
        shape = critic.codec.latent_shape((critic.config.sampling.size,) * 2)
        _, features = self._read(torch.zeros(1, *shape), torch.ones(1), critic.encode([""]))
        return features.shape[1 if features.ndim > 3 else 2]

    def _draw(self, batch: Batch) -> Tensor:
        """Samples of the student after a random number of its steps; gradients flow through the last one only."""
        times = grid(self.config.steps, self.student.config.sampling.shift)
        cond: Cond = self.student.encode(batch.prompts)
        x = torch.randn_like(self.student.codec.encode(batch.images))
        stop = int(torch.randint(self.config.steps, ()))
        for number, t in enumerate(times[: stop + 1]):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number == stop):
                now = t.expand(len(x))
                clean = from_velocity(self.student.velocity(x, now, cond), "data", x, now)
            if number < stop:
                x = interpolate(clean, torch.randn_like(x), times[number + 1].expand(len(x)))
        return clean

    def _direction(self, x: Tensor, y: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        """The normalised difference of critic and guided teacher (DMD2, eq. 2); zero where both agree."""
        teacher, critic = self._role("teacher"), self._role("critic")
        cond = teacher.encode(prompts)
        real = y - like(t, y) * teacher.guided(cond, cond.null(), self.config.guidance)(y, t)
        fake = y - like(t, y) * critic.velocity(y, t, critic.encode(prompts))
        scale = (x - real).abs().flatten(1).mean(1).clamp_min(1e-3)
        return (fake - real) / like(scale, x)
