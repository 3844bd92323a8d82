"""Tiny pipelines of diffusers with random weights, one of every family that is read and written."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import transformers
from diffusers.models.embeddings import Timesteps
from models.parity import scatter
from tokenizers.processors import TemplateProcessing
from torch import Tensor

VOCABULARY = sorted({*map(chr, range(97, 123)), *(chr(c) + "</w>" for c in range(97, 123))})


def clip(projected: bool, width: int = 16, positions: int = 77) -> tuple[Any, Any]:
    """A CLIP text encoder, and a tokenizer whose tokens are letters."""
    vocabulary = {word: number for number, word in enumerate([*VOCABULARY, "<|startoftext|>", "<|endoftext|>"])}
    end = vocabulary["<|endoftext|>"]
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=positions,
        projection_dim=width + 4 if projected else width,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return scatter(kind(config)), transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5(width: int = 40) -> tuple[Any, Any]:
    """A T5 encoder, and a tokenizer whose tokens are letters."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(97, 123))]
    tokenizer = transformers.T5Tokenizer(vocab=[(piece, -float(n)) for n, piece in enumerate(pieces)], extra_ids=0)
    config = transformers.T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return scatter(transformers.T5EncoderModel(config)), tokenizer


def letters() -> Any:
    """A language model's tokenizer, whose tokens are letters."""
    marks = [*map(chr, range(32, 127)), "\u2581", "\n"]
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *marks])}
    tokenizer = transformers.GemmaTokenizerFast(vocab=vocabulary, merges=[], padding_side="right")
    begin = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    tokenizer.backend_tokenizer.post_processor = begin  # so that the empty prompt has a token, as Gemma's
    return tokenizer


def gemma(width: int = 16) -> tuple[Any, Any]:
    """A language model and its tokenizer."""
    tokenizer = letters()
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
    )
    return scatter(transformers.Gemma2Model(config)), tokenizer


def llama(width: int = 12) -> tuple[Any, Any]:
    """Another, with the head that makes words of it."""
    tokenizer = letters()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    return scatter(transformers.LlamaForCausalLM(config)), tokenizer


def kl(channels: int, quant: bool, scale: float, shift: float | None = None) -> Any:
    """A KL autoencoder of factor 2."""
    return scatter(
        diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=[8, 8],
            layers_per_block=1,
            latent_channels=channels,
            norm_num_groups=4,
            use_quant_conv=quant,
            use_post_quant_conv=quant,
            scaling_factor=scale,
            shift_factor=shift,
            sample_size=16,
        )
    )


def discrete() -> Any:
    """The discrete path, sampled from its last step to data."""
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )


def sd15() -> Any:
    model, tokenizer = clip(projected=False)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[8, 16],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    return diffusers.StableDiffusionPipeline(
        kl(4, True, 0.18215), model, tokenizer, scatter(unet), discrete(), None, None, requires_safety_checker=False
    )


def sdxl() -> Any:
    (one, a), (two, b) = clip(projected=False), clip(projected=True, width=24)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[8, 16],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        layers_per_block=1,
        transformer_layers_per_block=[1, 2],
        norm_num_groups=4,
        cross_attention_dim=40,
        attention_head_dim=[1, 2],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=28 + 6 * 256,
    )
    return diffusers.StableDiffusionXLPipeline(kl(4, True, 0.13025), one, two, a, b, scatter(unet), discrete(), add_watermarker=False)


def sd3(with_t5: bool = True) -> Any:
    (one, a), (two, b) = clip(projected=True), clip(projected=True, width=20)
    three, c = t5(40) if with_t5 else (None, None)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=44,
        out_channels=16,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = kl(16, False, 1.5305, 0.0609)
    return diffusers.StableDiffusion3Pipeline(scatter(transformer), scheduler, vae, one, a, two, b, three, c)


def flux(guidance: bool = True) -> Any:
    (one, a), (two, b) = clip(projected=False), t5(24)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.FluxPipeline(scheduler, kl(4, False, 0.3611, 0.1159), one, a, two, b, scatter(transformer))


def pixart(kind: Any = diffusers.PixArtSigmaPipeline, side: int = 8) -> Any:
    model, tokenizer = t5(24)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=side,
        caption_channels=24,
    )
    return kind(tokenizer=tokenizer, text_encoder=model, vae=kl(4, True, 0.13025), transformer=scatter(transformer), scheduler=discrete())


def dit() -> Any:
    transformer: Any = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=16
    )
    first, *others = scatter(transformer).transformer_blocks
    for block in others:  # as in the published weights
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    labels = {str(k): f"thing {k}" for k in range(1000)} | LABELS
    pipeline = diffusers.DiTPipeline(transformer, kl(4, True, 0.18215), discrete(), labels)
    pipeline.register_to_config(id2label=labels)
    return pipeline


def sana() -> Any:
    model, tokenizer = gemma()
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=["ResBlock", "EfficientViTBlock"],
        decoder_block_types=["ResBlock", "EfficientViTBlock"],
        encoder_block_out_channels=[8, 16],
        decoder_block_out_channels=[8, 16],
        encoder_layers_per_block=[1, 1],
        decoder_layers_per_block=[1, 1],
        encoder_qkv_multiscales=[[], [5]],
        decoder_qkv_multiscales=[[], [5]],
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.41407,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.SanaPipeline(tokenizer, model, scatter(vae), scatter(transformer), scheduler)


def lumina2() -> Any:
    model, tokenizer = gemma()
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 64, 64),
        cap_feat_dim=16,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    return diffusers.Lumina2Pipeline(scatter(transformer), scheduler, kl(4, False, 0.3611, 0.1159), model, tokenizer)


def hidream() -> Any:
    encoders = [clip(True, positions=128), clip(True, 20, positions=128), t5(24), llama()]
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[24, 12],
        text_emb_dim=44,
        axes_dims_rope=(8, 4, 4),
        llama_layers=[1, 2],
    )
    scheduler, vae = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), kl(4, False, 0.3611, 0.1159)
    return diffusers.HiDreamImagePipeline(scheduler, vae, *(part for pair in encoders for part in pair), scatter(transformer))


MADE: dict[str, Callable[[], Any]] = {
    "sd3": sd3,
    "flux": flux,
    "sd1.5": sd15,
    "sdxl": sdxl,
    "dit": dit,
    "pixart-alpha": lambda: pixart(diffusers.PixArtAlphaPipeline, 128),
    "pixart": pixart,
    "sana": sana,
    "lumina2": lumina2,
    "hidream": hidream,
}
# What diffusers' classes take: DiT draws squares, and so does HiDream without padding that is attended.
SIZES = dict.fromkeys(MADE, (32, 64)) | dict.fromkeys(("dit", "hidream"), (32, 32))
# Names of classes, beside "thing 0" and so on.
LABELS = {"7": "a red star, star of red", "300": "two blue circles", "400": "crane", "517": "crane"}
# What makes diffusers ask for what we do by default: plain guidance, exact sizes, times shifted once.
WORDS: dict[str, dict[str, Any]] = {
    "sana": {"use_resolution_binning": False},
    "pixart-alpha": {"use_resolution_binning": False},
    "pixart": {"use_resolution_binning": False},
    "lumina2": {"cfg_normalization": False},
}
FLOWS = ("sd3", "flux", "sana", "lumina2", "hidream")


def make(name: str) -> Any:
    """The pipeline of a family, always with the same weights."""
    torch.manual_seed(0)
    pipeline = MADE[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def saved(name: str, folder: Path) -> Any:
    """The same, written by diffusers."""
    pipeline = make(name)
    pipeline.save_pretrained(folder)
    return pipeline


def draw(pipeline: Any, name: str, prompt: str, noise: Tensor, size: tuple[int, int], steps: int, guidance: float, **more: Any) -> Tensor:
    """Their picture (B, 3, H, W) in [-1, 1] from unit noise (B, C, h, w)."""
    if name == "dit":
        return draw_class(pipeline, prompt, noise, steps, guidance)
    if name == "hidream":
        pipeline.default_sample_size = math.isqrt(size[0] * size[1]) // pipeline.vae_scale_factor  # pictures are made that large
    words = WORDS.get(name, {}) | more
    if name in FLOWS:
        words["sigmas"] = [1 - k / steps for k in range(steps)]
    latents = noise
    if name == "flux":
        h, w = noise.shape[2:]
        latents = noise.unflatten(2, (h // 2, 2)).unflatten(4, (w // 2, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    words |= {"height": size[0], "width": size[1], "num_inference_steps": steps, "guidance_scale": guidance}
    images: Tensor = pipeline(prompt, latents=latents, output_type="pt", **words).images
    return 2 * images - 1


def draw_class(pipeline: Any, prompt: str, noise: Tensor, steps: int, guidance: float) -> Tensor:
    """The same of a DiT. Its time is read as in the paper's code, whose frequencies are 1 / 128 of the scale apart, not 1 / 127."""
    for block in pipeline.transformer.transformer_blocks:
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    with mock.patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", return_value=noise):
        images: Tensor = pipeline(pipeline.get_label_ids([prompt]), guidance, None, steps, output_type="pt").images
    return 2 * images - 1
