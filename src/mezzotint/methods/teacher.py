"""What distillation asks of a network that is not trained: that it fits its student, and what its blocks say of a picture."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mezzotint.errors import UserError
from mezzotint.methods.method import twin
from mezzotint.models import Cond
from mezzotint.models.denoiser import Told, blocks, tell
from mezzotint.pipeline import Pipeline, load


def teacher_of(student: Pipeline, source: str) -> Pipeline:
    """A teacher: the pipeline at `source` (see `pipeline.load`), or the student as it starts where that is empty.

    UserError where its velocities are not about what the student draws: other latents, or another kind of prediction.
    """
    if not source:
        return twin(student)
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
    student = twin(pipeline)
    tell(student.denoiser, what)
    student.config = replace(pipeline.config, denoiser=pipeline.config.denoiser.replace(**{what: True}))
    return student


@torch.no_grad()
def follow(target: nn.Module, student: nn.Module, decay: float) -> None:
    """Move a target's weights towards the student's: a moving average of that decay."""
    torch._foreach_lerp_(list(target.parameters()), list(student.parameters()), 1 - decay)


def block_features(pipeline: Pipeline, x: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
    """What every block of the network says at (x, t): tokens (B, N, D) each, with gradients back to x."""
    rows, columns = pipeline.grid((x.shape[-2] * pipeline.codec.factor, x.shape[-1] * pipeline.codec.factor))
    return answers(blocks(pipeline.denoiser), lambda: pipeline.velocity(x, t, cond), rows * columns)


def answers(parts: Sequence[nn.Module], run: Callable[[], Tensor], number: int = 0) -> list[Tensor]:
    """What each of these parts of a network says while it runs: tokens (B, N, D); those of the image, if their number is given.

    Places of a map are tokens.
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        said = [output] if isinstance(output, Tensor) else list(output)
        tokens = image_tokens(said, number) if number else None
        found.append((said[0].flatten(2).mT if said[0].ndim == 4 else said[0]) if tokens is None else tokens)

    handles = [part.register_forward_hook(keep) for part in parts]
    try:
        end = run()
    finally:
        for handle in handles:
            handle.remove()
    if end.requires_grad:  # a network that is sharded gathers its weights for the gradient when that comes by its output
        found[-1] = found[-1] + 0 * end.mean()
    return found


def image_tokens(said: Sequence[Tensor], number: int) -> Tensor | None:
    """(B, number, D), the image's tokens among what a block says: the last of the first stream that has enough; None if none has."""
    return next((tokens[:, -number:] for tokens in said if tokens.ndim == 3 and tokens.shape[1] >= number), None)
