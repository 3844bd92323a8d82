"""Encoders of published models: what diffusers' pipelines make of a prompt, from the same weights."""

import copy
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from diffusers import HiDreamImagePipeline
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from torch import Tensor

from mezzotint.errors import UserError
from mezzotint.models import Cond
from mezzotint.text.published import FAMILIES, SANA_INSTRUCTION, EncoderConfig, Published, PublishedConfig

PROMPTS = ["A Red Star", "two blue circles above it"]
ENCODERS = {name: ("", "_2", "_3")[: len(config.encoders)] for name, config in FAMILIES.items() if name != "hidream"}


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


def test_hidream_reads_all_layers_of_its_language_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoders = [peers.clip(True, positions=128), peers.clip(True, 20, positions=128), peers.t5(24), peers.gemma()]
    for number, (model, tokenizer) in enumerate(encoders):
        tokenizer.pad_token = tokenizer.eos_token  # as their pipeline has it for Llama, whose files have none
        model.save_pretrained(tmp_path / str(number))
        tokenizer.save_pretrained(tmp_path / str(number))
        tokenizer.model_max_length, tokenizer.padding_side = 1000, "right"  # as those of its Llama
    parts = [part for pair in encoders for part in pair]
    pipeline = HiDreamImagePipeline(None, peers.kl(4, False, 1.0), *parts[:8], None)
    pipeline.to("cpu")
    with torch.no_grad():
        text, _, states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    ours = FAMILIES["hidream"].at([(str(tmp_path / str(n)), str(tmp_path / str(n))) for n in range(4)]).build()
    cond = ours(PROMPTS)
    compare(cond, Cond(text, None, pooled))
    assert cond.states is not None
    assert torch.allclose(cond.states, states.transpose(0, 1), atol=1e-5)


def test_the_instruction_of_sana_is_word_by_word_theirs() -> None:
    import inspect

    default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    assert "\n".join(default) == SANA_INSTRUCTION


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
