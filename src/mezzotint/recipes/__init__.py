"""Where it fits: Python functions that return whole run configurations; a variant calls another one and changes it.

In: `RECIPES`, every recipe by the name that the command line knows. Out: anything that runs.
Gotchas: a recipe states what it is expected to reach, or says that it has not been run.
"""

from collections.abc import Callable

from mezzotint.recipes import post, repa, tiny
from mezzotint.train.trainer import RunConfig

RECIPES: dict[str, Callable[[tiny.SizeName], RunConfig]] = {
    "tiny.worlds": tiny.worlds,
    "tiny.starter": tiny.starter,
    "tiny.sft": post.sft,
    "tiny.dpo": post.dpo,
    "tiny.consistency": post.consistency,
    "tiny.dmd": post.dmd,
    "tiny.images": tiny.images,
    "tiny.repa": repa.repa,
}
