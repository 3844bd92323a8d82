"""The planner's times against published ones: what its two shares of rated speeds (`mezzotint.train.plan`) were fitted to.

Five published runs, rehearsed on the meta device: nothing is timed here. A value is planned over published time; the level is 0.8 to
1.2 for all of them. Sources and what was assumed of each are in docs/planning.md. `micro_dit.dollars` is its planned cost at the price
that its own numbers imply, $1,890 for 2.6 days of eight GPUs.

    python bench/plan_time.py
"""

import json
import runpy
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from mezzotint.models import PRESETS, PixArtConfig
from mezzotint.models.denoiser import blocks
from mezzotint.models.published import Unset
from mezzotint.train.devices import DEVICES, Device
from mezzotint.train.plan import DAY, kernel_seconds
from mezzotint.train.rehearsal import Rehearsal

DRAWN = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "draw_architectures.py"))
A100, H100 = DEVICES["a100"], DEVICES["h100"]
UPDATE = 40  # bytes a weight that AdamW and an average read and write
# Resolution, share of the patches that the backbone keeps, and steps of MicroDiT's four stages; 2,048 pictures a step on 8 GPUs.
STAGES = ((256, 4, 250_000), (256, 1, 30_000), (512, 4, 50_000), (512, 1, 5_000))
DAYS, DOLLARS = 2.6, 1890


def seconds(config: Any, side: int, batch: int, text: int, device: Device, trains: bool = True, recomputed: bool = False) -> float:
    """Of a forward and backward in mixed precision and the update, or of a forward in bfloat16."""
    with Rehearsal() as seen:
        with torch.device("meta"), Unset():
            net = config.build().to(torch.float32 if trains else torch.bfloat16)
            x, cond = torch.randn(batch, config.channels, side, side), DRAWN["said"](config, text).repeat(batch)
        kind, t, start = next(net.parameters()).dtype, torch.rand(batch), len(seen.work)
        if recomputed:
            for block in blocks(net):
                contexts = lambda: (nullcontext(), seen.autocast())  # noqa: E731
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
        if not trains:
            with torch.no_grad():
                net(x.to(kind), t, cond.in_precision(kind))
            return kernel_seconds(seen.work[start:], device.bf16, device.bandwidth)
        with seen.autocast():
            loss = net(x, t, cond.in_precision(kind)).float().square().mean()
        loss.backward()
        update = UPDATE * sum(p.numel() for p in net.parameters()) / device.bandwidth
        return kernel_seconds(seen.work[start:], device.bf16, device.bandwidth) + update


def micro_dit() -> float:
    """Days of MicroDiT's training, as two dense networks of equal work: a mixer on all patches, a backbone on those kept."""
    shape, micro, days = {"text_width": 1024, "channels": 4, "size": False}, 64, 0.0
    mixer, backbone = PixArtConfig(width=768, depth=6, heads=12, **shape), PixArtConfig(width=1024, depth=24, heads=16, **shape)  # type: ignore[arg-type]
    for pixels, masked, steps in STAGES:
        step = seconds(mixer, pixels // 8, micro, 77, H100) + seconds(backbone, int(pixels // 8 / masked**0.5), micro, 77, H100)
        days += steps * step * 2048 / 8 / micro / DAY
    return days


def main() -> None:
    sd, days = PRESETS["sd1.5"](), micro_dit()
    result = {
        "dit_xl_2": 0.84 * seconds(PRESETS["dit-xl-2"](), 32, 128, 0, A100, recomputed=True),
        "sd2_256": 1100 / 8 / 32 * seconds(sd, 32, 32, 77, A100),
        "sd2_512": 290 / 8 / 16 * seconds(sd, 64, 16, 77, A100),
        "flux_dev": 28 / 6.4 * seconds(PRESETS["flux-dev"](), 128, 1, 512, H100, trains=False),
        "micro_dit": days / DAYS,
        "micro_dit.dollars": days / DAYS * DOLLARS,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
