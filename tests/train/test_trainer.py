"""The one loop: exact resume after a stop, a kill, and a kill in the middle of a checkpoint; what it writes; what it refuses."""

import copy
import json
import os
import re
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from together import START, killed_run

from mezzotint.data.batch import Batch
from mezzotint.data.worlds import Worlds, WorldsConfig
from mezzotint.errors import UserError
from mezzotint.locks import alone
from mezzotint.methods.consistency import ConsistencyConfig
from mezzotint.methods.dmd import DMDConfig
from mezzotint.methods.dpo import DPOConfig
from mezzotint.methods.ladd import LADDConfig
from mezzotint.methods.method import MethodConfig
from mezzotint.models import lora
from mezzotint.models.lora import LoRAConfig
from mezzotint.pipeline import load
from mezzotint.train import checkpoint
from mezzotint.train.guard import NonFiniteError
from mezzotint.train.log import read
from mezzotint.train.optim import OptimConfig
from mezzotint.train.stop import Stopped
from mezzotint.train.trainer import RunConfig, Trainer
from mezzotint.weights.lora import read as read_adapter

Make = Callable[..., RunConfig]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Interrupting(Worlds):
    """A source that sends this process a signal when a certain batch is asked for."""

    def __init__(self, config: WorldsConfig, number: int) -> None:
        super().__init__(config)
        self.number = number

    def batch(self, number: int, size: int) -> Batch:
        if number == self.number:
            os.kill(os.getpid(), signal.SIGINT)
        return super().batch(number, size)


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        *product([None, DPOConfig(), ConsistencyConfig(), DMDConfig(critic_turns=2)], ["adamw", "muon"]),
        (None, "adamw8"),
    ],
    ids=lambda m: getattr(m, "kind", m or "denoise"),
)
def test_ctrl_c_and_again_is_the_same_run(method: MethodConfig | None, optimizer: str, run_config: Make, tmp_path: Path) -> None:
    config = run_config(method, pairs=isinstance(method, DPOConfig))
    config.optim = replace(config.optim, name=optimizer)
    Trainer(config, tmp_path / "whole").run()
    with pytest.raises(Stopped, match="step 4"):
        Trainer(config, tmp_path / "parts", Interrupting(config.data, 3)).run()  # type: ignore[arg-type]
    Trainer(config, tmp_path / "parts").run()
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    losses = [
        [(line["step"], line["loss"]) for line in read(tmp_path / name / "metrics.jsonl") if "loss" in line] for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [1, 2, 3, 4, 5, 6]


def test_one_run_at_a_time_in_a_folder(run_config: Make, tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(UserError, match="another run is at work"):
        Trainer(run_config(), tmp_path).run()
    Trainer(run_config(), tmp_path).run()


def test_a_deadline_is_no_accident(run_config: Make, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="step 1") as stopped:
        Trainer(run_config(deadline=1e-6), tmp_path / "parts").run()
    assert not stopped.value.by_hand
    Trainer(run_config(deadline=60.0), tmp_path / "parts").run()
    Trainer(run_config(), tmp_path / "whole").run()
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_other_data_are_refused(run_config: Make, tmp_path: Path) -> None:
    class Other(Worlds):
        """The same, but for its name."""

        version = "worlds 2"

    config = run_config(steps=2)
    Trainer(config, tmp_path).run()
    with pytest.raises(UserError, match=r"the data are not those .*version worlds 1, now worlds 2"):
        Trainer(config, tmp_path, Other(WorldsConfig())).run()


@pytest.mark.parametrize(("where", "when"), [("in-step", 4), ("in-checkpoint", 2), ("in-checkpoint", 5), ("in-checkpoint", 6)])
def test_kill_9_anywhere_and_again_is_the_same_run(where: str, when: int, run_config: Make, tmp_path: Path) -> None:
    # A checkpoint of this method has three files of tensors, so the fifth write is in the middle of the second checkpoint.
    config = run_config()
    Trainer(config, tmp_path / "whole").run()
    killed = START.Process(target=killed_run, args=(json.dumps(config.to_data()), tmp_path / "parts", where, when))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not (tmp_path / "parts" / "export").exists()
    Trainer(config, tmp_path / "parts").run()
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_a_finished_run_stays_what_it_is(run_config: Make, tmp_path: Path) -> None:
    config = run_config()
    Trainer(config, tmp_path).run()
    before, log = weights(tmp_path), (tmp_path / "metrics.jsonl").read_text()
    Trainer(config, tmp_path).run()
    assert equal(before, weights(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == log


def test_preview_sample_and_export_are_the_same_picture(run_config: Make, tmp_path: Path) -> None:
    from PIL import Image

    from mezzotint.pictures import to_pil

    trainer = Trainer(run_config(), tmp_path)
    trained = trainer.run()
    preview = Image.open(tmp_path / "previews" / "step-00000006.png")
    sampled = to_pil(load(tmp_path)("a red star", seed=0)[0])
    assert preview.tobytes() == sampled.tobytes()
    assert torch.equal(load(tmp_path)("a red star"), trained("a red star"))


def test_a_run_says_what_it_was(run_config: Make, tmp_path: Path) -> None:
    config = run_config()
    Trainer(config, tmp_path).run()
    assert RunConfig.from_data(json.loads((tmp_path / "config.json").read_text())) == config
    log = read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in log if "held_out" in line] == [3, 6]
    assert len(log[-1]["held_out_by_time"]) == 8
    assert [p.name for p in checkpoint.steps(tmp_path / "checkpoints")] == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": {"batch": 0}}, "train.batch must be at least 1, got 0"),
        ({"train": {"steps": -1}}, "train.steps must be at least 1, got -1"),
        ({"train": {"log": 0}}, "train.log must be at least 1, got 0"),
        ({"optim": {"lr": float("nan")}}, "optim.lr must be at least 0 and finite, got nan"),
        ({"optim": {"clip": 0.0}}, "optim.clip must be above 0, got 0.0"),
        ({"optim": {"average": 1.0}}, "optim.average must be at least 0 and below 1, got 1.0"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused(run_config: Make, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    config = run_config()
    for group, fields in changes.items():
        config = replace(config, **{group: replace(getattr(config, group), **fields)})
    with pytest.raises(UserError, match=re.escape(says)):
        Trainer(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_config_is_refused_by_field(run_config: Make, tmp_path: Path) -> None:
    config = run_config()
    Trainer(config, tmp_path).run()
    changed = replace(config, optim=replace(config.optim, lr=5e-4))
    with pytest.raises(UserError, match=r"optim\.lr was 0\.001, now 0\.0005"):
        Trainer(changed, tmp_path).run()


def test_starting_from_another_architecture_is_refused(run_config: Make, tmp_path: Path) -> None:
    config = run_config()
    Trainer(config, tmp_path / "a").run()
    other = replace(
        config, init=str(tmp_path / "a"), pipeline=replace(config.pipeline, denoiser=replace(config.pipeline.denoiser, depth=3))
    )
    with pytest.raises(UserError, match="another architecture"):
        Trainer(other, tmp_path / "b")


def test_a_damaged_checkpoint_is_named(run_config: Make, tmp_path: Path) -> None:
    config = run_config()
    Trainer(config, tmp_path).run()
    last = checkpoint.steps(tmp_path / "checkpoints")[-1]
    (last / "student.safetensors").write_bytes(b"noise")
    with pytest.raises(UserError, match=r"step-00000006 is damaged .* remove that folder to go on from step-00000004"):
        Trainer(config, tmp_path).run()


def test_a_full_disk_keeps_the_last_checkpoint(run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config()
    real = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        """The second checkpoint meets a system that takes no more than 30 kB of a file."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if "step-00000004" in str(path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        try:
            real(tensors, path, metadata)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"File too large.*; free some space.*last whole one is step-00000002"):
        Trainer(config, tmp_path / "run").run()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    Trainer(config, tmp_path / "run").run()
    Trainer(config, tmp_path / "whole").run()
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_folder_that_cannot_be_written_is_named(run_config: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        Trainer(run_config(), tmp_path / "file" / "run").run()


class Poisoned(Worlds):
    """A source with one picture that is not finite."""

    def batch(self, number: int, size: int) -> Batch:
        batch = super().batch(number, size)
        if number == 2:
            batch.images[1, 0, 3, 3] = torch.nan
        return batch


def test_a_bad_picture_stops_the_run_and_is_named(run_config: Make, tmp_path: Path) -> None:
    config = run_config()
    with pytest.raises(NonFiniteError) as error:
        Trainer(config, tmp_path, Poisoned(WorldsConfig())).run()
    message = str(error.value)
    assert "loss is not finite at step 2" in message
    assert "output of student.denoiser.embed_patch" in message
    assert "worlds-0-train-train-2-1 (" in message
    assert "t = 0." in message
    assert "train-2-0" not in message, "only the bad sample is named"


def test_a_weight_that_is_not_finite_is_found(run_config: Make, tmp_path: Path) -> None:
    trainer = Trainer(run_config(), tmp_path)
    with torch.no_grad():
        trainer.method.student.denoiser.blocks[1].mlp[0].weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"student\.denoiser\.blocks\.1\.mlp\.0"):
        trainer.run()


def test_accumulating_equals_one_large_batch(run_config: Make, tmp_path: Path) -> None:
    class Halves(Worlds):
        """Batch k of two is half of batch 0 of four."""

        def batch(self, number: int, size: int) -> Batch:
            whole = super().batch(0, 4)
            part = slice(0, 4) if size == 4 else slice(2 * (number % 2), 2 * (number % 2) + 2)
            return Batch(whole.images[part], whole.prompts[part], whole.ids[part])

    def gradients(batch: int, accumulate: int) -> list[torch.Tensor]:
        trainer = Trainer(run_config(batch=batch, accumulate=accumulate), tmp_path, Halves(WorldsConfig()))
        error = lambda b, turn, step: (trainer.method.student.encode(b.prompts).pooled.pow(4).mean(), {})  # noqa: E731
        trainer.method.loss = error  # type: ignore[method-assign, assignment]
        trainer._accumulate(trainer._experience()[1], 4, ("student",), 1, {})
        return [p.grad for p in trainer.parameters["student"] if p.grad is not None]

    grads = gradients(4, 1), gradients(2, 2)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))
    assert any(g.abs().max() > 1e-4 for g in grads[0])


def test_frozen_roles_stay_and_turns_train_only_their_own(run_config: Make, tmp_path: Path) -> None:
    trainer = Trainer(run_config(DMDConfig(critic_turns=1), steps=2), tmp_path)
    before = {name: {k: v.clone() for k, v in role.module.state_dict().items()} for name, role in trainer.method.roles.items()}
    trainer.run()
    after = {name: role.module.state_dict() for name, role in trainer.method.roles.items()}
    assert equal(before["teacher"], after["teacher"])
    assert not equal(before["student"], after["student"])
    assert not equal(before["critic"], after["critic"])


@pytest.mark.parametrize(("decay", "middle", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)])
def test_learning_rates(decay: str, middle: float, end: float) -> None:
    optim = OptimConfig(lr=2.0, warmup=10, decay=decay)  # type: ignore[arg-type]
    assert optim.rate(0, 110) == pytest.approx(2.0 / 11)
    assert optim.rate(10, 110) == 2.0
    assert optim.rate(60, 110) == pytest.approx(2.0 * middle)
    assert optim.rate(109, 110) == pytest.approx(2.0 * end, abs=0.03)


def test_wsd_is_constant_until_it_falls_as_one_minus_a_root() -> None:
    optim = OptimConfig(lr=2.0, warmup=10, decay="wsd", cooldown=0.25)
    rates = [optim.rate(step, 400) for step in range(400)]
    assert rates[:10] == sorted(rates[:10])
    assert set(rates[10:301]) == {2.0}
    assert rates[325] == pytest.approx(2.0 * (1 - 0.5))
    assert rates[301:] == sorted(rates[301:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert OptimConfig(lr=2.0, warmup=10, decay="wsd", cooldown=1.0).rate(10, 400) == 2.0, "warm-up comes first"


def test_a_role_learns_at_its_own_rate_and_a_critic_alone_at_first(run_config: Make, tmp_path: Path) -> None:
    def moved(name: str, steps: int = 1, **settings: float) -> dict[str, float]:
        config = run_config(LADDConfig(steps=2, **settings), steps=steps, preview_prompts=())  # type: ignore[arg-type]
        trainer = Trainer(config, tmp_path / name)
        before = {role: copy.deepcopy(trainer.method.roles[role].module.state_dict()) for role in ("student", "critic")}
        trainer.run()
        after = {role: trainer.method.roles[role].module.state_dict() for role in before}
        return {role: max(float((after[role][n] - x).abs().max()) for n, x in before[role].items()) for role in before}

    plain, fast = moved("plain"), moved("fast", critic_rate=10.0)
    assert fast["critic"] == pytest.approx(10 * plain["critic"], rel=1e-3)
    assert plain["student"] > 0
    assert fast["student"] == pytest.approx(plain["student"], rel=1e-3)
    assert moved("alone", steps=2, alone=2)["student"] == 0 < moved("alone too", steps=2, alone=2)["critic"]
    assert moved("then", steps=2, alone=1)["student"] > 0


def test_an_adapter_is_all_that_learns(run_config: Make, tmp_path: Path) -> None:
    pipeline = run_config().pipeline.build()
    for p in pipeline.parameters():
        torch.nn.init.normal_(p, std=0.1)
    pipeline.save(tmp_path / "init")
    config = replace(run_config(), adapter=LoRAConfig(rank=2, alpha=8.0), init=str(tmp_path / "init"))
    config.optim = config.optim.replace(lr=1e-2)
    trained = Trainer(config, tmp_path / "run").run()
    before, after = load_file(tmp_path / "init" / "model.safetensors"), weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inner = [name for name in lora.layers(pipeline.denoiser) if name.startswith("blocks.") and "modulation" not in name]
    assert changed == {f"denoiser.{name}.weight" for name in inner}
    adapted = load(tmp_path / "init")
    state, _ = read_adapter(tmp_path / "run" / "export" / "adapter", adapted.config.denoiser)
    lora.load(adapted.denoiser, state)
    drawn = adapted("a red star")
    assert torch.allclose(drawn, load(tmp_path / "run")("a red star"), atol=1e-4)
    assert torch.allclose(drawn, trained("a red star"), atol=1e-4)
    assert float((drawn - load(tmp_path / "init")("a red star")).abs().max()) > 1e-2

    part = replace(config, train=config.train.replace(deadline=1e-9))
    with pytest.raises(Stopped):
        Trainer(part, tmp_path / "parts").run()
    Trainer(config, tmp_path / "parts").run()
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "parts"))
