"""Names of MMDiT's weights in diffusers' SD3Transformer2DModel and in Stability's own files."""

from mezzotint.models.mmdit import MMDiTConfig
from mezzotint.weights.names import SWAP, Names, Rule, conv, fuse


def diffusers(config: MMDiTConfig) -> Names:
    """diffusers' SD3Transformer2DModel. Where a modulation has no gate, it has (scale, shift) for our (shift, scale)."""
    last = config.depth - 1
    return Names(
        [
            Rule("positions", "pos_embed.pos_embed"),
            Rule("embed_patch", "pos_embed.proj", conv(config.patch)),
            Rule("embed_text", "context_embedder"),
            Rule("embed_time.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
            Rule("embed_time.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
            Rule("embed_pooled.0", "time_text_embed.text_embedder.linear_1"),
            Rule("embed_pooled.2", "time_text_embed.text_embedder.linear_2"),
            Rule(f"blocks.{last}.text.modulation.linear", f"transformer_blocks.{last}.norm1_context.linear", SWAP),
            *joint_blocks("blocks.*", "transformer_blocks.*"),
            Rule("blocks.*.image.alone.qkv.linear", tuple(f"transformer_blocks.*.attn2.to_{x}" for x in "qkv"), fuse(1, 1, 1)),
            Rule("blocks.*.image.alone.qkv.norm_q", "transformer_blocks.*.attn2.norm_q"),
            Rule("blocks.*.image.alone.qkv.norm_k", "transformer_blocks.*.attn2.norm_k"),
            Rule("blocks.*.image.alone.out", "transformer_blocks.*.attn2.to_out.0"),
            Rule("head.modulation.linear", "norm_out.linear", SWAP),
            Rule("head.linear", "proj_out"),
        ]
    )


def joint_blocks(ours: str, theirs: str) -> list[Rule]:
    """Joint blocks as diffusers names them in SD3 and FLUX: the text's parts are "added" or "context"."""
    return [
        Rule(f"{ours}.image.modulation.linear", f"{theirs}.norm1.linear"),
        Rule(f"{ours}.image.qkv.linear", tuple(f"{theirs}.attn.to_{x}" for x in "qkv"), fuse(1, 1, 1)),
        Rule(f"{ours}.image.qkv.norm_q", f"{theirs}.attn.norm_q"),
        Rule(f"{ours}.image.qkv.norm_k", f"{theirs}.attn.norm_k"),
        Rule(f"{ours}.image.out", f"{theirs}.attn.to_out.0"),
        Rule(f"{ours}.image.mlp.0", f"{theirs}.ff.net.0.proj"),
        Rule(f"{ours}.image.mlp.2", f"{theirs}.ff.net.2"),
        Rule(f"{ours}.text.modulation.linear", f"{theirs}.norm1_context.linear"),
        Rule(f"{ours}.text.qkv.linear", tuple(f"{theirs}.attn.add_{x}_proj" for x in "qkv"), fuse(1, 1, 1)),
        Rule(f"{ours}.text.qkv.norm_q", f"{theirs}.attn.norm_added_q"),
        Rule(f"{ours}.text.qkv.norm_k", f"{theirs}.attn.norm_added_k"),
        Rule(f"{ours}.text.out", f"{theirs}.attn.to_add_out"),
        Rule(f"{ours}.text.mlp.0", f"{theirs}.ff_context.net.0.proj"),
        Rule(f"{ours}.text.mlp.2", f"{theirs}.ff_context.net.2"),
    ]


def original(config: MMDiTConfig) -> Names:
    """Stability's single files, without the prefix ``model.diffusion_model.`` that the whole checkpoint gives them."""
    streams = [("image", "x_block"), ("text", "context_block")]
    return Names(
        [
            Rule("positions", "pos_embed"),
            Rule("embed_patch", "x_embedder.proj", conv(config.patch)),
            Rule("embed_text", "context_embedder"),
            Rule("embed_time.mlp.*", "t_embedder.mlp.*"),
            Rule("embed_pooled.*", "y_embedder.mlp.*"),
            Rule("blocks.*.image.alone.qkv.linear", "joint_blocks.*.x_block.attn2.qkv"),
            Rule("blocks.*.image.alone.qkv.norm_q", "joint_blocks.*.x_block.attn2.ln_q"),
            Rule("blocks.*.image.alone.qkv.norm_k", "joint_blocks.*.x_block.attn2.ln_k"),
            Rule("blocks.*.image.alone.out", "joint_blocks.*.x_block.attn2.proj"),
            *(rule for ours, theirs in streams for rule in _stream(f"blocks.*.{ours}", f"joint_blocks.*.{theirs}")),
            Rule("head.modulation.linear", "final_layer.adaLN_modulation.1"),
            Rule("head.linear", "final_layer.linear"),
        ]
    )


def _stream(ours: str, theirs: str) -> list[Rule]:
    return [
        Rule(f"{ours}.modulation.linear", f"{theirs}.adaLN_modulation.1"),
        Rule(f"{ours}.qkv.linear", f"{theirs}.attn.qkv"),
        Rule(f"{ours}.qkv.norm_q", f"{theirs}.attn.ln_q"),
        Rule(f"{ours}.qkv.norm_k", f"{theirs}.attn.ln_k"),
        Rule(f"{ours}.out", f"{theirs}.attn.proj"),
        Rule(f"{ours}.mlp.0", f"{theirs}.mlp.fc1"),
        Rule(f"{ours}.mlp.2", f"{theirs}.mlp.fc2"),
    ]
