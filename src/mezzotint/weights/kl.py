"""Names of the KL autoencoder's weights in diffusers' AutoencoderKL and in the files of CompVis, Stability and Black Forest Labs."""

from mezzotint.codecs.kl import KLConfig
from mezzotint.weights.names import SAME, Change, Names, Rule, conv, fuse
from mezzotint.weights.unet import DIFFUSERS, residual

# The layers of the attention in the order norm, query, key, value, output.
ATTENTION = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
ATTENTION_OLD = ("group_norm", "query", "key", "value", "proj_attn")
ATTENTION_ORIGINAL = ("norm", "q", "k", "v", "proj_out")
ORIGINAL = (*DIFFUSERS[:-1], "nin_shortcut")


def diffusers(config: KLConfig) -> Names:
    """diffusers' AutoencoderKL."""
    return _diffusers(ATTENTION)


def diffusers_old(config: KLConfig) -> Names:
    """diffusers' AutoencoderKL with the names of the attention that it had until 0.16, and that files of SD 1.x still have."""
    return _diffusers(ATTENTION_OLD)


def original(config: KLConfig) -> Names:
    """Single files, without the prefix ``first_stage_model.`` that a whole checkpoint gives them. FLUX's ``ae`` file has none.

    Levels of the decoder are counted from the picture, whatever their order. Layers of the attention are 1 x 1 convolutions.
    """
    rules = [*_ends("encoder", "norm_out"), *_ends("decoder", "norm_out")]
    for half in ("encoder", "decoder"):
        rules += residual(f"{half}.middle.0", f"{half}.mid.block_1", ORIGINAL)
        rules += _attention(f"{half}.middle.1", f"{half}.mid.attn_1", ATTENTION_ORIGINAL, conv(1))
        rules += residual(f"{half}.middle.2", f"{half}.mid.block_2", ORIGINAL)
    rules += residual("encoder.levels.*.blocks.*", "encoder.down.*.block.*", ORIGINAL)
    rules.append(Rule("encoder.levels.*.smaller", "encoder.down.*.downsample.conv"))
    for number, level in enumerate(reversed(range(len(config.widths)))):
        rules += residual(f"decoder.levels.{number}.blocks.*", f"decoder.up.{level}.block.*", ORIGINAL)
        rules.append(Rule(f"decoder.levels.{number}.larger", f"decoder.up.{level}.upsample.conv"))
    return Names(rules)


def _diffusers(attention: tuple[str, ...]) -> Names:
    rules = [*_ends("encoder", "conv_norm_out"), *_ends("decoder", "conv_norm_out")]
    for half, way in (("encoder", "down"), ("decoder", "up")):
        rules += residual(f"{half}.middle.0", f"{half}.mid_block.resnets.0", DIFFUSERS)
        rules += _attention(f"{half}.middle.1", f"{half}.mid_block.attentions.0", attention)
        rules += residual(f"{half}.middle.2", f"{half}.mid_block.resnets.1", DIFFUSERS)
        rules += residual(f"{half}.levels.*.blocks.*", f"{half}.{way}_blocks.*.resnets.*", DIFFUSERS)
    rules.append(Rule("encoder.levels.*.smaller", "encoder.down_blocks.*.downsamplers.0.conv"))
    rules.append(Rule("decoder.levels.*.larger", "decoder.up_blocks.*.upsamplers.0.conv"))
    return Names(rules)


def _ends(half: str, norm: str) -> list[Rule]:
    quant = "quant" if half == "encoder" else "post_quant"
    return [
        Rule(quant, f"{quant}_conv"),
        Rule(f"{half}.embed", f"{half}.conv_in"),
        Rule(f"{half}.norm", f"{half}.{norm}"),
        Rule(f"{half}.head", f"{half}.conv_out"),
    ]


def _attention(ours: str, theirs: str, layers: tuple[str, ...], change: Change = SAME) -> list[Rule]:
    norm, *qkv, out = (f"{theirs}.{layer}" for layer in layers)
    return [
        Rule(f"{ours}.norm", norm),
        Rule(f"{ours}.attention.qkv.linear", tuple(qkv), change.then(fuse(1, 1, 1))),
        Rule(f"{ours}.attention.out", out, change),
    ]
