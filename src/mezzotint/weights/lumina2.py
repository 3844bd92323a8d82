"""Names of Lumina 2's weights in diffusers' Lumina2Transformer2DModel."""

from mezzotint.models.lumina2 import Lumina2Config
from mezzotint.weights.names import Names, Rule, fuse


def diffusers(config: Lumina2Config) -> Names:
    """diffusers' Lumina2Transformer2DModel."""
    streams = [("text_refiner", "context_refiner"), ("image_refiner", "noise_refiner"), ("joint", "layers")]
    shares = (config.heads, config.kv_heads, config.kv_heads)
    return Names(
        [
            Rule("embed_patch", "x_embedder"),
            Rule("norm_text", "time_caption_embed.caption_embedder.0"),
            Rule("embed_text", "time_caption_embed.caption_embedder.1"),
            Rule("embed_time.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
            Rule("embed_time.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
            Rule("text_refiner.*.norm_1", "context_refiner.*.norm1"),
            *(rule for ours, theirs in streams for rule in _block(f"{ours}.*", f"{theirs}.*", shares)),
            Rule("scale.linear", "norm_out.linear_1"),
            Rule("head", "norm_out.linear_2"),
        ]
    )


def _block(ours: str, theirs: str, shares: tuple[int, int, int]) -> list[Rule]:
    return [
        Rule(f"{ours}.modulation.linear", f"{theirs}.norm1.linear"),
        Rule(f"{ours}.norm_1", f"{theirs}.norm1.norm"),
        Rule(f"{ours}.norm_2", f"{theirs}.norm2"),
        Rule(f"{ours}.norm_3", f"{theirs}.ffn_norm1"),
        Rule(f"{ours}.norm_4", f"{theirs}.ffn_norm2"),
        Rule(f"{ours}.attention.qkv.linear", tuple(f"{theirs}.attn.to_{x}" for x in "qkv"), fuse(*shares)),
        Rule(f"{ours}.attention.qkv.norm_q", f"{theirs}.attn.norm_q"),
        Rule(f"{ours}.attention.qkv.norm_k", f"{theirs}.attn.norm_k"),
        Rule(f"{ours}.attention.out", f"{theirs}.attn.to_out.0"),
        Rule(f"{ours}.mlp.inner", (f"{theirs}.feed_forward.linear_1", f"{theirs}.feed_forward.linear_3"), fuse(1, 1)),
        Rule(f"{ours}.mlp.outer", f"{theirs}.feed_forward.linear_2"),
    ]
