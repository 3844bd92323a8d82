"""A writer of longer prompts, tuned by what its captions are worth: GRPO (Shao et al. 2024, eq. 3) on bytes.

Of each short caption x a group of long ones y is written and rated, r = (nothing lost + share of the open that is now said) / 2:

    rho_i = p(y_i | x, y_<i) / p_old(y_i | x, y_<i);    q_i = p_ref(y_i | x, y_<i) / p(y_i | x, y_<i)
    L = E 1/n sum_i max(-A rho_i, -A clip(rho_i)) + kl (q_i - log q_i - 1)

Advantage and clipped loss are those of `methods.policy`: a byte is to a text what a step is to a picture.

Where we differ: a text that found no end within the writer's length counts with all its bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mezzotint.data.batch import Batch, Loader
from mezzotint.methods.method import Method, Metrics, Role, Turn, twin
from mezzotint.methods.policy import PolicyConfig, advantages, grouped, policy_loss, told
from mezzotint.pipeline import Pipeline
from mezzotint.text.writer import ByteWriter, ByteWriterConfig, load_writer, read
from mezzotint.worlds.caption import worth


@dataclass
class EnhanceGRPOConfig(PolicyConfig, kind="enhance_grpo"):
    """group, updates, clip, kl: see `methods.policy`. start: the writer to begin with, as a run of tiny.enhance has left it; none: a fresh
    `writer`, which has nothing to be rewarded for. temperature: of the writing, above 0.
    """

    group: int = 8
    clip: float = 0.2
    kl: float = 0.02
    start: str = ""
    writer: ByteWriterConfig = field(default_factory=ByteWriterConfig)
    temperature: float = 1.0

    def build(self, pipeline: Pipeline) -> "EnhanceGRPO":
        return EnhanceGRPO(self, pipeline)


@dataclass(kw_only=True)
class Written(Batch):
    """What was written of `prompts`. tokens, written: as `ByteWriter.texts` has them. log_prob: (B, L) of the bytes under the policy that
    wrote them. advantage, kept, said: (B,) of the captions. distinct: share of different ones among those of a prompt."""

    tokens: Tensor
    written: Tensor
    log_prob: Tensor
    advantage: Tensor
    kept: Tensor
    said: Tensor
    distinct: float


def by_text(x: Tensor, written: Tensor) -> Tensor:
    """(B,) means of what is (B, L) over the bytes that were written."""
    return (x * written).sum(1) / written.sum(1)


class EnhanceGRPO(Method):
    """Roles: the writer, which is the policy; a frozen reference with its first weights; a student that stays as it is."""

    def __init__(self, config: EnhanceGRPOConfig, pipeline: Pipeline) -> None:
        if not config.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {config.temperature}")
        self.config = config
        writer = load_writer(config.start) if config.start else config.writer.build()
        self.roles = {
            "student": Role(pipeline, trained=False),
            "writer": Role(writer.requires_grad_(True), averaged=True),
            "reference": Role(twin(writer), trained=False),
        }

    def turns(self, step: int) -> Sequence[Turn]:
        return [("writer",)] * self.config.updates

    @torch.no_grad()
    def experience(self, loader: Loader, step: int) -> list[Batch]:
        asked, writer = next(loader), self._writer("writer")
        prompts, ids = grouped(asked, self.config.group)
        tokens, written = writer.draw(prompts, self.config.temperature, steady=True)
        longer = read(tokens, written)
        kept, said = torch.tensor(self.rate(prompts, longer), device=tokens.device).unbind(1)
        distinct = len(set(zip(prompts, longer, strict=True))) / len(longer)
        nothing = asked.images.new_empty(len(prompts), asked.images.shape[1], 0, 0)
        came: dict[str, Any] = {"advantage": advantages((kept + said) / 2, prompts), "kept": kept, "said": said}
        density = self._log_prob("writer", tokens)
        return [Written(nothing, prompts, ids, tokens=tokens, written=written, log_prob=density, distinct=distinct, **came)]

    def rate(self, prompts: Sequence[str], longer: Sequence[str]) -> list[tuple[float, float]]:
        """The two parts of what long captions of short ones are worth."""
        return list(map(worth, prompts, longer))

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        assert isinstance(batch, Written)
        density = self._log_prob("writer", batch.tokens)
        with torch.no_grad():
            of_reference = self._log_prob("reference", batch.tokens)
        ratio, log_q = (density - batch.log_prob).exp(), of_reference - density
        divergence = log_q.exp() - log_q - 1
        advantage = batch.advantage[:, None].expand_as(ratio)
        of_bytes = policy_loss(ratio, advantage, divergence, self.config)
        of_texts = {name: by_text(x, batch.written) for name, x in told(ratio, advantage, divergence, self.config).items()}
        return by_text(of_bytes, batch.written).mean(), {
            "reward": (batch.kept + batch.said) / 2,
            "kept": batch.kept,
            "said": batch.said,
            "distinct": torch.full((), batch.distinct),
            "bytes": batch.written.sum(1).float(),
            **of_texts,
        }

    def _writer(self, name: str) -> ByteWriter:
        module = self.roles[name].module
        assert isinstance(module, ByteWriter)
        return module

    def _log_prob(self, name: str, tokens: Tensor) -> Tensor:
        """(B, L) log-densities of bytes under a writer at the temperature of the roll-outs."""
        return self._writer(name).log_prob(tokens, self.config.temperature)
