"""What must be true of every architecture. A test of one is a table of its configurations.

A subclass of `Network` gives configurations and their conditions; the tests are here. Where there is a published implementation, a
subclass of `Parity` also says how to build the peer from a configuration of ours, how to call it in our convention (t = 0 is data,
what `prediction` says), and where its weights go. "Equal" is |ours - theirs| <= 1e-5 |theirs| (Euclidean norms), in float32 on the
CPU, of the output and of its gradients for the picture and for every condition.

For the gradients the peer computes its sinusoids as we do. Its own frequencies are rounded to 6e-7, ours to 6e-8; at an angle of
1000 that alone is 2e-6 of an output, and 1e-5 of some gradients.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from diffusers.models import embeddings
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mezzotint.models import Cond
from mezzotint.models.embed import sinusoid
from mezzotint.weights import Names, fill

EQUAL = 1e-5
TOKENS = (("text", "mask"), ("states", "states_mask"))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|."""
    assert ours.shape == theirs.shape
    assert theirs.any()
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def scatter(net: nn.Module) -> nn.Module:
    """Random weights where a fresh network has zeros, ones or nothing to tell apart."""
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim < 2:
                p.add_(torch.randn_like(p), alpha=0.1)
            elif not p.any():
                p.normal_(std=p.shape[1] ** -0.5)
    return net.eval()


def count(net: nn.Module) -> int:
    """Parameters of a network."""
    return sum(p.numel() for p in net.parameters())


def half(cond: Cond) -> Cond:
    """Conditions in bfloat16; numbers that are embedded stay as they are."""
    return cond._map(lambda x: x.bfloat16() if x.ndim > 1 and x.is_floating_point() else x)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made within, the weights of a network aside."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.bytes = 0
        self.weights = {p.untyped_storage()._cdata for p in (*net.parameters(), *net.buffers())}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        out = function(*arguments, **(keywords or {}))
        storages = [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.bytes = max([self.bytes, *(s.nbytes() for s in storages if s._cdata not in self.weights)])
        return out


class Network:
    """What is true with or without a peer."""

    configs: ClassVar[dict[str, Any]]  # tiny ones; the first one is trained
    sizes: ClassVar[list[tuple[int, int]]] = [(8, 8), (8, 12), (12, 4)]
    identity = True  # do all blocks start as identities?

    def cond(self, config: Any, rows: int = 2) -> Cond:
        """Random conditions of a tiny configuration."""
        raise NotImplementedError

    def inputs(self, config: Any, size: tuple[int, int], rows: int = 2) -> tuple[Tensor, Tensor, Cond]:
        """x, t and conditions."""
        torch.manual_seed(1)
        return torch.randn(rows, config.channels, *size), torch.rand(rows), self.cond(config, rows)

    def net(self, config: Any) -> nn.Module:
        """A network with random weights."""
        torch.manual_seed(0)
        return scatter(config.build())

    def roomy(self, config: Any) -> Any:
        """The same configuration for larger pictures, where a tiny one ends at those of `sizes`."""
        return config

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every test for every configuration, size or preset that it asks for."""
        for name, table in (("config", self.configs), ("preset", getattr(self, "presets", {}))):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, table.values(), ids=table.keys())
        if "size" in metafunc.fixturenames:
            metafunc.parametrize("size", self.sizes, ids=lambda size: f"{size[0]}x{size[1]}")

    def test_masked_tokens_are_not_seen(self, config: Any) -> None:
        net = self.net(config)
        x, t, cond = self.inputs(config, (8, 8))
        told = [(tokens, name) for tokens, name in TOKENS if (features := getattr(cond, tokens)) is not None and features.numel()]
        if not told:
            pytest.skip("takes no text")
        for tokens, name in told:
            features = getattr(cond, tokens)
            mask = getattr(cond.masked(), name).clone()
            mask[0, -2:] = False
            masked = replace(cond.masked(), **{name: mask})
            out, poisoned = net(x, t, masked), features.clone()
            poisoned[0, ..., -2:, :] += 100.0
            assert distance(net(x, t, replace(masked, **{tokens: poisoned})), out) <= EQUAL
            poisoned[0, ..., 0, :] += 100.0
            seen = net(x, t, replace(masked, **{tokens: poisoned}))
            assert distance(seen[0], out[0]) > 1e-3
            assert distance(seen[1], out[1]) <= EQUAL
            short = replace(masked, **{tokens: features[..., :-2, :], name: mask[:, :-2]}).index(slice(0, 1))
            assert distance(net(x[:1], t[:1], short), out[:1]) <= EQUAL

    def test_a_condition_that_says_nothing_has_a_finite_answer(self, config: Any) -> None:
        net = self.net(config)
        x, t, cond = self.inputs(config, (8, 8))
        out = net(x, t, cond.null())
        out.square().sum().backward()
        assert out.isfinite().all()
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)

    def test_a_picture_is_a_video_of_one_frame(self, config: Any) -> None:
        net = self.net(config)
        x, t, cond = self.inputs(config, (8, 12))
        assert torch.equal(net(x, t, cond), net(x[:, :, None], t, cond)[:, :, 0])
        if config.patch > 1:
            with pytest.raises(ValueError, match="multiple"):
                net(x[..., :-1], t, cond)

    def test_it_runs_in_bfloat16(self, config: Any) -> None:
        net = self.net(config)
        x, t, cond = self.inputs(config, (8, 8))
        exact = net(x, t, cond)
        low = net.to(torch.bfloat16)(x.bfloat16(), t, half(cond))
        assert low.dtype == torch.bfloat16
        assert distance(low.float(), exact) < 0.1

    def test_every_block_is_one_graph(self, config: Any) -> None:
        net = self.net(config).to(torch.bfloat16)
        x, t, cond = self.inputs(config, (8, 8))
        expected = net(x.bfloat16(), t, half(cond))
        torch.compiler.reset()
        for block in net.blocks:
            block.compile(fullgraph=True, backend="eager")
        assert torch.equal(net(x.bfloat16(), t, half(cond)), expected)

    def test_no_tensor_grows_with_the_square_of_the_tokens(self, config: Any) -> None:
        config = self.roomy(config)
        net = self.net(config)
        made = []
        for side in (16, 32):
            x, t, cond = self.inputs(config, (side, side))
            with torch.no_grad(), Largest(net) as largest:
                net(x, t, cond)
            made.append(largest.bytes)
        assert made[1] <= 5 * made[0]  # for four times the tokens; a matrix over them would be 16 times as large

    def test_blocks_can_be_computed_again_for_the_gradients(self, config: Any) -> None:
        net = self.net(config)
        x, t, cond = self.inputs(config, (8, 8))
        grads = []
        for again in (False, True):
            if again:
                for block in net.blocks:
                    block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            leaf = x.clone().requires_grad_()
            net(leaf, t, cond).square().sum().backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)

    def test_it_starts_at_zero(self, config: Any) -> None:
        torch.manual_seed(0)
        net = config.build()
        x, t, cond = self.inputs(config, (8, 8))
        same: list[bool] = []
        for block in net.blocks:
            block.register_forward_hook(lambda module, inputs, out: same.append(torch.equal(_first(out), inputs[0])))
        assert not net(x, t, cond).any()
        assert len(same) == len(net.blocks)
        assert all(same) == self.identity

    def test_eight_samples_are_learned(self) -> None:
        torch.manual_seed(0)
        config = next(iter(self.configs.values()))
        net = config.build()
        x, t, cond = self.inputs(config, (4, 4), rows=8)
        target = torch.randn_like(x)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        first = float(target.square().mean())  # the output is zero
        for _ in range(500):
            loss = (net(x, t, cond) - target).square().mean()
            if loss < 0.1 * first:
                return
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        pytest.fail(f"the loss went from {first} to {loss.item()} only")


class Parity(Network):
    """What is true beside a published implementation."""

    presets: ClassVar[dict[str, tuple[Callable[[], Any], int]]]  # published sizes, with their number of parameters

    def peer(self, config: Any) -> nn.Module:
        """Their network."""
        raise NotImplementedError

    def call(self, peer: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Their prediction, in our convention."""
        raise NotImplementedError

    def names(self, config: Any) -> Names:
        """Where their weights go."""
        raise NotImplementedError

    def pair(self, config: Any) -> tuple[nn.Module, nn.Module]:
        """Ours and theirs with the same random weights."""
        torch.manual_seed(0)
        theirs = scatter(self.peer(config))
        ours = config.build()
        fill(ours, theirs.state_dict(), self.names(config))
        return ours.eval(), theirs

    def test_output_is_theirs(self, config: Any, size: tuple[int, int]) -> None:
        ours, theirs = self.pair(config)
        x, t, cond = self.inputs(config, size)
        with torch.no_grad():
            assert distance(ours(x, t, cond), self.call(theirs, x, t, cond)) <= EQUAL

    def test_output_and_gradients_are_theirs(self, config: Any, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(embeddings, "get_timestep_embedding", lambda t, dim, **keywords: sinusoid(t, dim))
        ours, theirs = self.pair(config)
        x, t, cond = self.inputs(config, size)
        results = []
        for call in (ours, partial(self.call, theirs)):
            leaves = {"x": x.clone().requires_grad_(), **_leaves(cond)}
            out = call(leaves["x"], t, replace(cond, **{name: leaf for name, leaf in leaves.items() if name != "x"}))
            out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape))
            results.append({"output": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})
        distances = {name: distance(results[0][name], results[1][name]) for name in results[0]}
        assert max(distances.values()) <= EQUAL, distances

    def test_names_and_shapes_go_both_ways(self, config: Any) -> None:
        state = scatter(self.peer(config)).state_dict()
        ours = self.names(config).to_ours(state)
        assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in config.build().state_dict().items()}
        back = self.names(config).to_theirs(ours)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)

    def test_published_sizes(self, preset: tuple[Callable[[], Any], int]) -> None:
        make, parameters = preset
        config = make()
        with torch.device("meta"):
            ours, theirs = config.build(), self.peer(config).state_dict()
        assert count(ours) == parameters
        fill(ours, theirs, self.names(config))
        back = self.names(config).to_theirs(ours.state_dict())
        assert {name: x.shape for name, x in back.items()} == {name: x.shape for name, x in theirs.items()}


def _leaves(cond: Cond) -> dict[str, Tensor]:
    given = {f.name: getattr(cond, f.name) for f in fields(cond)}
    return {k: v.clone().requires_grad_() for k, v in given.items() if v is not None and v.is_floating_point() and v.numel()}


def _first(out: Tensor | tuple[Any, ...]) -> Tensor:
    return out if isinstance(out, Tensor) else _first(out[0])
