"""The writer of longer prompts, its training and its tuning: closed forms, identities, resumes, and that both do what they are for."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lettered import LetteredConfig
from safetensors.torch import load_file

from mezzotint.cli import main
from mezzotint.data.batch import Loader
from mezzotint.data.worlds import WorldsConfig
from mezzotint.errors import UserError
from mezzotint.evals import enhance
from mezzotint.methods.enhance import Captions, Enhance, EnhanceConfig, shorter
from mezzotint.methods.enhance_grpo import EnhanceGRPO, Written
from mezzotint.methods.method import MethodConfig
from mezzotint.methods.policy import advantages
from mezzotint.pipeline import Pipeline
from mezzotint.text.enhance import Trained
from mezzotint.text.writer import BREAK, END, ByteWriter, ByteWriterConfig, load_writer, read
from mezzotint.train.log import read as read_log
from mezzotint.train.stop import Stopped
from mezzotint.train.trainer import RunConfig, Trainer
from mezzotint.worlds.caption import describe, lost, lost_scene, parse, shorten, worth, write
from mezzotint.worlds.scene import RELATIONS, Description, Mention
from mezzotint.worlds.splits import draw

TURN = ("writer",)
SMALL = ByteWriterConfig(width=32, depth=1, heads=2)
LONG, SHORT = WorldsConfig(size=24, long_every=1), WorldsConfig(size=24, long_every=1_000_000)


@pytest.fixture
def writer() -> ByteWriter:
    """As if it had been trained."""
    torch.manual_seed(0)
    built = SMALL.replace(depth=2, length=96).build()
    for parameter in built.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return built.eval()


# Captions


def test_a_shorter_caption_is_implied_by_the_longer_and_not_the_other_way() -> None:
    rng = random.Random(0)
    for _ in range(500):
        long = describe(draw(rng, "any"), rng, long=True)
        short = shorten(long, rng)
        assert long.implies(short)
        assert long.implies(long)
        assert long.open == 0
        assert short.implies(long) is (short.open == 0)
        kept, said = worth(write(short, rng), write(long, rng))
        assert (kept, said) == (1.0, 1.0)
        assert worth(write(short, rng), write(short, rng)) == (1.0, 0.0 if short.open else 1.0)


def test_whoever_implies_holds_nowhere_else() -> None:
    """Against the judge's own meaning: where the longer description holds of a scene, so does the shorter."""
    rng = random.Random(1)
    for _ in range(2000):
        scene, other = draw(rng, "any"), draw(rng, "any")
        long, short = describe(scene, rng, long=True), shorten(describe(other, rng, long=True), rng)
        assert long.implies(short) is short.holds(scene), "a long description says all there is to know of a scene but the places"


def test_things_and_relations_may_change_places() -> None:
    star, ring = Mention("star", 1, "red"), Mention("ring", 1, "blue")
    for where in RELATIONS:
        assert Description((star, ring), where).implies(Description((star, ring), where))
        assert [o for o in RELATIONS if Description((ring, star), where).implies(Description((star, ring), o))] != [where]
    two = Description((Mention("star", 2),))
    assert Description((star, replace(star, colour="blue")), "left").implies(two)
    assert not two.implies(Description((star, replace(star, colour="blue"))))
    assert not Description((star,)).implies(two)


def test_what_is_no_caption_is_worth_nothing() -> None:
    assert lost_scene("a cat", "a red star") == "its sense: the prompt is no caption of Worlds"
    assert lost_scene("a star", "a red star, please") == "its sense: what was written is no caption of Worlds"
    assert worth("a star", "a red star, please") == worth("a star", "two red stars") == (0.0, 0.0)
    assert worth("a star", "a large red star") == (1.0, pytest.approx(2 / 5))
    assert lost("a star", "a red star, please") == ""


# The network


def test_a_text_is_bytes_and_what_is_learned_is_the_rest(writer: ByteWriter) -> None:
    tokens, written = writer.texts(["a star", "ein  süßer\nRing"], ["a red star", "x"])
    assert bytes(tokens[0].tolist()).startswith(b"a star\na red star\0")
    assert int(tokens[1, len("ein süßer Ring".encode())]) == BREAK
    assert written.sum(1).tolist() == [11, 2]
    assert read(tokens, written) == ["a red star", "x"]
    with pytest.raises(ValueError, match="at most the writer's length of 96 bytes"):
        writer.texts(["a" * 60], ["b" * 60])


def test_no_place_sees_what_follows_and_the_past_is_the_past(writer: ByteWriter) -> None:
    tokens = torch.randint(256, (2, 20))
    whole, _ = writer(tokens)
    changed = tokens.clone()
    changed[:, 12:] = 65
    assert torch.equal(writer(changed)[0][:, :12], whole[:, :12])
    assert not torch.allclose(writer(changed)[0][:, 12:], whole[:, 12:])
    parts, past = [], None
    for start, end in ((0, 7), (7, 8), (8, 20)):
        logits, past = writer(tokens[:, start:end], past)
        parts.append(logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_writing_takes_the_likeliest_bytes_whoever_is_beside_it(writer: ByteWriter) -> None:
    short = ["a star", "two large rings above", "a"]
    tokens, _ = writer.draw(short, 0.0)
    for row, text in enumerate(short):
        start = len(text) + 1
        assert bytes(tokens[row, :start].tolist()) == f"{text}\n".encode()
        for place in range(start, start + 5):
            assert int(writer(tokens[row : row + 1, :place])[0][0, -1].argmax()) == int(tokens[row, place])
            if int(tokens[row, place]) == END:
                break
    assert writer.write(short) == [writer.write([text])[0] for text in short]
    calls: list[int] = []
    writer.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(writer.draw(short, 0.0, steady=True)[0], tokens)
    assert len(calls) == 95, "as many calls whatever is written"
    torch.manual_seed(1)
    drawn, there = writer.draw(short)
    assert ((drawn == END) & there).sum(1).max() <= 1, "a text ends once"
    assert bool((there.int().diff(dim=1) == 1).sum(1).eq(1).all()), "what is written is in one piece"


def test_a_saved_writer_is_the_same(writer: ByteWriter, tmp_path: Path) -> None:
    writer.save(tmp_path)
    assert load_writer(str(tmp_path)).write(["a star"]) == writer.write(["a star"])
    with pytest.raises(UserError, match=r"`mezzotint train tiny\.enhance` makes one"):
        load_writer(str(tmp_path / "nowhere"))


class Perfect(ByteWriter):
    """It answers some prompts with the long captions that it knows, and the others with nonsense."""

    def write(self, short: Sequence[str], temperature: float = 0.0) -> list[str]:
        return ["a red" if len(text) % 2 else f"{text}, on a white background, drawn flat, lit from above" for text in short]


def test_the_suite_counts_what_is_kept_and_what_is_said(
    writer: ByteWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer.save(tmp_path)
    assert main(["eval", str(tmp_path), "--suite", "enhance", "--prompts", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 0
    monkeypatch.setattr(enhance, "source", lambda place: Trained(Perfect(SMALL)))
    result = enhance.evaluate("", 40)
    short = WorldsConfig(seed=1_000_000, long_every=41).build().batch(0, 40).prompts
    kept = [text for text in short if len(text) % 2 == 0]
    assert result["kept"] == len(kept) / 40
    assert result["said"] == pytest.approx(sum(3 / parse(text).open for text in kept) / len(kept))
    assert result["distinct"] == len(set(short)) / 40
    assert "asked" not in result, "nothing to draw with"
    monkeypatch.setattr(enhance, "source", lambda place: None)
    assert main(["eval", "http://localhost:1", "--suite", "enhance"]) == 2


def test_the_suite_draws_short_enhanced_and_long_captions_from_one_noise(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    # A pipeline that draws what a long caption says, and of others a scene that has nothing to do with them.
    short, long = (WorldsConfig(seed=7, long_every=every).build().batch(0, 6).prompts for every in (0, 1))
    scenes, other, seeds = WorldsConfig(seed=7).build().batch(0, 6).images, WorldsConfig(seed=8).build().batch(0, 6).images, list[int]()

    def draws(prompts: Sequence[str], seed: int) -> torch.Tensor:
        seeds.append(seed)
        return scenes if list(prompts) == long else torch.cat([scenes[:2], other[2:]])

    monkeypatch.setattr(pipeline, "forward", draws)
    enhanced = [f"{text}, on a white background" for text in short[:2]] + short[2:]
    result = enhance.drawn(pipeline, short, enhanced, long)
    assert result["asked"]["long"] == result["told"]["long"] == 1
    assert result["asked"]["short"] == result["told"]["short"] == result["asked"]["enhanced"]
    assert 1 / 3 <= result["asked"]["short"] < 1
    assert result["told"]["enhanced"] <= result["asked"]["enhanced"]
    assert len(set(seeds)) == 1


# Next bytes


def test_the_loss_is_that_of_the_long_caption_and_starts_at_ln_256(pipeline: Pipeline, writer: ByteWriter) -> None:
    method = EnhanceConfig(SMALL).build(pipeline)
    (batch,) = method.experience(Loader(LONG.build(), 8), 0)
    assert isinstance(batch, Captions)
    loss, _ = method.loss(batch, TURN, 0)
    assert float(loss.detach()) == pytest.approx(math.log(256), rel=1e-6)
    assert batch.longer == LONG.build().batch(0, 8).prompts
    assert all(parse(long).implies(parse(short)) for short, long in zip(batch.prompts, batch.longer, strict=True))
    method.roles["writer"].module = writer
    one = Captions(batch.images[:1], ["a star"], ["one"], longer=["ox"])
    tokens = torch.tensor([list(b"a star\nox\0")])
    by_hand = writer(tokens)[0][0].detach().log_softmax(-1)
    expected = -sum(float(by_hand[place - 1, tokens[0, place]]) for place in (7, 8, 9)) / 3
    assert float(method.loss(one, TURN, 0)[0].detach()) == pytest.approx(expected, rel=1e-5)


def test_captions_of_another_world_are_refused() -> None:
    with pytest.raises(UserError, match="captions of Worlds"):
        shorter("a photograph of a cat", "one")


# Its tuning


def rollout(method: EnhanceGRPO, step: int = 0) -> Written:
    torch.manual_seed(step)
    (batch,) = method.experience(Loader(SHORT.build(), 2), step)
    assert isinstance(batch, Written)
    return batch


GRPO = LetteredConfig(writer=SMALL.replace(length=112), group=4)


def test_on_policy_the_ratio_is_exactly_one_and_the_kl_exactly_zero(pipeline: Pipeline, writer: ByteWriter, tmp_path: Path) -> None:
    writer.save(tmp_path)
    method = GRPO.replace(start=str(tmp_path), temperature=0.7).build(pipeline)
    batch = rollout(method)
    assert len(batch) == 8
    assert batch.advantage.view(2, 4).sum(1).tolist() == pytest.approx([0, 0], abs=1e-4)
    loss, metrics = method.loss(batch, TURN, 0)
    assert metrics["ratio"].tolist() == pytest.approx([1.0] * 8, abs=1e-6)
    assert torch.equal(metrics["kl"], torch.zeros(8))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        for parameter in method._writer("writer").parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    _, metrics = method.loss(batch, TURN, 0)
    assert (metrics["kl"] > 0).all(), "an estimate of a divergence that is never below 0"
    assert not torch.allclose(metrics["ratio"], torch.ones(8), atol=1e-3)


def test_the_gradient_is_the_policy_gradient(pipeline: Pipeline, writer: ByteWriter, tmp_path: Path) -> None:
    writer.save(tmp_path)
    method = GRPO.replace(start=str(tmp_path), kl=0.0).build(pipeline)
    batch, weights = rollout(method), list(method._writer("writer").parameters())
    got = torch.autograd.grad(method.loss(batch, TURN, 0)[0], weights)
    density = (method._writer("writer").log_prob(batch.tokens) * batch.written).sum(1) / batch.written.sum(1)
    expected = torch.autograd.grad(-(batch.advantage * density).mean(), weights)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


def test_the_loss_off_its_policy(pipeline: Pipeline, writer: ByteWriter, tmp_path: Path) -> None:
    writer.save(tmp_path)
    method = GRPO.replace(start=str(tmp_path), clip=0.02, kl=0.5).build(pipeline)
    batch = rollout(method)
    assert torch.allclose(advantages((batch.kept + batch.said) / 2, batch.prompts), batch.advantage)
    with torch.no_grad():
        for parameter in method._writer("writer").parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    weights = list(method._writer("writer").parameters())
    now, first = (method._writer(name).log_prob(batch.tokens) for name in ("writer", "reference"))
    ratio, q, a = (now - batch.log_prob).exp(), (first.detach() - now).exp(), batch.advantage[:, None]
    of_bytes = torch.maximum(-a * ratio, -a * ratio.clamp(0.98, 1.02)) + 0.5 * (q - q.log() - 1)
    expected = ((of_bytes * batch.written).sum(1) / batch.written.sum(1)).mean()
    loss, metrics = method.loss(batch, TURN, 0)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert 0 < float(metrics["clipped"].mean()) < 1
    pairs = zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs), "the divergence has a gradient, and it goes to the writer"


def test_settings_that_cannot_be_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="group must be at least 2"):
        GRPO.replace(group=1).build(pipeline)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        GRPO.replace(temperature=0.0).build(pipeline)


# Runs


@pytest.fixture
def learning(run_config: Callable[..., RunConfig]) -> Callable[[MethodConfig, int], RunConfig]:
    def make(method: MethodConfig, steps: int) -> RunConfig:
        config = run_config(method, steps=steps, batch=8, checkpoint=2, preview=99, evaluate=99, held_out=2, preview_prompts=())
        config.data, config.optim = LONG if isinstance(method, EnhanceConfig) else SHORT, replace(config.optim, lr=5e-3)
        return config

    return make


def test_a_run_learns_the_language_and_exports_the_writer(learning: Callable[[MethodConfig, int], RunConfig], tmp_path: Path) -> None:
    config = learning(EnhanceConfig(SMALL), 40)
    config.train = config.train.replace(checkpoint=40)
    trainer = Trainer(config, tmp_path)
    before = {name: x.clone() for name, x in trainer.pipeline.state_dict().items()}
    assert isinstance(trainer.method, Enhance)
    trainer.run()
    losses = [line["writer.loss"] for line in read_log(tmp_path / "metrics.jsonl") if "writer.loss" in line]
    assert losses[0] == pytest.approx(math.log(256), rel=1e-5)
    assert losses[-1] < 3.2, losses
    assert load_writer(str(tmp_path)).write(["a star"])[0]
    assert all(torch.equal(before[name], x) for name, x in trainer.pipeline.state_dict().items()), "the student stays as it is"


def test_a_reward_rises(learning: Callable[[MethodConfig, int], RunConfig], tmp_path: Path) -> None:
    config = learning(GRPO.replace(group=8, kl=0.0), 10)
    config.train = config.train.replace(batch=2, checkpoint=99)
    config.optim = replace(config.optim, lr=5e-2)
    Trainer(config, tmp_path).run()
    rewards = [line["writer.reward"] for line in read_log(tmp_path / "metrics.jsonl") if "writer.reward" in line]
    assert rewards[-1] > rewards[0] + 0.06, rewards


@pytest.mark.parametrize("name", ["enhance", "enhance_grpo"])
def test_it_resumes_to_the_last_bit(
    name: str, learning: Callable[[MethodConfig, int], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = learning(EnhanceConfig(SMALL) if name == "enhance" else GRPO, 4)
    config.train = config.train.replace(batch=2)
    Trainer(config, tmp_path / "whole").run()
    real = Trainer._train_step

    def stops(self: Trainer) -> object:
        if self.step == 3:
            raise Stopped("enough for now")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stops)
        with pytest.raises(Stopped):
            Trainer(config, tmp_path / "parts").run()
    Trainer(config, tmp_path / "parts").run()
    exports = [load_file(tmp_path / run / "export" / "writer" / "writer.safetensors") for run in ("whole", "parts")]
    assert [key for key, tensor in exports[0].items() if not torch.equal(tensor, exports[1][key])] == []
