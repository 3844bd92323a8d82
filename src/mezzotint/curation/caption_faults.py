"""What is wrong with a caption, by looking at its letters alone: no model, and no judgement of whether it fits the picture."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mezzotint.curation.stage import Compute, Stage

if TYPE_CHECKING:
    import pyarrow as pa

# What is common in a language and rare in its neighbours; the Latin script does not tell them apart.
STOP_WORDS = {
    "en": ["the", "of", "and", "with", "in", "on", "is", "are", "at", "an", "its", "from", "by", "this", "that", "to", "for", "it", "as"],
    "de": ["der", "die", "das", "und", "mit", "ein", "eine", "einem", "einer", "auf", "ist", "im", "von", "den", "dem", "vor", "zwei"],
    "fr": ["le", "les", "des", "et", "avec", "un", "une", "sur", "est", "dans", "du", "au", "aux", "deux", "qui"],
    "es": ["el", "los", "las", "y", "con", "una", "en", "del", "por", "sobre", "al", "dos", "un", "que", "está"],
    "it": ["il", "gli", "e", "con", "una", "di", "della", "nel", "sul", "che", "dei", "un", "sono", "delle"],
    "pt": ["o", "os", "as", "e", "com", "uma", "em", "do", "da", "no", "na", "um", "dos", "que", "sobre", "ao"],
    "nl": ["het", "een", "en", "met", "van", "op", "de", "zijn", "voor", "twee", "in", "naast", "aan"],
}
# The word by which Unicode names a script's letters, and the language or languages that are written in it.
SCRIPTS = {
    "CYRILLIC": "ru",
    "GREEK": "el",
    "ARABIC": "ar",
    "HEBREW": "he",
    "DEVANAGARI": "hi",
    "THAI": "th",
    "HANGUL": "ko",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "CJK": "zh",
}
REFUSAL = re.compile(
    r"\b(as an? (ai|language model|assistant)|i('m| am) (sorry|unable|not able)|unable to (see|view|describe|process|assist)|"
    r"i (can ?not|can't|won't) (see|help|assist|view|describe|process|provide|identify)|please (provide|upload) |"
    r"no image (was|has been|is) (provided|attached))",
    re.IGNORECASE,
)
ADDRESS = re.compile(r"https?://|\bwww\.|\b[\w-]+\.(com|net|org|io|co\.uk|de)\b|\S+@\S+\.\w{2,}", re.IGNORECASE)
FILE = re.compile(
    r"\.(jpe?g|png|gif|webp|bmp|tiff?|heic|svg|mp4|mov|avi|webm)\b|^(img|dsc|dscn|dcim|p|pxl|screenshot|image|photo)[ _-]?\d{3,}",
    re.IGNORECASE,
)
# UTF-8 that was read as Latin-1 or Windows-1252, what replaces a byte that cannot be read, and codes of control.
MANGLED = re.compile(
    "[\u00c2\u00c3][\u0080-\u00bf\u0152\u0153\u0160\u0161\u2018-\u201e]|\u00e2(\u20ac|\u0080)|\ufffd|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
MARKUP = re.compile(r"&(amp|lt|gt|quot|nbsp|#\d+);|</?[a-z][^>]*>", re.IGNORECASE)
REPEATED = 4  # times in a row


@dataclass
class CaptionFaults(Stage, kind="caption faults"):
    """What is wrong with each caption of a column, "" if nothing: a list beside it, in `caption_faults` and the end of the column's name.

    language: which they should be in, "" for any; least, most: characters.
    """

    column: str = "captions"
    language: str = ""
    least: int = 3
    most: int = 2000
    rows: ClassVar[int] = 1024

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.column,)

    @property
    def writes(self) -> "pa.Schema":
        import pyarrow as pa

        return pa.schema([pa.field(f"caption_faults{self.column.removeprefix('captions')}", pa.list_(pa.string()))])

    def open(self) -> Compute:
        import pyarrow as pa

        def compute(batch: pa.RecordBatch) -> pa.RecordBatch:
            found = [
                None if captions is None else [fault(text or "", self.language, self.least, self.most) for text in captions]
                for captions in batch[self.column].to_pylist()
            ]
            return pa.record_batch([pa.array(found, pa.list_(pa.string()))], schema=self.writes)

        return compute


def fault(text: str, language: str = "", least: int = 3, most: int = 2000) -> str:
    """The first thing that is wrong with a caption: its kind, then for some a colon and the details; "" if nothing is."""
    bare = text.strip()
    if len(bare) < least:
        return "too short"
    if len(bare) > most:
        return f"too long: {len(bare)} characters"
    for kind, pattern in (("mangled text", MANGLED), ("file name", FILE), ("address", ADDRESS), ("refusal", REFUSAL), ("markup", MARKUP)):
        if pattern.search(bare):
            return kind
    if not any(character.isalpha() for character in bare):
        return "no words"
    if repeats(bare):
        return "repetition"
    guess = language_of(bare)
    return f"language: {guess}" if language and guess and guess != language else ""


def repeats(text: str) -> bool:
    """Whether one to eight words are said several times in a row, or a few words make up most of a long text."""
    words = re.findall(r"\w+", text.lower())
    for size in range(1, 9):
        run = 0
        for k in range(size, len(words)):
            run = run + 1 if words[k] == words[k - size] else 0
            if run >= size * (REPEATED - 1):
                return True
    return len(words) >= 24 and len(set(words)) < len(words) / 5


def language_of(text: str) -> str:
    """A guess at the language, as its code of two letters; "" where the letters do not tell."""
    scripts = Counter(_scripts(text))
    if not scripts:
        return ""
    script, _ = scripts.most_common(1)[0]
    if script in ("CJK", "HIRAGANA", "KATAKANA") and scripts["HIRAGANA"] + scripts["KATAKANA"]:
        return "ja"
    if script != "LATIN":
        return SCRIPTS.get(script, "")
    words = Counter(re.findall(r"\w+", text.lower()))
    known = {language: sum(words[word] for word in those) for language, those in STOP_WORDS.items()}
    best = max(known, key=lambda language: known[language])
    alone = sum(count == known[best] for count in known.values()) == 1
    return best if known[best] and alone else ""


def _scripts(text: str) -> Iterable[str]:
    return (unicodedata.name(character, "").split(" ")[0] for character in text if character.isalpha())
