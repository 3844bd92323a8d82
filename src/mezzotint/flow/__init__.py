"""Where it fits: the mathematics under everything else. Tensors in, tensors out.

In: paths between data and noise, densities of training times, solvers, guidance, power spectra.
Out: networks, text, devices, files. Imports nothing but torch.
Gotchas: t = 0 is data and t = 1 is noise, everywhere; a solver runs from 1 down to 0. docs/sampling.md says when to use which.
"""
