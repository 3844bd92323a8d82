"""Progressive distillation (Salimans & Ho 2022, algorithm 2): students that each halve the steps of the one before.

On a grid of 2n teacher steps, t > t' > t'' neighbours with t on the student's grid of n:

    x'' = two Euler steps of the teacher from x_t, by t' to t'';    L = max(SNR, 1) || x0(x_t, t) - x0* ||^2,

where x0* is the data for which one step of the student leads to x''. In velocities that is (x'' - x_t) / (t'' - t), and the weight
max((1 - t)^2, t^2); an Euler step is DDIM's. After `stage` steps the student becomes the teacher of the next, with half its steps.
Guidance is folded into the first student (Meng et al. 2023): its teacher is guided, later ones are not. A network that is told the
scale is told it throughout.

Where we differ: the student that becomes a teacher is not an average of its weights, and the learning rate falls over the whole run
instead of within every stage; the Trainer owns both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.flow.path import interpolate, like
from mezzotint.flow.solvers import Denoise, euler
from mezzotint.flow.time import places, truncated_snr
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.methods.teacher import teacher_of
from mezzotint.pipeline import Pipeline


@dataclass
class ProgressiveConfig(MethodConfig, kind="progressive"):
    """first, last: network calls of the first student and of the last, whose ratio is a power of two; the first teacher has twice those of
    the first student. stage: optimizer steps of every student but the last, which gets what is left. guidance: of the first teacher.
    shift: of the times towards noise (`flow.time.shift`); students sample by `euler` with the same. teacher: see `methods.teacher`.
    """

    first: int = 16
    last: int = 4
    stage: int = 500
    guidance: float = 2.5
    shift: float = 1.0
    teacher: str = ""

    @property
    def halvings(self) -> int:
        """How often the calls are halved after the first student."""
        return (self.first // self.last).bit_length() - 1

    def calls(self, step: int) -> int:
        """Network calls of the student that step 0, 1, ... trains."""
        return self.first >> min(step // self.stage, self.halvings)

    def build(self, pipeline: Pipeline) -> "Progressive":
        return Progressive(self, pipeline)


class Progressive(Method):
    """Roles: the student; its teacher, frozen until the student takes its place."""

    def __init__(self, config: ProgressiveConfig, pipeline: Pipeline) -> None:
        if not 1 <= config.last <= config.first or config.first != config.last << config.halvings:
            raise ValueError(f"first must be last times a power of two, got {config.first} and {config.last}")
        if config.stage < 1:
            raise ValueError(f"stage must be at least 1, got {config.stage}")
        self.config = config
        teacher = Role(teacher_of(pipeline, config.teacher), trained=False, moved=True)
        self.roles = {"student": Role(pipeline, averaged=True), "teacher": teacher}

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        config, teacher = self.config, self.pipeline("teacher")
        x0 = batch.x0(self.student)
        calls = config.calls(step)
        grid = self.student.config.path.times(2 * calls, config.shift)
        with torch.device("cpu"):
            place = 2 * places(len(batch), calls)
        times = torch.stack([grid[place], grid[place + 1], grid[place + 2]])
        t = times[0].to(x0.device, non_blocking=True)
        x_t = interpolate(x0, torch.randn_like(x0), t)
        told = self.student.config.denoiser.distilled
        scale = config.guidance if told or calls == config.first else 1.0
        with torch.no_grad():
            target = average_velocity(teacher.guided(teacher.encode(batch.prompts), scale), x_t, times)
        velocity = self.student.guided(self.student.encode(batch.prompts), config.guidance if told else 1.0)(x_t, t)
        error = (velocity - target).square().flatten(1).mean(1)
        loss = truncated_snr(t) * error
        return loss.mean(), {"t": t, "loss": loss.detach(), "calls": torch.full((), float(calls))}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.config.calls(step + 1) < self.config.calls(step):
            self.roles["teacher"].module.load_state_dict(self.student.state_dict())


def average_velocity(denoise: Denoise, x: Tensor, times: Tensor) -> Tensor:
    """The velocity that in one step leads where Euler steps lead, from x through falling times (K + 1, B), which are on the CPU."""
    *_, last = euler(denoise, x, times)
    return (last.x - x) / like((times[-1] - times[0]).to(x, non_blocking=True), x)
