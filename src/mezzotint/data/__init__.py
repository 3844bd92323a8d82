"""Where it fits: files and worlds to batches.

In: sources (a table, a folder of captioned images, Worlds, pairs that a teacher drew), the loader that remembers where it was.
Out: what a batch is used for.
Gotchas: a source is a pure function of the batch number; nothing about data is kept between batches but the files of pairs.
"""
