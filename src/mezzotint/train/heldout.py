"""The loss on pictures that training never sees, at fixed noise and fixed times, so that its value is comparable."""

import torch
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.methods.denoise import flow_error
from mezzotint.pipeline import Pipeline

QUANTILES = 8


@torch.no_grad()
def heldout_loss(pipeline: Pipeline, batch: Batch, chunk: int = 256) -> Tensor:
    """(QUANTILES,) mean squared errors of the velocity at the times (k + 1/2) / QUANTILES; their mean is the loss.

    Every picture is seen at every time, each with its own noise, which is the same in every call. Whatever the method
    optimises, this is the flow-matching loss of its student.
    """
    generator = torch.Generator().manual_seed(0)
    device = next(pipeline.denoiser.parameters()).device
    times = (torch.arange(QUANTILES, device=device) + 0.5) / QUANTILES
    errors = []
    for start in range(0, len(batch), chunk):
        part = batch.part(slice(start, start + chunk)).to(device)
        cond, x0 = part.conditions(pipeline), part.x0(pipeline)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        errors.append(torch.stack([flow_error(pipeline, x0, noise, t.expand(len(x0)), cond) for t in times]))
    return torch.cat(errors, dim=1).mean(1)
