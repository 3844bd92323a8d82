"""Prompt enhancement: a short prompt is made longer before it is drawn (Betker et al. 2023, section 3.5), and nothing of it may get lost.

Three things can write the longer prompt: any endpoint that speaks OpenAI's chat protocol, a causal language model of transformers in a
folder, and the small writer that is trained here (`text.writer`). None is trusted. What comes back has to be one plain text of bearable
length in which everything that was asked for is still there; otherwise the prompt is drawn as it was given, and a note says why.
"""

import os
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mezzotint.errors import UserError
from mezzotint.text.chat import ChatError, Server
from mezzotint.text.published import network, pretrained
from mezzotint.text.writer import ByteWriter, load_writer, writer_folder

KEY = "MEZZOTINT_ENHANCE_KEY"  # variable of the environment
LONGEST = 2000  # letters of a prompt
TOKENS = 400  # that a language model may write

INSTRUCTION = (
    "You make prompts for an image generator more detailed. Keep every object, number, colour, name, relation and quoted text of the "
    "prompt, in its own words, and add what it leaves open: the setting, the light, the style, the composition. Answer with the longer "
    "prompt alone, in one paragraph of at most a hundred words."
)

# Words that a sentence can lose without saying less. No preposition of place is among them, and no negation.
SILENT = frozenset(
    re.findall(r"\w+", "a an the of and with to is are was were be been it its this that these those there here i me my we you please")
)
_WORD = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:['’-][^\W\d_]+)*")
_QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|‘([^’]+)’|(?<!\w)'([^']+)'(?!\w)")


class Failed(Exception):
    """No longer prompt came of it; the message is one line that says why."""


class Source(Protocol):
    """Something that writes a longer prompt."""

    def __call__(self, prompt: str) -> str:
        """A longer prompt, not yet checked. `Failed` where there is none."""
        ...


Lost = Callable[[str, str], str]  # (what was asked, the longer prompt) -> what was lost, in words; empty: nothing


@dataclass(frozen=True)
class Enhanced:
    """What is to be drawn. note: why it is the prompt as it was given, where it is."""

    prompt: str
    note: str = ""


def lost_words(asked: str, longer: str) -> str:
    """What a longer prompt lost: content words and numbers, each as often as it was asked for, and quoted texts, letter for letter.

    Words are compared without case. Inflections and synonyms count as lost: the prompt is then drawn as it was given, which is right too.
    """
    missing = [f'"{text}"' for text in (Counter(_quoted(asked)) - Counter(_quoted(longer))).elements()]
    missing += (Counter(_content(asked)) - Counter(_content(longer))).elements()
    return ", ".join(missing)


def _quoted(text: str) -> list[str]:
    return [next(filter(None, groups)) for groups in _QUOTED.findall(text)]


def _content(text: str) -> list[str]:
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return [word for word in words if word not in SILENT]


def enhance(prompt: str, source: Source, lost: Lost = lost_words) -> Enhanced:
    """A longer prompt from a source, or the prompt itself with a note. Never raises for what a source does wrong."""
    try:
        if not 0 < len(prompt.strip()) <= LONGEST:
            raise Failed(f"only a prompt of 1 to {LONGEST} letters is made longer, and this one has {len(prompt.strip())}")
        longer = plain(source(prompt))
    except Failed as failed:
        return Enhanced(prompt, f"{failed}; the prompt is drawn as it was given")
    if missing := lost(prompt, longer):
        return Enhanced(prompt, f"the longer prompt lost {' '.join(missing.split())[:80]}; the prompt is drawn as it was given")
    return Enhanced(longer)


def plain(text: str) -> str:
    """An answer as one line: without what a model thought before it, and without quotation marks around it.

    `Failed` where nothing is left, or too much, or something that no prompt has in it.
    """
    text = " ".join(text.rpartition("</think>")[2].split())
    if len(text) > 1 and text[0] + text[-1] in ('""', "“”") and not re.search(r"[\"“”]", text[1:-1]):
        text = text[1:-1].strip()
    if not text:
        raise Failed("the enhancer answered nothing")
    if len(text) > LONGEST:
        raise Failed(f"the enhancer answered {len(text)} letters, and {LONGEST} are the most")
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Co", "Cn") or letter == "\ufffd" for letter in text):
        raise Failed("the enhancer answered something that is no text")
    return text


def source(place: str, device: torch.device | None = None) -> Source:
    """What writes longer prompts at a place: a URL, the folder of a run of tiny.enhance, or of a causal language model of transformers.

    UserError where there is nothing of the kind.
    """
    if "://" in place:
        return endpoint(place, os.environ.get(KEY, ""))
    if writer_folder(place) is not None:
        return Trained(load_writer(place))
    if not Path(place).is_dir():
        raise UserError(f"no enhancer at {place!r}: expected a URL, the folder of a run of tiny.enhance, or of a causal language model")
    return LanguageModel(place, device or torch.device("cpu"))


@dataclass(frozen=True)
class Trained:
    """A writer that was trained here, on captions of Worlds. It takes the likeliest byte."""

    writer: ByteWriter

    def __call__(self, prompt: str) -> str:
        try:
            return self.writer.write([prompt])[0]
        except ValueError as error:
            raise Failed(str(error)) from error


class LanguageModel:
    """A causal language model of transformers from a folder of safetensors. It takes the likeliest token, for a minute at most."""

    def __init__(self, place: str, device: torch.device, seconds: float = 60.0) -> None:
        import transformers

        self.seconds = seconds
        self.tokenizer: Any = pretrained(transformers.AutoTokenizer, place, "language model")
        self.model: Any = network(transformers.AutoModelForCausalLM, place, "language model").to(device)

    @torch.no_grad()
    def __call__(self, prompt: str) -> str:
        tokens = self.tokenizer(self._asked(prompt), return_tensors="pt", add_special_tokens=not self.tokenizer.chat_template)
        tokens = tokens.to(self.model.device)
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30) - tokens.input_ids.shape[1]
        if room < 1:
            raise Failed("the prompt is too long for the language model")
        out = self.model.generate(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            do_sample=False,
            max_new_tokens=min(TOKENS, room),
            max_time=self.seconds,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        answer: str = self.tokenizer.decode(out[0, tokens.input_ids.shape[1] :], skip_special_tokens=True)
        return answer if self.tokenizer.chat_template else answer.strip().split("\n")[0]

    def _asked(self, prompt: str) -> str:
        """What the model reads: in its own form of a conversation, or, where it has none, as a text to go on with."""
        if not self.tokenizer.chat_template:
            return f"{INSTRUCTION}\n\nPrompt: {prompt}\nLonger prompt:"
        turns = [{"role": "user", "content": f"{INSTRUCTION}\n\nPrompt: {prompt}"}]  # not all have a role for instructions
        said: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return said


@dataclass(frozen=True)
class Endpoint:
    """A server that speaks OpenAI's chat protocol. model: its name there, if it has one.

    seconds: for everything, all `tries` together. Only what may pass, as overload and lost connections do, is tried again.
    """

    server: Server
    model: str = ""
    seconds: float = 60.0
    tries: int = 3
    pause: float = 0.5

    def __call__(self, prompt: str) -> str:
        turns = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}]
        body = {"messages": turns, "max_tokens": TOKENS, "temperature": 0} | ({"model": self.model} if self.model else {})
        end = time.monotonic() + self.seconds
        for number in range(self.tries):
            try:
                return self.server.ask(body, max(0.1, end - time.monotonic()))
            except ChatError as error:
                pause = max(error.wait, self.pause * 2**number)
                if not error.again or number + 1 == self.tries or time.monotonic() + pause > end:
                    raise Failed(f"the enhancer {error}") from None
            time.sleep(pause)
        raise ValueError(f"tries must be at least 1, got {self.tries}")


def endpoint(place: str, key: str = "") -> Endpoint:
    """The endpoint at "https://HOST/v1#MODEL", or at "http://localhost:PORT/v1" without encryption. UserError for another URL."""
    address, _, model = place.partition("#")
    return Endpoint(Server.at(address, key, KEY), model)
