"""Muon and the moving average, as properties."""

import pytest
import torch
from torch import nn

from mezzotint.train.average import Weights, average_, warmed
from mezzotint.train.optim import Muon, OptimConfig, orthogonalise


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (3, 24, 32)])
def test_orthogonalising_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.5
    assert values.max() < 1.3
    g = torch.randn(shape)
    assert torch.allclose(orthogonalise(g), orthogonalise(7 * g), atol=1e-3), "scale is forgotten"


def test_bfloat16_is_enough_for_directions() -> None:
    torch.manual_seed(0)
    g = torch.randn(4, 24, 32)
    exact, rough = orthogonalise(g), orthogonalise(g.bfloat16()).float()
    assert (exact - rough).norm() < 0.05 * exact.norm()
    values = torch.linalg.svdvals(rough)
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_muon_steps_are_of_adamws_size() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(64, 256))
    p.grad = torch.randn(64, 256)
    Muon([p], lr=0.01).step()
    assert float(p.detach().square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.15)


def test_muon_descends_where_it_should() -> None:
    torch.manual_seed(0)
    target, p = torch.randn(32, 32), nn.Parameter(torch.zeros(32, 32))
    optimizer = Muon([p], lr=0.05)
    first = float((p.detach() - target).square().mean())
    for _ in range(200):
        optimizer.zero_grad()
        (p - target).square().mean().backward()
        optimizer.step()
    assert float((p.detach() - target).square().mean()) < 0.05 * first


def test_every_parameter_has_exactly_one_optimizer() -> None:
    from mezzotint.models import DiTConfig

    net = DiTConfig(width=32, depth=2, heads=2).build()
    for name, count in (("adamw", 1), ("muon", 2)):
        optimizers = OptimConfig(name=name).build(net)  # type: ignore[arg-type]
        owned = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        assert len(optimizers) == count
        assert sorted(owned) == sorted(id(p) for p in net.parameters())
    muon = next(o for o in optimizers if isinstance(o, Muon))
    named = {id(p): n for n, p in net.named_parameters()}
    assert all("blocks." in named[id(p)] and p.ndim == 2 for g in muon.param_groups for p in g["params"])


def test_the_average_follows_and_starts_fast() -> None:
    module, average, names = nn.Linear(1, 1), nn.Linear(1, 1), {"weight"}
    with torch.no_grad():
        module.weight.fill_(1.0)
        average.weight.zero_()
    average_(Weights(average, names), Weights(module, names), warmed(0.99, step=0))
    assert average.weight.item() == pytest.approx(0.9), "the first step takes 1 - 1/10 of the new weights"
    average_(Weights(average, names), Weights(module, names), warmed(0.5, step=10_000))
    assert average.weight.item() == pytest.approx(0.95)
