"""Checkpoints: written beside the loop, whole or not at all, by any number of ranks; read by any other."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch
from torch import Tensor, nn

from mezzotint.errors import UserError
from mezzotint.train import checkpoint
from mezzotint.train.checkpoint import Checkpoint, Saver, Share
from mezzotint.train.optim import OptimConfig
from mezzotint.train.trainer import RunConfig, Trainer


def test_the_loop_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is what was there when it was asked for, however long the disk takes."""
    go, real = threading.Event(), checkpoint.save_file

    def slow(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        assert go.wait(10)
        real(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    saver, weight = Saver(tmp_path), torch.ones(3)
    saver.save(1, {"student": {"weight": weight}}, {"step": 1})
    saver.settle()
    weight.fill_(2.0)
    assert not checkpoint.steps(tmp_path)
    go.set()
    saver.save(2, {"student": {"weight": weight}}, {"step": 2})
    saver.finish()
    for step, folder in enumerate(checkpoint.steps(tmp_path), start=1):
        read = {"student": {"weight": torch.zeros(3)}}
        Checkpoint(folder).fill(read)
        assert torch.equal(read["student"]["weight"], torch.full((3,), float(step)))


def test_weights_wait_until_they_are_copied(run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying takes longer than a forward and backward pass here, and the checkpoint has the weights of its step all the same."""
    config = run_config(steps=3, checkpoint=2, preview_prompts=())
    trainer, real, seen = Trainer(config, tmp_path), Saver._copy, dict[str, Tensor]()

    def slow(saver: Saver, group: str, own: dict[str, Share]) -> dict[str, Share]:
        if not seen:
            seen.update({name: tensor.clone() for name, tensor in trainer.method.student.state_dict().items()})
            time.sleep(0.5)
        return real(saver, group, own)

    monkeypatch.setattr(Saver, "_copy", slow)
    trainer.run()
    stored = {name: torch.zeros_like(tensor) for name, tensor in seen.items()}
    Checkpoint(tmp_path / "checkpoints" / "step-00000002").fill({"student": stored})
    assert all(torch.equal(stored[name], tensor) for name, tensor in seen.items())
    assert any(not torch.equal(tensor, seen[name]) for name, tensor in trainer.method.student.state_dict().items())


def test_an_error_of_any_kind_while_copying_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(saver: Saver, group: str, own: dict[str, Share]) -> dict[str, Share]:
        raise MemoryError("no room for copies")

    monkeypatch.setattr(Saver, "_copy", fails)
    saver = Saver(tmp_path)
    saver.save(1, {"student": {"weight": torch.ones(1)}}, {})
    saver.settle()
    with pytest.raises(MemoryError, match="no room for copies"):
        saver.finish()


def test_the_newest_stay_and_the_best(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=2)
    for step in range(1, 6):
        saver.save(step, {"student": {"weight": torch.ones(1)}}, {}, spare=[2])
    saver.finish()
    assert [checkpoint.number(folder) for folder in checkpoint.steps(tmp_path)] == [2, 4, 5]


def test_a_disk_that_fails_is_reported_by_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path)
    saver.save(1, {"student": {"weight": torch.ones(1)}}, {})
    saver.finish()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    saver.save(2, {"student": {"weight": torch.ones(1)}}, {})
    with pytest.raises(UserError, match=r"No space left on device.*the last whole one is step-00000001"):
        saver.finish()
    with pytest.raises(UserError, match="No space left"):
        saver.check()
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-00000001"]


def test_shares_of_two_ranks_are_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scalar = torch.arange(15.0).reshape(5, 3), torch.tensor(7.0)
    first = {"student": {"weight": Share(weight[:3].clone(), (0, 0)), "step": Share(scalar, ())}}
    second = {"student": {"weight": Share(weight[3:].clone(), (3, 0))}}
    monkeypatch.setattr(checkpoint, "WAIT", 0.05)
    with pytest.raises(UserError, match=r"only 1 of 2 ranks have written their files"):
        checkpoint.write(tmp_path, 1, first, {}, rank=0, world=2)
    assert not checkpoint.steps(tmp_path)
    checkpoint.clear(tmp_path)
    checkpoint.write(tmp_path, 1, second, {}, rank=1, world=2)
    assert not checkpoint.steps(tmp_path), "it is not whole before rank 0 has written"
    checkpoint.write(tmp_path, 1, first, {"step": 1}, rank=0, world=2)
    (folder,) = checkpoint.steps(tmp_path)
    saved = Checkpoint(folder)
    assert saved.shapes == {"student": {"weight": (5, 3), "step": ()}}
    read = {"student": {"weight": torch.zeros(5, 3), "step": torch.zeros(())}}
    saved.fill(read)
    assert torch.equal(read["student"]["weight"], weight)
    assert read["student"]["step"] == 7
    (folder / "student.00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"step-00000001 is damaged .*00002-of-00002.*remove that folder"):
        Checkpoint(folder)


@pytest.mark.parametrize("harm", ["truncate", "noise", "flip", "state", "missing", "shape"])
def test_damage_is_named(harm: str, tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(1, {"student": {"weight": torch.ones(100)}}, {})
    saver.finish()
    (folder,) = checkpoint.steps(tmp_path)
    file = folder / "student.safetensors"
    name, size = ("other" if harm == "missing" else "weight"), (99 if harm == "shape" else 100)
    if harm == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "noise":
        file.write_bytes(b"noise")
    elif harm == "flip":
        whole = bytearray(file.read_bytes())
        whole[-1] ^= 1
        file.write_bytes(whole)
    elif harm == "state":
        (folder / checkpoint.STATE).write_text("{")
    with pytest.raises(UserError, match=r"step-00000001 is damaged .*remove that folder to begin anew, since there is none before it"):
        Checkpoint(folder).fill({"student": {name: torch.zeros(size)}})


@pytest.mark.parametrize("name", ["adamw", "adamw8", "muon"])
def test_optimizers_come_back(name: str, tmp_path: Path) -> None:
    class Net(nn.Module):
        """One matrix that Muon or AdamW8 steps, and one vector that AdamW does."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(64, 64)})])

    def stepped(steps: int, net: Net) -> list[torch.optim.Optimizer]:
        optimizers = OptimConfig(name=name).build(net)  # type: ignore[arg-type]
        for step in range(steps):
            for p in net.parameters():
                p.grad = torch.full_like(p, step + 1.0)
            for optimizer in optimizers:
                optimizer.step()
        return optimizers

    torch.manual_seed(0)
    net, other = Net(), Net()
    stored = checkpoint.optimizer_tensors(net, stepped(2, net))
    saver = Saver(tmp_path)
    saver.save(1, {"student.optimizer": stored}, {})
    saver.finish()
    saved = Checkpoint(checkpoint.steps(tmp_path)[0])
    fresh = stepped(0, other)
    prepared = checkpoint.prepare_optimizers(other, fresh, saved, "student.optimizer")
    saved.fill({"student.optimizer": prepared})
    again = checkpoint.optimizer_tensors(other, fresh)
    assert again.keys() == stored.keys()
    assert len(stored) == {"adamw": 6, "adamw8": 8, "muon": 4}[name]
    assert all(again[key].dtype == stored[key].dtype and torch.equal(again[key], stored[key]) for key in stored)


def test_many_ranks_read_the_files_between_them(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(1, {"critic": {"weight": torch.ones(2)}, "student": {"weight": torch.ones(2)}}, {})
    saver.finish()
    (folder,) = tmp_path.iterdir()
    file = folder / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    Checkpoint(folder, slice(0, None, 2))
    with pytest.raises(UserError, match=r"student\.safetensors is not what was written"):
        Checkpoint(folder, slice(1, None, 2))


def test_nothing_but_json_and_safetensors(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(3, {"student": {"weight": torch.ones(2)}}, {"step": 3})
    saver.finish()
    (folder,) = tmp_path.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["state.json", "student.safetensors"]
    assert json.loads((folder / "state.json").read_text()) == {"step": 3, "files": {"student.safetensors": ANY}}
