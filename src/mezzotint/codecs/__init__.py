"""Where it fits: pixels to latents and back, for the pipeline and for training.

In: the identity. Out: training losses and critics of learned codecs.
Gotchas: latents leave a codec already normalised; nobody else scales them.
"""

from mezzotint.codecs.identity import Identity, IdentityConfig

__all__ = ["Identity", "IdentityConfig"]
