"""Where it fits: prompts to the conditions that denoisers take.

In: a byte-level encoder that is trained with the model and needs no download; those of published models, frozen; classes. Short prompts
to longer ones (`text.enhance`, `text.writer`).
Out: captions of scenes (worlds, data).
Gotchas: the empty prompt is the null condition, in every encoder.
"""

from mezzotint.text.bytes import ByteEncoder, ByteEncoderConfig
from mezzotint.text.classes import Classes, ClassesConfig
from mezzotint.text.encoder import TextConfig, TextEncoder
from mezzotint.text.published import EncoderConfig, PublishedConfig

__all__ = ["ByteEncoder", "ByteEncoderConfig", "Classes", "ClassesConfig", "EncoderConfig", "PublishedConfig", "TextConfig", "TextEncoder"]
