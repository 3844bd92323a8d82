"""FuseDiT against the paper's formulas, and beside tiny language models of transformers, whose layers it runs along with.

The formulas are in the layout of the language models, which turn a channel of a head's first half with one of its second.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from formulas import Paper, attended, linear, rms_norm, same_names
from parity import EQUAL, Parity, distance
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model, Qwen3Config, Qwen3Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mezzotint.models import Cond
from mezzotint.models.fuse_dit import FuseDiTConfig, fuse_dit_2b
from mezzotint.text.layers import keys_and_values
from mezzotint.weights import Names

TINY = FuseDiTConfig(width=24, depth=2, heads=4, kv_heads=2, head=8, hidden=40, channels=4)


def halves(x: Tensor, dim: int) -> Tensor:
    """Channels of a head from neighbouring pairs to halves."""
    return x.unflatten(dim, (-1, 2)).transpose(dim % x.ndim, dim % x.ndim + 1).flatten(dim % x.ndim, dim % x.ndim + 1)


class PaperFuseDiT(Paper):
    """Tang et al. 2025, section 4: Gemma's block with queries, keys and values of its own, and two-axis rotations."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.states is not None
        real = cond.masked().states_mask
        assert real is not None
        image = self.enter(x)
        keys = torch.cat([real, real.new_ones(image.shape[:2])], dim=1)
        for number in range(self.config.depth):
            k_text, v_text = cond.states[:, number].unflatten(-1, (2, self.config.kv_heads, -1)).unbind(2)
            q, k, v = self.ask(image, number, x.shape[2] // self.config.patch, real.sum(1))
            k, v = torch.cat([halves(k_text, -1), k], dim=1), torch.cat([v_text, v], dim=1)
            image = self.answer(image, self.attended(q, k, v, keys), number)
        return self.leave(image, x)

    def enter(self, x: Tensor) -> Tensor:
        p = self.config.patch
        patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1)  # B rows columns p p C
        return linear(patches.flatten(3).flatten(1, 2), self.weights, "embed_patch")

    def leave(self, image: Tensor, x: Tensor) -> Tensor:
        p, (rows, columns) = self.config.patch, (x.shape[2] // self.config.patch, x.shape[3] // self.config.patch)
        drawn = linear(rms_norm(image, self.weights, "norm", 1e-6), self.weights, "head")
        return drawn.reshape(len(x), rows, columns, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)

    def ask(self, image: Tensor, number: int, rows: int, start: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (B, N, heads, d), turned by where they stand behind a text of `start` (B,) tokens."""
        w, c = self.weights, self.config
        normal = rms_norm(image, w, f"blocks.{number}.norm_1", 1e-6)
        parts = linear(normal, w, f"blocks.{number}.qkv.linear").unflatten(-1, (-1, c.head)).split([c.heads, c.kv_heads, c.kv_heads], 2)
        q, k = (halves(rms_norm(x, w, f"blocks.{number}.qkv.norm_{n}", 1e-6), -1) for x, n in zip(parts[:2], "qk", strict=True))
        index = torch.arange(image.shape[1])
        columns = image.shape[1] // rows
        frequency = c.theta ** (-torch.arange(0, c.head // 2, 2) / (c.head // 2))
        row, column = ((start[:, None] + place)[..., None] * frequency for place in (index // columns, index % columns))
        angle = torch.cat([row, column], dim=-1)[:, :, None]

        def turned(x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

        return turned(q), turned(k), parts[2]

    def attended(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
        """One softmax over all keys (B, K) or (B, N, K); query heads share key heads."""
        k, v = (x.repeat_interleave(self.config.heads // self.config.kv_heads, dim=2) for x in (k, v))
        return attended(q.flatten(2), k.flatten(2), v.flatten(2), self.config.heads, keys)

    def answer(self, image: Tensor, heard: Tensor, number: int) -> Tensor:
        w, name = self.weights, f"blocks.{number}"
        image = image + rms_norm(linear(heard, w, f"{name}.out"), w, f"{name}.norm_2", 1e-6)
        gate, value = linear(rms_norm(image, w, f"{name}.norm_3", 1e-6), w, f"{name}.mlp.inner").chunk(2, dim=-1)
        gelu = gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) / 2
        return image + rms_norm(linear(gelu * value, w, f"{name}.mlp.outer"), w, f"{name}.norm_4", 1e-6)


class TestFuseDiT(Parity):
    identity = False
    configs: ClassVar = {
        "fuse_dit": TINY,
        "a key head for each": TINY.replace(kv_heads=4, depth=3, theta=100.0, channels=3),
        "narrower than its heads": TINY.replace(width=12, head=12, kv_heads=1, patch=4),
    }
    presets: ClassVar = {"2b": (fuse_dit_2b, 2_024_828_480)}  # the paper: 2B

    def peer(self, config: FuseDiTConfig) -> nn.Module:
        return PaperFuseDiT(config)

    def call(self, peer: PaperFuseDiT, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return peer(x, t, cond)

    def names(self, config: FuseDiTConfig) -> Names:
        return same_names(config)

    def cond(self, config: FuseDiTConfig, rows: int = 2) -> Cond:
        states = torch.randn(rows, config.depth, 5, 2 * config.kv_heads * config.head)
        return Cond.of_states(states, torch.arange(5) < torch.randint(1, 6, (rows, 1)))

    def test_what_the_network_needs_must_be_given(self) -> None:
        x, t, cond = self.inputs(TINY, (4, 4))
        with pytest.raises(ValueError, match=r"states must be keys and values of a language model's layers, \(B, 2, L, 32\), got none"):
            TINY.build()(x, t, replace(cond, states=None, states_mask=None))
        assert cond.states is not None
        with pytest.raises(ValueError, match=r"got \(2, 1, 5, 32\)"):
            TINY.build()(x, t, replace(cond, states=cond.states[:, :1]))
        with pytest.raises(ValueError, match="head must be a multiple of 4"):
            TINY.replace(head=6).build()

    def test_the_time_is_not_told(self) -> None:
        net = self.net(TINY)
        x, t, cond = self.inputs(TINY, (8, 8))
        assert torch.equal(net(x, t, cond), net(x, t / 2, cond))


SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": TINY.depth,
    "num_attention_heads": TINY.heads,
    "num_key_value_heads": TINY.kv_heads,
    "head_dim": TINY.head,
}
# Gemma 2 caps its logits, and the joint attention of text and image does not: without the cap they are comparable.
LLMS: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: Gemma2Model(Gemma2Config(**SIZES, query_pre_attn_scalar=TINY.head, attn_logit_softcapping=None)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**SIZES)),
}
TOKENS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 0]])
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


def language_model(name: str) -> Any:
    torch.manual_seed(2)
    llm = LLMS[name]().eval()
    for p in llm.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.2)
    return llm


def together(llm: Any, peer: PaperFuseDiT, x: Tensor) -> tuple[Tensor, Tensor]:
    """Text and image pass layer by layer through one attention over both, as published: the velocity, and what becomes of the text."""
    image, start = [peer.enter(x)], MASK.sum(1)
    text, patches = MASK.shape[1], image[0].shape[1]
    text_rows = torch.cat([MASK[:, None] & torch.ones(text, text).tril().bool(), torch.zeros(2, text, patches).bool()], dim=2)
    image_rows = torch.cat([MASK, torch.ones(2, patches).bool()], dim=1)[:, None].expand(-1, patches, -1)

    def joint(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **keywords: Any) -> tuple[Tensor, None]:
        asked = peer.ask(image[0], module.layer_idx, x.shape[2] // TINY.patch, start)
        q, k, v = (torch.cat([a.transpose(1, 2), b], dim=1) for a, b in zip((q, k, v), asked, strict=True))
        heard = peer.attended(q, k, v, torch.cat([text_rows, image_rows], dim=1))
        image[0] = peer.answer(image[0], heard[:, text:], module.layer_idx)
        return heard[:, :text], None

    ALL_ATTENTION_FUNCTIONS.register("joint", joint)
    kept, llm.config._attn_implementation = llm.config._attn_implementation, "joint"
    hidden = llm(TOKENS, position_ids=(MASK.cumsum(1) - 1), use_cache=False).last_hidden_state
    llm.config._attn_implementation = kept
    return peer.leave(image[0], x), hidden


@pytest.mark.parametrize("name", LLMS)
def test_from_the_cache_and_together_are_one(name: str) -> None:
    ours, theirs = TestFuseDiT().pair(TINY)
    assert isinstance(theirs, PaperFuseDiT)
    llm, x = language_model(name), torch.randn(2, 4, 8, 12)
    cond = Cond.of_states(keys_and_values(llm, TOKENS, MASK), MASK)
    alone = llm(TOKENS, attention_mask=MASK.long()).last_hidden_state
    with torch.no_grad():
        for t in (1.0, 0.6, 0.3):  # the cache outlives the steps
            expected, hidden = together(llm, theirs, x)
            velocity = ours(x, torch.full((2,), t), cond)
            assert distance(velocity, expected) <= EQUAL
            assert distance(hidden[MASK], alone[MASK]) <= EQUAL  # the text never saw the image
            x = x - 0.3 * velocity


@pytest.mark.parametrize("name", LLMS)
def test_the_language_model_gets_no_gradient(name: str) -> None:
    llm, net = language_model(name), TestFuseDiT().net(TINY)
    cond = Cond.of_states(keys_and_values(llm, TOKENS, MASK), MASK)
    net(torch.randn(2, 4, 8, 8), torch.rand(2), cond).square().sum().backward()
    assert all(p.grad is None for p in llm.parameters())
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("name", LLMS)
def test_where_the_padding_stands_does_not_matter(name: str) -> None:
    llm, net = language_model(name), TestFuseDiT().net(TINY)
    x, t = torch.randn(1, 4, 8, 8), torch.rand(1)
    behind, before = torch.tensor([[5, 9, 2, 0, 0]]), torch.tensor([[0, 0, 5, 9, 2]])
    out = [net(x, t, Cond.of_states(keys_and_values(llm, tokens, tokens > 0), tokens > 0)) for tokens in (behind, before)]
    assert distance(*out) <= EQUAL
