"""Mezzotint: the whole life of an image and video model, in one readable code base."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mezzotint.pipeline import Pipeline, load

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__", "load"]


def __getattr__(name: str) -> object:
    # torch takes a second to import; the command line answers before that.
    if name in ("Pipeline", "load"):
        from mezzotint import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'mezzotint' has no attribute {name!r}")
