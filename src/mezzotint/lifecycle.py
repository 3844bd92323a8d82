"""The speedrun's longer sister: the chain that a team would choose, in one command.

Worlds -> pre-training -> fine-tuning on the preferred look -> a reward model of it -> online DPO, or Flow-GRPO, on what is right and
what is liked -> distillation to four steps by distribution matching (DMD2) -> a subject in an adapter on the student. Every one is judged.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rich.progress import Progress

from mezzotint import chain
from mezzotint.chain import PROMPTS_PER_TASK, Part
from mezzotint.errors import UserError
from mezzotint.recipes import lifecycle as own
from mezzotint.recipes import post, reward, tiny
from mezzotint.worlds import subject

Tune = Literal["grpo", "dpo"]
TUNES = {"grpo": ("Flow-GRPO on the reward", own.grpo_both), "dpo": ("Online DPO on the reward", own.dpo_both)}
PROMPTS = (*tiny.PREVIEWS, subject.CAPTION)


def parts(folder: Path, size: tiny.SizeName, tune: Tune) -> list[Part]:
    """The stages. The student is asked for the subject before it knows it, so that what the last stage gains and forgets is seen."""
    title, recipe = TUNES[tune]
    goal = own.both(str(folder / "reward")).replace(failures=str(folder / tune / "failures"))
    personalised = ("worlds", "subject")
    return [
        Part(folder / "pretrain", "Pre-training", tiny.worlds(size)),
        Part(folder / "sft", "Fine-tuning on the preferred look", post.sft(size), "pretrain"),
        Part(folder / "reward", "A reward model of the look", reward.reward(size), "sft", ("pairs",)),
        Part(folder / tune, title, recipe(size, goal), "sft"),
        Part(folder / "distil", "Distillation to 4 steps (DMD2)", post.dmd(size), tune, personalised),
        Part(folder / "subject", "A subject in an adapter (DreamBooth)", own.subject_lora(size), "distil", personalised),
    ]


def lifecycle(folder: Path, size: tiny.SizeName, tune: Tune, progress: Progress) -> Path:
    """Run what is not done yet; returns the path of the report. UserError where the last stage could not be trained."""
    if find_spec("peft") is None:
        raise UserError('the last stage trains an adapter, which needs peft: pip install "mezzotint[lora]"')
    return chain.run("Mezzotint lifecycle", folder, parts(folder, size, tune), PROMPTS, PROMPTS_PER_TASK[size], progress)
