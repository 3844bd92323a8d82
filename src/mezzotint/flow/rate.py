"""How fast a function of (x, t) changes along a path, dx/dt = v:    df/dt = (v . d_x + d_t) f

`exact_rate` is a Jacobian-vector product: forward-mode differentiation. Torch's fused attention on CPUs has none, so that attention
runs in its plain form, with a matrix over all pairs of tokens. `quotient_rate` is a quotient of differences, in two calls. The exact one
is noise where f wiggles faster than what it was fitted at, as a network with a sinusoid of 1000 t does, which turns once in 0.006.

x (B, ...), t (B,). Neither keeps what a backward pass would need.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mezzotint.flow.path import like
from mezzotint.flow.solvers import Denoise


@torch.no_grad()
def exact_rate(f: Denoise, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """df/dt at (x, t), of the shape of f."""
    with sdpa_kernel(SDPBackend.MATH):
        rate: Tensor = torch.func.jvp(f, (x, t), (v, torch.ones_like(t)))[1]
    return rate


@torch.no_grad()
def quotient_rate(f: Denoise, x: Tensor, t: Tensor, v: Tensor, difference: float, low: Tensor | float, high: float) -> Tensor:
    """The change of f between two points of the straight line along v, `difference` before t and after it but within [low, high], for
    each unit of time; 0 where both are one point.
    """
    ahead, back = (high - t).clamp_max(difference), (t - low).clamp_max(difference)
    later, earlier = f(x + like(ahead, x) * v, t + ahead), f(x - like(back, x) * v, t - back)
    return (later - earlier) / like((ahead + back).clamp_min(1e-6), x)
