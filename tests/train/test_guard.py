"""Bad steps: found without waiting for the device, traced to module, time and sample, with the weights unharmed; skipped; rolled back."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from mezzotint.data.batch import Batch
from mezzotint.data.worlds import Worlds, WorldsConfig
from mezzotint.errors import UserError
from mezzotint.methods.method import Role
from mezzotint.train import guard
from mezzotint.train.adamw8 import AdamW8
from mezzotint.train.guard import (
    BadStepError,
    Guard,
    GuardConfig,
    LeapError,
    NonFiniteError,
    Place,
    check_loss,
    check_precision,
    enough_memory,
)
from mezzotint.train.log import read
from mezzotint.train.optim import Muon, OptimConfig, clip_, step_
from mezzotint.train.trainer import RunConfig, Trainer

Make = Callable[..., RunConfig]
PACKAGE = Path(guard.__file__).parent.parent


class Spoilt(Worlds):
    """A source whose batches of some numbers have one picture with a pixel of some value."""

    def __init__(self, value: float, *numbers: int) -> None:
        super().__init__(WorldsConfig())
        self.value, self.numbers = value, numbers

    def batch(self, number: int, size: int) -> Batch:
        batch = super().batch(number, size)
        if number in self.numbers:
            batch.images[1, 0, 3, 3] = self.value
        return batch


def rarely(make: Make, policy: str = "stop", **train: object) -> RunConfig:
    """A run that looks at its numbers every six steps only."""
    often = {"steps": 12, "log": 6, "preview": 6, "evaluate": 6, "checkpoint": 6, "preview_prompts": ()}
    config = make(**{**often, **train})
    return replace(config, guard=GuardConfig(policy=policy))  # type: ignore[arg-type]


def student(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.method.student.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for a number, but for what a method computes: it checks the range of times that are on the CPU."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.trusted = False
        trainer.method.experience = self._trust(trainer.method.experience)  # type: ignore[method-assign]
        trainer.method.loss = self._trust(trainer.method.loss)  # type: ignore[method-assign]

    def _trust(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def trusted(*arguments: Any) -> Any:
            self.trusted = True
            result = function(*arguments)
            self.trusted = False
            return result

        return trusted

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        assert self.trusted or function is not torch.ops.aten._local_scalar_dense.default, "a number was read"
        assert self.trusted or "nonzero" not in str(function), "a shape was read"
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8", "muon"])
def test_a_step_does_not_wait_for_the_device(optimizer: str, run_config: Make, tmp_path: Path) -> None:
    config = rarely(run_config)
    trainer = Trainer(replace(config, optim=replace(config.optim, name=optimizer)), tmp_path)
    trainer._train_step()  # the first one makes the optimizers' state
    with NoSync(trainer) as watch:
        trainer._train_step()
        with pytest.raises(AssertionError, match="a number was read"):
            float(torch.ones(()))
    assert not watch.trusted


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8", "muon"])
def test_a_bad_picture_is_named_late_and_the_weights_are_whole(optimizer: str, run_config: Make, tmp_path: Path) -> None:
    config = rarely(run_config)
    config.optim = replace(config.optim, name=optimizer, weight_decay=0.1, decay="constant")
    before = Trainer(replace(config, train=replace(config.train, steps=8)), tmp_path / "eight")
    before.run()
    trainer = Trainer(config, tmp_path / "run", Spoilt(math.nan, 8, 10))
    with pytest.raises(NonFiniteError) as error:
        trainer.run()
    message = str(error.value)
    assert "the loss is not finite at step 8: first in the output of student.denoiser.embed_patch" in message
    assert re.search(r"samples worlds-0-train-train-8-1 \('.*', t = 0\.\d{4}\); the batch is in", message), "only the bad sample is named"
    assert same(student(before), student(trainer)), "updates after the bad one are held back too"
    folder = tmp_path / "run" / "bad" / "step-00000008"
    stored = load_file(folder / "batch.safetensors")
    assert stored["images"][1, 0, 3, 3].isnan()
    assert stored["t"].shape == (4,)
    report = json.loads((folder / "report.json").read_text())
    skipping = Trainer(replace(config, guard=GuardConfig(policy="skip")), tmp_path / "run", Spoilt(math.nan, 8, 10))
    assert len(skipping.run()("a red star")) == 1, "the same run goes on with another policy"
    assert report["bad_rows"] == [1]
    assert report["ids"][1] == "worlds-0-train-train-8-1"
    assert report["message"] == message


def test_a_gradient_that_is_not_finite_is_traced_to_its_module(run_config: Make, tmp_path: Path) -> None:
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            gradient = gradient.clone()
            gradient[2] = torch.inf
            return gradient

    trainer = Trainer(rarely(run_config), tmp_path)
    trainer.method.student.denoiser.blocks[1].mlp.register_forward_pre_hook(lambda module, inputs: (Steep.apply(inputs[0]),))
    weights = student(trainer)
    with pytest.raises(
        NonFiniteError, match=r"the gradient is not finite at step 0: first in the gradient of the output of student\.denoiser\."
    ):
        trainer.run()
    message = json.loads((tmp_path / "bad" / "step-00000000" / "report.json").read_text())
    assert message["bad_rows"] == [2]
    assert same(weights, student(trainer))


def test_skipping_leaves_the_step_out_and_says_so(run_config: Make, tmp_path: Path) -> None:
    config = rarely(run_config, "skip")
    trainer = Trainer(config, tmp_path / "a", Spoilt(math.nan, 2, 4))
    trainer.run()
    assert all(tensor.isfinite().all() for tensor in student(trainer).values())
    lines = [line for line in read(tmp_path / "a" / "metrics.jsonl") if "held" in line]
    assert [line["held"] for line in lines] == [2, 4]
    assert "the loss is not finite at step 2" in lines[0]["why"]
    again = Trainer(config, tmp_path / "b", Spoilt(math.nan, 2, 4))
    again.run()
    assert same(student(trainer), student(again))
    with pytest.raises(BadStepError, match="were all skipped"):
        Trainer(
            rarely(run_config, "skip", steps=24, log=24, evaluate=24, checkpoint=24), tmp_path / "c", Spoilt(math.nan, *range(24))
        ).run()


class Elsewhere(Worlds):
    """The plain stream without one of its batches."""

    def batch(self, number: int, size: int) -> Batch:
        return super().batch(number + (number >= 8), size)


def test_rolling_back_is_the_run_that_never_had_the_batch(run_config: Make, tmp_path: Path) -> None:
    config = rarely(run_config, "rollback", steps=18)
    trainer = Trainer(config, tmp_path / "bad", Spoilt(math.nan, 8))
    trainer.run()
    assert trainer.moved == {8: 1}
    assert trainer.loader.position == 19
    clean = Trainer(config, tmp_path / "clean", Elsewhere(WorldsConfig()))
    clean.run()
    assert same(student(trainer), student(clean))
    curves = [[(x["step"], x["loss"]) for x in read(tmp_path / name / "metrics.jsonl") if "loss" in x] for name in ("bad", "clean")]
    assert curves[0] == curves[1]
    moved = [line for line in read(tmp_path / "bad" / "metrics.jsonl") if "moved" in line]
    assert [(line["step"], line["moved"]) for line in moved] == [(9, 1)]
    resumed = Trainer(replace(config), tmp_path / "bad", Spoilt(math.nan, 8))
    resumed.run()
    assert resumed.moved == {8: 1}, "a later start knows it from the checkpoint"


def test_rolling_back_ends_where_other_batches_are_as_bad(run_config: Make, tmp_path: Path) -> None:
    trainer = Trainer(rarely(run_config, "rollback", log=1, evaluate=12, checkpoint=2), tmp_path, Spoilt(math.nan, *range(3, 20)))
    with pytest.raises(NonFiniteError, match="at step 3"):
        trainer.run()
    assert trainer.moved == {3: 3}


def values(guard: Guard, losses: list[float], norms: list[float] | None = None) -> list[bool]:
    """Which of a row of updates are held."""
    norms = norms or [1.0 + 0.01 * (i % 3) for i in range(len(losses))]
    rows = zip(losses, norms, strict=True)
    return [
        bool(guard.judge(Place(i, i, 1), 1, ("student",), "student", torch.tensor(a), torch.tensor(b))) for i, (a, b) in enumerate(rows)
    ]


def test_a_leap_is_measured_in_deviations_from_the_median() -> None:
    usual = [1.0, 1.1, 0.9, 1.05, 0.95] * 4  # median 1, MAD 0.05
    config = GuardConfig(policy="skip", deviations=10, window=20)
    assert values(Guard(config), [*usual, 1.49])[-1] is False
    assert values(Guard(config), [*usual, 1.51])[-1] is True
    assert values(Guard(config), [*usual, 1.0], [1.0] * 20 + [1.2])[-1] is True, "a norm leaps alike"
    assert not any(values(Guard(config), [*usual[:-1], 100.0])), "too few to judge by"
    assert values(Guard(config), [*usual, 0.0])[-1] is False, "a fall is no leap"
    assert not any(values(Guard(config.replace(deviations=0)), [*usual, 1e9]))
    shifted = values(Guard(config), [*usual, *[3.0] * 20])
    assert sum(shifted) <= 11, "a loss that stays up becomes the new usual one"
    assert not shifted[-1]


def test_a_leap_names_the_samples_with_the_largest_loss(run_config: Make, tmp_path: Path) -> None:
    config = replace(rarely(run_config), guard=GuardConfig(deviations=8, window=4))
    with pytest.raises(LeapError, match=r"the loss leaps at step 8: .*largest gradient in student\..*; samples worlds-0-train-train-8-1 "):
        Trainer(config, tmp_path, Spoilt(1e4, 8)).run()


def test_a_guard_goes_on_as_it_was() -> None:
    config = GuardConfig(policy="skip", deviations=10, window=20)
    losses = torch.rand(40, generator=torch.Generator().manual_seed(0)).add(1).tolist()
    whole, first = Guard(config), Guard(config)
    held = values(whole, [*losses, 50.0])
    values(first, losses[:25])
    second = Guard(config)
    second.restore(json.loads(json.dumps(first.state())), torch.device("cpu"))
    usual = [1.0 + 0.01 * (i % 3) for i in range(41)]
    assert values(second, [*losses[25:], 50.0], usual[25:]) == held[25:]
    assert held[-1]
    assert torch.equal(whole.windows["student"], second.windows["student"])


@pytest.mark.parametrize("kind", ["adamw", "adamw8", "muon"])
def test_a_held_step_changes_nothing_at_all(kind: str) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(64, 64)})])})
    (optimizer, *rest) = OptimConfig(name=kind, weight_decay=0.1).build(net)  # type: ignore[arg-type]
    assert type(optimizer) is {"adamw": AdamW, "adamw8": AdamW8, "muon": Muon}[kind]
    for gradient, held in ((1.0, 0.0), (math.nan, 1.0), (1.0, 1.0)):
        before = [p.detach().clone() for p in net.parameters()]
        state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in optimizer.param_groups[0]["params"]]
        for p in net.parameters():
            p.grad = torch.full_like(p, gradient)
        for each in (optimizer, *rest):
            step_(each, 0.1, torch.tensor(held))
        after = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
        assert all(torch.equal(a, b.detach()) for a, b in zip(before, net.parameters(), strict=True)) == bool(held)
        if held:
            assert all(torch.equal(a[k], b[k]) for a, b in zip(state, after, strict=True) for k in a)


def test_clipping_is_torchs() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    for largest in (0.5, 100.0):
        for a, b in zip(ours[:2], theirs[:2], strict=True):
            a.grad = torch.randn(4, 4)
            b.grad = a.grad.clone()
        norms, norm = clip_(ours, largest), nn.utils.clip_grad_norm_(theirs, largest)
        assert torch.equal(norms.total, norm)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:2], theirs[:2], strict=True))  # type: ignore[arg-type]
        assert norms.by(["a", "a", "b"]) == {"a": pytest.approx(float(norm))}


def test_weights_in_less_than_float32_are_refused_at_the_start(run_config: Make) -> None:
    roles = {"student": Role(run_config().pipeline.build().half())}
    with pytest.raises(UserError, match=r"student\..* is float16, and trained weights must be float32"):
        check_precision(roles)
    check_precision({"teacher": Role(roles["student"].module, trained=False)})
    with pytest.raises(ValueError, match="loss of a method must be float32, got bfloat16"):
        check_loss(torch.ones((), dtype=torch.bfloat16), {})


def test_too_little_memory_is_told_with_what_to_do(run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"more memory than there is .*, the cheapest first: smaller pictures"), enough_memory([]):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="another"), enough_memory([]):
        raise RuntimeError("another")
    advice = r"first: --parallel.checkpoint full; --train.batch 2 --train.accumulate 2; --adapter.rank 16; --optim.name adamw8; smaller"
    trainer = Trainer(run_config(), tmp_path)
    monkeypatch.setattr(trainer, "_train_step", lambda: torch.empty(1 << 60))
    with pytest.raises(UserError, match=advice):
        trainer.run()


def test_no_clock_that_can_jump_is_used() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"time\.time\(|datetime\.(now|utcnow)", path.read_text()), path
