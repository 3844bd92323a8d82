"""What decides which rows of a table are worth training on.

`stage` is the contract between a computation and the engine that runs it over a table, on one machine or a cluster. `cache` makes what
frozen networks see in rows.
"""
