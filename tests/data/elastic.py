"""What any number of ranks reads in a step, for tests of sources."""

from collections.abc import Callable

from mezzotint.data.batch import Loader, Source


def step(build: Callable[[], Source], position: int, ranks: int) -> list[str]:
    """Ids and captions of four micro-batches of three, which so many ranks read between them, each with a source of its own."""
    names: list[str] = []
    for rank in range(ranks):
        loader = Loader(build(), 3, streams=4)
        for micro in range(rank * 4 // ranks, (rank + 1) * 4 // ranks):
            loader.stream, loader.position = micro, position
            batch = next(loader)
            names += [f"{name} {prompt}" for name, prompt in zip(batch.ids, batch.prompts, strict=True)]
        loader.close()
    return names
