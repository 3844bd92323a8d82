"""Where it fits: pipelines to named numbers, with the protocol stored beside them.

In: the judge's six tasks on Worlds, students beside their teachers, distances between sets of pictures, diversity, the report page.
Out: training, sampling settings (they come with the pipeline or from the caller).
Gotchas: a Frechet distance in another feature space than Inception's is not an FID, and is not called one.
"""
