"""Names of DiT's weights in diffusers' DiTTransformer2DModel.

With the same weights diffusers draws other pictures than the published code and we do: it sets the frequencies of the time 1 / 127 of their
scale apart, and not 1 / 128.
"""

from mezzotint.models.class_dit import ClassDiTConfig
from mezzotint.weights.names import Names, Rule, conv, copies, fuse


def diffusers(config: ClassDiTConfig) -> Names:
    """diffusers' DiTTransformer2DModel, which keeps a copy of the embeddings of time and class in every block."""
    embeddings = [
        ("embed_time.mlp.0", "timestep_embedder.linear_1"),
        ("embed_time.mlp.2", "timestep_embedder.linear_2"),
        ("embed_label", "class_embedder.embedding_table"),
    ]
    return Names(
        [
            Rule("embed_patch", "pos_embed.proj", conv(config.patch)),
            *(
                Rule(ours, tuple(f"transformer_blocks.{i}.norm1.emb.{theirs}" for i in range(config.depth)), copies(config.depth))
                for ours, theirs in embeddings
            ),
            Rule("blocks.*.modulation.linear", "transformer_blocks.*.norm1.linear"),
            Rule("blocks.*.attention.qkv.linear", tuple(f"transformer_blocks.*.attn1.to_{x}" for x in "qkv"), fuse(1, 1, 1)),
            Rule("blocks.*.attention.out", "transformer_blocks.*.attn1.to_out.0"),
            Rule("blocks.*.mlp.0", "transformer_blocks.*.ff.net.0.proj"),
            Rule("blocks.*.mlp.2", "transformer_blocks.*.ff.net.2"),
            Rule("head.modulation.linear", "proj_out_1"),
            Rule("head.linear", "proj_out_2"),
        ]
    )
