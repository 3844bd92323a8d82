"""AdamW in 8 bits: what a code loses, that it is AdamW otherwise, and that it takes a quarter of the memory."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from mezzotint.data.worlds import WorldsConfig
from mezzotint.methods.denoise import DenoiseConfig
from mezzotint.models import DiTConfig
from mezzotint.pipeline import PipelineConfig, Sampling
from mezzotint.text import ByteEncoderConfig
from mezzotint.train.adamw8 import OCTAVES, AdamW8, block_size, decode, encode
from mezzotint.train.devices import DEVICES
from mezzotint.train.optim import OptimConfig, step_
from mezzotint.train.plan import Setup, plan
from mezzotint.train.trainer import RunConfig

SOUND = torch.zeros(())


@pytest.mark.parametrize(("dtype", "error"), [(torch.int8, 0.0562), (torch.uint8, 0.0276)])
def test_numbers_of_any_size_lose_equally_little(dtype: torch.dtype, error: float) -> None:
    """Half a step between levels, 2^(OCTAVES / 2n) - 1; the largest of a block loses nothing, and zero stays zero."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, 128) * torch.logspace(-5, 0, 128)
    x = x if dtype == torch.int8 else x.abs()
    x[0, 0, :3] = 0
    codes, scales = encode(x, 256, dtype)
    assert (codes.dtype, codes.shape, scales.shape) == (dtype, x.shape, (6, 2))
    again = decode(codes, scales, 256)
    shown = x.abs().view(6, 2, 256) > scales[..., None] * 2.0**-OCTAVES
    lost = ((again - x) / x.where(x != 0, 1)).abs().view(6, 2, 256)[shown].max()
    assert 0.9 * error < lost < error
    assert torch.equal(again.view(6, 2, 256).abs().amax(-1), scales)
    assert not again[0, 0, :3].any()
    assert torch.equal(decode(*encode(torch.zeros(2, 64), 64, dtype), 64), torch.zeros(2, 64))


def test_a_ranks_rows_are_coded_as_they_are_in_the_whole() -> None:
    x = torch.randn(5, 192, generator=torch.manual_seed(0))
    codes, scales = encode(x, 192, torch.int8)
    for rows in (slice(0, 3), slice(3, 5), slice(5, 5)):
        own = encode(x[rows], 192, torch.int8)
        assert torch.equal(own[0], codes[rows])
        assert torch.equal(own[1], scales[rows])
        assert decode(*own, 192).shape == x[rows].shape


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((64, 64), 64),
        ((96, 1152), 192),
        ((16, 3072), 256),
        ((32, 36, 3, 3), 162),
        ((64, 5 * 67), 67),
        ((4096,), 0),
        ((128, 48), 0),
        ((63, 64), 0),
        ((64, 257), 0),
    ],
)
def test_blocks_divide_rows(shape: tuple[int, ...], size: int) -> None:
    assert block_size(torch.Size(shape)) == size


def test_the_first_step_is_adamws() -> None:
    """From states of zeros nothing has been rounded yet."""
    p = nn.Parameter(torch.randn(64, 128, generator=torch.manual_seed(0)))
    q = nn.Parameter(p.detach().clone())
    p.grad = torch.randn(64, 128)
    q.grad = p.grad.clone()
    AdamW([p], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1).step()
    AdamW8([q], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1).step()
    assert torch.allclose(p, q, atol=1e-6)


def test_a_first_step_that_is_held_changes_nothing() -> None:
    p = nn.Parameter(torch.randn(64, 128, generator=torch.manual_seed(0)))
    before, optimizer = p.detach().clone(), AdamW8([p], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    p.grad = torch.full_like(p, torch.nan)
    step_(optimizer, 0.01, torch.ones(()))
    assert torch.equal(p, before)
    assert not any(x.any() for x in optimizer.state[p].values())


def test_small_gradients_beside_large_ones_do_not_leap() -> None:
    """A second moment that becomes zero would make steps of any length: here columns differ by 10^4, their squares by 10^8."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(64, 128))
    q = nn.Parameter(p.detach().clone())
    ours, theirs = AdamW8([q], lr=1e-3, betas=(0.9, 0.99)), AdamW([p], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    columns = torch.logspace(-4, 0, 128)[torch.randperm(128)]
    for _ in range(100):
        before = p.detach().clone(), q.detach().clone()
        p.grad = (torch.randn(64, 128) + 0.3) * columns
        q.grad = p.grad.clone()
        theirs.step()
        ours.step()
    update, other = p.detach() - before[0], q.detach() - before[1]
    assert other.abs().max() < 1.5 * update.abs().max()
    assert (other - update).norm() < 0.2 * update.norm()


# Most of its weights are coded.
SMALL = PipelineConfig(
    text=ByteEncoderConfig(width=64, depth=1, heads=2, word_bytes=4),
    denoiser=DiTConfig(width=64, depth=1, heads=2, patch=8, text_width=64),
    sampling=Sampling(size=16, steps=2),
)


def curve(name: str, steps: int) -> Tensor:
    """(steps,) losses on one batch."""
    torch.manual_seed(0)
    method = DenoiseConfig().build(SMALL.build())
    optim = OptimConfig(name=name, lr=2e-3, warmup=10)  # type: ignore[arg-type]
    optimizers, source = optim.build(method.student), WorldsConfig(size=16).build()
    batch, losses = source.batch(0, 4), []
    for step in range(steps):
        torch.manual_seed(step)
        loss, _ = method.loss(batch, ("student",), step)
        loss.backward()
        losses.append(loss.detach())
        for optimizer in optimizers:
            step_(optimizer, optim.rate(step, steps), SOUND)
    return torch.stack(losses)


def test_it_learns_as_adamw_does() -> None:
    """Losses are near each other step by step, where a rate that is a tenth higher puts them 0.08 apart, and end alike."""
    plain, coded = curve("adamw", 105), curve("adamw8", 105)
    assert plain[-20:].mean() < 0.2 * plain[:5].mean()
    assert (coded / plain - 1).abs().mean() < 0.04
    assert coded[-20:].mean() == pytest.approx(float(plain[-20:].mean()), rel=0.06)


def test_states_take_a_quarter_as_planned() -> None:
    """Of what is coded, a quarter and the scales; small parameters are not. The plan is of the same bytes."""
    sizes, updates = {}, {}
    for name in ("adamw", "adamw8"):
        config = RunConfig(pipeline=SMALL, data=WorldsConfig(size=16), optim=OptimConfig(name=name))  # type: ignore[arg-type]
        config.train.batch = 1
        net = config.method.build(SMALL.build()).student
        optimizers = config.optim.build(net)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        for optimizer in optimizers:
            optimizer.step()
        states = [(p, x) for optimizer in optimizers for p, state in optimizer.state.items() for x in state.values()]
        sizes[name] = sum(x.nbytes for p, x in states if block_size(p.shape))
        made = plan(config, Setup(precision="float32"), DEVICES["h100"])
        updates[name] = made.update_s
        assert made.states_gb * 1e9 == sum(x.nbytes for _, x in states)
    assert 0.25 < sizes["adamw8"] / sizes["adamw"] < 0.25 * (1 + 4 / 64)
    assert updates["adamw8"] > 2 * updates["adamw"], "it is many kernels"
    assert sizes["adamw"] > 0.9 * 8 * sum(p.numel() for p in net.parameters())
