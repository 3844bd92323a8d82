"""Where it fits: files to tables, and files and worlds to batches.

In: heaps of files and lists of addresses (`ingest`); sources (a table, a folder of captioned images or of preference pairs, Worlds, pairs
that a teacher drew); the loader that remembers where it was. Out: tables, and what a batch is used for.
Gotchas: a source is a pure function of the batch number; nothing about data is kept between batches but the files of pairs.
"""
