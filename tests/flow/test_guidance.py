"""Classifier-free guidance as an identity, and what it costs."""

import torch
from torch import Tensor

from mezzotint.flow.guidance import cfg


class Network:
    """Two branches that count their calls."""

    def __init__(self) -> None:
        self.single = self.double = 0

    def conditional(self, x: Tensor, t: Tensor) -> Tensor:
        self.single += 1
        return 2 * x

    def both(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        self.double += 1
        return 2 * x, x


def test_scale_one_is_the_condition_and_zero_is_none() -> None:
    net, x, t = Network(), torch.randn(3, 4), torch.full((3,), 0.5)
    assert torch.equal(cfg(net.conditional, net.both, 1.0)(x, t), 2 * x)
    assert (net.single, net.double) == (1, 0)
    assert torch.equal(cfg(net.conditional, net.both, 0.0)(x, t), x)
    assert torch.allclose(cfg(net.conditional, net.both, 3.0)(x, t), 4 * x)


def test_outside_the_interval_one_branch_is_called() -> None:
    net, x = Network(), torch.randn(2, 4)
    denoise = cfg(net.conditional, net.both, 3.0, interval=(0.2, 0.6))
    for time in (0.1, 0.7, 1.0):
        assert torch.equal(denoise(x, torch.full((2,), time)), 2 * x)
    assert (net.single, net.double) == (3, 0)
    denoise(x, torch.full((2,), 0.4))
    assert (net.single, net.double) == (3, 1)
    assert torch.allclose(denoise(x, torch.tensor([0.1, 0.4])), torch.stack([2 * x[0], 4 * x[1]]))
