"""The front door: the whole life of a model in one command.

Worlds -> pre-training -> fine-tuning on the preferred look -> preference optimisation -> distillation to four steps, an
evaluation of every stage, and one page that shows it all. Every stage is an ordinary run of an ordinary recipe; stopped
at any point, the same command goes on from there.
"""

from pathlib import Path

from rich.progress import Progress

from mezzotint import chain
from mezzotint.chain import PROMPTS_PER_TASK, Part
from mezzotint.recipes import post, tiny


def parts(folder: Path, size: tiny.SizeName) -> list[Part]:
    """The stages, each starting from what the one before it exported."""
    return [
        Part(folder / "pretrain", "Pre-training", tiny.worlds(size)),
        Part(folder / "sft", "Fine-tuning on the preferred look", post.sft(size), "pretrain"),
        Part(folder / "dpo", "Preference optimisation", post.dpo(size), "sft"),
        Part(folder / "distil", "Distillation to 4 steps", post.consistency(size), "dpo"),
    ]


def speedrun(folder: Path, size: tiny.SizeName, progress: Progress) -> Path:
    """Run what is not done yet; returns the path of the report."""
    return chain.run("Mezzotint speedrun", folder, parts(folder, size), tiny.PREVIEWS, PROMPTS_PER_TASK[size], progress)
