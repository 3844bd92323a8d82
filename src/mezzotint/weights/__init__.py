"""Where it fits: the names and layouts that other code bases give to the same numbers.

In: maps between our state dicts and published ones, one small file of rules per architecture; adapters (LoRA) as files in the
field's dialects, which follow from the same rules.
Out: reading and writing whole checkpoints, choosing an architecture, downloading.
Gotchas: a map is strict both ways. A key that is left over or missing is an error that lists it, never a warning.
"""

from mezzotint.weights.names import Names, Rule, fill

__all__ = ["Names", "Rule", "fill"]
