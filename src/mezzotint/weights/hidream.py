"""Names of HiDream's weights in diffusers' HiDreamImageTransformer2DModel."""

from mezzotint.models.hidream import HiDreamConfig
from mezzotint.weights.names import Names, Rule, fuse, reshape, stack


def diffusers(config: HiDreamConfig) -> Names:
    """diffusers' HiDreamImageTransformer2DModel."""
    joint, single = "double_stream_blocks.*.block", "single_stream_blocks.*.block"
    both = ("joint.*.image.modulation.linear", "joint.*.text.modulation.linear")
    return Names(
        [
            Rule("embed_patch", "x_embedder.proj"),
            Rule("embed_text", f"caption_projection.{config.joint + config.single}.linear"),
            Rule("embed_states.*", "caption_projection.*.linear"),
            Rule("embed_pooled.0", "p_embedder.pooled_embedder.linear_1"),
            Rule("embed_pooled.2", "p_embedder.pooled_embedder.linear_2"),
            Rule("embed_time.mlp.0", "t_embedder.timestep_embedder.linear_1"),
            Rule("embed_time.mlp.2", "t_embedder.timestep_embedder.linear_2"),
            Rule(both, f"{joint}.adaLN_modulation.1", fuse(1, 1).reversed),
            *_attention("joint.*.image", joint, "", config),
            *_attention("joint.*.text", joint, "_t", config),
            *_experts("joint.*.image.mlp", f"{joint}.ff_i", config),
            *_swiglu("joint.*.text.mlp", f"{joint}.ff_t"),
            Rule("single.*.stream.modulation.linear", f"{single}.adaLN_modulation.1"),
            *_attention("single.*.stream", single, "", config),
            *_experts("single.*.stream.mlp", f"{single}.ff_i", config),
            Rule("head.modulation.linear", "final_layer.adaLN_modulation.1"),
            Rule("head.linear", "final_layer.linear"),
        ]
    )


def _attention(ours: str, theirs: str, suffix: str, config: HiDreamConfig) -> list[Rule]:
    across = reshape((config.heads, -1), (config.width,))
    return [
        Rule(f"{ours}.qkv.linear", tuple(f"{theirs}.attn1.to_{x}{suffix}" for x in "qkv"), fuse(1, 1, 1)),
        Rule(f"{ours}.qkv.norm_q", f"{theirs}.attn1.q_rms_norm{suffix}", across),
        Rule(f"{ours}.qkv.norm_k", f"{theirs}.attn1.k_rms_norm{suffix}", across),
        Rule(f"{ours}.out", f"{theirs}.attn1.to_out{suffix}"),
    ]


def _swiglu(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}.inner", (f"{theirs}.w1", f"{theirs}.w3"), fuse(1, 1)), Rule(f"{ours}.outer", f"{theirs}.w2")]


def _experts(ours: str, theirs: str, config: HiDreamConfig) -> list[Rule]:
    inner = tuple(f"{theirs}.experts.{e}.{w}.weight" for e in range(config.experts) for w in ("w1", "w3"))
    outer = tuple(f"{theirs}.experts.{e}.w2.weight" for e in range(config.experts))
    return [
        Rule(f"{ours}.gate", f"{theirs}.gate"),
        Rule(f"{ours}.inner", inner, stack(config.experts, 2)),
        Rule(f"{ours}.outer", outer, stack(config.experts)),
        *_swiglu(f"{ours}.shared", f"{theirs}.shared_experts"),
    ]
