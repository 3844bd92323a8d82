"""The same sigmas, the same network, the same noise: our solvers against the schedulers of diffusers 0.42, and where those are wrong.

The peers step in float32 where they cast to it, so relative errors are those of float32; in float64 where they allow it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor

from mezzotint.flow import guidance, path, solvers
from mezzotint.flow.path import like
from mezzotint.flow.solvers import Solver
from mezzotint.flow.time import shift

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

SHAPE = (2, 4, 6, 6)
MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64) / 2
TABLE = path.scaled_linear_table()
LIMIT = 1e-5


def flow_network(x: Tensor, t: Tensor) -> Tensor:
    """Some velocity that is not linear in x, of x and t (B,)."""
    return torch.tanh(torch.einsum("oc,bchw->bohw", MIX.to(x), x) + like(3 * t, x)) + 0.5 * x


def noise_network(x: Tensor, index: Tensor) -> Tensor:
    """Some noise prediction of a thousand steps, of x of unit variance and the index (B,)."""
    return 0.9 * x + 0.2 * torch.tanh(torch.einsum("oc,bchw->bohw", MIX.to(x), x) + like(index / 300, x))


def noise(dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def end(solver: Solver, denoise: solvers.Denoise, x: Tensor, times: Tensor) -> Tensor:
    *_, step = solver(denoise, x, times, generator=seeded())
    return step.x


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def run_flow(scheduler: Any, times: Tensor, x: Tensor, interleaved: bool = False, **extra: Any) -> Tensor:
    """A peer's loop over given sigmas (N + 1,), its own being replaced."""
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas = torch.cat([times[:1], times[1:-1].repeat_interleave(2), times[-1:]]) if interleaved else times
    scheduler.set_begin_index(0)
    for sigma in scheduler.sigmas[:-1]:
        v = flow_network(x, sigma.to(x).expand(len(x)))
        x = scheduler.step(v, 1000 * sigma, x, return_dict=False, **extra)[0]
    return x


def steep(steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A shifted grid from 0.98, since some peers cannot start at 1, to 0."""
    return shift(torch.linspace(0.94, 0, steps + 1, dtype=torch.float64), 3.0).to(dtype)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_euler(steps: int) -> None:
    times, x = torch.linspace(1, 0, steps + 1), noise(torch.float32)
    theirs = run_flow(FlowMatchEulerDiscreteScheduler(), times, x)
    assert relative(end(solvers.euler, flow_network, x, times), theirs) < LIMIT


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_heun(steps: int) -> None:
    times, x = torch.linspace(1, 0, steps + 1), noise(torch.float32)
    theirs = run_flow(FlowMatchHeunDiscreteScheduler(), times, x, interleaved=True)
    assert relative(end(solvers.heun, flow_network, x, times), theirs) < LIMIT


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize(("kind", "solver"), [("dpmsolver++", solvers.dpmpp_2m), ("sde-dpmsolver++", solvers.dpmpp_2m_sde)])
def test_dpmpp_2m(kind: str, solver: Solver, steps: int) -> None:
    times, x = steep(steps), noise(torch.float32)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type=kind)
    theirs = run_flow(scheduler, times, x, generator=seeded())
    assert relative(end(solver, flow_network, x, times), theirs) < LIMIT


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_unipc(steps: int) -> None:
    times, x = steep(steps, torch.float64), noise(torch.float64)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    theirs = run_flow(scheduler, times, x)
    assert relative(end(solvers.unipc, flow_network, x, times), theirs) < 1e-12


def run_discrete(scheduler: Any, x: Tensor, steps: int, **extra: Any) -> tuple[Tensor, Tensor]:
    """A peer's loop over indices in x's precision: the sample, and the linear path's times (N + 1,) that it went through."""
    scheduler.alphas_cumprod = TABLE.to(x)
    scheduler.set_timesteps(steps)
    abar = TABLE[scheduler.timesteps.round().long().unique().flip(0)]
    times = torch.cat([1 / (1 + (abar / (1 - abar)).sqrt()), torch.zeros(1, dtype=torch.float64)])
    for index in scheduler.timesteps:
        eps = noise_network(scheduler.scale_model_input(x, index), index.to(x).expand(len(x)))
        x = scheduler.step(eps, index, x, return_dict=False, **extra)[0]
    return x, times


def run_ours(solver: Solver, x: Tensor, times: Tensor) -> Tensor:
    """Our solver from x of unit variance, with the network read on the linear path."""
    denoise = path.from_discrete(noise_network, TABLE, "noise")
    return end(solver, denoise, x * ((1 - times[0]) ** 2 + times[0] ** 2).sqrt().to(x), times)


SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [5, 20])
def test_ddim(eta: float, steps: int) -> None:
    x = noise(torch.float32)
    scheduler = DDIMScheduler(**SCALED_LINEAR, clip_sample=False, steps_offset=1)
    theirs, times = run_discrete(scheduler, x, steps, eta=eta, generator=seeded())
    assert relative(run_ours(partial(solvers.ddim, eta=eta), x, times), theirs) < LIMIT


def test_ddim_in_float64() -> None:
    x = noise(torch.float64)
    scheduler = DDIMScheduler(**SCALED_LINEAR, clip_sample=False, steps_offset=1)
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    theirs, times = run_discrete(scheduler, x, 20)
    assert relative(run_ours(solvers.euler, x, times), theirs) < 1e-10


@pytest.mark.parametrize("steps", [5, 50])
def test_ddpm(steps: int) -> None:
    x = noise(torch.float32)
    theirs, times = run_discrete(DDPMScheduler(**SCALED_LINEAR, clip_sample=False), x, steps, generator=seeded())
    assert relative(run_ours(solvers.ddpm, x, times), theirs) < LIMIT


@pytest.mark.parametrize("steps", [5, 20])
def test_the_sampler_of_edm(steps: int) -> None:
    x, scheduler = noise(torch.float64), HeunDiscreteScheduler(**SCALED_LINEAR)
    scheduler.alphas_cumprod = TABLE
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])
    times, y = sigmas / (1 + sigmas), x * sigmas[0]
    for index, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        eps = noise_network(y / (1 + sigma**2).sqrt(), index.to(y).expand(len(y)))
        y = scheduler.step(eps, index, y, return_dict=False)[0]
    # The peer's sigmas are rounded to float32, and so is what index our adapter finds for them.
    ours = end(solvers.edm, path.from_discrete(noise_network, TABLE, "noise"), x * times[0], times)
    assert relative(ours, y) < LIMIT


def test_the_comparison_sees_a_wrong_step() -> None:
    # Planted: sigmas a ten-thousandth off, and noise drawn from another seed.
    times, x = steep(20), noise(torch.float32)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert relative(end(solvers.dpmpp_2m, flow_network, x, times), run_flow(scheduler, times * 0.9999, x)) > LIMIT
    theirs, grid = run_discrete(DDPMScheduler(**SCALED_LINEAR, clip_sample=False), x, 20, generator=torch.Generator().manual_seed(2))
    assert relative(run_ours(solvers.ddpm, x, grid), theirs) > LIMIT


def test_the_peer_shifts_its_last_time_twice() -> None:
    # It computes the smallest sigma after shifting, and shifts again in set_timesteps: 0.001 -> 0.003 -> 0.009.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    smallest = torch.tensor(1 / 1000, dtype=torch.float64)
    once, twice = float(shift(smallest, 3.0)), float(shift(shift(smallest, 3.0), 3.0))
    assert float(scheduler.sigmas[-2]) == pytest.approx(twice, rel=1e-4)
    assert float(scheduler.sigmas[-2]) > 2.9 * once
    # Told its sigmas, it shifts them once, as we do.
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.001, 10).tolist())
    assert torch.allclose(scheduler.sigmas[:-1], shift(torch.linspace(1, 0.001, 10), 3.0), atol=1e-6)


def branches() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, v_c, v_u = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(3))
    return x, torch.tensor([0.3, 0.8], dtype=torch.float64), v_c, v_u


def data_under(rule: guidance.Rule) -> tuple[Tensor, Tensor, Tensor]:
    """The data that a rule leads to, beside those of its two branches."""
    x, t, v_c, v_u = branches()
    return x - like(t, x) * rule(x, t, v_c, v_u), x - like(t, x) * v_c, x - like(t, x) * v_u


def test_projected_guidance_is_the_peers_original_formulation() -> None:
    for scale in (1.0, 3.0, 8.0):
        ours, d_c, d_u = data_under(guidance.apg(scale, parallel=0.2, radius=2.5))
        theirs = normalized_guidance(d_c, d_u, scale - 1, None, 0.2, 2.5, use_original_formulation=True)
        assert relative(ours, theirs) < 1e-12


def test_projected_guidance_remembers_as_the_peer_does() -> None:
    x, t, v_c, v_u = branches()
    rule, buffer = guidance.apg(4.0, radius=2.5, momentum=-0.5), MomentumBuffer(-0.5)
    for factor in (1.0, 0.5, 2.0):
        time = like(t, x)
        ours = x - time * rule(x, t, factor * v_c, v_u)
        theirs = normalized_guidance(x - time * factor * v_c, x - time * v_u, 3.0, buffer, 0.0, 2.5, use_original_formulation=True)
        assert relative(ours, theirs) < 1e-12


def test_the_peers_default_projection_is_not_the_papers() -> None:
    # At scale 1 guidance is off, and the paper gives the conditional. The peer adds the update to the unconditional.
    ours, d_c, d_u = data_under(guidance.apg(1.0))
    assert torch.allclose(ours, d_c, rtol=1e-12)
    assert relative(normalized_guidance(d_c, d_u, 1.0, None, 0.0, 2.5), d_c) > 0.1


def test_rescaling_and_zero_star_are_the_peers() -> None:
    x, t, v_c, v_u = branches()
    plain = guidance.linear(5.0)(x, t, v_c, v_u)
    rescaled: Callable[..., Tensor] = guidance.rescaled(guidance.linear(5.0), 0.7)
    assert relative(rescaled(x, t, v_c, v_u), rescale_noise_cfg(plain, v_c, 0.7)) < 1e-12
    best = cfg_zero_star_scale(v_c.flatten(1), v_u.flatten(1)).reshape(-1, 1, 1, 1) * v_u
    assert relative(guidance.cfg_zero_star(5.0)(x, t, v_c, v_u), best + 5.0 * (v_c - best)) < 1e-7
