"""Rewards: what they say of known pictures, parity of published ones with transformers, and what happens when one fails."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import published
import pytest
import torch
import transformers
from torch import Tensor

from mezzotint.data.worlds import WorldsConfig
from mezzotint.errors import UserError
from mezzotint.pictures import from_pil, to_pil
from mezzotint.rewards import (
    AestheticConfig,
    CLIPRewardConfig,
    GoalConfig,
    ImageRewardConfig,
    JudgeConfig,
    LearnedConfig,
    OCRConfig,
    PartConfig,
    PreferenceConfig,
    RewardConfig,
    RewardError,
    RewardModelConfig,
    TotalConfig,
)
from mezzotint.rewards.model import CLIPEncoderConfig, SmallEncoderConfig
from mezzotint.rewards.ocr import spelled, words
from mezzotint.rewards.pairs import held_out, measure
from mezzotint.rewards.published import Eye
from mezzotint.rewards.total import measured
from mezzotint.text import ByteEncoderConfig

PROMPTS = ["a red star", "two blue circles", "a ring"]


@dataclass
class FunctionConfig(RewardConfig, kind="test_function"):
    """Any function as a reward."""

    function: Callable[[Tensor, Sequence[str]], Any] = lambda images, prompts: images.flatten(1).mean(1)

    def build(self) -> Any:
        return self.function


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published rewards, tiny."""
    folder = tmp_path_factory.mktemp("published")
    published.clip(folder / "clip")
    published.blip(folder / "blip")
    published.trocr(folder / "ocr")
    published.head(folder / "aesthetic.safetensors", 12)
    published.head(folder / "image_reward.safetensors", 16)
    return folder


def pictures(side: int = published.SIDE) -> Tensor:
    """Pictures whose pixels are bytes, as other tools see them."""
    torch.manual_seed(0)
    return torch.stack([from_pil(to_pil(image)) for image in torch.rand(3, 3, side, side) * 2 - 1])


def bytes_of(images: Tensor) -> list[Any]:
    return [to_pil(image) for image in images]


def test_the_judge_and_the_preferred_look_of_known_pictures() -> None:
    batch = WorldsConfig(pairs=True).build().batch(0, 8)
    assert batch.rejected is not None
    assert JudgeConfig().build()(batch.images, batch.prompts).tolist() == [1.0] * 8
    assert JudgeConfig().build()(torch.zeros(8, 3, 32, 32), batch.prompts).tolist() == [0.0] * 8
    better, worse = PreferenceConfig().build()(batch.images, batch.prompts), PreferenceConfig().build()(batch.rejected, batch.prompts)
    assert (better > worse).all()


def test_clip_rewards_are_transformers_cosines(folder: Path) -> None:
    images = pictures()
    model = transformers.CLIPModel.from_pretrained(folder / "clip").eval()
    processor = transformers.AutoProcessor.from_pretrained(folder / "clip")
    given = processor(text=PROMPTS, images=bytes_of(images), return_tensors="pt", padding="max_length")
    with torch.no_grad():
        out = model(**given)
    learned = CLIPRewardConfig(str(folder / "clip"), scale=0.0).build()(images, PROMPTS)
    assert torch.allclose(learned, out.logits_per_image.diagonal(), atol=1e-4)
    cosine = (out.image_embeds * out.text_embeds).sum(1)
    floored = CLIPRewardConfig(str(folder / "clip"), scale=2.5, floor=0.0).build()(images, PROMPTS)
    assert torch.allclose(floored, 2.5 * cosine.clamp_min(0), atol=1e-5)
    prefixed = CLIPRewardConfig(str(folder / "clip"), prefix="a photo of ").build()(images, PROMPTS)
    assert torch.allclose(prefixed, CLIPRewardConfig(str(folder / "clip")).build()(images, [f"a photo of {p}" for p in PROMPTS]))
    rate = AestheticConfig(str(folder / "clip"), str(folder / "aesthetic.safetensors")).build()
    assert torch.allclose(rate(images, PROMPTS), published.head(folder / "again.safetensors", 12)(out.image_embeds)[:, 0], atol=1e-5)


@pytest.mark.parametrize(("kind", "cut"), [("clip", True), ("ocr", False)])
def test_pictures_are_seen_as_by_the_processors(folder: Path, kind: str, cut: bool) -> None:
    side = published.SIDE
    smooth = torch.nn.functional.interpolate(pictures(4), size=(40, 64), mode="bicubic").clamp(-1, 1)
    size = {"shortest_edge": side} if cut else {"height": side, "width": side}
    processor = transformers.AutoImageProcessor.from_pretrained(folder / kind)
    theirs = processor(bytes_of(smooth), size=size, crop_size=side, do_center_crop=cut, resample=3, return_tensors="pt").pixel_values
    ours = Eye(str(folder / kind), side, cut)(smooth)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 0.05  # a byte is 0.015 after the division by the deviation


def test_image_reward_is_blips_first_token_through_the_head(folder: Path) -> None:
    images = pictures()
    model = transformers.BlipForImageTextRetrieval.from_pretrained(folder / "blip").eval()
    model.itm_head = published.head(folder / "again.safetensors", 16)
    said = transformers.AutoTokenizer.from_pretrained(folder / "blip")(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    seen = transformers.AutoImageProcessor.from_pretrained(folder / "blip")(bytes_of(images), return_tensors="pt")
    with torch.no_grad():
        theirs = model(pixel_values=seen.pixel_values, input_ids=said.input_ids, attention_mask=said.attention_mask).itm_score[:, 0]
    reward = ImageRewardConfig(str(folder / "blip"), str(folder / "image_reward.safetensors"), mean=0.5, std=2.0).build()
    assert torch.allclose(reward(images, PROMPTS), (theirs - 0.5) / 2, atol=1e-5)


def test_published_rewards_have_gradients(folder: Path) -> None:
    for config in (
        CLIPRewardConfig(str(folder / "clip")),
        AestheticConfig(str(folder / "clip"), str(folder / "aesthetic.safetensors")),
        ImageRewardConfig(str(folder / "blip"), str(folder / "image_reward.safetensors")),
    ):
        images = pictures(24).requires_grad_()
        (gradient,) = torch.autograd.grad(config.build()(images, PROMPTS).sum(), images)
        assert gradient.flatten(1).any(1).all(), config.kind


def test_what_is_read_counts_by_letters(folder: Path) -> None:
    assert words('a sign that says "Open late", small') == "Open late"
    assert spelled("Open late", "now open  LATE!") == 1.0
    assert spelled("star", "stir") == pytest.approx(0.75)
    assert spelled("star", "") == 0.0
    assert spelled("ab", "zzzzzzzz") == 0.0
    with pytest.raises(ValueError, match="quotation marks"):
        words("a sign")
    images, asked = pictures(), ['"star"', '"ring"', '"cross"']
    reader = transformers.VisionEncoderDecoderModel.from_pretrained(folder / "ocr").eval()
    seen = transformers.AutoImageProcessor.from_pretrained(folder / "ocr")(bytes_of(images), return_tensors="pt").pixel_values
    read = transformers.AutoTokenizer.from_pretrained(folder / "ocr").batch_decode(
        reader.generate(seen, max_length=8), skip_special_tokens=True
    )
    expected = [spelled(a.strip('"'), r) for a, r in zip(asked, read, strict=True)]
    assert OCRConfig(str(folder / "ocr"), length=8).build()(images, asked).tolist() == pytest.approx(expected)


def test_what_is_no_published_reward_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read a reward's CLIPModel"):
        CLIPRewardConfig(str(tmp_path)).build()
    (tmp_path / "head.pth").write_bytes(b"")
    with pytest.raises(UserError, match="pickle"):
        AestheticConfig(str(folder / "clip"), str(tmp_path / "head.pth")).build()
    published.save_file({"layers.0.weight": torch.zeros(3, 12), "layers.0.bias": torch.zeros(3)}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="ends in one number"):
        AestheticConfig(str(folder / "clip"), str(tmp_path / "half.safetensors")).build()


def test_a_total_is_a_weighted_sum_of_standardised_scores() -> None:
    images = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 8, 8)
    bright, dark = FunctionConfig(), FunctionConfig(lambda images, prompts: -3 * images.flatten(1).mean(1) + 1)
    parts = (PartConfig(bright, weight=2.0, mean=0.5, std=0.25), PartConfig(dark, weight=1.0, mean=1.0, std=3.0))
    level = images[:, 0, 0, 0]
    assert torch.allclose(TotalConfig(parts).build()(images, [""] * 5), 2 * (level - 0.5) / 0.25 - level)
    standard = TotalConfig((measured(PartConfig(dark), images, [""] * 5),)).build()(images, [""] * 5)
    assert float(standard.mean()) == pytest.approx(0, abs=1e-6)
    assert float(standard.std()) == pytest.approx(1)
    with pytest.raises(ValueError, match="std"):
        PartConfig(std=0.0)
    with pytest.raises(ValueError, match="must differ"):
        measured(PartConfig(bright), torch.zeros(3, 3, 8, 8), [""] * 3)
    with pytest.raises(ValueError, match="at least one"):
        TotalConfig(()).build()


def _raises(images: Tensor, prompts: Sequence[str]) -> Tensor:
    if "bad" in prompts:
        raise RuntimeError("no\nreason")
    return images.flatten(1).mean(1)


def _is_nan(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1).mean(1) + torch.tensor([math.nan if prompt == "bad" else 0.0 for prompt in prompts])


def _of_another_shape(images: Tensor, prompts: Sequence[str]) -> Tensor:
    scores = images.flatten(1).mean(1)
    return scores[:, None] if "bad" in prompts else scores


@pytest.mark.parametrize(
    ("function", "reason"),
    [(_raises, "raised RuntimeError (no reason)"), (_is_nan, "not finite"), (_of_another_shape, r"(1, 1) instead of a tensor (1,)")],
)
def test_a_reward_that_fails_is_said_with_its_picture(function: Any, reason: str, tmp_path: Path) -> None:
    images, prompts = torch.linspace(-1, 1, 3)[:, None, None, None].expand(3, 3, 8, 8), ["good", "bad", "good too"]
    config = GoalConfig(FunctionConfig(function), FunctionConfig(), failures=str(tmp_path / "stop"))
    with pytest.raises(RewardError, match=r"test_function.*'bad'; the picture is .*on_failure skip") as error:
        config.build().score(images, prompts)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    skipping = config.replace(on_failure="skip", failures=str(tmp_path / "skip")).build()
    scores = skipping.score(images, prompts)
    assert scores.isnan().tolist() == [False, True, False]
    assert scores[[0, 2]].tolist() == [-1.0, 1.0]
    (line,) = [json.loads(line) for line in (tmp_path / "skip" / "failures.jsonl").read_text().splitlines()]
    assert (line["prompt"], line["reward"]) == ("bad", "test_function")
    assert (tmp_path / "skip" / line["picture"]).is_file()
    assert skipping.watch(images, prompts).tolist() == [-1.0, 0.0, 1.0]


def test_a_reward_that_fails_on_many_pictures_only_is_asked_one_by_one(tmp_path: Path) -> None:
    def small(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if len(images) > 1:
            raise MemoryError
        return images.flatten(1).mean(1)

    goal = GoalConfig(FunctionConfig(small), failures=str(tmp_path)).build()
    images = torch.ones(3, 3, 8, 8, requires_grad=True)
    scores = goal.score(images, [""] * 3)
    assert scores.tolist() == [1.0] * 3
    assert scores.requires_grad
    assert not list(tmp_path.iterdir())


def test_prompts_are_held_out_by_their_words() -> None:
    prompts = [f"{n} red stars" for n in range(4000)]
    assert sum(map(held_out, prompts)) / 4000 == pytest.approx(1 / 8, abs=0.02)
    assert held_out("A  red star") == held_out("a red star")
    assert not any(held_out(prompt, 1) for prompt in prompts)


def test_calibration_is_measured_on_held_out_prompts() -> None:
    # The first pixel is the true margin; the second picture has none. Who wins is drawn with the Bradley-Terry probability.
    torch.manual_seed(0)
    margin = 2 * torch.randn(20_000)
    margin = margin * torch.where(torch.rand(20_000) < margin.sigmoid(), 1, -1)
    batch = WorldsConfig(size=24, pairs=True).build().batch(0, 1)
    batch.prompts, batch.images = [f"prompt {n}" for n in range(20_000)], margin[:, None, None, None]
    batch.rejected = torch.zeros(20_000, 1, 1, 1)
    batch.images[:50] = 0
    true = measure(lambda images, prompts: images[:, 0, 0, 0], [batch])
    sure = measure(lambda images, prompts: 5 * images[:, 0, 0, 0], [batch])
    held = [n for n, prompt in enumerate(batch.prompts) if held_out(prompt)]
    assert true["ties"] == sum(n < 50 for n in held)
    assert true["pairs"] == len(held) - true["ties"]
    assert true["accuracy"] == sure["accuracy"] == pytest.approx(float((margin[held] > 0).float().mean()), abs=0.01)
    assert true["calibration_error"] < 0.03
    assert sure["calibration_error"] > 0.1
    assert true["log_loss"] < min(math.log(2), sure["log_loss"])
    with pytest.raises(ValueError, match="held-out prompts"):
        measure(lambda images, prompts: images[:, 0, 0, 0], [batch], folds=1)


def test_a_published_reward_is_read_within_a_step_of_another_device(folder: Path) -> None:
    with torch.device("meta"):
        reward = CLIPRewardConfig(str(folder / "clip")).build()
    assert reward(pictures(32), PROMPTS).isfinite().all()


def test_a_reward_model_comes_back_as_it_was(folder: Path, tmp_path: Path) -> None:
    small = SmallEncoderConfig(widths=(8, 16), text=ByteEncoderConfig(width=16, heads=2))
    for name, encoder in {"small": small, "clip": CLIPEncoderConfig(str(folder / "clip"))}.items():
        model = RewardModelConfig(encoder).build()
        images = pictures(32)
        assert model(images, PROMPTS).tolist() == [0.0] * 3
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save(tmp_path / name / "export" / "reward")
        again = LearnedConfig(str(tmp_path / name)).build()
        assert torch.equal(again(images, PROMPTS), model(images, PROMPTS))
        assert not torch.allclose(again(images, PROMPTS[::-1]), model(images, PROMPTS)), "the prompt is read"
    assert not any("clip" in name for name in model.state_dict()), "a frozen encoder is in no checkpoint"
    with pytest.raises(UserError, match=r"no reward model at .*tiny\.reward"):
        LearnedConfig(str(tmp_path / "nowhere")).build()
