"""HiDream-I1 (Cai et al. 2025): joint blocks, then one stream, with sparse mixtures of experts for their MLPs.

Every block reads a layer of a language model of its own beside the running text (T5, then the last layer), and forgets it after.

Where we differ: masks hold for text; the published code has none. What a block reads and forgets is attended to, but no answer to it
is computed, which the published code computes and drops. t = 0 is data and the output is eps - x0; the published network
gives the negative. `balanced` also returns how unevenly the experts are loaded, so that a loss can ask for it.

B batch, C channels, F frames, N image tokens, L text tokens, T tokens of the whole batch, K layers of states, E experts, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.flow.path import Prediction
from mezzotint.models.attention import QKV
from mezzotint.models.blocks import Head, Stream, SwiGLU, converse, gated, initialise, modulate
from mezzotint.models.cond import Cond
from mezzotint.models.denoiser import DenoiserConfig
from mezzotint.models.embed import TimeEmbedding, VectorEmbedding, as_video, image_positions, patchify, rope, unpatchify


@dataclass
class HiDreamConfig(DenoiserConfig, kind="hidream"):
    """Sizes of a HiDream; as they stand here, those of I1.

    joint, single: numbers of blocks with two streams and with one. layers: which of `Cond.states` each block reads. axes:
    channels of a head that turn with frame, row and column. hidden: of an expert and of the text's MLP; shared: of the expert
    that every token asks, beside the best `active` of `experts`. text_width, states_width, pooled_width: of the conditions.
    """

    width: int = 2560
    joint: int = 16
    single: int = 32
    layers: tuple[int, ...] = (*range(32), *(31,) * 16)
    heads: int = 20
    axes: tuple[int, int, int] = (64, 32, 32)
    experts: int = 4
    active: int = 2
    hidden: int = 6912
    shared: int = 3584
    patch: int = 2
    channels: int = 16
    text_width: int = 4096
    states_width: int = 4096
    pooled_width: int = 2048
    prediction: Prediction = "velocity"

    def build(self) -> "HiDream":
        return HiDream(self)


class Experts(nn.Module):
    """A sparse mixture of SwiGLUs: each token asks the `active` experts that its gate prefers, and one that all share.

    An answer is weighed by the softmax over all experts, not only over those asked. Tokens are sorted by expert, so that each
    weight is one product and no shape depends on the data.
    """

    def __init__(self, dim: int, hidden: int, experts: int, active: int, shared: int) -> None:
        super().__init__()
        self.active = active
        self.gate = nn.Linear(dim, experts, bias=False)
        self.inner = nn.Parameter(torch.empty(experts, 2 * hidden, dim))
        self.outer = nn.Parameter(torch.empty(experts, dim, hidden))
        self.shared = SwiGLU(dim, shared)
        for weight in (*self.inner, *self.outer):
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, D) -> answer (B, N, D), balance (): E sum_e f_e P_e (Fedus et al. 2021, eq. 4), 1 where loads are even.

        f: the share of questions that an expert gets; P: its mean probability.
        """
        tokens = x.flatten(0, 1)
        probability = self.gate(tokens).softmax(dim=-1)  # (T, E)
        weight, chosen = probability.topk(self.active, dim=-1)  # (T, active)
        order = chosen.flatten().argsort()  # questions, sorted by expert
        asked = F.one_hot(chosen.flatten(), probability.shape[1]).sum(0)
        ends = asked.cumsum(0).int()

        row = order // self.active
        gate, value = F.grouped_mm(tokens[row], self.inner.mT, offs=ends).chunk(2, dim=-1)
        answers = F.grouped_mm(F.silu(gate) * value, self.outer.mT, offs=ends) * weight.flatten()[order, None]
        mixed = torch.zeros_like(tokens).index_add(0, row, answers.to(tokens.dtype)).unflatten(0, x.shape[:2])
        balance = len(asked) * (asked / len(order) * probability.mean(0)).sum()
        return mixed + self.shared(x), balance


class ExpertStream(Stream):
    """A stream with experts, whose answer comes with their balance."""

    def __init__(self, config: HiDreamConfig) -> None:
        experts = Experts(config.width, config.hidden, config.experts, config.active, config.shared)
        super().__init__(config.width, _qkv(config), experts)

    def weigh(self, x: Tensor, attended: Tensor, rest: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """As `answer`, and the balance ()."""
        gate_a, shift_m, scale_m, gate_m = rest
        x = gated(x, gate_a, self.out(attended))
        change, balance = self.mlp(modulate(self.norm(x), shift_m, scale_m))
        return gated(x, gate_m, change), balance


def _qkv(config: HiDreamConfig) -> QKV:
    return QKV(config.width, config.heads, norm="width", eps=1e-5)


class HiDreamJointBlock(nn.Module):
    """Image with experts and text with a dense MLP, in one attention."""

    def __init__(self, config: HiDreamConfig) -> None:
        super().__init__()
        self.image = ExpertStream(config)
        self.text = Stream(config.width, _qkv(config), SwiGLU(config.width, config.hidden))

    def forward(
        self, image: Tensor, text: Tensor, said: Tensor, c: Tensor, rotation: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """image (B, N, D), text (B, L, D), said (B, L', D), c (B, D), rotation and mask over all, [said, text, image]

        -> image, text, balance ().
        """
        read = torch.cat([said, text], dim=1)
        for_text, for_image = converse((self.text, self.image), (read, image), c, rotation, mask, silent=said.shape[1])
        image, balance = self.image.weigh(image, *for_image)
        return image, self.text.answer(text, *for_text), balance


class HiDreamSingleBlock(nn.Module):
    """Text and image as one stream, with experts."""

    def __init__(self, config: HiDreamConfig) -> None:
        super().__init__()
        self.stream = ExpertStream(config)

    def forward(self, x: Tensor, said: Tensor, c: Tensor, rotation: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, N, D), said (B, L', D), c (B, D), rotation and mask over [said, x] -> x, balance ()."""
        (attended,) = converse((self.stream,), (torch.cat([said, x], dim=1),), c, rotation, mask, silent=said.shape[1])
        return self.stream.weigh(x, *attended)


class HiDream(nn.Module):
    """(B, C, H, W) or (B, C, F, H, W), t (B,), Cond with text, pooled and states -> velocity of the same shape.

    H and W are multiples of the patch. At initialisation the output is zero and blocks are identities.
    """

    def __init__(self, config: HiDreamConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        width, patch_size, depth = config.width, config.patch**2 * config.channels, config.joint + config.single
        if sum(config.axes) * config.heads != width:
            raise ValueError(f"axes must add up to the channels of a head, {width} / {config.heads}, got {config.axes}")
        if len(config.layers) != depth:
            raise ValueError(f"layers must name one for each of {depth} blocks, got {len(config.layers)}")
        self.embed_patch = nn.Linear(patch_size, width)
        self.embed_text = nn.Linear(config.text_width, width, bias=False)
        self.embed_states = nn.ModuleList(nn.Linear(config.states_width, width, bias=False) for _ in range(depth))
        self.embed_pooled = VectorEmbedding(config.pooled_width, width)
        self.embed_time = TimeEmbedding(width)
        self.joint = nn.ModuleList(HiDreamJointBlock(config) for _ in range(config.joint))
        self.single = nn.ModuleList(HiDreamSingleBlock(config) for _ in range(config.single))
        self.head = Head(width, patch_size)
        initialise(self, self.head.linear)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order of the computation."""
        return [*self.joint, *self.single]

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.balanced(x, t, cond)[0]

    def balanced(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """The velocity and the sum of the blocks' balances (), which the published training adds to its loss 0.01 times."""
        p = self.config.patch
        video = as_video(x, p)
        _, _, frames, height, width = video.shape

        image = self.embed_patch(patchify(video, p))
        states = self._states(cond)
        text = torch.cat([self.embed_text(cond.text), states[-1]], dim=1)
        c = self.embed_time(t) + self.embed_pooled(cond.pooled)
        length = states[0].shape[1]  # of what a block reads and forgets; it stands first
        positions = image_positions(frames, height // p, width // p, x.device)
        rotation = rope(torch.cat([positions.new_zeros(length + text.shape[1], 3), positions]), self.config.axes)
        mask, balance = self._mask(cond, image), x.new_zeros(())

        for block, said in zip(self.joint, states[: len(self.joint)], strict=True):
            image, text, uneven = block(image, text, said, c, rotation, mask)
            balance = balance + uneven
        tokens = torch.cat([text, image], dim=1)
        for block, said in zip(self.single, states[len(self.joint) :], strict=True):
            tokens, uneven = block(tokens, said, c, rotation, mask)
            balance = balance + uneven

        patches = self.head(tokens[:, text.shape[1] :], c)
        return -unpatchify(patches, p, video.shape).reshape(x.shape), balance

    def _states(self, cond: Cond) -> list[Tensor]:
        """What each block reads, (B, L', D)."""
        if cond.states is None:
            raise ValueError(f"states must be given to this network: (B, K, L, {self.config.states_width}) of a language model's layers")
        return [embed(cond.states[:, layer]) for embed, layer in zip(self.embed_states, self.config.layers, strict=True)]

    def _mask(self, cond: Cond, image: Tensor) -> Tensor | None:
        """(B, L' + L + L' + N) over [a layer, text, last layer, image]."""
        if cond.mask is None and cond.states_mask is None:
            return None
        whole = cond.masked()
        assert whole.mask is not None
        assert whole.states_mask is not None
        return torch.cat([whole.states_mask, whole.mask, whole.states_mask, whole.mask.new_ones(image.shape[:2])], dim=1)


def hidream_i1() -> HiDreamConfig:
    """HiDream-I1, 17.1B parameters, of which a token meets 12B."""
    return HiDreamConfig()


PRESETS: dict[str, Callable[[], HiDreamConfig]] = {"hidream-i1": hidream_i1}
