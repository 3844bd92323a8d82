"""What a run does not train is in memory once, in no checkpoint, and known again."""

import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from techniques import METHODS, PAIRED
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mezzotint.errors import UserError
from mezzotint.methods.method import Role, twin
from mezzotint.models.lora import LoRAConfig
from mezzotint.train import checkpoint
from mezzotint.train.average import FOLDER, snapshots
from mezzotint.train.fixed import fingerprint
from mezzotint.train.log import read
from mezzotint.train.parallel import ParallelConfig, leave
from mezzotint.train.stop import Stopped
from mezzotint.train.trainer import RunConfig, Trainer

Make = Callable[..., RunConfig]


def adapted(run_config: Make, name: str = "dpo", steps: int = 2) -> RunConfig:
    config = run_config(METHODS[name], pairs=name in PAIRED, steps=steps, preview_prompts=())
    return replace(config, adapter=LoRAConfig(rank=2))


def places(module: nn.Module) -> dict[str, int]:
    """Where this rank's share of every parameter lies."""
    local = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in module.named_parameters()}
    return {name: x.untyped_storage().data_ptr() for name, x in local.items()}


def modules(trainer: Trainer) -> list[nn.Module]:
    return [*(role.module for role in trainer.method.roles.values()), *trainer._averages().values()]


def groups(trainer: Trainer) -> dict[str, set[str]]:
    """What the newest checkpoint has."""
    newest = checkpoint.steps(trainer.folder / "checkpoints")[-1]
    return {group: set(shapes) for group, shapes in checkpoint.Checkpoint(newest).shapes.items()}


def assert_only_adapters_are_several(found: Iterable[nn.Module]) -> None:
    first, *others = map(places, found)
    assert others
    for other in others:
        assert other.keys() == first.keys()
        assert {name for name in first if first[name] == other[name]} == {name for name in first if "lora_" not in name}


@pytest.mark.parametrize("name", ["dpo", "flow_grpo", "consistency", "progressive", "dmd", "scm", "dreambooth"])
def test_under_an_adapter_a_run_has_its_network_once(name: str, run_config: Make, tmp_path: Path) -> None:
    trainer = Trainer(adapted(run_config, name), tmp_path)
    assert_only_adapters_are_several(modules(trainer))
    before = {n: p.clone() for n, p in trainer.method.student.named_parameters() if "lora_" not in n}
    trainer.run()
    assert_only_adapters_are_several(modules(trainer))
    assert all(torch.equal(p, before[n]) for n, p in trainer.method.student.named_parameters() if n in before)
    assert all("lora_" in key for keys in groups(trainer).values() for key in keys)


def test_an_average_shares_nothing_that_learns(run_config: Make, tmp_path: Path) -> None:
    trainer = Trainer(run_config(), tmp_path)
    student, average = map(places, modules(trainer))
    assert not set(student.values()) & set(average.values())


@pytest.mark.parametrize(
    ("name", "others"), [("dpo", set()), ("consistency", {"target"}), ("progressive", {"teacher"}), ("dmd", {"critic", "critic.optimizer"})]
)
def test_checkpoints_have_what_changes_and_nothing_else(name: str, others: set[str], run_config: Make, tmp_path: Path) -> None:
    trainer = Trainer(run_config(METHODS[name], pairs=name in PAIRED, steps=1, preview_prompts=()), tmp_path)
    trainer.run()
    found = groups(trainer)
    assert found.keys() == {"student", "student.average", "student.optimizer"} | others
    learnt = {n for n, _ in trainer.method.student.named_parameters()}
    for group in found.keys() - {"student.optimizer", "critic.optimizer"}:
        assert learnt <= found[group]


def test_a_run_goes_on_from_what_it_started_from(run_config: Make, tmp_path: Path) -> None:
    start = run_config().pipeline.build()
    start.save(tmp_path / "start")
    config = replace(adapted(run_config), init=str(tmp_path / "start"))
    with pytest.raises(Stopped):
        Trainer(replace(config, train=config.train.replace(deadline=1e-9)), tmp_path / "run").run()
    learnt = checkpoint.steps(tmp_path / "run" / "checkpoints")
    with torch.no_grad():
        next(start.denoiser.parameters()).flatten()[0].add_(1e-3)
    start.save(tmp_path / "start")
    with pytest.raises(UserError, match=r"start is not what .*run was started from: .*; put them back"):
        Trainer(config, tmp_path / "run").run()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == learnt


@pytest.mark.parametrize("whole", [False, True])
def test_weights_that_are_spread_are_shared_too(whole: bool, run_config: Make, tmp_path: Path) -> None:
    """Frozen ones wait, but for those under the adapter: they are where that is, and cost nothing more there."""
    config = adapted(run_config)
    Trainer(config, tmp_path / "plain").run()
    config.parallel = ParallelConfig(offload=True, replicate_text=whole)
    try:
        trainer = Trainer(config, tmp_path / "spread")
        trainer.run()
    finally:
        leave()
    assert all(isinstance(p, DTensor) for p in trainer.method.student.denoiser.parameters())
    assert all(isinstance(p, DTensor) is not whole for p in trainer.method.student.text.parameters())
    assert_only_adapters_are_several(modules(trainer))
    spread, plain = ([line["loss"] for line in read(tmp_path / name / "metrics.jsonl") if "loss" in line] for name in ("spread", "plain"))
    assert spread == pytest.approx(plain, rel=1e-6)


def test_a_twin_has_its_own_of_what_learns() -> None:
    net = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    copied = twin(net)
    assert copied[0].weight is net[0].weight
    assert copied[1].weight is not net[1].weight
    assert torch.equal(copied[1].weight, net[1].weight)


def test_what_is_fixed_of_a_role() -> None:
    net = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    some, every = {"0.weight", "0.bias"}, {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert Role(net).fixed().keys() == some
    assert Role(net, trained=False, moved=True).fixed().keys() == some
    assert Role(net, trained=False).fixed().keys() == every
    net[1].weight = net[0].weight  # one weight under two names
    assert Role(net).fixed().keys() == some | {"1.weight"}


def test_tensors_are_known_again() -> None:
    def found(**tensors: Tensor) -> int:
        return fingerprint(tensors)

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert found(x=x) == found(x=x.clone()) == found(x=x.t().contiguous().t())
    others = [found(y=x), found(x=x.t()), found(x=x.half()), found(x=x, y=x), found(x=torch.nextafter(x, x + 1)), found()]
    assert len({found(x=x), *others}) == 7
    kinds = [torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.bool]
    assert len({found(x=x.to(kind)) for kind in kinds}) == 4
    assert found(x=torch.tensor(1.0)) != found(x=torch.tensor(2.0))


@pytest.mark.parametrize(("name", "rank"), [("dpo", 2), ("guidance_distill", 0)])
def test_averages_of_what_is_not_the_recipes_network(name: str, rank: int, run_config: Make, tmp_path: Path) -> None:
    """An adapter, or a network with a new input: what is stored is what learns, and what is made of it is the pipeline as exported."""
    config = replace(adapted(run_config, name), adapter=LoRAConfig(rank=rank))
    config.optim = config.optim.replace(lengths=(0.05, 0.1), snapshot=2, lr=1e-2)
    trainer = Trainer(config, tmp_path / "run")
    trainer.run()
    (first, _) = snapshots(tmp_path / "run" / FOLDER / "student")
    learns = {n for n, _ in trainer.method.student.named_parameters() if not rank or "lora_" in n}
    assert load_file(first.path).keys() & dict(trainer.method.student.named_parameters()).keys() == learns
    words = ["average", str(tmp_path / "run"), "--length", "0.05", "--out", str(tmp_path / "average")]
    subprocess.run([sys.executable, "-m", "mezzotint.cli", *words], check=True)  # a process that knows what the verb imports
    made, exported = (load_file(folder / "model.safetensors") for folder in (tmp_path / "average", tmp_path / "run" / "export"))
    assert made.keys() == exported.keys()
    assert all(torch.allclose(made[n], exported[n], atol=1e-5) for n in made)
