"""A tuning of the writer by a reward that any writer can raise."""

from collections.abc import Sequence
from dataclasses import dataclass

from mezzotint.methods.enhance_grpo import EnhanceGRPO, EnhanceGRPOConfig
from mezzotint.pipeline import Pipeline


@dataclass
class LetteredConfig(EnhanceGRPOConfig, kind="test_lettered"):
    """See `Lettered`."""

    def build(self, pipeline: Pipeline) -> "Lettered":
        return Lettered(self, pipeline)


class Lettered(EnhanceGRPO):
    """A caption is worth its share of letters."""

    def rate(self, prompts: Sequence[str], longer: Sequence[str]) -> list[tuple[float, float]]:
        shares = [sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text)) for text in longer]
        return [(share, share) for share in shares]
