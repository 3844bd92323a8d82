"""The shared attention: against its definition, with masks, with fewer key heads, of two streams."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from mezzotint.models.attention import QKV, CrossAttention, SelfAttention, attend
from mezzotint.models.blocks import MLP, Head, JointBlock, Stream, SwiGLU, initialise
from mezzotint.models.embed import as_video, image_positions, rope, rotate, sincos_2d, sincos_2d_mae, sinusoid


def test_attention_is_a_mean_of_values_weighed_by_the_softmax_of_products() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.rand(2, 7) > 0.4
    mask[:, 0] = True
    out = attend(q, k, v, mask).unflatten(-1, (4, 8))
    for b, head, n in ((0, 0, 0), (1, 2, 4), (0, 3, 1)):
        weights = (k[b, head // 2] @ q[b, head, n] / 8**0.5).masked_fill(~mask[b], -torch.inf).softmax(0)
        assert torch.allclose(out[b, n, head], weights @ v[b, head // 2], atol=1e-6)


def test_a_gpu_is_given_as_many_key_heads_as_query_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer it has no fused kernel that takes a mask, or float32, and makes the matrix of all pairs."""
    given: list[list[int]] = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: given.append([x.shape[1] for x in (q, k, v)]) or q)
    with FakeTensorMode():
        q, k, mask = (torch.empty(shape, device="cuda") for shape in ((2, 4, 5, 8), (2, 2, 7, 8), (2, 7)))
        attend(q, k, k, mask.bool())
    assert given == [[4, 4, 4]]


def test_where_nothing_may_be_attended_the_answer_is_zero_and_so_is_its_gradient() -> None:
    q, k, v = (torch.randn(2, 2, 3, 4, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, torch.tensor([[False, False, False], [True, False, True]]))
    out.square().sum().backward()
    assert not out[0].any()
    assert out[1].any()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert not x.grad[0].any()


@pytest.mark.parametrize("norm", ["head", "width"])
def test_queries_and_keys_are_normalised_per_head_or_across_all(norm: str) -> None:
    qkv = QKV(16, 4, kv_heads=2, norm=norm)  # type: ignore[arg-type]
    q, k, v = qkv(10 * torch.randn(2, 3, 16))
    assert (q.shape, k.shape, v.shape) == ((2, 4, 3, 4), (2, 2, 3, 4), (2, 2, 3, 4))
    for x in (q, k):
        mean_square = x.square().mean(-1 if norm == "head" else (1, 3))
        assert torch.allclose(mean_square, torch.ones_like(mean_square), atol=1e-3)
    with pytest.raises(ValueError, match="multiple of heads"):
        QKV(16, 3)
    with pytest.raises(ValueError, match="heads of kv_heads"):
        QKV(16, 4, kv_heads=3)


def test_masked_tokens_are_not_seen() -> None:
    x, text = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    cross = CrossAttention(16, 4, norm=True)
    assert torch.allclose(cross(x, text, mask)[0], cross(x[:1], text[:1, :3])[0], atol=1e-6)
    own = SelfAttention(16, 4, kv_heads=1, bias=False)
    assert torch.allclose(own(text, mask=mask)[0, :3], own(text[:1, :3])[0], atol=1e-6)


def test_joint_attention_with_equal_weights_is_one_stream() -> None:
    torch.manual_seed(0)
    stream = Stream(16, QKV(16, 2, norm="head"), MLP(16))
    for p in stream.parameters():
        torch.nn.init.normal_(p, std=0.3)
    both = JointBlock(stream, stream)
    image, text, c = torch.randn(2, 4, 16), torch.randn(2, 3, 16), torch.randn(2, 16)
    joined = torch.cat([text, image], dim=1)
    out_image, out_text = both(image, text, c)
    asked, rest = stream.ask(joined, c)
    alone = stream.answer(joined, attend(*asked), rest)
    assert torch.allclose(torch.cat([out_text, out_image], dim=1), alone, atol=1e-5)


def test_blocks_and_heads_start_at_zero() -> None:
    block = JointBlock(Stream(16, QKV(16, 2), MLP(16)), Stream(16, QKV(16, 2), MLP(16)))
    head = Head(16, 8)
    initialise(block)
    initialise(head, head.linear)
    image, text, c = torch.randn(2, 4, 16), torch.randn(2, 3, 16), torch.randn(2, 16)
    assert all(torch.equal(a, b) for a, b in zip(block(image, text, c), (image, text), strict=True))
    assert not head(image, c).any()


def test_swiglu_is_its_formula() -> None:
    net, x = SwiGLU(6, 10), torch.randn(3, 6)
    w1, w3 = net.inner.weight.chunk(2)
    assert torch.allclose(net(x), (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ net.outer.weight.T, atol=1e-6)


def test_the_two_orders_of_sines_hold_the_same_numbers() -> None:
    positions = image_positions(1, 3, 5)
    ours, mae = sincos_2d(positions, 16).unflatten(1, (2, 2, 4)), sincos_2d_mae(positions, 16).unflatten(1, (2, 2, 4))
    assert torch.equal(ours.flip(1, 2), mae)
    assert torch.allclose(mae[7, 0, 0, 0], positions[7, 2].sin())  # the column's sine comes first


def test_sinusoids_are_their_formula() -> None:
    value = torch.tensor([0.0, 0.37, 20.0], dtype=torch.float64)
    angles = value[:, None] * 10_000 ** (-torch.arange(8) / 8)
    assert torch.allclose(sinusoid(value.float(), 16).double(), torch.cat([angles.cos(), angles.sin()], dim=1), atol=1e-5)


def test_a_picture_is_read_as_a_video() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(as_video(x, 2)[:, :, 0], x)
    with pytest.raises(ValueError, match="multiples of the patch 4, got 4x6"):
        as_video(x, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiler_is_given_the_same_rotation_without_complex_numbers(dtype: torch.dtype) -> None:
    x, rotation = torch.randn(2, 3, 6, 8, dtype=dtype), rope(image_positions(1, 2, 3), (4, 2, 2))
    code = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        code.append(graph.code)
        return graph.forward

    compiled = torch.compile(rotate, fullgraph=True, backend=backend)
    results = []
    for function in (rotate, compiled):
        leaf = x.clone().requires_grad_()
        out = function(leaf, rotation)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=dtype).reshape(out.shape))
        results.append((out, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert code
    assert not any("complex" in text for text in code)
