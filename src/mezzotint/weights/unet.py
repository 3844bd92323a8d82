"""Names of the UNet's weights in diffusers' UNet2DConditionModel and in the single files of Stability and CompVis."""

from mezzotint.models.unet import UNetConfig
from mezzotint.weights.names import SAME, Names, Rule, conv, fuse


def diffusers(config: UNetConfig) -> Names:
    """diffusers' UNet2DConditionModel."""
    return Names(
        [
            Rule("embed_picture", "conv_in"),
            Rule("embed_time.mlp.0", "time_embedding.linear_1"),
            Rule("embed_time.mlp.2", "time_embedding.linear_2"),
            Rule("embed_told.0", "add_embedding.linear_1"),
            Rule("embed_told.2", "add_embedding.linear_2"),
            *residual("down.*.blocks.*.res", "down_blocks.*.resnets.*", DIFFUSERS),
            *_transformer(config, "down.*.blocks.*.transformer", "down_blocks.*.attentions.*"),
            Rule("down.*.smaller", "down_blocks.*.downsamplers.0.conv"),
            *residual("middle.*.res", "mid_block.resnets.*", DIFFUSERS),
            *_transformer(config, "middle.*.transformer", "mid_block.attentions.*"),
            *residual("up.*.blocks.*.res", "up_blocks.*.resnets.*", DIFFUSERS),
            *_transformer(config, "up.*.blocks.*.transformer", "up_blocks.*.attentions.*"),
            Rule("up.*.larger", "up_blocks.*.upsamplers.0.conv"),
            Rule("norm", "conv_norm_out"),
            Rule("head", "conv_out"),
        ]
    )


def original(config: UNetConfig) -> Names:
    """Single files, without the prefix ``model.diffusion_model.`` that the whole checkpoint gives them.

    They count all blocks of a way, whatever their level, and a block's layers: the residual block is 0, a transformer 1.
    """
    rules = [Rule("embed_picture", "input_blocks.0.0")]
    for ours, theirs in (("embed_time.mlp", "time_embed"), ("embed_told", "label_emb.0")):
        rules += [Rule(f"{ours}.{i}", f"{theirs}.{i}") for i in (0, 2)]
    for level in range(len(config.depths)):
        first = 1 + level * (config.layers + 1)
        for number in range(config.layers):
            rules += _block(config, f"down.{level}.blocks.{number}", f"input_blocks.{first + number}.0", f"input_blocks.{first + number}.1")
        rules.append(Rule(f"down.{level}.smaller", f"input_blocks.{first + config.layers}.0.op"))
    rules += _block(config, "middle.0", "middle_block.0", "middle_block.1")
    rules += residual("middle.1.res", "middle_block.2", ORIGINAL)
    for level, depth in enumerate(reversed(config.depths)):
        first = level * (config.layers + 1)
        for number in range(config.layers + 1):
            rules += _block(config, f"up.{level}.blocks.{number}", f"output_blocks.{first + number}.0", f"output_blocks.{first + number}.1")
        rules.append(Rule(f"up.{level}.larger", f"output_blocks.{first + config.layers}.{2 if depth else 1}.conv"))
    return Names([*rules, Rule("norm", "out.0"), Rule("head", "out.2")])


# The layers of a residual block in the order norm, convolution, time, norm, convolution, skip.
OURS = ("norm_in", "conv_in", "time", "norm_out", "conv_out", "skip")
DIFFUSERS = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
ORIGINAL = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")


def _block(config: UNetConfig, ours: str, res: str, transformer: str) -> list[Rule]:
    return [*residual(f"{ours}.res", res, ORIGINAL), *_transformer(config, f"{ours}.transformer", transformer)]


def residual(ours: str, theirs: str, layers: tuple[str, ...]) -> list[Rule]:
    """The layers of a residual block, named as one of the above."""
    return [Rule(f"{ours}.{a}", f"{theirs}.{b}") for a, b in zip(OURS, layers, strict=True)]


def _transformer(config: UNetConfig, ours: str, theirs: str) -> list[Rule]:
    """The same names in both kinds of files."""
    projection = SAME if config.linear else conv(1)
    a, b = f"{ours}.blocks.*", f"{theirs}.transformer_blocks.*"
    return [
        Rule(f"{ours}.norm", f"{theirs}.norm"),
        Rule(f"{ours}.inner", f"{theirs}.proj_in", projection),
        Rule(f"{a}.norm_attention", f"{b}.norm1"),
        Rule(f"{a}.attention.q", f"{b}.attn1.to_q"),
        Rule(f"{a}.attention.kv", (f"{b}.attn1.to_k", f"{b}.attn1.to_v"), fuse(1, 1)),
        Rule(f"{a}.attention.out", f"{b}.attn1.to_out.0"),
        Rule(f"{a}.norm_cross", f"{b}.norm2"),
        Rule(f"{a}.cross.q", f"{b}.attn2.to_q"),
        Rule(f"{a}.cross.kv", (f"{b}.attn2.to_k", f"{b}.attn2.to_v"), fuse(1, 1)),
        Rule(f"{a}.cross.out", f"{b}.attn2.to_out.0"),
        Rule(f"{a}.norm_mlp", f"{b}.norm3"),
        Rule(f"{a}.mlp.inner", f"{b}.ff.net.0.proj"),
        Rule(f"{a}.mlp.outer", f"{b}.ff.net.2"),
        Rule(f"{ours}.outer", f"{theirs}.proj_out", projection),
    ]
