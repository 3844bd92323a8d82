"""What diffusers' config.json says of an architecture, and what it is called there.

A description of theirs is read into a configuration of ours, and that is written as theirs again: where the two differ, the description
asks for something that we do not have, and is refused. So what is written is also the list of what is understood.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from math import ceil, isclose
from typing import Any

from mezzotint.codecs import CodecConfig, DeepConfig, KLConfig
from mezzotint.config import Data
from mezzotint.errors import UserError, unknown
from mezzotint.models import (
    ClassDiTConfig,
    DenoiserConfig,
    FluxConfig,
    HiDreamConfig,
    Lumina2Config,
    MMDiTConfig,
    PixArtConfig,
    SanaConfig,
    UNetConfig,
)
from mezzotint.models.unet import FREQUENCIES, NUMBERS
from mezzotint.weights import class_dit, deep, flux, hidream, kl, lumina2, mmdit, pixart, sana, unet
from mezzotint.weights.names import Names


def _read_unet(data: Data) -> UNetConfig:
    widths = tuple(data["block_out_channels"])
    depths = _each(data.get("transformer_layers_per_block", 1), len(widths))
    told = data.get("projection_class_embeddings_input_dim")
    return UNetConfig(
        widths=widths,
        depths=tuple(d if "Cross" in kind else 0 for d, kind in zip(depths, data["down_block_types"], strict=True)),
        middle=depths[-1],
        heads=_each(data["attention_head_dim"], len(widths)),
        layers=data["layers_per_block"],
        groups=data["norm_num_groups"],
        channels=data["in_channels"],
        text_width=data["cross_attention_dim"],
        pooled_width=told - NUMBERS * FREQUENCIES if told else 0,
        linear=data.get("use_linear_projection", False),
    )


def _write_unet(config: UNetConfig) -> Data:
    told = config.pooled_width + NUMBERS * FREQUENCIES if config.pooled_width else None
    return {
        "in_channels": config.channels,
        "out_channels": config.channels,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.depths)],
        "block_out_channels": list(config.widths),
        "layers_per_block": config.layers,
        "transformer_layers_per_block": [*(depth or 1 for depth in config.depths[:-1]), config.middle],
        "attention_head_dim": list(config.heads),
        "norm_num_groups": config.groups,
        "cross_attention_dim": config.text_width,
        "use_linear_projection": config.linear,
        "addition_embed_type": "text_time" if told else None,
        "addition_time_embed_dim": FREQUENCIES if told else None,
        "projection_class_embeddings_input_dim": told,
        "num_attention_heads": None,
        "only_cross_attention": False,
        "dual_cross_attention": False,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
        "act_fn": "silu",
        "norm_eps": 1e-5,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "resnet_time_scale_shift": "default",
        "time_embedding_type": "positional",
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
    }


def _read_mmdit(data: Data) -> MMDiTConfig:
    return MMDiTConfig(
        width=data["num_attention_heads"] * data["attention_head_dim"],
        depth=data["num_layers"],
        heads=data["num_attention_heads"],
        patch=data["patch_size"],
        channels=data["in_channels"],
        text_width=data["joint_attention_dim"],
        pooled_width=data["pooled_projection_dim"],
        table=data["pos_embed_max_size"],
        base=data["sample_size"] // data["patch_size"],
        qk_norm=data.get("qk_norm") is not None,
        dual=len(data.get("dual_attention_layers", ())),
    )


def _write_mmdit(config: MMDiTConfig) -> Data:
    return {
        "sample_size": config.base * config.patch,
        "patch_size": config.patch,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "num_layers": config.depth,
        "attention_head_dim": config.width // config.heads,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.text_width,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_width,
        "pos_embed_max_size": config.table,
        "dual_attention_layers": list(range(config.dual)),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def _read_flux(data: Data) -> FluxConfig:
    out = data.get("out_channels") or data["in_channels"]
    patch = FluxConfig.patch
    return FluxConfig(
        width=data["num_attention_heads"] * data["attention_head_dim"],
        joint=data["num_layers"],
        single=data["num_single_layers"],
        heads=data["num_attention_heads"],
        axes=tuple(data.get("axes_dims_rope", FluxConfig.axes)),
        channels=out // patch**2,
        control=(data["in_channels"] - out) // patch**2,
        guidance=data["guidance_embeds"],
        text_width=data["joint_attention_dim"],
        pooled_width=data["pooled_projection_dim"],
    )


def _write_flux(config: FluxConfig) -> Data:
    return {
        "patch_size": 1,
        "in_channels": config.patch**2 * (config.channels + config.control),
        "out_channels": config.patch**2 * config.channels,
        "num_layers": config.joint,
        "num_single_layers": config.single,
        "attention_head_dim": config.width // config.heads,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.text_width,
        "pooled_projection_dim": config.pooled_width,
        "guidance_embeds": config.guidance,
        "axes_dims_rope": list(config.axes),
    }


def _read_pixart(data: Data) -> PixArtConfig:
    side = data["sample_size"]
    size = data.get("use_additional_conditions")
    return PixArtConfig(
        width=data["num_attention_heads"] * data["attention_head_dim"],
        depth=data["num_layers"],
        heads=data["num_attention_heads"],
        patch=data["patch_size"],
        channels=data["in_channels"],
        text_width=data["caption_channels"],
        span=side // data["patch_size"] / (data.get("interpolation_scale") or max(side // 64, 1)),
        size=side == 128 if size is None else size,
        variance=data["out_channels"] == 2 * data["in_channels"],
    )


def _write_pixart(config: PixArtConfig) -> Data:
    return {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.channels,
        "out_channels": (2 if config.variance else 1) * config.channels,
        "num_layers": config.depth,
        "cross_attention_dim": config.width,
        "attention_bias": True,
        "patch_size": config.patch,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": config.text_width,
        "attention_type": "default",
    }


def _place_pixart(config: PixArtConfig, side: int) -> Data:
    """Positions span the same at any size, which theirs says with a scale. It tells a network the picture's size at 128 and at no other."""
    side = 128 if config.size else side
    return {"sample_size": side, "interpolation_scale": side // config.patch / config.span, "use_additional_conditions": config.size}


def _read_class_dit(data: Data) -> ClassDiTConfig:
    return ClassDiTConfig(
        width=data["num_attention_heads"] * data["attention_head_dim"],
        depth=data["num_layers"],
        heads=data["num_attention_heads"],
        patch=data["patch_size"],
        channels=data["in_channels"],
        classes=data["num_embeds_ada_norm"],
        span=data["sample_size"] / data["patch_size"],
        variance=data["out_channels"] == 2 * data["in_channels"],
    )


def _write_class_dit(config: ClassDiTConfig) -> Data:
    return {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.channels,
        "out_channels": (2 if config.variance else 1) * config.channels,
        "num_layers": config.depth,
        "attention_bias": True,
        "sample_size": round(config.span * config.patch),
        "patch_size": config.patch,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": config.classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }


def _dit_epsilon(config: ClassDiTConfig, side: int) -> Data:
    """The paper's epsilon of norms. Theirs is ten times that where a description is silent, as the published ones are."""
    return {"norm_eps": 1e-6}


def _read_sana(data: Data) -> SanaConfig:
    return SanaConfig(
        width=data["num_attention_heads"] * data["attention_head_dim"],
        depth=data["num_layers"],
        heads=data["num_attention_heads"],
        cross_heads=data["num_cross_attention_heads"],
        patch=data["patch_size"],
        channels=data["in_channels"],
        ratio=data["mlp_ratio"],
        qk_norm=data.get("qk_norm") is not None,
        text_width=data["caption_channels"],
    )


def _write_sana(config: SanaConfig) -> Data:
    return {
        "in_channels": config.channels,
        "out_channels": config.channels,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_layers": config.depth,
        "num_cross_attention_heads": config.cross_heads,
        "cross_attention_head_dim": config.width // config.cross_heads,
        "cross_attention_dim": config.width,
        "caption_channels": config.text_width,
        "mlp_ratio": config.ratio,
        "attention_bias": False,
        "patch_size": config.patch,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": None,
        "guidance_embeds": False,
        "qk_norm": "rms_norm_across_heads" if config.qk_norm else None,
        "timestep_scale": 1.0,
    }


def _read_lumina2(data: Data) -> Lumina2Config:
    width, multiple = data["hidden_size"], data.get("multiple_of", 256)
    hidden = int((data.get("ffn_dim_multiplier") or 1) * 4 * width)
    return Lumina2Config(
        width=width,
        refiners=data["num_refiner_layers"],
        depth=data["num_layers"],
        heads=data["num_attention_heads"],
        kv_heads=data["num_kv_heads"],
        axes=tuple(data["axes_dim_rope"]),
        hidden=multiple * ceil(hidden / multiple),
        patch=data["patch_size"],
        channels=data["in_channels"],
        time_width=min(width, 1024),
        text_width=data["cap_feat_dim"],
    )


def _write_lumina2(config: Lumina2Config) -> Data:
    return {
        "patch_size": config.patch,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "hidden_size": config.width,
        "num_layers": config.depth,
        "num_refiner_layers": config.refiners,
        "num_attention_heads": config.heads,
        "num_kv_heads": config.kv_heads,
        "norm_eps": 1e-5,
        "scaling_factor": 1.0,
        "axes_dim_rope": list(config.axes),
        "cap_feat_dim": config.text_width,
    }


def _read_hidream(data: Data) -> HiDreamConfig:
    width = data["num_attention_heads"] * data["attention_head_dim"]
    text_width, states_width = data["caption_channels"]
    return HiDreamConfig(
        width=width,
        joint=data["num_layers"],
        single=data["num_single_layers"],
        layers=tuple(data["llama_layers"]),
        heads=data["num_attention_heads"],
        axes=tuple(data["axes_dims_rope"]),
        experts=data["num_routed_experts"],
        active=data["num_activated_experts"],
        hidden=_two_thirds(4 * width),
        shared=_two_thirds(2 * width),
        patch=data["patch_size"],
        channels=data["in_channels"],
        text_width=text_width,
        states_width=states_width,
        pooled_width=data["text_emb_dim"],
    )


def _two_thirds(width: int) -> int:
    """The hidden width of a SwiGLU with the weights of a plain MLP of that width, rounded up to a multiple of 256."""
    return 256 * ceil(2 * width // 3 / 256)


def _write_hidream(config: HiDreamConfig) -> Data:
    return {
        "patch_size": config.patch,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "num_layers": config.joint,
        "num_single_layers": config.single,
        "attention_head_dim": config.width // config.heads,
        "num_attention_heads": config.heads,
        "caption_channels": [config.text_width, config.states_width],
        "text_emb_dim": config.pooled_width,
        "num_routed_experts": config.experts,
        "num_activated_experts": config.active,
        "axes_dims_rope": list(config.axes),
        "llama_layers": list(config.layers),
    }


def _read_kl(data: Data) -> KLConfig:
    return KLConfig(
        widths=tuple(data["block_out_channels"]),
        layers=data["layers_per_block"],
        groups=data["norm_num_groups"],
        attention=data.get("mid_block_add_attention", True),
        channels=data["latent_channels"],
        quant=data.get("use_quant_conv", True),
        scale=data.get("scaling_factor", 0.18215),
        shift=data.get("shift_factor") or 0.0,
    )


def _write_kl(config: KLConfig) -> Data:
    levels = len(config.widths)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.layers,
        "act_fn": "silu",
        "latent_channels": config.channels,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scale,
        "shift_factor": config.shift or None,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": config.quant,
        "use_post_quant_conv": config.quant,
        "mid_block_add_attention": config.attention,
    }


def _read_deep(data: Data) -> DeepConfig:
    kinds = _each(data["encoder_block_types"], len(data["encoder_block_out_channels"]))
    return DeepConfig(
        widths=tuple(data["encoder_block_out_channels"]),
        encoder_depths=tuple(data["encoder_layers_per_block"]),
        decoder_depths=tuple(data["decoder_layers_per_block"]),
        attending=sum(kind == "EfficientViTBlock" for kind in kinds),
        head=data["attention_head_dim"],
        kernels=tuple(data["encoder_qkv_multiscales"][-1]),
        channels=data["latent_channels"],
        scale=data["scaling_factor"],
    )


def _write_deep(config: DeepConfig) -> Data:
    convs = len(config.widths) - config.attending
    kinds = ["ResBlock"] * convs + ["EfficientViTBlock"] * config.attending
    scales: list[list[int]] = [[]] * convs + [list(config.kernels)] * config.attending
    return {
        "in_channels": 3,
        "latent_channels": config.channels,
        "attention_head_dim": config.head,
        "encoder_block_types": kinds,
        "decoder_block_types": kinds,
        "encoder_block_out_channels": list(config.widths),
        "decoder_block_out_channels": list(config.widths),
        "encoder_layers_per_block": list(config.encoder_depths),
        "decoder_layers_per_block": list(config.decoder_depths),
        "encoder_qkv_multiscales": scales,
        "decoder_qkv_multiscales": scales,
        "upsample_block_type": "interpolate",
        "downsample_block_type": "conv",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": config.scale,
    }


@dataclass(frozen=True)
class Architecture:
    """One class of diffusers: how its descriptions are read and written, and where its weights are.

    also: what is written beside, but not compared, with the side of the latents that a pipeline draws. older: names that files had
    before. original: the names of the publisher's own single files.
    """

    name: str
    ours: type[DenoiserConfig | CodecConfig]
    read_data: Callable[[Data], Any]
    write_data: Callable[[Any], Data]
    names: Callable[[Any], Names]
    older: Callable[[Any], Names] | None = None
    original: Callable[[Any], Names] | None = None
    also: Callable[[Any, int], Data] = lambda config, side: {}

    def read(self, data: Data) -> Any:
        """A configuration of ours. UserError that names what it says and we do not have."""
        try:
            config = self.read_data(data)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the description of a {self.name} cannot be read: {type(error).__name__} {error}") from error
        for key, value in self.write_data(config).items():
            given = data.get(key)
            if given is not None and not _same(given, value):
                raise UserError(f"this {self.name} has {key} {given!r}, and only {value!r} is supported with the rest of its description")
        return config

    def names_in(self, config: Any, files: Iterable[str]) -> Names:
        """The names of theirs that these files have."""
        names, names_before = self.names(config), self.older(config) if self.older else None
        return names_before if names_before and names_before.knows(files) else names

    def write(self, config: Any, side: int) -> Data:
        """A description of theirs, where pictures are `side` latents wide. UserError where theirs has no words for what ours is."""
        data = {"_class_name": self.name, **self.write_data(config), **self.also(config, side)}
        read = self.read_data(data)
        for name in (f.name for f in fields(config) if f.name != "prediction"):  # that is said by the scheduler
            ours, theirs = getattr(config, name), getattr(read, name)
            if not _same(ours, theirs):
                raise UserError(
                    f"this network has {name} {ours!r}, and a {self.name} of diffusers only {theirs!r} with the rest of its sizes"
                )
        return data


def _drawn(config: DenoiserConfig, side: int) -> Data:
    return {"sample_size": side}


def _lumina2_hidden(config: Lumina2Config, side: int) -> Data:
    """Their hidden width is four times the width, rounded up to a multiple: of itself, ours is what it is."""
    return {"sample_size": side, "multiple_of": config.hidden, "ffn_dim_multiplier": None}


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("UNet2DConditionModel", UNetConfig, _read_unet, _write_unet, unet.diffusers, None, unet.original, _drawn),
        Architecture("SD3Transformer2DModel", MMDiTConfig, _read_mmdit, _write_mmdit, mmdit.diffusers, original=mmdit.original),
        Architecture("FluxTransformer2DModel", FluxConfig, _read_flux, _write_flux, flux.diffusers, original=flux.original),
        Architecture("PixArtTransformer2DModel", PixArtConfig, _read_pixart, _write_pixart, pixart.diffusers, also=_place_pixart),
        Architecture("DiTTransformer2DModel", ClassDiTConfig, _read_class_dit, _write_class_dit, class_dit.diffusers, also=_dit_epsilon),
        Architecture("SanaTransformer2DModel", SanaConfig, _read_sana, _write_sana, sana.diffusers, also=_drawn),
        Architecture("Lumina2Transformer2DModel", Lumina2Config, _read_lumina2, _write_lumina2, lumina2.diffusers, also=_lumina2_hidden),
        Architecture("HiDreamImageTransformer2DModel", HiDreamConfig, _read_hidream, _write_hidream, hidream.diffusers),
        Architecture("AutoencoderKL", KLConfig, _read_kl, _write_kl, kl.diffusers, kl.diffusers_old, kl.original),
        Architecture("AutoencoderDC", DeepConfig, _read_deep, _write_deep, deep.diffusers),
    )
}

# What both were called when they were published, and how they are told apart.
BEFORE = "Transformer2DModel"
NORMS = {"ada_norm_single": "PixArtTransformer2DModel", "ada_norm_zero": "DiTTransformer2DModel"}


def of_theirs(data: Data) -> Architecture:
    """The architecture that a description of theirs is of."""
    name = str(data.get("_class_name"))
    if name == BEFORE:
        name = NORMS.get(str(data.get("norm_type")), name)
    if name not in ARCHITECTURES:
        raise unknown("architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]


def of_ours(config: DenoiserConfig | CodecConfig) -> Architecture:
    """The architecture that a configuration of ours is. UserError where it has no name there."""
    for architecture in ARCHITECTURES.values():
        if type(config) is architecture.ours:
            return architecture
    known = ", ".join(a.ours.kind for a in ARCHITECTURES.values())
    raise UserError(f"diffusers has no network of the kind {config.kind!r} that we know of; known: {known}")


def _each(value: Any, count: int) -> tuple[Any, ...]:
    """One value for all, or one for each."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * count


def _same(given: Any, value: Any) -> bool:
    if isinstance(value, list) or isinstance(given, list | tuple):
        count = len(given) if isinstance(given, list | tuple) else len(value)
        mine = _each(value, count)
        return len(mine) == count and all(_same(a, b) for a, b in zip(_each(given, count), mine, strict=True))
    return isclose(given, value) if isinstance(given, float) and isinstance(value, float) else bool(given == value)
