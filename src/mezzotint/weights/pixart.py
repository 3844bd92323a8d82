"""Names of PixArt's weights in diffusers' PixArtTransformer2DModel."""

from mezzotint.models.pixart import PixArtConfig
from mezzotint.weights.names import Names, Rule, conv, fuse


def diffusers(config: PixArtConfig) -> Names:
    """diffusers' PixArtTransformer2DModel."""
    return Names(
        [
            Rule("embed_patch", "pos_embed.proj", conv(config.patch)),
            *single_modulation(),
            Rule("embed_size.side.mlp.0", "adaln_single.emb.resolution_embedder.linear_1"),
            Rule("embed_size.side.mlp.2", "adaln_single.emb.resolution_embedder.linear_2"),
            Rule("embed_size.aspect.mlp.0", "adaln_single.emb.aspect_ratio_embedder.linear_1"),
            Rule("embed_size.aspect.mlp.2", "adaln_single.emb.aspect_ratio_embedder.linear_2"),
            Rule("blocks.*.mlp.0", "transformer_blocks.*.ff.net.0.proj"),
            Rule("blocks.*.mlp.2", "transformer_blocks.*.ff.net.2"),
        ]
    )


def single_modulation(time: str = "adaln_single") -> list[Rule]:
    """What PixArt and SANA have in common in diffusers: text and time in, attention and tables of blocks, head."""
    block = "transformer_blocks.*"
    return [
        Rule("embed_text.0", "caption_projection.linear_1"),
        Rule("embed_text.2", "caption_projection.linear_2"),
        Rule("embed_time.mlp.0", f"{time}.emb.timestep_embedder.linear_1"),
        Rule("embed_time.mlp.2", f"{time}.emb.timestep_embedder.linear_2"),
        Rule("modulation.linear", f"{time}.linear"),
        Rule("blocks.*.modulation.table", f"{block}.scale_shift_table"),
        Rule("blocks.*.attention.qkv.linear", tuple(f"{block}.attn1.to_{x}" for x in "qkv"), fuse(1, 1, 1)),
        Rule("blocks.*.attention.out", f"{block}.attn1.to_out.0"),
        Rule("blocks.*.cross.q", f"{block}.attn2.to_q"),
        Rule("blocks.*.cross.kv", (f"{block}.attn2.to_k", f"{block}.attn2.to_v"), fuse(1, 1)),
        Rule("blocks.*.cross.out", f"{block}.attn2.to_out.0"),
        Rule("head.modulation.table", "scale_shift_table"),
        Rule("head.linear", "proj_out"),
    ]
