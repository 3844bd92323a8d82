"""What distillation asks of a network that is not trained: that it fits its student, and what its blocks say of a picture."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mezzotint.errors import UserError
from mezzotint.models import Cond
from mezzotint.models.denoiser import Told, blocks, tell
from mezzotint.pipeline import Pipeline, load


def teacher_of(student: Pipeline, source: str) -> Pipeline:
    """A teacher: the pipeline at `source` (see `pipeline.load`), or the student as it starts where that is empty.

    UserError where its velocities are not about what the student draws: other latents, or another kind of prediction.
    """
    if not source:
        return copy.deepcopy(student)
    teacher = load(source)
    theirs, ours = teacher.config, student.config
    remedy = "start the student from its teacher (--init), or take another teacher"
    if theirs.codec != ours.codec or not _equal(teacher.codec, student.codec):
        raise UserError(f"the teacher {source} has latents of another codec than the student's; {remedy}")
    if theirs.denoiser.prediction != ours.denoiser.prediction:
        kinds = f"the {theirs.denoiser.prediction}, and the student the {ours.denoiser.prediction}"
        raise UserError(f"the teacher {source} predicts {kinds}; {remedy}")
    if theirs.path != ours.path:
        raise UserError(f"the teacher {source} was trained on another path than the student's; {remedy}")
    return teacher


def _equal(a: nn.Module, b: nn.Module) -> bool:
    """Are the weights of two modules of one configuration the same? The lowest precision in which they may be stored decides."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.allclose(x.float(), y.float(), rtol=1e-2, atol=1e-3) for x, y in pairs)


def told_copy(pipeline: Pipeline, what: Told) -> Pipeline:
    """A copy of a pipeline whose network is told one more number, which changes nothing yet. ValueError as `models.denoiser.tell`."""
    student = copy.deepcopy(pipeline)
    tell(student.denoiser, what)
    student.config = replace(pipeline.config, denoiser=pipeline.config.denoiser.replace(**{what: True}))
    return student


@torch.no_grad()
def follow(target: nn.Module, student: nn.Module, decay: float) -> None:
    """Move a target's weights towards the student's: a moving average of that decay."""
    torch._foreach_lerp_(list(target.parameters()), list(student.parameters()), 1 - decay)


def block_features(pipeline: Pipeline, x: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
    """What every block of the network says at (x, t): tokens (B, N, D) each, with gradients back to x."""
    return answers(blocks(pipeline.denoiser), lambda: pipeline.velocity(x, t, cond))


def answers(parts: Sequence[nn.Module], run: Callable[[], Tensor]) -> list[Tensor]:
    """What each of these parts of a network says while it runs: tokens (B, N, D).

    Of a block with two streams, the image's; places of a map are tokens.
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        features = output if isinstance(output, Tensor) else output[0]
        found.append(features.flatten(2).mT if features.ndim == 4 else features)

    handles = [part.register_forward_hook(keep) for part in parts]
    try:
        end = run()
    finally:
        for handle in handles:
            handle.remove()
    if end.requires_grad:  # a network that is sharded gathers its weights for the gradient when that comes by its output
        found[-1] = found[-1] + 0 * end.mean()
    return found
