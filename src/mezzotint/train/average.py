"""Moving averages of weights: of a fixed length in steps, or of a length that grows with the run and can be chosen after it.

The power-function average of Karras et al. 2024 ("Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.1)
weighs the weights theta(tau) of a run of t steps by

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),    0 <= tau <= t,

whose standard deviation is the same share of t at all times, the relative length s = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)).
It follows step by step with the decay (1 - 1/t)^(gamma + 1), and at t = 1 it is the first weights, whatever it was before: no warm-up.
Any linear combination of stored averages is an average too. Its profile is the combination of theirs, so that any other length is
found after the run by least squares between profiles (section 3.2): the inner products are integrals of powers, below in closed form.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mezzotint.errors import UserError
from mezzotint.methods.method import twin
from mezzotint.train.parallel import whole

FOLDER = "averages"
LONGEST = 0.28  # above, gamma comes near 0 and the average near the plain mean, whose length is 0.2887


class Weights:
    """The tensors of a module, found once: to walk through its modules takes half as long as to average them.

    moving: names of the parameters that an average is to follow.
    """

    def __init__(self, module: nn.Module, moving: Collection[str]) -> None:
        self.parameters: list[Tensor] = [p for name, p in module.named_parameters() if name in moving]
        self.buffers = list(module.buffers())


@lru_cache
def gamma(length: float) -> float:
    """The exponent of a relative length: the largest root of (g + 2)^2 (g + 3) = (g + 1) / length^2. ValueError outside (0, LONGEST]."""
    if not 0 < length <= LONGEST:
        raise ValueError(f"length must be above 0 and at most {LONGEST}, got {length}")
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots.real.max())


def decay(length: float, step: int) -> float:
    """The decay of a power-function average at the update of step 0, 1, ..."""
    return (1 - 1 / (step + 1)) ** (gamma(length) + 1)


def warmed(fixed: float, step: int) -> float:
    """A fixed decay, smaller in the first steps: at most (1 + step) / (10 + step)."""
    return min(fixed, (1 + step) / (10 + step))


@torch.no_grad()
def average_(average: Weights, of: Weights, decay: float) -> None:
    """Move an average towards what it is of by 1 - decay. Buffers are copied."""
    torch._foreach_lerp_(average.parameters, of.parameters, 1 - decay)
    for mine, other in zip(average.buffers, of.buffers, strict=True):
        mine.copy_(other)


class Average:
    """The averages of one module: one with a fixed decay, or one for each relative length. The first is what others see.

    They are of the weights that need a gradient when they are made, and share all others with the module.
    """

    def __init__(self, module: nn.Module, fixed: float, lengths: tuple[float, ...] = ()) -> None:
        self.fixed, self.lengths = fixed, lengths
        self.moving = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
        self.modules = [twin(module).requires_grad_(False).eval() for _ in lengths or (fixed,)]
        self.weights: list[Weights] = []  # of the module and of its averages, once they are spread

    @property
    def shown(self) -> nn.Module:
        """The average that previews, evaluation and export see."""
        return self.modules[0]

    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after step 0, 1, ..."""
        decays = [decay(length, step) for length in self.lengths] or [warmed(self.fixed, step)]
        if not self.weights:
            self.weights = [Weights(each, self.moving) for each in (module, *self.modules)]
        of, *averages = self.weights
        for average, d in zip(averages, decays, strict=True):
            average_(average, of, d)

    def store(self, folder: Path, step: int, write: bool = True) -> None:
        """Write what is needed to find other lengths later: all averages after `step` steps, each file whole or not at all.

        Weights that they share with the module are not in it. Of many ranks all call it, and one writes. UserError where the disk does
        not take it.
        """
        part = folder / ".part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for length, module in zip(self.lengths, self.modules, strict=True):
                shared = {name for name, _ in module.named_parameters(remove_duplicate=False)} - self.moving
                own = {name: x for name, x in module.state_dict().items() if name not in shared}
                tensors = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in own.items()}
                if not write:
                    continue
                save_file(tensors, part)
                part.replace(folder / f"step-{step:08d}-{length:g}.safetensors")
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write to {folder}: {error}; free some space and run the same command again") from error


@dataclass(frozen=True)
class Snapshot:
    """A power-function average of a relative length after so many steps, and its file."""

    step: int
    length: float
    path: Path


def snapshots(folder: Path) -> list[Snapshot]:
    """What a run has stored, oldest first."""
    found = []
    for path in sorted(folder.glob("step-*.safetensors")):
        _, step, length = path.name.removesuffix(".safetensors").split("-", 2)
        found.append(Snapshot(int(step), float(length), path))
    return found


def product(a: tuple[int, float], b: tuple[int, float]) -> float:
    """The integral of the product of two profiles (t, gamma)."""
    (t, g), (u, h) = a, b
    least = min(t, u)
    logarithm = (g + h + 1) * math.log(least) - (g + 1) * math.log(t) - (h + 1) * math.log(u)
    return (g + 1) * (h + 1) / (g + h + 1) * math.exp(logarithm)


def coefficients(stored: list[tuple[int, float]], wanted: tuple[int, float]) -> tuple[list[float], float]:
    """The combination of stored averages (step, length) that is nearest to the wanted one, and how far it is.

    Nearest by the L2 norm between profiles; the distance is in units of the wanted profile's norm, 0 where it is met exactly.
    """
    profiles = [(step, gamma(length)) for step, length in stored]
    target = (wanted[0], gamma(wanted[1]))
    a = np.array([[product(p, q) for q in profiles] for p in profiles])
    b = np.array([product(p, target) for p in profiles])
    scale = 1 / np.sqrt(np.diag(a))  # profiles of one norm: early ones are much narrower than late ones
    x = scale * np.linalg.lstsq(a * np.outer(scale, scale), b * scale, rcond=1e-13)[0]
    whole = product(target, target)
    missed = max(0.0, whole - 2 * x @ b + x @ a @ x)
    return x.tolist(), math.sqrt(missed / whole)


def reconstruct(folder: Path, length: float, step: int | None = None) -> tuple[dict[str, Tensor], float]:
    """The weights of an average of any length after any stored number of steps (the last), and the distance of its profile.

    Files are read one by one. UserError where nothing is stored, or nothing up to that step.
    """
    found = snapshots(folder)
    if not found:
        raise UserError(f"no averages in {folder}; train with --optim.lengths 0.05 0.1 to have them stored")
    step = step or found[-1].step
    used = [snapshot for snapshot in found if snapshot.step <= step]
    if not used:
        raise UserError(f"the first stored average in {folder} is of step {found[0].step}, which is after step {step}")
    weights, distance = coefficients([(s.step, s.length) for s in used], (step, length))
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(used, weights, strict=True):
        for name, tensor in load_file(snapshot.path).items():
            if not tensor.is_floating_point():
                total[name] = tensor
            else:
                total[name] = total.get(name, torch.zeros_like(tensor, dtype=torch.float64)) + weight * tensor.double()
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in total.items()}, distance
