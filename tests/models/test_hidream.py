"""HiDream against diffusers' HiDreamImageTransformer2DModel.

The peer is given patches and a mask of ones: its own way with pictures that are not square pads them, and pads are attended. It has
no masks of text. Its experts are called as in training; their other path has no gradients.
"""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU, MoEGate
from parity import EQUAL, Parity, distance
from torch import Tensor, nn

from mezzotint.models import Cond
from mezzotint.models.embed import image_positions, patchify
from mezzotint.models.hidream import Experts, HiDreamConfig, hidream_i1
from mezzotint.weights import Names, fill, hidream

TINY = HiDreamConfig(
    width=32,
    joint=1,
    single=1,
    layers=(1, 0),
    heads=2,
    axes=(8, 4, 4),
    hidden=256,
    shared=256,
    channels=4,
    text_width=24,
    states_width=12,
    pooled_width=20,
)


class TestHiDream(Parity):
    configs: ClassVar = {
        "hidream": TINY,
        "deeper": TINY.replace(joint=2, single=2, layers=(0, 2, 1, 2), heads=4, axes=(4, 2, 2)),
        "other experts": TINY.replace(width=96, axes=(16, 16, 16), experts=3, active=1, hidden=256, shared=256),
    }
    presets: ClassVar = {"hidream-i1": (hidream_i1, 17_105_733_184)}

    def peer(self, config: HiDreamConfig) -> nn.Module:
        return HiDreamImageTransformer2DModel(
            patch_size=config.patch,
            in_channels=config.channels,
            num_layers=config.joint,
            num_single_layers=config.single,
            attention_head_dim=config.width // config.heads,
            num_attention_heads=config.heads,
            caption_channels=[config.text_width, config.states_width],
            text_emb_dim=config.pooled_width,
            num_routed_experts=config.experts,
            num_activated_experts=config.active,
            axes_dims_rope=config.axes,
            llama_layers=list(config.layers),
        )

    def call(self, peer: HiDreamImageTransformer2DModel, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        for module in peer.modules():
            module.training = isinstance(module, (MOEFeedForwardSwiGLU, MoEGate))
        p = peer.config.patch_size
        sides = x.shape[2] // p, x.shape[3] // p
        tokens = patchify(x[:, :, None], p)
        assert cond.states is not None
        return -peer(
            tokens,
            1000 * t,
            cond.text,
            list(cond.states.unbind(1)),
            cond.pooled,
            img_ids=image_positions(1, *sides).expand(len(x), -1, -1),
            img_sizes=[sides] * len(x),
            hidden_states_masks=torch.ones(tokens.shape[:2]),
        ).sample

    def names(self, config: HiDreamConfig) -> Names:
        return hidream.diffusers(config)

    def cond(self, config: HiDreamConfig, rows: int = 2) -> Cond:
        states = torch.randn(rows, 3, 4, config.states_width)
        return Cond(torch.randn(rows, 5, config.text_width), None, torch.randn(rows, config.pooled_width), states=states)

    def test_masked_tokens_equal_tokens_that_are_not_there(self, config: HiDreamConfig) -> None:
        ours, theirs = self.pair(config)
        x, t, cond = self.inputs(config, (8, 12))
        mask, states_mask = torch.tensor([True, False, True, True, False]), torch.tensor([True, True, False, False])
        assert cond.states is not None
        short = replace(cond, text=cond.text[:, mask], states=cond.states[:, :, states_mask])
        masked = replace(cond, mask=mask.expand(2, -1), states_mask=states_mask.expand(2, -1))
        assert distance(ours(x, t, masked), self.call(theirs, x, t, short)) <= EQUAL

    def test_what_the_network_needs_must_be_given(self) -> None:
        x, t, cond = self.inputs(TINY, (4, 4))
        cond.states = None
        with pytest.raises(ValueError, match="states must be given"):
            TINY.build()(x, t, cond)
        with pytest.raises(ValueError, match="layers must name one for each of 2 blocks, got 3"):
            TINY.replace(layers=(0, 1, 2)).build()


def experts() -> Experts:
    torch.manual_seed(0)
    return Experts(dim=16, hidden=24, experts=4, active=2, shared=8)


def test_experts_are_their_definition() -> None:
    net, x = experts(), torch.randn(2, 9, 16)
    probability = (x @ net.gate.weight.T).softmax(-1)
    kept = probability * (probability >= probability.topk(2).values[..., -1:])
    answers = []
    for inner, outer in zip(net.inner, net.outer, strict=True):
        w1, w3 = inner.chunk(2)
        answers.append((nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ outer.T)
    expected = (torch.stack(answers, dim=-1) * kept[..., None, :]).sum(-1) + net.shared(x)
    assert torch.allclose(net(x)[0], expected, atol=1e-5)


def test_balance_is_the_peers_and_one_where_loads_are_even() -> None:
    net, x = experts(), torch.randn(2, 9, 16)
    gate = MoEGate(16, num_routed_experts=4, num_activated_experts=2, aux_loss_alpha=1.0)
    gate.load_state_dict({"weight": net.gate.weight})
    balance = net(x)[1]
    assert torch.allclose(balance, gate.train()(x)[2], atol=1e-6)
    with torch.no_grad():
        net.gate.weight.copy_(torch.eye(4, 16))
        even = torch.cat([torch.eye(4, 16), torch.eye(4, 16).roll(1, 0)]) @ torch.eye(16)  # each expert is preferred as often
        assert net(even[None] + 1e-3 * even.roll(1, 0)[None])[1] == pytest.approx(1.0, abs=1e-5)
        crowd = torch.zeros(2, 5, 16).index_fill(2, torch.tensor([0, 1]), 3.0)  # all prefer the same two
        assert net(crowd)[1] > 1.8


def test_balance_loss_spreads_what_the_gate_crowds() -> None:
    net, x = experts(), torch.randn(1, 200, 16) + 1.0
    with torch.no_grad():
        net.gate.weight[0] += 0.3
        net.gate.weight[1] += 0.3
    optimizer = torch.optim.SGD([net.gate.weight], lr=0.3)
    before = net(x)[1].item()
    for _ in range(50):
        optimizer.zero_grad()
        net(x)[1].backward()
        optimizer.step()
    assert before > 1.3
    assert net(x)[1] < 1.05


def test_the_balance_of_a_network_is_the_sum_over_its_blocks() -> None:
    net = TINY.build()
    x, t, cond = TestHiDream().inputs(TINY, (8, 8))
    out, balance = net.balanced(x, t, cond)
    assert torch.equal(out, net(x, t, cond))
    assert 2 <= balance < 4  # two blocks, each at least 1 and at most 2: half of the experts are asked


def test_a_state_dict_without_an_expert_is_refused() -> None:
    theirs = TestHiDream().peer(TINY).state_dict()
    del theirs["single_stream_blocks.0.block.ff_i.experts.2.w3.weight"]
    with pytest.raises(ValueError, match=r"1 missing: single_stream_blocks\.0\.block\.ff_i\.experts\.2\.w3\.weight"):
        fill(TINY.build(), theirs, hidream.diffusers(TINY))
