"""Where it fits: pixels to latents and back, for the pipeline and for training.

In: what every codec is, and the identity. Out: training losses and critics of learned codecs.
Gotchas: latents leave a codec already normalised; nobody else scales them.
"""

from mezzotint.codecs.codec import Codec, CodecConfig
from mezzotint.codecs.identity import Identity, IdentityConfig

__all__ = ["Codec", "CodecConfig", "Identity", "IdentityConfig"]
