"""What is done to a role's blocks from outside changes what is kept, and not what is computed."""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.data.buckets import batch_size, shapes
from mezzotint.data.worlds import WorldsConfig
from mezzotint.errors import UserError
from mezzotint.methods.denoise import DenoiseConfig
from mezzotint.methods.dmd import DMDConfig
from mezzotint.methods.dpo import DPOConfig
from mezzotint.methods.ladd import LADDConfig
from mezzotint.methods.method import MethodConfig, Role
from mezzotint.methods.progressive import ProgressiveConfig
from mezzotint.methods.reflow import ReflowConfig
from mezzotint.models import PRESETS, Cond, DenoiserConfig, DiTConfig, FluxConfig
from mezzotint.pipeline import Pipeline, PipelineConfig
from mezzotint.train import checkpoint, context, parallel, trainer
from mezzotint.train.log import read
from mezzotint.train.parallel import ParallelConfig, Ranks, blocks, empty_copy, gather, leave
from mezzotint.train.trainer import RunConfig, Trainer

Make = Callable[..., RunConfig]


def loss_and_gradients(pipeline: Pipeline) -> tuple[int, list[Tensor]]:
    """Bytes that one loss keeps for its backward pass, and the loss with all gradients."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in pipeline.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    pipeline.zero_grad()
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = DenoiseConfig().build(pipeline).loss(WorldsConfig().build().batch(0, 4), ("student",), 0)
    loss.backward()
    return sum(kept.values()), [loss.detach(), *(p.grad.clone() for p in pipeline.parameters() if p.grad is not None)]


def spread(pipeline: Pipeline, **settings: Any) -> None:
    Ranks(ParallelConfig(**settings)).spread({"student": Role(pipeline)})


def test_recomputing_keeps_less_and_gives_the_same_gradients(pipeline: Pipeline) -> None:
    state = pipeline.state_dict()
    everything, expected = loss_and_gradients(pipeline)
    spread(pipeline, checkpoint="full")
    inputs, gradients = loss_and_gradients(pipeline)
    assert inputs < 0.6 * everything
    assert len(gradients) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients, strict=True))
    assert pipeline.state_dict().keys() == state.keys(), "no name changes"


def test_selective_recomputing_computes_no_product_again(pipeline: Pipeline) -> None:
    def count(**settings: str) -> tuple[int, list[Tensor]]:
        copied = copy.deepcopy(pipeline)
        spread(copied, **settings)
        with FlopCounterMode(display=False) as counter:
            _, gradients = loss_and_gradients(copied)
        return counter.get_total_flops(), gradients

    plain, expected = count()
    selective, gradients = count(checkpoint="selective")
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients, strict=True))
    assert selective == plain < count(checkpoint="full")[0]


def test_selective_recomputing_finds_in_bfloat16_what_it_kept(run_config: Make, tmp_path: Path) -> None:
    """The text encoder's blocks are called twice, for the captions and for none."""
    norms = []
    for keep in ("none", "selective"):
        config = run_config(steps=1, preview_prompts=())
        config.parallel = ParallelConfig(checkpoint=keep, precision="bfloat16")
        Trainer(config, tmp_path / keep).run()
        norms.append(next(line["grad_norm"] for line in read(tmp_path / keep / "metrics.jsonl") if "lr" in line))
    assert norms[0] == norms[1]


def test_every_block_is_compiled_by_itself(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward) or forward)
    _, expected = loss_and_gradients(pipeline)
    spread(pipeline, compile=True)
    assert len(compiled) == 3  # one block of the text encoder, two of the denoiser
    assert all(torch.equal(a, b) for a, b in zip(expected, loss_and_gradients(pipeline)[1], strict=True))


def test_buckets_compile_to_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven shapes of four numbers of tokens, batches of nearly constant tokens: no block has more graphs than there are numbers."""
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    net = DiTConfig(width=16, depth=2, heads=2, patch=8, text_width=8).build()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    Ranks(ParallelConfig(compile=True)).spread({"student": Role(net)})
    seen, buckets = [], shapes(64, 8)
    for width, height in 2 * buckets:
        rows = batch_size((width, height), 8, 128)
        cond = Cond(torch.randn(rows, 6, 8), None, torch.randn(rows, 8))
        net(torch.randn(rows, 3, height, width), torch.rand(rows), cond).sum().backward()
        seen.append(len(graphs))
    assert len(buckets) == 7
    assert 1 <= len(graphs) <= len({width * height for width, height in buckets}) == 4
    assert set(seen[len(buckets) :]) == {len(graphs)}, "a second epoch compiles nothing"


@pytest.mark.parametrize("name", ["sd1.5", "uvit-m-4", "dit-b-2", "pixart-sigma", "sana-600m", "sd3-medium", "flux-dev", "lumina-image-2"])
def test_most_of_a_published_network_is_in_blocks(name: str) -> None:
    """What is not in a block is neither checkpointed nor gathered apart from the rest."""
    with torch.device("meta"):
        net: nn.Module = PRESETS[name]().build()
    inside = sum(p.numel() for block in blocks(net) for p in block.parameters())
    assert inside > 0.75 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_and_states_are_float32_in_any_precision(
    precision: Literal["float32", "bfloat16"], run_config: Make, tmp_path: Path
) -> None:
    config = run_config(steps=2, preview_prompts=())
    Trainer(config, tmp_path / "plain").run()
    config.parallel = ParallelConfig(precision=precision)
    trainer = Trainer(config, tmp_path / "run")
    trainer.run()
    states = checkpoint.optimizer_tensors(trainer.method.student, trainer.optimizers["student"])
    assert {tensor.dtype for tensor in (*trainer.method.student.parameters(), *states.values())} == {torch.float32}
    plain, other = ([line["loss"] for line in read(tmp_path / name / "metrics.jsonl") if "loss" in line] for name in ("plain", "run"))
    assert other == (plain if precision == "float32" else pytest.approx(plain, rel=2e-2))
    assert (other == plain) == (precision == "float32")


def test_a_copy_without_weights_is_filled(tiny: PipelineConfig) -> None:
    pipeline = tiny.build()
    empty = empty_copy(pipeline)
    assert all(p.device.type == "meta" for p in empty.parameters())
    gather(pipeline, empty, keep=False)
    assert all(p.device.type == "meta" for p in empty.parameters())
    gather(pipeline, empty, keep=True)
    assert isinstance(empty, Pipeline)
    assert torch.equal(empty("a red star"), pipeline("a red star"))


@pytest.mark.parametrize("shard", [3, -1])
def test_groups_must_divide_the_ranks(shard: int) -> None:
    from mezzotint.train.parallel import _mesh

    with pytest.raises(UserError, match=rf"parallel.shard must divide the number of ranks \(4\) or be 0, got {shard}"):
        _mesh("cpu", 4, shard)


def test_samples_are_shared_by_all_ranks_or_by_none() -> None:
    with pytest.raises(UserError, match=r"parallel.context must divide the number of ranks \(1\), got 2"):
        Ranks(ParallelConfig(context=2))


def small(name: str) -> nn.Module:
    """A published network on the meta device, with few blocks."""
    config: DenoiserConfig = PRESETS[name]()
    few = {"depth": 2} if "depth" in vars(config) else {"joint": 1, "single": 1} if "joint" in vars(config) else {}
    if name == "hidream-i1":
        few["layers"] = (0, 1)
    with torch.device("meta"):
        return config.replace(**few).build()


@pytest.mark.parametrize("name", ["dit-s-2", "sd3-medium", "flux-dev", "pixart-sigma", "uvit-s-2", "fuse-dit-2b"])
def test_what_is_cut_are_arguments_of_the_blocks(name: str) -> None:
    net = small(name)
    context.check(net, 2)
    assert blocks(net)
    for block in blocks(net):
        cut, arguments = context.CUTS[type(block)], set(inspect.signature(type(block).forward).parameters)
        named = {*cut.tokens, *cut.beside, *(["rotation"] if cut.rotation else []), *(["mask"] if cut.mask else [])}
        assert named <= arguments
        assert ("rotation" in arguments, "mask" in arguments) == (bool(cut.rotation), bool(cut.mask))
        assert {*cut.rotation, *cut.mask} <= {*cut.tokens, *cut.beside}


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("sd1.5", 2, "the tokens of UNet, which has "),
        ("sana-600m", 2, "the tokens of Sana, which has SanaBlock"),
        ("hidream-i1", 2, "the tokens of HiDream, which has HiDreamJointBlock, HiDreamSingleBlock"),
        ("lumina-image-2", 2, "the tokens of Lumina2, which has TextBlock, TimedBlock"),
        ("dit-s-2", 4, "parallel.context must divide the 6 heads of ClassDiT, got 4"),
        ("fuse-dit-2b", 8, "parallel.context must divide the 4 kv_heads of FuseDiT, got 8"),
    ],
)
def test_networks_whose_tokens_cannot_be_spread_are_named(name: str, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        context.check(small(name), size)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (LADDConfig(), "ladd, which reads features of blocks"),
        (ReflowConfig(perceptual=0.1), "reflow, which reads features of blocks"),
        (DenoiseConfig(mask=0.5), "method.mask, which leaves patches out"),
    ],
)
def test_techniques_that_need_whole_blocks_are_named(method: MethodConfig, why: str) -> None:
    with pytest.raises(UserError, match=f"parallel.context cannot be used with {why}"):
        context.check_methods([DenoiseConfig(), method])
    context.check_methods([ReflowConfig(), DenoiseConfig()])


class Lonely(context.Group):
    """One of several ranks, the others of which have the same: what it would send comes back, and blocks' tokens are counted."""

    def exchange(self, x: Tensor) -> Tensor:
        return x.clone()

    def collect(self, x: Tensor) -> Tensor:
        return torch.stack([x] * self.size)


def test_blocks_have_a_share_of_the_tokens_and_what_follows_has_all() -> None:
    """35 tokens of a picture and 7 of a text over four ranks: 9 and 2 each, or 11 of both in one stream."""
    config = FluxConfig(
        width=32, joint=2, single=2, heads=4, axes=(2, 2, 4), patch=2, channels=3, text_width=8, pooled_width=8, guidance=False
    )
    net, group = config.build(), Lonely(4, 3)
    context.share_attention(net, group)
    context.share_tokens(net, group)
    seen: list[int] = []
    for block in blocks(net):
        inner = block.norm if hasattr(block, "norm") else block.image.norm  # type: ignore[union-attr]
        inner.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))  # type: ignore[operator, union-attr]
    cond = Cond(torch.randn(1, 7, 8), torch.ones(1, 7, dtype=torch.bool), torch.randn(1, 8))
    assert net(torch.randn(1, 3, 10, 14), torch.rand(1), cond).shape == (1, 3, 10, 14)
    assert set(seen[:4]) == {9}
    assert set(seen[4:]) == {11}


def test_states_wait_while_another_role_steps(run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they are in the CPU's memory then; here they are not numbers, so that nothing may touch them before they are fetched."""
    away: dict[Tensor, Tensor] = {}
    waiting: list[int] = []

    def store(optimizers: list[torch.optim.Optimizer]) -> None:
        for state in parallel._states(optimizers):
            if state not in away:
                away[state] = state.clone()
                state.fill_(torch.nan)

    def fetch(optimizers: list[torch.optim.Optimizer], device: torch.device) -> None:
        for state in parallel._states(optimizers):
            if state in away:
                state.copy_(away.pop(state))
        waiting.append(len(away))

    config = run_config(DMDConfig(critic_turns=2), steps=3, evaluate=3, checkpoint=3, preview_prompts=())
    Trainer(config, tmp_path / "plain").run()
    config.parallel = ParallelConfig(offload=True)
    monkeypatch.setattr(trainer, "store_states_", store)
    monkeypatch.setattr(trainer, "fetch_states_", fetch)
    try:
        run = Trainer(config, tmp_path / "waits")
        run.run()
    finally:
        leave()
    own = {name: parallel._states(optimizers) for name, optimizers in run.optimizers.items()}
    one = len(own["critic"])
    assert one == len(own["student"]) > 0
    assert waiting == [0, one, one, one, one, one], "in every turn those of one role, once both have any"
    assert all(state in away for state in own["critic"])
    assert all(state.isfinite().all() for state in own["student"])
    waits, plain = ([line["loss"] for line in read(tmp_path / name / "metrics.jsonl") if "loss" in line] for name in ("waits", "plain"))
    assert len(plain) == 3
    assert waits == pytest.approx(plain, rel=1e-6)


def test_weights_that_wait_are_those_that_are_frozen(run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, FSDP2's policy keeps them in the CPU's memory; here, that they have it, and that the numbers stay."""
    where: dict[nn.Module, Any] = {}
    real = parallel.fully_shard

    def recorded(module: nn.Module, **keywords: Any) -> Any:
        where[module] = keywords["offload_policy"]
        return real(module, **keywords)

    monkeypatch.setattr(parallel, "fully_shard", recorded)
    config = run_config(DPOConfig(), pairs=True, steps=2, preview_prompts=())
    config.parallel = ParallelConfig(offload=True)
    trainer = Trainer(config, tmp_path / "waits")
    try:
        trainer.run()
        again = Trainer(config, tmp_path / "waits")
        again.run()  # reads its checkpoint, and has nothing left to do
        halving = run_config(ProgressiveConfig(first=2, last=1, stage=1), steps=2, preview_prompts=())
        halving.parallel = config.parallel
        Trainer(halving, tmp_path / "halved").run()  # its teacher is replaced
    finally:
        leave()
    for role in trainer.method.roles.values():
        for module in role.module.modules():
            if module in where:
                assert isinstance(where[module], parallel.CPUOffloadPolicy) == (not role.trained)
    for block in blocks(trainer.method.pipeline("reference").denoiser):
        assert block in where
    config.parallel = ParallelConfig()
    Trainer(config, tmp_path / "plain").run()
    waits, plain = ([line["loss"] for line in read(tmp_path / name / "metrics.jsonl") if "loss" in line] for name in ("waits", "plain"))
    assert waits == pytest.approx(plain, rel=1e-6)
