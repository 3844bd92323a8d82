"""A published script's memory, term by term: fast-DiT's DiT-XL/2 on one A100 with 128 pictures, for which its README has 27,485 MB.

Its step is rehearsed as its own train.py does it and not as ours would: float32 weights under autocast, whose copies of weights last
through the forward pass, checkpointed blocks that are not told of the last block's, attention that makes its matrix (timm of that time),
old gradients that are let go only after the forward pass, AdamW over lists of tensors with its temporaries. Beside that, an autoencoder
that it puts on the GPU and does not use with features made beforehand, and what the driver and libraries take.

`allocated_gb` is the most that its tensors hold at once, `known_gb` that and what is beside it, `ratio` of that to what was published,
MB being 2^20 bytes as nvidia-smi and torch count them. `ddp_gb` is a copy of all gradients in buckets, which its logs of that week say
they had (one process under DistributedDataParallel) and its present launch line does not: `ratio_ddp` has it. The rest is what an
allocator keeps back between sizes. Nothing is measured here.

    python bench/plan_memory.py
"""

import json
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mezzotint.models import PRESETS, Cond
from mezzotint.models.denoiser import blocks
from mezzotint.models.published import Unset
from mezzotint.train.plan import CONTEXT
from mezzotint.train.rehearsal import Rehearsal

PUBLISHED = 27_485 * 2**20
BATCH, SIDE = 128, 32
AUTOENCODER = 83_653_863 * 4  # bytes of sd-vae-ft-ema's weights


def with_matrix(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
    """Attention in four steps."""
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v


def step(net: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, seen: Rehearsal, cond: Cond) -> None:
    """One of fast-DiT's steps."""
    x, target = torch.randn(2, BATCH, 4, SIDE, SIDE).unbind()
    with seen.autocast():
        loss = (net(x, torch.rand(BATCH), cond).float() - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for mine, other in zip(ema.parameters(), net.parameters(), strict=True):
            mine.mul_(0.9999).add_(other, alpha=1e-4)


def allocated(matrix: bool) -> float:
    """Bytes held at most in the second of two steps."""
    with Rehearsal() as seen:
        fused = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = with_matrix if matrix else fused  # type: ignore[assignment]
        with torch.device("meta"), Unset():
            net = PRESETS["dit-xl-2"]().build()
            ema = deepcopy(net).requires_grad_(False)
            cond = Cond.of_classes(torch.zeros(BATCH, dtype=torch.long))
            for block in blocks(net):
                again = partial(checkpoint, block.forward, use_reentrant=False, context_fn=lambda: (nullcontext(), seen.autocast()))
                block.forward = again
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0, foreach=True)
            for _ in range(2):
                start = len(seen.steps)
                step(net, ema, optimizer, seen, cond)
        F.scaled_dot_product_attention = fused
        return seen.peak(start, len(seen.steps), {})


def main() -> None:
    held = {name: allocated(matrix) for name, matrix in {"fused": False, "matrix": True}.items()}
    with torch.device("meta"), Unset():
        gradients = 4 * sum(p.numel() for p in PRESETS["dit-xl-2"]().build().parameters())
    known = held["matrix"] + AUTOENCODER + CONTEXT
    result = {
        "published_gb": PUBLISHED / 1e9,
        "allocated_gb": held["matrix"] / 1e9,
        "allocated_with_fused_attention_gb": held["fused"] / 1e9,
        "autoencoder_gb": AUTOENCODER / 1e9,
        "driver_gb": CONTEXT / 1e9,
        "known_gb": known / 1e9,
        "ratio": known / PUBLISHED,
        "ddp_gb": gradients / 1e9,
        "ratio_ddp": (known + gradients) / PUBLISHED,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
