"""Names of the deep-compression autoencoder's weights in diffusers' AutoencoderDC and in the authors' own files."""

from mezzotint.codecs.deep import DeepConfig
from mezzotint.weights.names import Names, Rule, conv, fuse


def diffusers(config: DeepConfig) -> Names:
    """diffusers' AutoencoderDC."""
    rules = [
        Rule("encoder.embed", "encoder.conv_in"),
        Rule("encoder.head", "encoder.conv_out"),
        Rule("decoder.embed", "decoder.conv_in"),
        Rule("decoder.norm", "decoder.norm_out"),
        Rule("decoder.head", "decoder.conv_out"),
    ]
    for a, b in (("encoder.levels.*.*", "encoder.down_blocks.*.*"), ("decoder.levels.*.*", "decoder.up_blocks.*.*")):
        rules += [
            Rule(f"{a}.conv", f"{b}.conv"),
            Rule(f"{a}.conv_in", f"{b}.conv1"),
            Rule(f"{a}.conv_out", f"{b}.conv2"),
            Rule(f"{a}.norm", f"{b}.norm"),
            Rule(f"{a}.attention.qkv", (f"{b}.attn.to_q", f"{b}.attn.to_k", f"{b}.attn.to_v"), fuse(1, 1, 1)),
            Rule(f"{a}.attention.scales.*.0", f"{b}.attn.to_qkv_multiscale.*.proj_in"),
            Rule(f"{a}.attention.scales.*.1", f"{b}.attn.to_qkv_multiscale.*.proj_out"),
            Rule(f"{a}.attention.out", f"{b}.attn.to_out"),
            Rule(f"{a}.norm_attention", f"{b}.attn.norm_out"),
            Rule(f"{a}.mlp.inner", f"{b}.conv_out.conv_inverted", conv(1)),
            Rule(f"{a}.mlp.depthwise", f"{b}.conv_out.conv_depth"),
            Rule(f"{a}.mlp.outer", f"{b}.conv_out.conv_point", conv(1)),
            Rule(f"{a}.norm_mlp", f"{b}.conv_out.norm"),
        ]
    return Names(rules)


def original(config: DeepConfig) -> Names:
    """The authors' files. Their linear layers are 1 x 1 convolutions."""
    rules = [
        Rule("encoder.embed", "encoder.project_in.conv"),
        Rule("encoder.head", "encoder.project_out.0.conv"),
        Rule("decoder.embed", "decoder.project_in.conv"),
        Rule("decoder.norm", "decoder.project_out.0"),
        Rule("decoder.head", "decoder.project_out.2.conv"),
        Rule("encoder.levels.*.*.conv", "encoder.stages.*.op_list.*.main.conv"),
        Rule("decoder.levels.*.*.conv", "decoder.stages.*.op_list.*.main.conv.conv"),
    ]
    for a, b in ((f"{half}.levels.*.*", f"{half}.stages.*.op_list.*") for half in ("encoder", "decoder")):
        rules += [
            Rule(f"{a}.conv_in", f"{b}.main.conv1.conv"),
            Rule(f"{a}.conv_out", f"{b}.main.conv2.conv"),
            Rule(f"{a}.norm", f"{b}.main.conv2.norm"),
            Rule(f"{a}.attention.qkv", f"{b}.context_module.main.qkv.conv", conv(1)),
            Rule(f"{a}.attention.scales.*.*", f"{b}.context_module.main.aggreg.*.*"),
            Rule(f"{a}.attention.out", f"{b}.context_module.main.proj.conv", conv(1)),
            Rule(f"{a}.norm_attention", f"{b}.context_module.main.proj.norm"),
            Rule(f"{a}.mlp.inner", f"{b}.local_module.main.inverted_conv.conv", conv(1)),
            Rule(f"{a}.mlp.depthwise", f"{b}.local_module.main.depth_conv.conv"),
            Rule(f"{a}.mlp.outer", f"{b}.local_module.main.point_conv.conv", conv(1)),
            Rule(f"{a}.norm_mlp", f"{b}.local_module.main.point_conv.norm"),
        ]
    return Names(rules)
