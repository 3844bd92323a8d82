"""What must be true of every learned codec. A test of one is a table of its configurations.

A subclass of `Contract` gives configurations and published sizes, builds the peer from a configuration of ours, and says where its
weights go and what it gives for pictures and for latents. "Equal" is |ours - theirs| <= 1e-5 |theirs| (Euclidean norms), in float32
on the CPU, of results and of their gradients for what went in.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from models.parity import EQUAL, count, distance, scatter
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mezzotint.codecs import Codec
from mezzotint.config import Config
from mezzotint.weights import Names, fill


def with_gradient(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A result, and the gradient of a weighted sum of it for what went in."""
    leaf = x.clone().requires_grad_()
    out = call(leaf)
    out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape))
    assert leaf.grad is not None
    return out.detach(), leaf.grad


class Contract:
    """What is true of every codec beside a published implementation."""

    configs: ClassVar[dict[str, Any]]  # tiny ones
    presets: ClassVar[dict[str, tuple[Callable[[], Any], int]]]  # published sizes, with their number of parameters
    sizes: ClassVar[list[tuple[int, int]]] = [(1, 1), (2, 3), (8, 6)]  # of the latents

    def peer(self, config: Any) -> Any:
        """Their network."""
        raise NotImplementedError

    def encode(self, peer: Any, images: Tensor) -> Tensor:
        """Their latents, not normalised."""
        raise NotImplementedError

    def names(self, config: Any) -> dict[str, Names]:
        """Where their weights go, for every form of their files; "diffusers" is what the peer has."""
        raise NotImplementedError

    def to_diffusers(self, form: str, state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """What diffusers makes of another form of file."""
        raise NotImplementedError

    def pair(self, config: Any) -> tuple[Any, Any]:
        """Ours and theirs with the same random weights."""
        torch.manual_seed(0)
        theirs = scatter(self.peer(config))
        ours = config.build()
        fill(ours, theirs.state_dict(), self.names(config)["diffusers"])
        return ours.eval(), theirs

    def images(self, config: Any, size: tuple[int, int], rows: int = 2) -> Tensor:
        """Random pictures whose latents have this size."""
        factor = 2 ** (len(config.widths) - 1)
        return torch.rand(rows, 3, *(factor * side for side in size), generator=torch.Generator().manual_seed(1)) * 2 - 1

    def latents(self, config: Any, size: tuple[int, int], rows: int = 2) -> Tensor:
        """Random latents."""
        return torch.randn(rows, config.channels, *size, generator=torch.Generator().manual_seed(1))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every test for every configuration, size or preset that it asks for."""
        for name, table in (("config", self.configs), ("preset", self.presets)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, table.values(), ids=table.keys())
        if "size" in metafunc.fixturenames:
            metafunc.parametrize("size", self.sizes, ids=lambda size: f"{size[0]}x{size[1]}")

    def test_latents_and_their_gradients_are_theirs(self, config: Any, size: tuple[int, int]) -> None:
        ours, theirs = self.pair(config)
        shift = getattr(config, "shift", 0.0)
        images = self.images(config, size)
        found = with_gradient(ours.encode, images)
        expected = with_gradient(lambda x: (self.encode(theirs, x) - shift) * config.scale, images)
        distances = [distance(a, b) for a, b in zip(found, expected, strict=True)]
        assert max(distances) <= EQUAL, distances

    def test_pictures_and_their_gradients_are_theirs(self, config: Any, size: tuple[int, int]) -> None:
        _, theirs = self.pair(config)
        z = self.latents(config, size)
        latents = (z - getattr(config, "shift", 0.0)) * config.scale
        with torch.no_grad():  # the brightest place is at 2: some of the picture is clamped, most is not
            peak = theirs.decode(z).sample.abs().max()
            for parameter in theirs.decoder.conv_out.parameters():
                parameter.mul_(2 / peak)
        ours = config.build()
        fill(ours, theirs.state_dict(), self.names(config)["diffusers"])
        found = with_gradient(ours.decode, latents)
        expected = with_gradient(lambda z: theirs.decode(z).sample.clamp(-1, 1), z)
        assert 0 < (found[0].abs() == 1).float().mean() < 0.5
        assert distance(found[0], expected[0]) <= EQUAL
        assert distance(found[1] * config.scale, expected[1]) <= EQUAL

    def test_shapes(self, config: Any, size: tuple[int, int]) -> None:
        net: Codec = config.build()
        images = self.images(config, size)
        height, width = images.shape[-2:]
        assert net.latent_shape((height, width)) == (config.channels, *size)
        assert (height, width) == (net.factor * size[0], net.factor * size[1])
        latents = net.encode(images)
        assert latents.shape == (2, *net.latent_shape((height, width)))
        assert net.decode(latents).shape == images.shape

    def test_a_size_that_does_not_fit_is_refused(self, config: Any) -> None:
        net: Codec = config.build()
        images = self.images(config, (2, 3))
        for cut in (images[..., :-1], images[..., 1:, :]):
            size = cut.shape[-2], cut.shape[-1]
            match = f"height and width must be multiples of the factor {net.factor}, got {size[0]}x{size[1]}"
            with pytest.raises(ValueError, match=match):
                net.encode(cut)
            with pytest.raises(ValueError, match=match):
                net.latent_shape(size)

    def test_latents_are_normalised_by_the_configuration(self, config: Any) -> None:
        plain = {"scale": 1.0} | ({"shift": 0.0} if hasattr(config, "shift") else {})
        torch.manual_seed(0)
        net, raw = config.build(), config.replace(**plain).build()
        raw.load_state_dict(net.state_dict())
        images = self.images(config, (2, 3))
        z = raw.encode(images)
        latents = (z - getattr(config, "shift", 0.0)) * config.scale
        assert torch.equal(net.encode(images), latents)
        assert distance(net.decode(latents), raw.decode(z)) <= EQUAL
        with pytest.raises(ValueError, match=r"scale must be positive, got 0\.0"):
            config.replace(scale=0.0).build()

    def test_it_runs_in_bfloat16(self, config: Any) -> None:
        ours, _ = self.pair(config)
        images, latents = self.images(config, (8, 6)), self.latents(config, (8, 6))
        exact = ours.encode(images), ours.decode(latents)
        half = ours.to(torch.bfloat16)
        low = half.encode(images.bfloat16()), half.decode(latents.bfloat16())
        for a, b in zip(low, exact, strict=True):
            assert a.dtype == torch.bfloat16
            assert distance(a.float(), b) < 0.1

    def test_every_block_is_one_graph(self, config: Any) -> None:
        ours, _ = self.pair(config)
        images, latents = self.images(config, (2, 3)), self.latents(config, (2, 3))
        expected = ours.encode(images), ours.decode(latents)
        torch.compiler.reset()
        for block in ours.blocks:
            block.compile(fullgraph=True, backend="eager")
        with torch._dynamo.config.patch(recompile_limit=64, automatic_dynamic_shapes=False):
            found = ours.encode(images), ours.decode(latents)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_blocks_can_be_computed_again_for_the_gradients(self, config: Any) -> None:
        ours, _ = self.pair(config)
        images = self.images(config, (2, 3))
        _, expected = with_gradient(lambda x: ours.decode(ours.encode(x)), images)
        runs: list[int] = []
        for block in ours.blocks:
            block.register_forward_hook(lambda module, inputs, out: runs.append(id(module)))
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        _, found = with_gradient(lambda x: ours.decode(ours.encode(x)), images)
        assert torch.equal(found, expected)
        assert runs == [id(block) for block in ours.blocks]  # all, once, in the order of the computation

    def test_names_and_shapes_go_both_ways(self, config: Any) -> None:
        _, theirs = self.pair(config)
        state, shapes = theirs.state_dict(), {name: x.shape for name, x in config.build().state_dict().items()}
        ours = self.names(config)["diffusers"].to_ours(state)
        assert {name: x.shape for name, x in ours.items()} == shapes
        for form, names in self.names(config).items():
            foreign = names.to_theirs(ours)
            back = names.to_ours(foreign)
            assert back.keys() == ours.keys()
            assert all(torch.equal(back[name], ours[name]) for name in ours)
            converted = foreign if form == "diffusers" else self.to_diffusers(form, dict(foreign), config)
            assert converted.keys() == state.keys(), form
            assert all(torch.equal(converted[name], state[name]) for name in state), form

    def test_published_sizes(self, preset: tuple[Callable[[], Any], int]) -> None:
        make, parameters = preset
        config = make()
        assert Config.from_data(json.loads(json.dumps(config.to_data()))) == config
        with torch.device("meta"):
            ours, theirs = config.build(), self.peer(config).state_dict()
        assert count(ours) == parameters == sum(x.numel() for x in theirs.values())
        assert sum(count(block) for block in ours.blocks) > 0.8 * parameters
        fill(ours, theirs, self.names(config)["diffusers"])
        own = {name: x.shape for name, x in ours.state_dict().items()}
        for form, names in self.names(config).items():
            foreign = names.to_theirs(ours.state_dict())
            assert {name: x.shape for name, x in names.to_ours(foreign).items()} == own
            if form == "diffusers":
                assert {name: x.shape for name, x in foreign.items()} == {name: x.shape for name, x in theirs.items()}

    def test_published_shapes(self, preset: tuple[Callable[[], Any], int]) -> None:
        config = preset[0]()
        with torch.device("meta"):
            net: Codec = config.build()
            images = torch.empty(1, 3, 256, 384)
        latents = net.encode(images)
        assert latents.shape == (1, *net.latent_shape((256, 384)))
        assert net.decode(latents).shape == images.shape
