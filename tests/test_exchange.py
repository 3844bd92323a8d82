"""Pipelines of diffusers and ours draw one picture from one noise, whichever wrote the files; what cannot be read is refused."""

import json
from pathlib import Path
from typing import Any

import diffusers
import peers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mezzotint.cli import main
from mezzotint.errors import UserError
from mezzotint.exchange import FAMILIES, WEIGHTS, read_diffusers, read_single_file, write_diffusers, write_single_file
from mezzotint.flow.solvers import randn_like
from mezzotint.models import ClassDiTConfig, HiDreamConfig
from mezzotint.pipeline import DiscretePath, LinearPath, Pipeline, PipelineConfig, load
from mezzotint.text import ClassesConfig
from mezzotint.weights.configs import of_ours

PROMPT, STEPS, GUIDANCE = "a red star", 4, 3.0
SAME = 1e-4  # of pictures in [-1, 1]


@pytest.fixture(params=peers.MADE)
def name(request: pytest.FixtureRequest) -> str:
    family: str = request.param
    return family


def noise(pipeline: Pipeline, name: str, seed: int = 5) -> Tensor:
    """What our pipeline starts from."""
    return randn_like(torch.empty(1, *pipeline.codec.latent_shape(peers.SIZES[name])), [torch.Generator().manual_seed(seed)])


def picture(pipeline: Pipeline, prompt: str = PROMPT, name: str = "sd1.5", **changes: Any) -> Tensor:
    settings = {"seed": 5, "size": peers.SIZES[name], "steps": STEPS, "guidance": GUIDANCE, "rule": "cfg", "solver": "euler"}
    return pipeline(prompt, **{**settings, **changes})


@torch.no_grad()
def theirs(pipeline: Any, name: str, start: Tensor, **words: Any) -> Tensor:
    return peers.draw(pipeline, name, PROMPT, start, peers.SIZES[name], STEPS, GUIDANCE, **words)


def test_one_noise_gives_one_picture_whoever_wrote_the_files(name: str, tmp_path: Path) -> None:
    written = peers.saved(name, tmp_path / "theirs")
    ours = read_diffusers(tmp_path / "theirs")
    start, drawn = noise(ours, name), picture(ours, name=name)
    expected = theirs(written, name, start)
    assert expected.std() > 0.05
    assert drawn.shape == expected.shape
    assert float((drawn - expected).abs().max()) <= SAME
    assert float((picture(ours, "two blue circles", name) - expected).abs().max()) > 10 * SAME
    assert float((picture(ours, name=name, guidance=1.5) - expected).abs().max()) > 10 * SAME

    ours.save(tmp_path / "ours")
    assert torch.equal(picture(load(tmp_path / "ours"), name=name), drawn)

    write_diffusers(load(tmp_path / "ours"), tmp_path / "back")
    read = getattr(diffusers, type(written).__name__).from_pretrained(tmp_path / "back")
    read.set_progress_bar_config(disable=True)
    assert float((theirs(read, name, start) - expected).abs().max()) <= SAME
    for part in ("transformer", "unet", "vae"):
        if (tmp_path / "theirs" / part).is_dir():
            drawn_at = [json.loads((tmp_path / x / part / "config.json").read_text()).get("sample_size") for x in ("theirs", "back")]
            assert part == "vae" or drawn_at[0] == drawn_at[1]
            before, after = (load_file(tmp_path / side / part / "diffusion_pytorch_model.safetensors") for side in ("theirs", "back"))
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)


def test_guidance_that_stops_after_some_steps_is_an_interval(tmp_path: Path) -> None:
    written = peers.saved("lumina2", tmp_path)
    ours = read_diffusers(tmp_path)
    assert ours.config.sampling.rule == "renormed"
    times = ours.times(ours.config.sampling.replace(steps=STEPS))
    whole = theirs(written, "lumina2", noise(ours, "lumina2"))
    half = theirs(written, "lumina2", noise(ours, "lumina2"), cfg_trunc_ratio=0.5)  # of the steps
    assert float((half - whole).abs().max()) > 10 * SAME
    assert float((picture(ours, interval=(times[1].item(), 1.0)) - half).abs().max()) <= SAME


def test_files_of_an_encoder_that_was_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    written = peers.sd3(with_t5=False)
    written.set_progress_bar_config(disable=True)
    written.save_pretrained(tmp_path / "theirs")
    ours = read_diffusers(tmp_path / "theirs")
    cond = ours.encode([PROMPT])
    assert cond.text.shape == (1, 77 + 256, 40)
    assert not cond.text[:, 77:].any()
    assert float((picture(ours) - theirs(written, "sd3", noise(ours, "sd3"))).abs().max()) <= SAME
    ours.save(tmp_path / "ours")
    assert torch.equal(picture(load(tmp_path / "ours")), picture(ours))


def test_paths_and_settings_are_those_of_the_files(tmp_path: Path) -> None:
    peers.saved("sd1.5", tmp_path / "sd")
    ours = read_diffusers(tmp_path / "sd")
    assert ours.config.path == DiscretePath()
    assert ours.config.denoiser.prediction == "noise"
    assert ours.config.sampling.size == 16
    schedule = tmp_path / "sd" / "scheduler" / "scheduler_config.json"
    data = json.loads(schedule.read_text())
    schedule.write_text(json.dumps(data | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}))
    ours = read_diffusers(tmp_path / "sd")
    assert ours.config.path == DiscretePath(zero_terminal=True)
    assert ours.config.denoiser.prediction == "vp_velocity"
    for change, message in (
        ({"beta_schedule": "linar"}, "'linear'"),
        ({"prediction_type": "epsilom"}, "'epsilon'"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "max_shift": 2.0}, "max_shift"),
    ):
        schedule.write_text(json.dumps(data | change))
        with pytest.raises(UserError, match=message):
            read_diffusers(tmp_path / "sd")
    schedule.write_text(json.dumps({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}))
    flowing = read_diffusers(tmp_path / "sd")
    assert flowing.config.path == LinearPath()
    assert flowing.config.sampling.shift == 3.0


def test_shards_are_read_and_damage_is_named(tmp_path: Path) -> None:
    peers.saved("sd1.5", tmp_path)
    expected = picture(read_diffusers(tmp_path))
    folder, stem = tmp_path / "unet", "diffusion_pytorch_model"
    whole = folder / f"{stem}.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({key: tensors[key] for key in part}, folder / file)
    index = folder / f"{stem}.safetensors.index.json"
    where = {key: file for file, part in shards.items() for key in part}
    index.write_text(json.dumps({"weight_map": where}))
    assert torch.equal(picture(read_diffusers(tmp_path)), expected)

    for outside in ("../a.safetensors", "/etc/passwd", "x/../../a.safetensors", "C:a.safetensors", "..\\a.safetensors"):
        index.write_text(json.dumps({"weight_map": where | {names[0]: outside}}))
        with pytest.raises(UserError, match="names a file outside of its folder"):
            read_diffusers(tmp_path)
    index.write_text(json.dumps({"weight_map": where | {"more": "a.safetensors"}}))
    with pytest.raises(UserError, match="does not hold what its index says: more"):
        read_diffusers(tmp_path)
    fewer = {key: file for key, file in where.items() if key not in names[:2]}
    index.write_text(json.dumps({"weight_map": fewer}))
    with pytest.raises(UserError, match=f"2 missing: {', '.join(sorted(names[:2], reverse=True))}"):
        read_diffusers(tmp_path)
    save_file(tensors | {"more": torch.zeros(1)}, whole)
    with pytest.raises(UserError, match="1 left over: more"):
        read_diffusers(tmp_path)
    save_file(tensors | {names[0]: torch.zeros(1)}, whole)
    with pytest.raises(UserError, match="have another shape"):
        read_diffusers(tmp_path)
    whole.write_bytes(whole.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read"):
        read_diffusers(tmp_path)
    whole.unlink()
    index.unlink()
    (folder / f"{stem}.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"\.bin is a pickle, and reading one runs any code"):
        read_diffusers(tmp_path)
    (folder / f"{stem}.bin").unlink()
    with pytest.raises(UserError, match=r"no weights in .*unet: expected diffusion_pytorch_model\.safetensors"):
        read_diffusers(tmp_path)


def test_what_is_larger_than_a_shard_is_written_in_shards(tmp_path: Path) -> None:
    peers.saved("pixart", tmp_path / "theirs")
    ours, back = read_diffusers(tmp_path / "theirs"), tmp_path / "back"
    write_diffusers(ours, back)
    write_diffusers(ours, back, shard=20_000)
    transformer = back / "transformer"
    files = sorted(path.name for path in transformer.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"{WEIGHTS}-{k:05}-of-{len(files):05}.safetensors" for k in range(1, len(files) + 1)]
    index = json.loads((transformer / f"{WEIGHTS}.safetensors.index.json").read_text())
    held = {file: load_file(transformer / file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    sizes = {file: sum(x.nbytes for x in tensors.values()) for file, tensors in held.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 20_000 or len(held[file]) == 1 for file, size in sizes.items())
    read = diffusers.PixArtTransformer2DModel.from_pretrained(transformer)
    before = load_file(tmp_path / "theirs" / "transformer" / f"{WEIGHTS}.safetensors")
    after = read.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(picture(read_diffusers(back)), picture(ours))
    write_diffusers(ours, back)
    assert [path.name for path in transformer.glob("*.safetensors*")] == [f"{WEIGHTS}.safetensors"]


def test_descriptions_that_ask_for_more_are_refused(tmp_path: Path) -> None:
    peers.saved("sd1.5", tmp_path)
    for file, change, message in (
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn 'gelu'"),
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "unknown architecture 'UNet2DModel'; did you mean 'UNet2DConditionModel'"),
        ("unet/config.json", {"block_out_channels": None}, "cannot be read: TypeError"),
        ("vae/config.json", {"latents_mean": [0.0]}, "latents_mean"),
        ("model_index.json", {"_class_name": "StableDiffusionPipelin"}, "did you mean 'StableDiffusionPipeline'"),
        ("model_index.json", {"text_encoder": [None, None]}, "has no text_encoder, and this family cannot do without it"),
    ):
        path = tmp_path / file
        text = path.read_text()
        path.write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(UserError, match=message):
            read_diffusers(tmp_path)
        path.write_text(text)
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="has no folder tokenizer, which its index names"):
        read_diffusers(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "tokenizer")
    weights = tmp_path / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(UserError, match="cannot read a text encoder from"):
        read_diffusers(tmp_path)


@pytest.mark.parametrize("family", ["sd3", "flux", "sd1.5", "sdxl"])
def test_single_files_go_both_ways(family: str, tmp_path: Path) -> None:
    peers.saved(family, tmp_path / "theirs")
    ours, other = read_diffusers(tmp_path / "theirs"), read_diffusers(tmp_path / "theirs")
    expected, file = picture(ours), tmp_path / "single" / "model.safetensors"
    write_single_file(ours, file)
    with torch.no_grad():
        for parameter in (*other.denoiser.parameters(), *other.codec.parameters()):
            parameter.mul_(0.5)
    assert not torch.allclose(picture(other), expected, atol=0.01)
    assert read_single_file(file, other) == []
    assert torch.equal(picture(other), expected)

    tensors = load_file(file)
    bare = {key.removeprefix("model.diffusion_model."): x for key, x in tensors.items() if key.startswith("model.")}
    save_file(bare, file)
    assert read_single_file(file, other) == []
    assert torch.equal(picture(other), expected)
    save_file(tensors | {"cond_stage_model.x": torch.zeros(1), "betas": torch.zeros(1)}, file)
    assert read_single_file(file, other) == ["cond_stage_model.", "betas"]
    save_file(tensors | {"lora.x": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"1 tensors of no known part: lora\.x"):
        read_single_file(file, other)
    tensors.pop(next(key for key in tensors if key.startswith("model.") and key.endswith("weight")))
    save_file(tensors, file)
    with pytest.raises(UserError, match="do not fit this architecture"):
        read_single_file(file, other)


def test_what_others_do_not_have_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diffusers has no network of the kind 'dit'"):
        write_diffusers(pipeline, tmp_path)
    with pytest.raises(UserError, match="diffusers has no network of the kind 'dit'"):
        write_single_file(pipeline, tmp_path / "x.safetensors")
    peers.saved("sana", tmp_path)
    with pytest.raises(UserError, match="publisher's own names of a SanaTransformer2DModel are not known"):
        write_single_file(read_diffusers(tmp_path), tmp_path / "x.safetensors")


def test_networks_that_diffusers_has_no_words_for_are_refused() -> None:
    tiny = ClassDiTConfig(width=24, depth=1, heads=2)
    for config, message in (
        (tiny.replace(variant="in_context"), "variant 'in_context', and a DiTTransformer2DModel of diffusers only 'adaln_zero'"),
        (tiny.replace(span=4.3), "span 4.3"),
        (HiDreamConfig(width=32, heads=2, axes=(8, 4, 4), hidden=300), "hidden 300, and a HiDreamImageTransformer2DModel"),
    ):
        with pytest.raises(UserError, match=message):
            of_ours(config).write(config, 32)


def test_names_of_classes_are_those_of_the_index(tmp_path: Path) -> None:
    peers.saved("dit", tmp_path)
    described = tmp_path / "transformer" / "config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"_class_name": "Transformer2DModel"}))  # as published
    ours = read_diffusers(tmp_path)
    label = ours.encode(["Star of Red", "thing 12", "999", ""]).label
    assert label is not None
    assert label.tolist() == [7, 12, 999, -1]
    index = tmp_path / "model_index.json"
    data = json.loads(index.read_text())
    index.write_text(json.dumps({key: value for key, value in data.items() if key != "id2label"}))
    assert torch.equal(picture(read_diffusers(tmp_path), "7", "dit"), picture(ours, PROMPT, "dit"))
    few = PipelineConfig(ClassesConfig(("", "")), ours.config.denoiser.replace(classes=2), ours.config.codec, path=ours.config.path)
    with pytest.raises(UserError, match="takes 1000 for the number of no class, and here that is 2"):
        write_diffusers(few.build(), tmp_path / "back")
    assert not (tmp_path / "back").exists()
    index.write_text(json.dumps(data | {"id2label": {"1000": "one more"}}))
    with pytest.raises(UserError, match="names a class 1000, and the network knows numbers from 0 to 999"):
        read_diffusers(tmp_path)


def test_a_stored_pipeline_names_no_files_outside_of_its_folder(tmp_path: Path) -> None:
    peers.saved("sd1.5", tmp_path / "theirs")
    read_diffusers(tmp_path / "theirs").save(tmp_path / "ours")
    path = tmp_path / "ours" / "pipeline.json"
    data = json.loads(path.read_text())
    assert data["text"]["encoders"][0]["weights"] == "text/0"
    for outside in ("../theirs/text_encoder", str(tmp_path / "theirs" / "text_encoder")):
        data["text"]["encoders"][0]["weights"] = outside
        path.write_text(json.dumps(data))
        with pytest.raises(UserError, match="names a file outside of its folder"):
            load(tmp_path / "ours")


def test_weights_keep_the_precision_of_their_files(tmp_path: Path) -> None:
    peers.make("sd3").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    ours = read_diffusers(tmp_path / "theirs")
    assert {p.dtype for p in ours.denoiser.parameters()} == {torch.bfloat16}
    ours.save(tmp_path / "ours")
    assert {x.dtype for x in load_file(tmp_path / "ours" / "model.safetensors").values()} == {torch.bfloat16}
    whole, stored = load(tmp_path / "ours"), load(tmp_path / "ours", dtype=None)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    drawn = picture(stored)
    assert drawn.dtype == torch.float32
    assert 0 < float((drawn - picture(whole)).abs().mean()) < 0.02


def test_the_command_line_imports_samples_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers.saved("sd1.5", tmp_path / "theirs")
    ours, back, single = (str(tmp_path / x) for x in ("ours", "back", "single.safetensors"))
    capsys.readouterr()
    assert main(["import", str(tmp_path / "theirs"), "--out", ours]) == 0
    assert main(["sample", PROMPT, "--model", ours, "--size", "24x16", "--steps", "2", "--out", str(tmp_path / "x.png")]) == 0
    assert Image.open(tmp_path / "x.png").size == (24, 16)
    assert main(["export", ours, "--to", "diffusers", "--out", back]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"pipeline: {ours}", str(tmp_path / "x.png"), back]
    assert [line.split()[0] for line in said.err.splitlines()] == ["sampling"], "bars and notes of transformers are not ours"
    assert torch.equal(picture(read_diffusers(tmp_path / "back")), picture(load(ours)))
    assert main(["export", ours, "--to", "single-file", "--out", single]) == 0
    assert main(["import", single, "--base", ours, "--out", str(tmp_path / "again")]) == 0
    assert torch.equal(picture(load(tmp_path / "again")), picture(load(ours)))
    run = tmp_path / "run"
    few = ["--train.steps", "1", "--train.batch", "2", "--train.held-out", "2", "--train.preview", "9", "--pipeline.sampling.steps", "2"]
    assert main(["train", "tiny.sft", "--init", ours, "--adapter.rank", "2", "--out", str(run), *few]) == 0
    assert load(run).config.sampling == load(ours).config.sampling.replace(steps=2)
    assert float((picture(load(run)) - picture(load(ours), steps=2)).abs().max()) < 0.1
    capsys.readouterr()
    (tmp_path / "x.ckpt").write_bytes(b"")
    for words, message in (
        ([single], "say with --base which pipeline"),
        ([str(tmp_path / "nowhere")], "it does not exist"),
        ([ours], "is no diffusers folder"),
        ([str(tmp_path / "x.ckpt")], "is a pickle"),
        ([str(tmp_path / "x.ckpt"), "--base", ours], "is a pickle"),
    ):
        assert main(["import", *words, "--out", str(tmp_path / "no")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


def test_every_family_has_a_peer_and_is_in_the_readme() -> None:
    assert {family.text for family in FAMILIES.values()} == peers.MADE.keys()
    text = (Path(__file__).parent.parent / "README.md").read_text()
    assert all(f"`{name}`" in text for name in FAMILIES)
