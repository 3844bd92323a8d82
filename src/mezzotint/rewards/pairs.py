"""Preference pairs as a reward sees them: which prompts are held out, which pairs are ties, and how well a reward tells winners."""

import math
import zlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.rewards.reward import Reward

FOLDS = 8  # one prompt in so many is held out


def held_out(prompt: str, folds: int = FOLDS) -> bool:
    """Whether a reward model never trains on pairs of a prompt: a function of its words. folds <= 1 holds out none."""
    return folds > 1 and zlib.crc32(" ".join(prompt.lower().split()).encode()) % folds == 0


def identical(first: Tensor, second: Tensor) -> Tensor:
    """(B,) bool: where two pictures (B, C, H, W) are the same to the last bit."""
    return (first == second).flatten(1).all(1)


@torch.no_grad()
def measure(reward: Reward, batches: Iterable[Batch], folds: int = FOLDS, bins: int = 10) -> dict[str, Any]:
    """How well a reward tells winners from losers on held-out prompts, and whether its probabilities are true.

    pairs, ties: how many were seen; identical pictures are no pairs. accuracy: share in which the winner has more. log_loss: mean of
    -log sigmoid(r_w - r_l); ln 2 is guessing. calibration_error: with confidence p = sigmoid|r_w - r_l|, the mean over `bins` equal
    parts of [1/2, 1] of |accuracy - mean p|, weighted by their pairs (Guo et al. 2017, eq. 3). calibration: [mean p, accuracy, pairs] of
    each bin that has any. ValueError where no pair is held out.
    """
    margins, ties = [], 0
    for batch in batches:
        assert batch.rejected is not None
        same = identical(batch.images, batch.rejected)
        rows = [i for i, prompt in enumerate(batch.prompts) if held_out(prompt, folds)]
        ties += int(same[rows].sum())
        rows = [i for i in rows if not same[i]]
        if rows:
            prompts = [batch.prompts[i] for i in rows]
            margins.append((reward(batch.images[rows], prompts) - reward(batch.rejected[rows], prompts)).double().cpu())
    if not margins:
        raise ValueError(f"batches must hold pairs of held-out prompts, one in {folds}; they have none")
    margin = torch.cat(margins)
    confidence, right = margin.abs().sigmoid(), (margin > 0).double()
    place = ((confidence - 0.5) * 2 * bins).long().clamp_max(bins - 1)
    parts = [place == i for i in place.unique()]
    table = [(float(confidence[rows].mean()), float(right[rows].mean()), int(rows.sum())) for rows in parts]
    return {
        "pairs": len(margin),
        "ties": ties,
        "accuracy": float(right.mean()),
        "log_loss": float(-F.logsigmoid(margin).mean()),
        "chance": math.log(2),
        "calibration_error": sum(count * abs(accuracy - p) for p, accuracy, count in table) / len(margin),
        "calibration": table,
    }
