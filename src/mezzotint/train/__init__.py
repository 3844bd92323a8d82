"""Where it fits: the one loop, and what it owns: optimizers, averages, checkpoints, previews, logs.

In: any method, any pipeline, any source. Out: what a loss is (methods), what a batch is (data).
Gotchas: everything random in micro-batch m of step k is a function of (seed, k, m), so a resumed run is the same run, on any number of
ranks. Importing `train.parallel` joins nothing; a `Trainer` joins the ranks that torchrun started.
"""
