"""Data whose flow is known: a Gaussian with its map from noise to data, and a mixture of Gaussians with its moments."""

import torch
from torch import Tensor

from mezzotint.flow.path import like


class Gaussian:
    """Independent N(mean_i, std_i^2) in D dimensions."""

    def __init__(self, size: int) -> None:
        self.mean = torch.linspace(-1, 1, size, dtype=torch.float64)
        self.std = torch.linspace(0.3, 1.4, size, dtype=torch.float64)

    def spread(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * self.std**2 + t**2).sqrt()

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[eps - x0 | x_t = x]."""
        t = like(t, x)
        return (t - (1 - t) * self.std**2) / self.spread(t) ** 2 * (x - (1 - t) * self.mean) - self.mean

    def move(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Where the flow takes x from t to s: quantiles stay quantiles."""
        return (1 - s) * self.mean + self.spread(s) / self.spread(t) * (x - (1 - t) * self.mean)


class Mixture:
    """Two round Gaussians of unequal weight in D dimensions, at -1.5 and +1.5 on the first axis."""

    def __init__(self, size: int, share: float = 0.7, std: float = 0.4) -> None:
        self.means = torch.zeros(2, size, dtype=torch.float64)
        self.means[:, 0] = torch.tensor([-1.5, 1.5])
        self.share, self.std = share, std

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[eps - x0 | x_t = x]: the components' velocities, weighted by how likely each made x."""
        t = like(t, x)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        off = [x - (1 - t) * mean for mean in self.means]
        logits = [torch.tensor(w).log() - (o**2).sum(-1, keepdim=True) / (2 * variance) for w, o in zip(self.weights, off, strict=True)]
        likely = torch.stack(logits).softmax(0)
        slope = (t - (1 - t) * self.std**2) / variance
        return sum(p * (slope * o - mean) for p, o, mean in zip(likely, off, self.means, strict=True))

    @property
    def weights(self) -> tuple[float, float]:
        return self.share, 1 - self.share

    def deviations(self, x: Tensor) -> dict[str, float]:
        """By how many standard errors samples x (N, D) differ from the mixture: in weight, means and variances.

        With N = 10,000 a weight off by 0.03 stands out by 6.5 errors, a mean by 0.05 by 6 or more, a variance by 10% by 5.5 or more: a
        limit of 4.5 errors sees each at least 8 times in 10, and calls exact samples wrong less than once in 10,000 times.
        """
        count, size = x.shape
        right = x[:, 0] > 0
        found = {"weight": (float((~right).double().mean()) - self.share) / (self.share * (1 - self.share) / count) ** 0.5}
        for name, part, mean in (("left", x[~right], self.means[0]), ("right", x[right], self.means[1])):
            rest, total = part - mean, part.numel()
            found[f"mean {name}"] = float(rest[:, 0].mean()) / (self.std / len(part) ** 0.5)
            found[f"variance {name}"] = (float((rest**2).mean()) / self.std**2 - 1) / (2 / total) ** 0.5
        assert size >= 2
        return found
