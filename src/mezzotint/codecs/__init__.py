"""Where it fits: pixels to latents and back, for the pipeline and for training.

In: the identity, and learned codecs, one file each; published sizes by name (PRESETS). Out: their training losses and critics.
Gotchas: latents leave a codec already normalised; nobody else scales them.
"""

from collections.abc import Callable

from mezzotint.codecs import deep, kl
from mezzotint.codecs.codec import Codec, CodecConfig
from mezzotint.codecs.deep import Deep, DeepConfig
from mezzotint.codecs.identity import Identity, IdentityConfig
from mezzotint.codecs.kl import KL, KLConfig

PRESETS: dict[str, Callable[[], CodecConfig]] = {**kl.PRESETS, **deep.PRESETS}

__all__ = ["KL", "PRESETS", "Codec", "CodecConfig", "Deep", "DeepConfig", "Identity", "IdentityConfig", "KLConfig"]
