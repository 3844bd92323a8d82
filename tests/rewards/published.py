"""Tiny networks with random weights in the folders of published rewards."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import peers
import torch
import transformers
from models.parity import scatter
from safetensors.torch import save_file

SIDE = 16


def _vision(**changes: int) -> dict[str, Any]:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    return sizes | changes


def _processor(kind: str) -> Any:
    return getattr(transformers, kind)(size={"height": SIDE, "width": SIDE}, do_center_crop=False, do_resize=True)


def clip(folder: Path) -> Any:
    """A CLIP of both towers."""
    text, tokenizer = peers.clip(projected=False)
    config = transformers.CLIPConfig(text_config=text.config.to_dict(), vision_config=_vision(), projection_dim=12)
    model = scatter(transformers.CLIPModel(config)).eval()
    for part in (model, tokenizer, _processor("CLIPImageProcessor")):
        part.save_pretrained(folder)
    return model


def blip(folder: Path) -> Any:
    """A BLIP whose text encoder looks at the picture."""
    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(chr, range(97, 123)), *(f"##{chr(c)}" for c in range(97, 123))]
    tokenizer = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(letters)})
    text = {"hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(letters), "max_position_embeddings": 64, "projection_dim": 8}
    config = transformers.BlipConfig(text_config=text, vision_config=_vision(), image_text_hidden_size=8)
    model = scatter(transformers.BlipForImageTextRetrieval(config)).eval()
    for part in (model, tokenizer, _processor("BlipImageProcessor")):
        part.save_pretrained(folder)
    return model


def trocr(folder: Path) -> Any:
    """A reader of letters."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(97, 123))]
    tokenizer = transformers.T5Tokenizer(vocab=[(piece, -float(n)) for n, piece in enumerate(pieces)], extra_ids=0)
    decoder = transformers.TrOCRConfig(vocab_size=len(pieces), d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32)
    encoder = transformers.ViTConfig(**_vision())
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 1
    model = scatter(transformers.VisionEncoderDecoderModel(config)).eval()
    for part in (model, tokenizer, _processor("ViTImageProcessor")):
        part.save_pretrained(folder)
    return model


def head(path: Path, width: int) -> torch.nn.Sequential:
    """The layers of a published head, saved under its names."""
    torch.manual_seed(0)
    sizes = (width, 8, 6, 4, 3, 1)
    layers: list[torch.nn.Module] = []
    for number, (a, b) in enumerate(pairwise(sizes)):
        layers += [torch.nn.Linear(a, b)] + ([torch.nn.Dropout(0.2)] if number < 3 else [])
    stack = torch.nn.Sequential(*layers).eval()
    save_file({f"layers.{name}": x for name, x in stack.state_dict().items()}, path)
    return stack
