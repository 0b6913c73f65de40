"""Ids of a text: the byte-pair encoding of CLIP (Radford et al., ICML 2021), which TATS takes for descriptions.

The list of merges comes from the small package clip-anytorch as data, checked by its hash, or from a path:

    python -m training.tats.text                       stores it in the cache

| ids | meaning |
|---|---|
| 0 ... 255, 256 ... 511 | bytes, and bytes that end a word |
| 512 ... 49405 | merges, in the order of the list |
| 49406, 49407 | start and end of a text |

Ids after the end are 0, which is also the symbol "!" inside a word: nothing tells them apart, as published.
"""

from __future__ import annotations

import functools
import gzip
import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np

from dnnlib.download import file_sha256
from dnnlib.text import shown
from dnnlib.util import make_cache_dir_path
from metrics.detectors.registry import DetectorFile, Package, store_member
from training.tats.options import TEXT_LENGTH

MERGES = DetectorFile(
    cached_as="bpe_simple_vocab_16e6.txt.gz",
    sha256="924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
    num_bytes=1_356_917,
    licence="MIT",
    origin="https://github.com/openai/CLIP",
    package=Package(
        "clip-anytorch", "2.6.0", "ebc0afed243851b9dc7e16ab8afb665237e8a5838986e97cd99f123ae4ce94ce", is_wheel=True
    ),
    member="clip/bpe_simple_vocab_16e6.txt.gz",
)
NUM_MERGES = 48894
VOCABULARY = 512 + NUM_MERGES + 2
START, END = VOCABULARY - 2, VOCABULARY - 1
WORD_END = "</w>"
SPECIAL = {"<|startoftext|>": START, "<|endoftext|>": END}
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def stored_merges() -> Path:
    """Return the place of the list of merges in the cache."""
    return Path(make_cache_dir_path("text")) / MERGES.cached_as


def read_merges(path: str | Path | None = None) -> list[str]:
    """Return the lines of a list of merges, by default of that in the cache, whose hash is checked.

    Raises `ValueError` for a missing or other file.
    """
    file = stored_merges() if path is None else Path(path)
    if not file.is_file():
        remedy = "fetch it: python -m training.tats.text" if path is None else "give that of CLIP"
        raise ValueError(f"there is no list of merges at {file}: {remedy}")
    if path is None and file_sha256(file) != MERGES.sha256:
        raise ValueError(f"{file} is not the published list of merges: fetch it again: python -m training.tats.text")
    data = file.read_bytes()
    try:
        lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode().split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no list of merges ({error}): give that of CLIP") from error
    merges = lines[1 : 1 + NUM_MERGES]
    if len(merges) < NUM_MERGES or any(len(line.split()) != 2 for line in merges):
        raise ValueError(f"{file} does not hold {NUM_MERGES} pairs after its first line: give the list of CLIP")
    return merges


def byte_symbols() -> dict[int, str]:
    """Return the symbol of each byte, in the order of their ids: visible characters stand for themselves."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(visible)]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def clean(text: str) -> str:
    """Return a text with broken characters and HTML entities repaired, single spaces, and small letters.

    Raises `ValueError` if a text needs repair and ftfy is not installed.
    """
    if not (text.isascii() and text.isprintable()) or "&" in text:  # ftfy leaves any other text as it is
        try:
            import ftfy
        except ImportError:
            raise ValueError(
                f"the text {shown(text)} has characters other than ASCII, which ftfy reads: pip install "
                "'longtake[published]'"
            ) from None
        text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    return re.sub(r"\s+", " ", text).strip().lower()


def words(text: str) -> Iterator[str]:
    """Yield the parts of a cleaned text: marks, contractions, runs of letters, single digits, runs of other signs."""

    def kind(character: str) -> str:
        return " " if character.isspace() else {"L": "L", "N": "N"}.get(unicodedata.category(character)[0], "other")

    at = 0
    while at < len(text):
        known = next((word for word in (*SPECIAL, *CONTRACTIONS) if text.startswith(word, at)), None)
        first, stop = kind(text[at]), at + 1
        if known is not None:
            stop = at + len(known)
        elif first in ("L", "other"):
            while stop < len(text) and kind(text[stop]) == first:
                stop += 1
        if first != " ":
            yield text[at:stop]
        at = stop


class BytePairs:
    """The encoding of a list of merges, such as "i n"."""

    def __init__(self, merges: Sequence[str]):
        pairs = [(first, second) for first, second in (line.split() for line in merges)]
        self.of_byte = byte_symbols()
        symbols = list(self.of_byte.values())
        names = [*symbols, *(symbol + WORD_END for symbol in symbols), *(a + b for a, b in pairs)]
        self.ids = {name: number for number, name in enumerate(names)}
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.word = functools.lru_cache(maxsize=1 << 14)(self._word)

    def _word(self, word: str) -> tuple[int, ...]:
        """Return the ids of a word."""
        if word in SPECIAL:
            return (SPECIAL[word],)
        parts = [self.of_byte[byte] for byte in word.encode()]
        parts[-1] += WORD_END
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:], strict=False), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if pair not in self.ranks:
                break
            parts = list(_merged(parts, pair))
        return tuple(self.ids[part] for part in parts)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with those of its start and end."""
        return [START, *(number for word in words(clean(text)) for number in self.word(word)), END]

    def ids_of(self, text: str, length: int = TEXT_LENGTH, cut: bool = True) -> np.ndarray:
        """Return the ids of a text, followed by zeros: int64 (length,).

        A longer text loses its end with `cut`, else it raises `ValueError`.
        """
        found = self.encode(text)
        if len(found) > length:
            if not cut:
                raise ValueError(f"the text {shown(text)} has {len(found)} ids, at most {length} fit: shorten it")
            found = [*found[: length - 1], END]
        return np.array([*found, *[0] * (length - len(found))], np.int64)


def _merged(parts: Sequence[str], pair: tuple[str, str]) -> Iterator[str]:
    """Yield symbols in which every occurrence of a pair is one, from the left."""
    at = 0
    while at < len(parts):
        if tuple(parts[at : at + 2]) == pair:
            yield parts[at] + parts[at + 1]
            at += 2
        else:
            yield parts[at]
            at += 1


@click.command(help=__doc__)
def main() -> None:
    """Store the list of merges in the cache."""
    try:
        store_member(MERGES, stored_merges())
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"verified, {stored_merges()}. Next: python train.py tats --help")


if __name__ == "__main__":
    main()
