"""Names of FLUX's weights in diffusers' FluxTransformer2DModel and in Black Forest Labs' own files."""

from mezzotint.models.flux import FluxConfig
from mezzotint.weights.mmdit import joint_blocks
from mezzotint.weights.names import SWAP, Names, Rule, columns, fuse, rows


def diffusers(config: FluxConfig) -> Names:
    """diffusers' FluxTransformer2DModel. The last modulation has (scale, shift) for our (shift, scale)."""
    inner = (*(f"single_transformer_blocks.*.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.*.proj_mlp")
    return Names(
        [
            Rule("embed_patch", "x_embedder", columns(config.patch)),
            Rule("embed_text", "context_embedder"),
            *(
                Rule(f"{ours}.{2 * i}", f"time_text_embed.{theirs}_embedder.linear_{i + 1}")
                for ours, theirs in (("embed_time.mlp", "timestep"), ("embed_guidance.mlp", "guidance"), ("embed_pooled", "text"))
                for i in range(2)
            ),
            *joint_blocks("joint.*", "transformer_blocks.*"),
            Rule("single.*.modulation.linear", "single_transformer_blocks.*.norm.linear"),
            Rule("single.*.inner", inner, fuse(1, 1, 1, 4)),
            Rule("single.*.norm_q", "single_transformer_blocks.*.attn.norm_q"),
            Rule("single.*.norm_k", "single_transformer_blocks.*.attn.norm_k"),
            Rule("single.*.outer", "single_transformer_blocks.*.proj_out"),
            Rule("head.modulation.linear", "norm_out.linear", SWAP),
            Rule("head.linear", "proj_out", rows(config.patch)),
        ]
    )


def original(config: FluxConfig) -> Names:
    """Black Forest Labs' files, without the prefix ``model.diffusion_model.`` that some give them."""
    return Names(
        [
            Rule("embed_patch", "img_in", columns(config.patch)),
            Rule("embed_text", "txt_in"),
            *(
                Rule(f"{ours}.{2 * i}", f"{theirs}_in.{layer}_layer")
                for ours, theirs in (("embed_time.mlp", "time"), ("embed_guidance.mlp", "guidance"), ("embed_pooled", "vector"))
                for i, layer in enumerate(("in", "out"))
            ),
            *_stream("joint.*.image", "double_blocks.*.img"),
            *_stream("joint.*.text", "double_blocks.*.txt"),
            Rule("single.*.modulation.linear", "single_blocks.*.modulation.lin"),
            Rule("single.*.inner", "single_blocks.*.linear1"),
            Rule("single.*.norm_q.weight", "single_blocks.*.norm.query_norm.scale"),
            Rule("single.*.norm_k.weight", "single_blocks.*.norm.key_norm.scale"),
            Rule("single.*.outer", "single_blocks.*.linear2"),
            Rule("head.modulation.linear", "final_layer.adaLN_modulation.1"),
            Rule("head.linear", "final_layer.linear", rows(config.patch)),
        ]
    )


def _stream(ours: str, theirs: str) -> list[Rule]:
    return [
        Rule(f"{ours}.modulation.linear", f"{theirs}_mod.lin"),
        Rule(f"{ours}.qkv.linear", f"{theirs}_attn.qkv"),
        Rule(f"{ours}.qkv.norm_q.weight", f"{theirs}_attn.norm.query_norm.scale"),
        Rule(f"{ours}.qkv.norm_k.weight", f"{theirs}_attn.norm.key_norm.scale"),
        Rule(f"{ours}.out", f"{theirs}_attn.proj"),
        Rule(f"{ours}.mlp.*", f"{theirs}_mlp.*"),
    ]
