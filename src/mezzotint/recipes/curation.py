"""What is computed of collected rows, and which of them are kept. The thresholds were chosen on dirtied pictures: `docs/data.md`.

Every recipe also leaves out all but one of rows that are the same, and rows all of whose captions are faulty.
"""

from mezzotint.curation.caption_faults import CaptionFaults
from mezzotint.curation.clips import Clips
from mezzotint.curation.cuts import Curation, Cut
from mezzotint.curation.dedup import Duplicates, Perceptual
from mezzotint.curation.nsfw import Nsfw
from mezzotint.curation.overlay import Overlay
from mezzotint.curation.probe import Probe

OTHERS = (Cut("duplicate_of", empty=True), Cut("caption_faults", empty=True))
NAKED = Cut("nsfw", most=0.6, optional=True)


def photos() -> Curation:
    """Photographs and drawings of at least 256 pixels, for a model of about 512."""
    return Curation(
        stages=(CaptionFaults(), Probe()),
        optional=(Overlay(), Nsfw()),
        cuts=(
            Cut("short_side", least=256),
            Cut("aspect", most=3.0),
            Cut("entropy", least=2.0),
            Cut("flatness", most=0.95),
            Cut("contrast", least=0.02),
            Cut("sharpness", least=20.0),
            Cut("tiling", most=0.06),
            Cut("text_area", most=0.01, optional=True),
            NAKED,
            *OTHERS,
        ),
    )


def pixels() -> Curation:
    """Emoji, icons and sprites, of 32 pixels and more. Letters are a part of them, and marks are not found on so few pixels.

    Rows are the same where whole pictures are: of icons that look alike when cropped, one in six is another icon, and one that looks the
    other way is another one too.
    """
    return Curation(
        stages=(CaptionFaults(), Probe()),
        duplicates=Duplicates(Perceptual(mirror=False, crops=False)),
        cuts=(Cut("short_side", least=32), Cut("aspect", most=2.0), Cut("flatness", most=0.95), Cut("edge", least=0.48), *OTHERS),
    )


def clips() -> Curation:
    """Clips of one shot that move, but neither shake nor stutter."""
    return Curation(
        stages=(CaptionFaults(), Clips()),
        cuts=(
            Cut("seconds", least=1.0),
            Cut("shot_count", most=1),
            Cut("motion", least=0.005),
            Cut("shake", most=0.01),
            Cut("black_share", most=0.1),
            Cut("duplicate_share", most=0.5),
            *OTHERS,
        ),
    )
