"""Adversarial diffusion distillation (ADD, Sauer et al. 2023): a critic of pictures, and the score of the teacher.

The student jumps from a noised sample to data at one of its `steps` times s, x = x_s - s v(x_s, s), as in `methods.ladd`. The critic D
reads pictures: small heads on the tokens of frozen blocks F_k of a vision encoder. With y a noised copy of x that has no gradient,
and all differences and features of decoded pictures,

    L = -E D(F(x)) + weight E_t c(t) || x - sg x0_teacher(y, t) ||^2,    c(t) = (1 - t) / sqrt((1 - t)^2 + t^2)
    L_D = E max(0, 1 - D(F(x_real))) + max(0, 1 + D(F(x))) + r1 E |grad_F D(F(x_real))|^2

c is alpha of the variance-preserving path: noisy estimates count less. Heads are told the text and the encoder's mean token of the real
picture, as much of it as the student saw, (1 - s) times. Real samples are the teacher's own if the data are pairs, and pictures otherwise.

Where we differ: heads see single tokens instead of neighbourhoods, and losses average over tokens and blocks instead of adding them up;
the text is the teacher's pooled one; the teacher may be guided; real pictures go through the codec as well, so that its traces tell
nothing.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mezzotint.data.batch import Batch
from mezzotint.flow.domain import within
from mezzotint.flow.path import from_velocity, interpolate
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.adversarial import HIDDEN, Heads, accuracy, hinge, jumped, turns
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.methods.repa import LEAST, TransformersConfig, Vision, VisionConfig
from mezzotint.methods.teacher import answers, teacher_of
from mezzotint.models import Cond
from mezzotint.models.denoiser import blocks
from mezzotint.pipeline import Pipeline


@dataclass
class ADDConfig(MethodConfig, kind="add"):
    """vision: the encoder. levels: so many of its blocks are read, the last among them. steps: network calls of the student, sampled with
    `consistency`. shift: of their times. weight, guidance, times: of the teacher's term. r1: weight of the penalty. alone,
    critic_rate: see `methods.adversarial`. teacher: see `methods.teacher`.
    """

    vision: VisionConfig = field(default_factory=TransformersConfig)
    levels: int = 5
    steps: int = 4
    shift: float = 1.0
    weight: float = 2.5
    guidance: float = 2.5
    r1: float = 1e-5
    alone: int = 0
    critic_rate: float = 1.0
    times: TimeDensity = field(default_factory=lambda: TimeDensity(uniform=1.0))
    teacher: str = ""

    def build(self, pipeline: Pipeline) -> "ADD":
        return ADD(self, pipeline)


class Critic(nn.Module):
    """Tokens of blocks, list of (B, N, D), told a pooled text (B, P) and a picture (B, E) -> logits and slopes (`Heads`)."""

    def __init__(self, widths: list[int], pooled: int) -> None:
        super().__init__()
        self.heads = Heads(widths)
        self.embed_text = nn.Linear(pooled, HIDDEN)
        self.embed_image = nn.Sequential(nn.LayerNorm(widths[-1], elementwise_affine=False), nn.Linear(widths[-1], HIDDEN))

    def forward(self, features: list[Tensor], text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        read: tuple[Tensor, Tensor] = self.heads(features, self.embed_text(text) + self.embed_image(image))
        return read


class ADD(Method):
    """Roles: the student; its frozen teacher; the frozen vision encoder; the critic that reads what that says."""

    def __init__(self, config: ADDConfig, pipeline: Pipeline) -> None:
        within(1, 1000, steps=config.steps, levels=config.levels)
        self.config = config
        teacher, vision = teacher_of(pipeline, config.teacher), config.vision.build()
        with torch.no_grad(), torch.device("cpu"):  # where encoders are built
            widths = [f.shape[-1] for f in features(vision, torch.zeros(1, 3, *pipeline.config.sampling.shape), config.levels)]
        self.roles = {
            "student": Role(pipeline, averaged=True),
            "teacher": Role(teacher, trained=False),
            "vision": Role(vision, trained=False),
            "critic": Role(Critic(widths, teacher.encode([""]).pooled.shape[-1]), rate=config.critic_rate),
        }

    def turns(self, step: int) -> list[Turn]:
        return turns(step, self.config.alone)

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        config, critic = self.config, self.roles["critic"].module
        x0 = batch.x0(self.student)
        cond: Cond = self.pipeline("teacher").encode(batch.prompts)
        with torch.set_grad_enabled(torch.is_grad_enabled() and turn == ("student",)):
            x, s = jumped(self.student, x0, batch.prompts, config.steps, config.shift)
            pictures = self._decoded(x)
            fake = self._features(pictures)
        with torch.no_grad():
            real = self._features(self._decoded(x0))
            told = cond.pooled, (1 - s)[:, None] * real[-1].mean(1)
        if turn == ("student",):
            adversarial, distance = -critic(fake, *told)[0].mean(1), self._distance(x, pictures, cond)
            loss = adversarial + config.weight * distance
            return loss.mean(), {"t": s, "loss": loss.detach(), "adversarial": adversarial.detach(), "distance": distance.detach()}
        (right, slopes), (wrong, _) = critic(real, *told), critic(fake, *told)
        penalty = slopes.mean(1)
        loss = hinge(right, wrong) + config.r1 * penalty
        return loss.mean(), {"t": s, "loss": loss.detach(), "accuracy": accuracy(right, wrong), "penalty": penalty.detach()}

    def _distance(self, x: Tensor, pictures: Tensor, cond: Cond) -> Tensor:
        """(B,) squared distance of the student's pictures from what the teacher makes of its samples x when they are noised again."""
        t = self.config.times.sample(len(x))
        with torch.no_grad():
            y = interpolate(x, torch.randn_like(x), t)
            v = self.pipeline("teacher").guided(cond, self.config.guidance)(y, t)
            target = self._decoded(from_velocity(v, "data", y, t))
        return (1 - t) * ((1 - t) ** 2 + t**2).rsqrt() * (pictures - target).square().flatten(1).mean(1)

    def _decoded(self, latents: Tensor) -> Tensor:
        """Pictures that are not clamped, so that all of them have gradients."""
        codec = self.student.codec
        return codec.restore(latents / codec.scale + codec.shift)

    def _features(self, pictures: Tensor) -> list[Tensor]:
        vision = self.roles["vision"].module
        assert isinstance(vision, Vision)
        return features(vision, pictures, self.config.levels)


def features(vision: Vision, pictures: Tensor, levels: int) -> list[Tensor]:
    """What so many blocks of an encoder, evenly spaced, say of pictures (B, 3, H, W): tokens (B, N, D) float32 each."""
    height, width = pictures.shape[-2:]
    grid = round(LEAST * height / min(height, width)), round(LEAST * width / min(height, width))
    parts = blocks(vision.network)
    number = min(levels, len(parts))
    read = [parts[(level + 1) * len(parts) // number - 1] for level in range(number)]
    return [tokens.float() for tokens in answers(read, lambda: vision(pictures, grid))]
