"""Transfusion against transformers' Llama, given the paper's mask in full and the tokens of text and image as one sequence."""

from dataclasses import replace
from itertools import product
from typing import ClassVar

import pytest
import torch
from parity import EQUAL, Parity, distance
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from mezzotint.models import Cond
from mezzotint.models.embed import TimeEmbedding, patchify, unpatchify
from mezzotint.models.transfusion import (
    TransfusionConfig,
    transfusion_7b,
    transfusion_160m,
    transfusion_370m,
    transfusion_760m,
    transfusion_1400m,
)
from mezzotint.weights import Names, Rule
from mezzotint.weights.names import Change, fuse

TINY = TransfusionConfig(width=32, depth=2, heads=4, hidden=48, vocabulary=12, channels=4)


def mixed(real: Tensor, patches: int) -> Tensor:
    """Figure 4, entry by entry: who may attend to whom, (B, T, T), after a text whose tokens are `real` (B, M)."""
    b, text = real.shape
    mask = torch.zeros(b, text + patches, text + patches, dtype=torch.bool)
    for sample, i, j in product(range(b), range(text + patches), range(text + patches)):
        both_image = i >= text and j >= text
        there = j >= text or bool(real[sample, j])
        mask[sample, i, j] = there and (both_image or j <= i)
    return mask


class LlamaTransfusion(nn.Module):
    """The paper's network, with transformers' Llama for its transformer."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.llama = LlamaModel(
            LlamaConfig(
                hidden_size=config.width,
                intermediate_size=config.hidden,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                vocab_size=config.vocabulary,
                rms_norm_eps=1e-5,
                attn_implementation="sdpa",
            )
        )
        patch_size = config.patch**2 * config.channels
        self.embed_patch, self.head = nn.Linear(patch_size, config.width), nn.Linear(config.width, patch_size)
        self.embed_time = TimeEmbedding(config.width)
        self.head_token = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        boi = tokens.new_full((len(tokens), 1), self.llama.config.vocab_size - 1)
        numbers = torch.cat([tokens, boi], dim=1)
        text = self.llama.embed_tokens(numbers.clamp(min=0))
        image = self.embed_patch(patchify(x[:, :, None], self.patch)) + self.embed_time(t)[:, None]
        real = torch.cat([numbers >= 0, torch.ones(image.shape[:2], dtype=torch.bool)], dim=1)
        out = self.llama(
            inputs_embeds=torch.cat([text, image], dim=1),
            attention_mask=mixed(numbers >= 0, image.shape[1])[:, None],
            position_ids=real.cumsum(1) - 1,
        ).last_hidden_state
        drawn = unpatchify(self.head(out[:, numbers.shape[1] :]), self.patch, x[:, :, None].shape)
        return drawn[:, :, 0], self.head_token(out[:, : tokens.shape[1]])


def paired(heads: int) -> Change:
    """Queries, keys and values of Llama, which turns a channel of a head's first half with one of its second, in neighbouring pairs."""

    def pairs(x: Tensor) -> Tensor:
        return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def halves(x: Tensor) -> Tensor:
        return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def back(parts: tuple[Tensor, ...]) -> list[Tensor]:
        q, k, v = fuse(1, 1, 1).to_theirs(parts)
        return [halves(q), halves(k), v]

    return Change(lambda parts: fuse(1, 1, 1).to_ours([pairs(parts[0]), pairs(parts[1]), parts[2]]), back)  # type: ignore[arg-type]


class TestTransfusion(Parity):
    identity = False
    configs: ClassVar = {
        "transfusion": TINY,
        "deeper": TINY.replace(depth=4, heads=2, hidden=32, channels=3, vocabulary=30),
        "large patches": TINY.replace(patch=4, channels=1, width=24),
    }
    presets: ClassVar = {  # the paper: 7B, 1.4B, 0.76B, 0.37B, 0.16B
        "7b": (transfusion_7b, 6_756_524_064),
        "1400m": (transfusion_1400m, 1_369_157_664),
        "760m": (transfusion_760m, 780_715_040),
        "370m": (transfusion_370m, 375_248_928),
        "160m": (transfusion_160m, 163_263_008),
    }

    def peer(self, config: TransfusionConfig) -> nn.Module:
        return LlamaTransfusion(config)

    def call(self, peer: LlamaTransfusion, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.tokens is not None
        return peer(x, t, cond.tokens)[0]

    def names(self, config: TransfusionConfig) -> Names:
        block, theirs = "blocks.*", "llama.layers.*"
        return Names(
            [
                Rule(f"{block}.qkv.linear", tuple(f"{theirs}.self_attn.{x}_proj" for x in "qkv"), paired(config.heads)),
                Rule(f"{block}.out", f"{theirs}.self_attn.o_proj"),
                Rule(f"{block}.norm_attention", f"{theirs}.input_layernorm"),
                Rule(f"{block}.norm_mlp", f"{theirs}.post_attention_layernorm"),
                Rule(f"{block}.mlp.inner", (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj"), fuse(1, 1)),
                Rule(f"{block}.mlp.outer", f"{theirs}.mlp.down_proj"),
                Rule("embed_token", "llama.embed_tokens"),
                Rule("norm", "llama.norm"),
                *(Rule(name, name) for name in ("embed_patch", "embed_time.mlp.0", "embed_time.mlp.2", "head", "head_token")),
            ]
        )

    def cond(self, config: TransfusionConfig, rows: int = 2) -> Cond:
        tokens = torch.randint(0, config.vocabulary - 1, (rows, 5))
        return Cond.of_tokens(tokens.where(torch.arange(5) < torch.randint(1, 6, (rows, 1)), -1))

    def test_masked_tokens_are_not_seen(self, config: TransfusionConfig) -> None:
        net = self.net(config)
        x, t, _ = self.inputs(config, (8, 8))
        whole = torch.randint(0, config.vocabulary - 1, (2, 4))
        short, logits = net.with_logits(x, t, Cond.of_tokens(whole))
        for places in ([0, 1, 2, 3], [2, 3, 4, 5], [0, 2, 3, 5]):  # padded behind, before, between
            padded = torch.full((2, 6), -1).index_copy(1, torch.tensor(places), whole)
            out, long = net.with_logits(x, t, Cond.of_tokens(padded))
            assert distance(out, short) <= EQUAL
            assert distance(long[:, places], logits) <= EQUAL
        told = net(x, t, Cond.of_tokens(whole.index_fill(1, torch.tensor([2]), -1)))
        assert distance(told, short) > 1e-3

    def test_logits_are_the_language_models(self, config: TransfusionConfig) -> None:
        ours, theirs = self.pair(config)
        x, t, cond = self.inputs(config, (8, 12))
        assert cond.tokens is not None
        drawn, logits = ours.with_logits(x, t, cond)  # type: ignore[operator]
        real = cond.tokens >= 0
        assert distance(logits[real], theirs(x, t, cond.tokens)[1][real]) <= EQUAL
        assert torch.equal(drawn, ours(x, t, cond))


def moved(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> tuple[list[bool], list[bool]]:
    """Which patches (2 x 2, in reading order) and which tokens' logits another input changes."""
    patches, logits = ((a - b).abs() > 1e-5 for a, b in zip(before, after, strict=True))
    return patchify(patches[:, :, None].float(), 2)[0].any(-1).tolist(), logits[0].any(-1).tolist()


def test_exactly_what_the_mask_allows_is_seen() -> None:
    net = TestTransfusion().net(TINY)
    x, t = torch.randn(1, 4, 4, 6), torch.tensor([0.4])
    tokens = torch.tensor([[3, 1, -1, 4, 1]])
    before = net.with_logits(x, t, Cond.of_tokens(tokens))
    all_patches, no_patches, no_tokens = [True] * 6, [False] * 6, [False] * 5
    real = (tokens >= 0)[0]

    def after(tokens: Tensor = tokens, x: Tensor = x, t: Tensor = t) -> tuple[list[bool], list[bool]]:
        patches, logits = moved(before, net.with_logits(x, t, Cond.of_tokens(tokens)))
        return patches, [there and bool(here) for there, here in zip(logits, real, strict=True)]

    assert after() == (no_patches, no_tokens)
    for place in (0, 1, 3, 4):  # a token is seen by itself, by those after it, and by all patches
        changed = tokens.clone()
        changed[0, place] += 5
        assert after(tokens=changed) == (all_patches, [bool(real[i]) and i >= place for i in range(5)]), place
    for row, column in product(range(2), range(3)):  # a patch is seen by all patches, and by no token
        changed = x.clone()
        changed[0, :, 2 * row, 2 * column] += 1
        assert after(x=changed) == (all_patches, no_tokens), (row, column)
    assert after(t=t / 2) == (all_patches, no_tokens)  # and so is the time


def test_patches_know_their_place() -> None:
    net = TestTransfusion().net(TINY)
    x, t, cond = TestTransfusion().inputs(TINY, (8, 8))
    out = net(x.roll(2, dims=-1), t, cond)
    assert distance(out.roll(-2, dims=-1), net(x, t, cond)) > 1e-2


def test_a_language_loss_needs_no_second_forward() -> None:
    net = TestTransfusion().net(TINY)
    x, t, cond = TestTransfusion().inputs(TINY, (4, 4))
    assert cond.tokens is not None
    read: list[int] = []
    net.blocks[0].register_forward_hook(lambda *_: read.append(1))
    drawn, logits = net.with_logits(x, t, cond)
    following = torch.cat([cond.tokens[:, 1:], cond.tokens.new_full((2, 1), TINY.vocabulary - 1)], dim=1)
    language = nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=-1)
    (drawn.square().mean() + language).backward()
    assert len(read) == 1
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_what_the_network_needs_must_be_given() -> None:
    x, t, cond = TestTransfusion().inputs(TINY, (4, 4))
    with pytest.raises(ValueError, match="tokens must be given to this network"):
        TINY.build()(x, t, replace(cond, tokens=None))
