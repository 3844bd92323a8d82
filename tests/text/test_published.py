"""Encoders of published models: what diffusers' pipelines make of a prompt, from the same weights."""

import copy
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from mezzotint.errors import UserError
from mezzotint.models import Cond, DenoiserConfig, FuseDiTConfig, TransfusionConfig
from mezzotint.pipeline import Pipeline, PipelineConfig, Sampling, load
from mezzotint.text.layers import keys_and_values
from mezzotint.text.published import FAMILIES, SANA_INSTRUCTION, EncoderConfig, Published, PublishedConfig

PROMPTS = ["A Red Star", "two blue circles above it"]
ENCODERS = {name: ("", "_2", "_3", "_4")[: len(config.encoders)] for name, config in FAMILIES.items() if name in peers.MADE}


def build(name: str, folder: Path) -> tuple[Any, Published]:
    """Diffusers' pipeline, and our encoders of its files."""
    pipeline = peers.saved(name, folder)
    places = [(str(folder / f"text_encoder{suffix}"), str(folder / f"tokenizer{suffix}")) for suffix in ENCODERS[name]]
    return pipeline, FAMILIES[name].at(places).build()


@torch.no_grad()
def said(name: str, pipeline: Any) -> tuple[Cond, Cond | None]:
    """What diffusers makes of the prompts, and of none, as conditions."""
    nothing = torch.zeros(len(PROMPTS), 0)
    if name == "flux":
        text, pooled, _ = pipeline.encode_prompt(PROMPTS, None, max_sequence_length=512)
        return Cond(text, None, pooled), None
    if name == "sd1.5":
        text, null = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
        return Cond(text, None, nothing), Cond(null, None, nothing)
    if name in ("sd3", "sdxl"):
        words = {"prompt_3": None} if name == "sd3" else {}
        text, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS, None, **words)
        return Cond(text, None, pooled), Cond(null, None, null_pooled)
    if name == "hidream":
        text, null, states, null_states, pooled, null_pooled = pipeline.encode_prompt(PROMPTS)
        states, null_states = states.transpose(0, 1), null_states.transpose(0, 1)
        return Cond(text, None, pooled, states=states), Cond(null, None, null_pooled, states=null_states)
    words = {"complex_human_instruction": SANA_INSTRUCTION.split("\n")} if name == "sana" else {}
    if name == "lumina2":
        words["negative_prompt"] = [""] * len(PROMPTS)
    text, mask, null, null_mask = pipeline.encode_prompt(PROMPTS, **words)
    return Cond(text, mask.bool(), nothing), Cond(null, null_mask.bool(), nothing)


def compare(ours: Cond, theirs: Cond) -> None:
    assert ours.pooled.shape == theirs.pooled.shape
    assert torch.allclose(ours.pooled, theirs.pooled, atol=1e-5)
    assert ours.text.shape == theirs.text.shape
    if theirs.mask is None:
        assert ours.mask is None
        assert torch.allclose(ours.text, theirs.text, atol=1e-5)
    else:
        assert ours.mask is not None
        assert torch.equal(ours.mask, theirs.mask)
        assert torch.allclose(ours.text[ours.mask], theirs.text[theirs.mask], atol=1e-5)
    if theirs.states is not None:
        assert ours.states is not None
        assert torch.allclose(ours.states, theirs.states, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_prompts_become_what_diffusers_makes_of_them(name: str, tmp_path: Path) -> None:
    pipeline, ours = build(name, tmp_path)
    expected, null = said(name, pipeline)
    cond = ours(PROMPTS)
    compare(cond, expected)
    assert not torch.allclose(cond.text[0], cond.text[1], atol=1e-3) or not torch.allclose(cond.pooled[0], cond.pooled[1], atol=1e-3)
    if null is not None:
        compare(ours(["", ""]), null)
    alone = ours([PROMPTS[1]])
    assert torch.allclose(alone.text, cond.text[1:], atol=1e-4)


def test_the_instruction_of_sana_is_word_by_word_theirs() -> None:
    import inspect

    default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    assert "\n".join(default) == SANA_INSTRUCTION


def test_prompts_with_an_instruction_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = build("sana", tmp_path)
    read: list[int] = []
    monkeypatch.setattr(ours.encoders[0].model, "forward", _counted(ours.encoders[0].model.forward, read))  # type: ignore[union-attr]
    mixed, apart = ours(["", PROMPTS[0], "", PROMPTS[1]]), [ours([prompt]) for prompt in ("", *PROMPTS)]
    assert read[:2] == [2, 2]
    for row, alone in zip((0, 2, 1, 3), (apart[0], apart[0], *apart[1:]), strict=True):
        assert torch.allclose(mixed.text[row], alone.text[0], atol=1e-5)


def _counted(forward: Any, read: list[int]) -> Any:
    def counted(tokens: Tensor, **keywords: Any) -> Any:
        read.append(len(tokens))
        return forward(tokens, **keywords)

    return counted


def test_encoders_are_frozen_shared_and_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    _, ours = build("sd1.5", tmp_path)
    assert list(ours.parameters()) == []
    assert ours.state_dict() == {}
    model = ours.encoders[0].model  # type: ignore[union-attr]
    assert copy.deepcopy(ours).encoders[0].model is model  # type: ignore[union-attr]
    assert not any(p.requires_grad for p in model.parameters())
    ours.train()
    assert not model.training
    assert not ours(PROMPTS).text.requires_grad


def test_a_long_prompt_is_cut_with_a_warning(tmp_path: Path) -> None:
    _, ours = build("sd1.5", tmp_path)
    with pytest.warns(UserWarning, match="prompt cut from 102 to 77 tokens: 'aaaa"):
        cond = ours(["a" * 100])
    assert cond.text.shape[1] == 77


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    config = PublishedConfig((EncoderConfig(weights=str(tmp_path), tokenizer=str(tmp_path)),))
    with pytest.raises(UserError, match=r"cannot read a text encoder from .*only safetensors") as error:
        config.build()
    assert "\n" not in str(error.value)


def test_a_left_out_encoder_says_zeros() -> None:
    clip = EncoderConfig(pooled="projected", width=6, pooled_width=4)
    ours = PublishedConfig((clip, clip.replace(text="beside"), EncoderConfig("t5", length=9, width=20, masked="all"))).build()
    cond = ours(PROMPTS)
    text: Tensor = cond.text
    assert text.shape == (2, 77 + 9, 20)
    assert cond.pooled.shape == (2, 8)
    assert not text.any()
    assert cond.mask is not None
    assert cond.mask.sum(1).tolist() == [77] * 2


def test_a_language_model_gives_transfusion_the_numbers_of_its_tokens(tmp_path: Path) -> None:
    tokenizer = peers.letters()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = FAMILIES["transfusion"].at([("", str(tmp_path / "tokenizer"))])
    denoiser = TransfusionConfig(width=32, depth=1, heads=4, hidden=48, vocabulary=len(tokenizer) + 1, channels=3)
    pipeline = sampled(text, denoiser, tmp_path)
    cond = pipeline.encode(["a red star", ""])
    assert cond.tokens is not None
    ids = tokenizer("a red star").input_ids
    assert cond.tokens[0].tolist() == ids + [-1] * (64 - len(ids))
    assert (cond.tokens[1] >= 0).sum() == 1  # what begins a text


def test_a_language_model_gives_fuse_dit_keys_and_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = peers.gemma()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "llm")
    text = FAMILIES["fuse-dit"].at([(str(tmp_path / "llm"), str(tmp_path / "llm"))])
    denoiser = FuseDiTConfig(width=16, depth=3, heads=2, kv_heads=1, head=8, hidden=32, channels=3)
    pipeline = sampled(text, denoiser, tmp_path)
    cond = pipeline.encode(["a red star", "circle"])
    assert cond.states is not None
    assert cond.states_mask is not None
    ids = tokenizer("circle", return_tensors="pt").input_ids
    assert cond.states_mask.sum(1).tolist() == [len("<a_red_star"), len("<circle")]
    alone = keys_and_values(model, ids, torch.ones_like(ids, dtype=torch.bool))
    assert torch.allclose(cond.states[1:, :, cond.states_mask[1]], alone, atol=1e-5)


def test_an_encoder_without_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    model, tokenizer = peers.clip(projected=False)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    text = PublishedConfig((EncoderConfig(),)).at([(str(tmp_path), str(tmp_path))])
    text.build()
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if name.endswith("final_layer_norm.bias"))
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of a text encoder: .*final_layer_norm\.bias"):
        text.build()


def test_an_encoder_that_is_gone_is_not_looked_for_on_a_hub(tmp_path: Path) -> None:
    config = FAMILIES["sd1.5"].at([("text/0", "text/0")])
    with pytest.raises(UserError, match="has lost its folder text/0"):
        config.found_in(tmp_path)
    (tmp_path / "text" / "0").mkdir(parents=True)
    assert config.found_in(tmp_path).encoders[0].weights == str(tmp_path / "text" / "0")


def sampled(text: PublishedConfig, denoiser: DenoiserConfig, folder: Path) -> Pipeline:
    """A pipeline that draws what it is told, and the same when it was saved and loaded."""
    torch.manual_seed(0)
    pipeline = PipelineConfig(text, denoiser, sampling=Sampling(8, 2, 2.0)).build()
    for parameter in pipeline.denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    images = pipeline(["a red star", "circle"], seed=[0, 0])
    assert images.shape == (2, 3, 8, 8)
    assert float((images[0] - images[1]).abs().max()) > 1e-3
    pipeline.save(folder / "saved")
    assert torch.equal(load(folder / "saved")(["a red star", "circle"], seed=[0, 0]), images)
    return pipeline
