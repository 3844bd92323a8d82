"""The suite "images": how near samples are to pictures of a folder that training never saw."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mezzotint.data.batch import Source
from mezzotint.errors import UserError
from mezzotint.evals import features
from mezzotint.evals.distance import diversity, frechet, kernel
from mezzotint.pipeline import Pipeline, Sampling


@dataclass(frozen=True)
class Protocol:
    """What was asked: at most so many held-out captions, one picture each, from this seed."""

    captions: int = 500
    seed: int = 1_000_000


def evaluate(
    pipeline: Pipeline,
    source: Source,
    protocol: Protocol | None = None,
    settings: Sampling | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Distances of samples, drawn from held-out captions, to the held-out pictures of those captions.

    fd, kd: in the feature space named. floor: what as many training pictures score, which is as good as it gets.
    diversity: among the samples. A Frechet distance depends on the number of pictures: compare equal `pictures` only.
    """
    protocol = protocol or Protocol()
    settings = settings or pipeline.config.sampling
    real = source.held_out(protocol.captions)
    if len(real) < 2:
        raise UserError(f"an evaluation needs at least 2 held-out pictures, the data has {len(real)}; raise the held-out share")
    samples = pipeline(real.prompts, seed=protocol.seed, settings=settings, progress=progress)
    drawn, held = features.scattering(samples), features.scattering(real.images)
    known = features.scattering(source.batch(0, len(real)).images)
    return {
        "suite": "images",
        "protocol": asdict(protocol) | {"sampling": settings.to_data()},
        "pictures": len(real),
        f"fd_{features.NAME}": frechet(drawn, held),
        f"fd_{features.NAME}_floor": frechet(known, held),
        f"kd_{features.NAME}": kernel(drawn, held),
        f"kd_{features.NAME}_floor": kernel(known, held),
        "diversity": diversity(samples, ["all"] * len(real)),
        "diversity_held_out": diversity(real.images, ["all"] * len(real)),
    }
