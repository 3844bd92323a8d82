"""Where it fits: Python functions that return whole run configurations; a variant calls another one and changes it.

In: `RECIPES`, every recipe by the name that the command line knows. Out: anything that runs.
Gotchas: a recipe states what it is expected to reach, or says that it has not been run.
"""

from collections.abc import Callable

from mezzotint.recipes import consistent, curriculum, distil, enhance, lifecycle, personal, post, reinforce, repa, reward, tiny
from mezzotint.train.trainer import RunConfig

RECIPES: dict[str, Callable[[tiny.SizeName], RunConfig]] = {
    "tiny.worlds": tiny.worlds,
    "tiny.starter": tiny.starter,
    "tiny.sft": post.sft,
    "tiny.dpo": post.dpo,
    "tiny.consistency": post.consistency,
    "tiny.dmd": post.dmd,
    "tiny.guidance_distill": distil.guidance_distill,
    "tiny.progressive": distil.progressive,
    "tiny.reflow": distil.reflow,
    "tiny.instaflow": distil.instaflow,
    "tiny.meanflow": distil.meanflow,
    "tiny.ladd": distil.ladd,
    "tiny.add": distil.add,
    "tiny.scm": distil.scm,
    "tiny.lcm": consistent.lcm,
    "tiny.lcm_lora": consistent.lcm_lora,
    "tiny.consistency_training": consistent.consistency_training,
    "tiny.reward": reward.reward,
    "tiny.mistaken": reinforce.mistaken,
    "tiny.grpo": reinforce.grpo,
    "tiny.flow_grpo": reinforce.flow_grpo,
    "tiny.dance_grpo": reinforce.dance_grpo,
    "tiny.grpo_fast": reinforce.grpo_fast,
    "tiny.mix_grpo": reinforce.mix_grpo,
    "tiny.grpo_learned": reinforce.grpo_learned,
    "tiny.grpo_both": lifecycle.grpo_both,
    "tiny.refl": reward.refl,
    "tiny.dpo_online": reward.dpo_online,
    "tiny.dpo_both": lifecycle.dpo_both,
    "tiny.dreambooth": personal.dreambooth,
    "tiny.subject_lora": lifecycle.subject_lora,
    "tiny.textual_inversion": personal.textual_inversion,
    "tiny.enhance": enhance.enhance,
    "tiny.enhance_grpo": enhance.enhance_grpo,
    "tiny.images": tiny.images,
    "tiny.repa": repa.repa,
    "tiny.curriculum": curriculum.curriculum,
    "tiny.masked": curriculum.masked,
}
