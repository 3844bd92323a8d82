"""Adapters in files: every dialect to every other, and to and from diffusers' networks, changes no weight and no output."""

import json
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import test_flux
import test_mmdit
import test_pixart
import test_sana
import test_unet
import torch
from diffusers import FluxPipeline, SanaPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models import embeddings
from parity import EQUAL, Parity, distance
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mezzotint.models import DiTConfig, lora
from mezzotint.models.embed import sinusoid
from mezzotint.models.flux import flux_dev
from mezzotint.weights import lora as files
from mezzotint.weights.lora import Dialect, LowRank
from mezzotint.weights.names import SWAP, Change, columns, conv, copies, fuse, rows, stack

DIALECTS: tuple[Dialect, ...] = get_args(Dialect)
State = dict[str, Tensor]

FLUX, SD35 = test_flux.TINY, test_mmdit.TINY.replace(qk_norm=True, dual=1)
SD15 = test_unet.TINY.replace(widths=(8, 16), depths=(1, 0), heads=(2, 4), layers=1)
SDXL, SANA = test_unet.XL.replace(layers=1), test_sana.TINY.replace(qk_norm=True)

# An architecture, a tiny configuration, its dialects, and diffusers' pipeline that reads and writes its adapters.
CASES: dict[str, tuple[Parity, Any, tuple[Dialect, ...], Any]] = {
    "flux": (test_flux.TestFlux(), FLUX, DIALECTS, FluxPipeline),
    "flux control": (test_flux.TestFlux(), FLUX.replace(control=4), DIALECTS, FluxPipeline),
    "sd3": (test_mmdit.TestMMDiT(), test_mmdit.TINY, DIALECTS, StableDiffusion3Pipeline),
    "sd3.5": (test_mmdit.TestMMDiT(), SD35, DIALECTS, StableDiffusion3Pipeline),
    "sd1.5": (test_unet.TestUNet(), SD15, DIALECTS, StableDiffusionPipeline),
    "sdxl": (test_unet.TestUNet(), SDXL, DIALECTS, StableDiffusionXLPipeline),
    "sana": (test_sana.TestSana(), SANA, ("peft", "diffusers"), SanaPipeline),
    "sana, patches": (test_sana.TestSana(), test_sana.TINY.replace(patch=2), ("peft", "diffusers"), SanaPipeline),
    "pixart": (test_pixart.TestPixArt(), test_pixart.TINY, ("peft", "diffusers"), None),
}


class Case:
    """A row of the table."""

    def __init__(self, name: str) -> None:
        self.parity, self.config, self.dialects, self.pipeline = CASES[name]
        self.part = "unet" if name in ("sd1.5", "sdxl") else "transformer"

    def state(self, dora: bool = False) -> State:
        """Random adapters on every layer, of ranks 2 and 3, with alphas that are not the rank."""
        net = self.config.build()
        torch.manual_seed(2)
        state: State = {}
        for number, (layer, module) in enumerate(lora.layers(net).items()):
            shape, rank = module.weight.shape, 2 + (number % 3 == 0)
            a, b = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *(1 for _ in shape[2:]))
            state[f"{layer}.lora_A.weight"] = 0.1 * a
            state[f"{layer}.lora_B.weight"] = 0.1 * b
            state[f"{layer}.alpha"] = torch.tensor((1.5, 5.0)[number % 2])
            if dora:
                lengths = 1 + 0.1 * torch.rand(shape[0])
                state[f"{layer}.lora_magnitude_vector"] = lengths if len(shape) == 2 else lengths[None, :, None, None]
        return state


@pytest.fixture(autouse=True)
def sinusoids_as_we_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the peers are rounded more; see parity."""
    monkeypatch.setattr(embeddings, "get_timestep_embedding", lambda t, dim, **keywords: sinusoid(t, dim))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def through(path: Path, state: State, config: Any, dialect: Dialect) -> State:
    """Written and read again."""
    place = path / dialect if dialect == "peft" else path / f"{dialect}.safetensors"
    files.write(place, state, config, dialect)
    return files.read(place, config)[0]


def products(state: State) -> State:
    """alpha / r B A of every layer, and the lengths of a DoRA."""
    layers = [key.removesuffix(".alpha") for key in state if key.endswith(".alpha")]
    result = {}
    for layer in layers:
        a, b = state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]
        result[layer] = state[f"{layer}.alpha"] / len(a) * (b.flatten(1) @ a.flatten(1))
    return result | {key: x for key, x in state.items() if key.endswith("vector")}


def assert_same(state: State, other: State) -> None:
    """The same changes of the same layers, to 1e-6."""
    given, found = products(state), products(other)
    assert given.keys() == found.keys()
    for layer, x in given.items():
        assert x.shape == found[layer].shape
        assert distance(found[layer], x) <= 1e-6, layer


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_every_dialect_goes_to_every_other_and_back(case: Case, tmp_path: Path, dora: bool) -> None:
    state = case.state(dora)
    for first in case.dialects:
        once = through(tmp_path, state, case.config, first)
        assert_same(state, once)
        assert {key: x.shape for key, x in once.items()} == {key: x.shape for key, x in state.items()}
        for second in () if dora else case.dialects:
            assert_same(state, through(tmp_path, once, case.config, second))


def test_alphas_stay_but_in_diffusers_files(case: Case, tmp_path: Path) -> None:
    state = case.state()
    for dialect in case.dialects:
        back = through(tmp_path, state, case.config, dialect)
        for key in (key for key in state if key.endswith(".alpha")):
            rank = len(state[key.replace("alpha", "lora_A.weight")])
            assert float(back[key]) == pytest.approx(rank if dialect == "diffusers" else float(state[key]))
    with safe_open(tmp_path / "diffusers.safetensors", "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert {key.split(".")[0] for key in told} == {case.part}
    assert {told[f"{case.part}.lora_alpha"], *told[f"{case.part}.alpha_pattern"].values()} == {2, 3}


def test_dialects_that_are_not_known_are_refused(case: Case, tmp_path: Path) -> None:
    for dialect in set(DIALECTS) - set(case.dialects):
        with pytest.raises(ValueError, match=rf"names of \w+ in the dialect '{dialect}' are not known here; known: peft, diffusers"):
            files.write(tmp_path / "x.safetensors", case.state(), case.config, dialect)
    with pytest.raises(ValueError, match=r"names of dit in the dialect 'diffusers' are not known here; known: peft$"):
        files.write(tmp_path / "x.safetensors", case.state(), DiTConfig(), "diffusers")


# Beside diffusers' networks.


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_our_files_do_the_same_to_diffusers_networks(case: Case, tmp_path: Path, dora: bool, recwarn: pytest.WarningsRecorder) -> None:
    ours, theirs = case.parity.pair(case.config)
    x, t, cond = case.parity.inputs(case.config, (8, 8))
    plain, state = ours(x, t, cond), case.state(dora)
    lora.load(ours, state)
    path = tmp_path / "adapter.safetensors"
    files.write(path, state, case.config, "diffusers")
    if case.pipeline is not None:
        theirs.load_lora_adapter(path.parent, weight_name=path.name, prefix=case.part)
    else:  # diffusers' PixArt cannot load adapters by itself
        tensors = {key.removeprefix("transformer."): x for key, x in load_file(path).items()}
        with safe_open(path, "pt") as file:
            settings = json.loads(file.metadata()["lora_adapter_metadata"])
        inject_adapter_in_model(LoraConfig(**{key.removeprefix("transformer."): x for key, x in settings.items()}), theirs)
        assert not set_peft_model_state_dict(theirs, tensors).unexpected_keys
    assert not [w for w in recwarn if "target" in str(w.message) or "keys" in str(w.message)]
    with torch.no_grad():
        out = ours(x, t, cond)
        assert distance(out, plain) > 1e-2
        assert distance(out, case.parity.call(theirs, x, t, cond)) <= EQUAL


def adapted(theirs: nn.Module, rank: int, dora: bool) -> None:
    """diffusers' network with an adapter on all its layers, as its training scripts make one, and random weights in it."""
    found = {name: m for name, m in theirs.named_modules() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)}
    some, other = list(found)[::3], list(found)[::5]
    ranks, alphas = ({f"^{name}$": value for name in names} for names, value in ((some, rank + 1), (other, 2.5)))
    settings = LoraConfig(r=rank, lora_alpha=3, target_modules=list(found), rank_pattern=ranks, alpha_pattern=alphas, use_dora=dora)
    inject_adapter_in_model(settings, theirs)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if ".lora_" in name:
                p.mul_(1 + 0.1 * torch.rand_like(p)) if "magnitude" in name else p.normal_(std=0.1)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_diffusers_files_do_the_same_to_our_networks(case: Case, tmp_path: Path, dora: bool) -> None:
    ours, theirs = case.parity.pair(case.config)
    x, t, cond = case.parity.inputs(case.config, (8, 8))
    plain = ours(x, t, cond)
    if case.pipeline is not None:
        adapted(theirs, 2, dora)
        layers, settings = get_peft_model_state_dict(theirs), theirs.peft_config["default"].to_dict()
        about = {f"{case.part}_lora_layers": layers, f"{case.part}_lora_adapter_metadata": settings}
        case.pipeline.save_lora_weights(tmp_path, **about)
        (path,) = tmp_path.glob("*.safetensors")
    else:  # PixArt's adapters are peft's, of diffusers' network
        path = tmp_path
        settings = LoraConfig(r=3, lora_alpha=2, target_modules="transformer_blocks.*(to_[qkv]|proj|to_out.0)", use_dora=dora)
        wrapped = get_peft_model(theirs, settings)
        with torch.no_grad():
            for name, p in wrapped.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.2)
        wrapped.save_pretrained(path)
    lora.load(ours, files.read(path, case.config)[0])
    with torch.no_grad():
        out = ours(x, t, cond)
        assert distance(out, plain) > 1e-2
        assert distance(out, case.parity.call(theirs, x, t, cond)) <= EQUAL


@pytest.mark.parametrize("name", ["sd1.5", "sdxl"])
def test_kohya_files_do_the_same_to_diffusers_unets(name: str, tmp_path: Path) -> None:
    case = Case(name)
    ours, theirs = case.parity.pair(case.config)
    x, t, cond = case.parity.inputs(case.config, (8, 8))
    # It loses the alphas of attention layers where they differ, so here they do not.
    layers = {name: module.weight.shape for name, module in lora.layers(ours).items() if ".transformer." in name or ".res." in name}
    state: State = {}
    for layer, (out, *inputs) in layers.items():
        state[f"{layer}.lora_A.weight"], state[f"{layer}.alpha"] = 0.1 * torch.randn(2, *inputs), torch.tensor(3.0)
        state[f"{layer}.lora_B.weight"] = 0.1 * torch.randn(out, 2, *(1 for _ in inputs[1:]))
    lora.load(ours, state)
    files.write(tmp_path / "kohya.safetensors", state, case.config, "kohya")
    tensors, alphas = case.pipeline.lora_state_dict(load_file(tmp_path / "kohya.safetensors"), unet_config=theirs.config)
    case.pipeline.load_lora_into_unet(tensors, alphas, theirs)
    with torch.no_grad():
        assert distance(ours(x, t, cond), case.parity.call(theirs, x, t, cond)) <= EQUAL


def test_kohya_files_of_flux_are_what_diffusers_converts(tmp_path: Path) -> None:
    # The converter knows the published width only. Separate layers of ours are block-diagonal there, and it cuts them up again.
    config = flux_dev().replace(joint=1, single=1)
    with torch.device("meta"):
        weights = {layer: module.weight for layer, module in lora.layers(config.build()).items() if layer.startswith(("joint", "single"))}
    state: State = {}
    for layer, weight in weights.items():
        state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = torch.randn(2, weight.shape[1]), torch.randn(len(weight), 2)
        state[f"{layer}.alpha"] = torch.tensor(3.0)
    kohya, _ = files.to_theirs(state, config, "kohya")
    save_file(kohya, tmp_path / "kohya.safetensors")
    converted = FluxPipeline.lora_state_dict(load_file(tmp_path / "kohya.safetensors"))
    expected, _ = files.to_theirs(state, config, "diffusers")
    assert converted.keys() == expected.keys()
    for key in (key for key in expected if "lora_A" in key):
        up = key.replace("lora_A", "lora_B")
        rows, columns = torch.randint(len(expected[up]), (50,)), torch.randint(expected[key].shape[1], (50,))
        ours, theirs = (x[up][rows] @ x[key][:, columns] for x in (expected, converted))
        assert distance(ours, theirs) <= 1e-6
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in kohya
    assert "lora_unet_single_blocks_0_linear1.alpha" in kohya


@pytest.mark.parametrize(
    ("name", "dialect", "keys"),
    [
        (
            "flux",
            "comfyui",
            ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "diffusion_model.single_blocks.1.linear1.alpha"),
        ),
        (
            "sd3",
            "kohya",
            ("lora_unet_joint_blocks_0_context_block_attn_qkv.lora_up.weight", "lora_unet_joint_blocks_1_x_block_mlp_fc1.alpha"),
        ),
        ("sd3", "comfyui", ("diffusion_model.joint_blocks.0.x_block.attn.proj.lora_B.weight",)),
        ("sd1.5", "kohya", ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",)),
        ("sdxl", "kohya", ("lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_v.lora_down.weight",)),
        ("sdxl", "diffusers", ("unet.mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj.lora_A.weight",)),
        ("sana", "diffusers", ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",)),
        ("pixart", "diffusers", ("transformer.pos_embed.proj.lora_A.weight",)),
    ],
)
def test_keys_are_those_that_are_seen(name: str, dialect: Dialect, keys: tuple[str, ...]) -> None:
    case = Case(name)
    tensors, _ = files.to_theirs(case.state(), case.config, dialect)
    assert set(keys) <= tensors.keys()
    assert files.dialect_of(tensors) == dialect


@pytest.mark.parametrize("name", ["sd1.5", "sdxl"])
def test_kohya_files_of_unets_are_read_under_either_names(name: str) -> None:
    case = Case(name)
    for make in (test_unet.unet.diffusers, test_unet.unet.original):
        moves, sizes = files._moves(case.config, "kohya", make(case.config))
        carried = files._carried(files._parsed(case.state(), files._alpha({})), moves, sizes, "ours")
        tensors = {key: x for layer, pair in carried.items() for key, x in pair.named(layer, files.LEAVES["kohya"]).items()}
        assert_same(case.state(), files.to_ours(tensors, case.config))


def test_peft_reads_our_folders(case: Case, tmp_path: Path) -> None:
    ours, _ = case.parity.pair(case.config)
    other, _ = case.parity.pair(case.config)
    x, t, cond = case.parity.inputs(case.config, (8, 8))
    files.write(tmp_path, case.state(), case.config, "peft")
    lora.load(ours, case.state())
    PeftModel.from_pretrained(other, tmp_path)  # wraps the layers of `other` itself
    with torch.no_grad():
        assert distance(ours(x, t, cond), other(x, t, cond)) <= EQUAL


# Layers that are one here and several there.


@cache
def separate() -> State:
    """A diffusers file of FLUX with adapters of rank 4 on q, k, v of one block and on q and mlp of another."""
    torch.manual_seed(4)
    state: State = {}
    for layer, out in (
        ("transformer_blocks.0.attn.to_q", 32),
        ("transformer_blocks.0.attn.to_k", 32),
        ("transformer_blocks.0.attn.to_v", 32),
        ("single_transformer_blocks.1.attn.to_q", 32),
        ("single_transformer_blocks.1.proj_mlp", 128),
    ):
        state[f"transformer.{layer}.lora_A.weight"], state[f"transformer.{layer}.lora_B.weight"] = torch.randn(4, 32), torch.randn(out, 4)
    return state


def test_separate_layers_become_one_of_the_sum_of_ranks_and_come_back() -> None:
    ours = files.to_ours(separate(), FLUX)
    assert {key: tuple(x.shape) for key, x in ours.items()} == {
        "joint.0.image.qkv.linear.lora_A.weight": (12, 32),
        "joint.0.image.qkv.linear.lora_B.weight": (96, 12),
        "joint.0.image.qkv.linear.alpha": (),
        "single.1.inner.lora_A.weight": (8, 32),
        "single.1.inner.lora_B.weight": (224, 8),
        "single.1.inner.alpha": (),
    }
    assert not ours["single.1.inner.lora_B.weight"][32:96].any()
    back, _ = files.to_theirs(ours, FLUX, "diffusers")
    assert back.keys() == separate().keys()
    assert all(torch.equal(back[key], x) for key, x in separate().items())


def test_one_layer_becomes_several_of_the_same_rank_and_comes_back() -> None:
    ours = {
        "joint.0.image.qkv.linear.lora_A.weight": torch.randn(4, 32),
        "joint.0.image.qkv.linear.lora_B.weight": torch.randn(96, 4),
        "joint.0.image.qkv.linear.alpha": torch.tensor(4.0),
    }
    theirs, _ = files.to_theirs(ours, FLUX, "diffusers")
    assert all(torch.equal(x, ours["joint.0.image.qkv.linear.lora_A.weight"]) for key, x in theirs.items() if "lora_A" in key)
    assert [tuple(x.shape) for key, x in theirs.items() if "lora_B" in key] == [(32, 4)] * 3
    back = files.to_ours(theirs, FLUX)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], x) for key, x in ours.items())


def test_a_fresh_adapter_keeps_its_layers() -> None:
    net = FLUX.build()
    lora.add(net, lora.LoRAConfig(rank=4))
    theirs, _ = files.to_theirs(lora.state(net), FLUX, "diffusers")
    assert all(f"transformer.transformer_blocks.0.attn.to_{x}.lora_A.weight" in theirs for x in "qkv")
    back = files.to_ours(theirs, FLUX)
    assert all(torch.equal(back[key], x) for key, x in lora.state(net).items() if "lora_A" in key)


@pytest.mark.parametrize(
    ("change", "shapes"),
    [
        (fuse(1, 1, 1), [(4, 5)] * 3),
        (fuse(4, 1, 1), [(8, 5), (2, 5), (2, 5)]),
        (fuse(1, 1).reversed, [(6, 5)]),
        (SWAP, [(6, 5)]),
        (rows(2), [(12, 5)]),
        (columns(2), [(5, 12)]),
        (conv(2), [(5, 3, 2, 2)]),
        (conv(2).reversed, [(5, 12)]),
    ],
)
def test_adapters_follow_a_change_of_weights(change: Change, shapes: list[tuple[int, ...]]) -> None:
    pairs = [LowRank(torch.randn(2 + i, *shape[1:]), torch.randn(shape[0], 2 + i), 1.0 + i) for i, shape in enumerate(shapes)]

    def weight(pair: LowRank) -> Tensor:
        return pair.scale * (pair.B @ pair.A.flatten(1)).reshape(-1, *pair.A.shape[1:])

    carried = files.carry(pairs, change, [shape[0] for shape in shapes])
    expected = change.to_ours([weight(pair) for pair in pairs])
    assert len(carried) == len(expected)
    for pair, x in zip(carried, expected, strict=True):
        assert pair is not None
        assert distance(weight(pair), x) <= 1e-6


def test_a_change_that_no_pair_follows_is_refused() -> None:
    pair = LowRank(torch.randn(2, 5), torch.randn(4, 2), 1.0)
    with pytest.raises(ValueError, match="no low-rank pair follows"):
        files.carry([pair, pair], stack(2), [4, 4])
    other = LowRank(torch.randn(2, 5), torch.randn(4, 2), 1.0)
    assert len(files.carry([pair, pair], copies(2), [4, 4])) == 1
    with pytest.raises(ValueError, match="must be copies of each other differ"):
        files.carry([pair, other], copies(2), [4, 4])
    with pytest.raises(ValueError, match="either all of them are a DoRA or none"):
        files.carry([pair, LowRank(pair.A, pair.B, 1.0, torch.ones(4))], fuse(1, 1), [4, 4])


# Files.


def test_keys_that_fit_nothing_are_listed() -> None:
    config = FLUX
    kohya, _ = files.to_theirs(Case("flux").state(), config, "kohya")
    pair = {"lora_down.weight": torch.zeros(2, 8), "lora_up.weight": torch.zeros(8, 2)}
    text = {f"lora_te1_layers_0_q.{leaf}": x for leaf, x in pair.items()}
    with pytest.raises(ValueError, match="1 layers of the adapter fit nothing in this network: lora_te1_layers_0_q"):
        files.to_ours(kohya | text, config)
    with pytest.raises(ValueError, match=r"2 keys belong to no pair of a LoRA: lora_unet_x\.lokr_w1, lora_unet_y"):
        files.to_ours(kohya | {"lora_unet_x.lokr_w1": torch.zeros(1), "lora_unet_y.lora_up.weight": torch.zeros(1, 1)}, config)
    with pytest.raises(ValueError, match=r"another size than the network's: .*lora_unet_txt_in"):
        files.to_ours(kohya, config.replace(text_width=25))
    with pytest.raises(ValueError, match="fit nothing in this network"):
        files.to_ours(kohya, Case("sd3").config)
    for keys in ([], ["down.lora_A.weight"], ["unet.x.alpha", "lora_unet_x.alpha"]):
        with pytest.raises(ValueError, match="must begin in one way of"):
            files.dialect_of(keys)


def test_only_safetensors_are_read_and_written(tmp_path: Path) -> None:
    damaged = tmp_path / "x.safetensors"
    damaged.write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match="damaged or none"):
        files.read(damaged, FLUX)
    with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
        files.read(tmp_path / "x.bin", FLUX)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        files.write(tmp_path / "x.bin", Case("flux").state(), FLUX, "kohya")
    with pytest.raises(ValueError, match="at least one layer"):
        files.write(damaged, {}, FLUX, "kohya")


def test_the_header_is_kept(tmp_path: Path) -> None:
    case, about = Case("flux"), {"ss_base_model_version": "flux1", "modelspec.title": "mine"}
    path = tmp_path / "x.safetensors"
    for dialect in ("kohya", "diffusers", "comfyui"):
        files.write(path, case.state(), case.config, dialect, about)
        assert files.read(path, case.config)[1] == {"format": "pt", **about}


def test_names_of_an_adapter_in_keys_and_other_parts_in_the_header_are_no_matter(tmp_path: Path) -> None:
    plain = separate()
    path = tmp_path / "x.safetensors"
    told = {"transformer.lora_alpha": 2, "transformer.r": 4, "text_encoder.lora_alpha": 64, "text_encoder.r": 64}
    save_file({key.replace(".weight", ".default.weight"): x for key, x in plain.items()}, path, {"lora_adapter_metadata": json.dumps(told)})
    state, _ = files.read(path, FLUX)
    full = products(files.to_ours(plain, FLUX))
    assert all(torch.allclose(x, full[layer] / 2) for layer, x in products(state).items())
    rooted = files.to_ours(plain, FLUX, {"lora_alpha": 2, "use_rslora": True, "alpha_pattern": {"attn.to_q": 6}})
    for layer, part, times in (("joint.0.image.qkv.linear", slice(32), 3.0), ("joint.0.image.qkv.linear", slice(32, 96), 1.0)):
        assert distance(products(rooted)[layer][part], times * full[layer][part]) <= 1e-6  # alpha / sqrt(4)


def test_half_precision_is_kept_where_it_holds_the_numbers() -> None:
    state = {key: x if key.endswith("alpha") else x.bfloat16() for key, x in Case("flux").state().items()}
    tensors, _ = files.to_theirs(state, FLUX, "kohya")
    assert {x.dtype for key, x in tensors.items() if not key.endswith("alpha")} == {torch.bfloat16}
    for dialect in ("kohya", "diffusers"):
        tensors, _ = files.to_theirs(state, FLUX, dialect)
        back = files.to_ours(tensors, FLUX)
        wide = {key: x.float() for key, x in state.items()}
        assert_same(wide, {key: x.float() for key, x in back.items()})
