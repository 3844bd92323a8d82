"""Where it fits: the one loop, and what it owns: optimizers, averages, checkpoints, previews, logs.

In: any method, any pipeline, any source. Out: what a loss is (methods), what a batch is (data).
Gotchas: everything random in step k is a function of (seed, rank, k), so a resumed run is the same run.
"""
