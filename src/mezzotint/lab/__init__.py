"""Where it fits: the field's claims, each an experiment that anybody can repeat.

In: recipes, run by the one loop and measured by `evals` as the command line does. Out: techniques and measures themselves.
Gotchas: an experiment is one command, can be stopped at any point and goes on; what it has measured stays in its folder.
"""
