"""Names of SANA's weights in diffusers' SanaTransformer2DModel."""

from mezzotint.models.sana import SanaConfig
from mezzotint.weights.names import Names, Rule, conv, reshape
from mezzotint.weights.pixart import single_modulation


def diffusers(config: SanaConfig) -> Names:
    """diffusers' SanaTransformer2DModel. Its 1 x 1 convolutions are linear layers, and its norms across heads are flat."""
    norms = [("attention.qkv", "attn1", config.heads), ("cross", "attn2", config.cross_heads)]
    flat = (config.width,)
    return Names(
        [
            Rule("embed_patch", "patch_embed.proj", conv(config.patch)),
            Rule("norm_text", "caption_norm"),
            *single_modulation("time_embed"),
            *(
                Rule(f"blocks.*.{ours}.norm_{x}", f"transformer_blocks.*.{theirs}.norm_{x}", reshape((heads, -1), flat))
                for ours, theirs, heads in norms
                for x in "qk"
            ),
            Rule("blocks.*.mlp.inner", "transformer_blocks.*.ff.conv_inverted", conv(1)),
            Rule("blocks.*.mlp.depthwise", "transformer_blocks.*.ff.conv_depth"),
            Rule("blocks.*.mlp.outer", "transformer_blocks.*.ff.conv_point", conv(1)),
        ]
    )
