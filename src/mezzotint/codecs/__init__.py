"""Where it fits: pixels to latents and back, for the pipeline and for training.

In: the identity, and learned codecs, one file each; published sizes by name (PRESETS). Out: their training losses and critics.
Gotchas: latents leave a codec already normalised; nobody else scales them.
"""

from collections.abc import Callable

from mezzotint.codecs import kl
from mezzotint.codecs.codec import Codec
from mezzotint.codecs.identity import Identity, IdentityConfig
from mezzotint.codecs.kl import KL, KLConfig
from mezzotint.config import Config

PRESETS: dict[str, Callable[[], Config]] = {**kl.PRESETS}

__all__ = ["KL", "PRESETS", "Codec", "Identity", "IdentityConfig", "KLConfig"]
