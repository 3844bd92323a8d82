"""Where it fits: techniques. Each is one file that says which roles it needs and what its loss is.

In: the four-hook `Method` contract, and one file per technique.
Out: loops, optimizers, devices, files: the Trainer owns them.
Gotchas: a method keeps no state of its own; what changes over training is a role's weights or a function of `step`.
"""
