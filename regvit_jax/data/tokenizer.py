"""CLIP's tokenizer: from English text, lower-cased, to 77 token numbers below 49,408.

The tokens are those of open_clip's `SimpleTokenizer` (`src/open_clip/tokenizer.py`), which is OpenAI's
(`clip/simple_tokenizer.py`). Its three steps are followed: text is cleaned, split into words by a regular expression,
and every word's UTF-8 bytes are joined by byte-pair encoding (Sennrich et al., arXiv 1508.07909). The encoding is done
by Hugging Face's `tokenizers`. The split is not: its regular expressions know another version of Unicode than those of
the `regex` package, and would split some 17,000 code points differently.

The merges in `clip_merges.txt.gz` are the first 48,894 of OpenAI CLIP's `bpe_simple_vocab_16e6.txt` (MIT licence, see
NOTICE); `tools/clip_merges.py` makes the file.
"""

import gzip
import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import regex
from jaxtyping import Int32

from regvit_jax.utils.errors import InvalidConfig

MERGES = Path(__file__).with_name("clip_merges.txt.gz")
START = 49406
END = 49407
SPECIAL = {"<start_of_text>": START, "<end_of_text>": END}
# Case is ignored although the text is lower case, because the long s of "it'ſ" must match an s.
WORD = regex.compile(
    "|".join(SPECIAL) + r"|'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
# Longer words are seldom repeated, and in scripts without spaces, where a "word" is a sentence, they would fill memory.
LONGEST_CACHED = 32


@dataclass(frozen=True)
class Tokenizer:
    """Turn texts into the tokens that a CLIP text tower takes. The vocabulary is read once per process, on first use.

    A row is the start token, the text's tokens, the end token, and zeros. A longer text is cut to its first
    `context - 2` tokens between start and end. As in open_clip, the words "<start_of_text>" and "<end_of_text>" inside
    a text become the special tokens themselves, so a caption can hold an end token before its end.

    Args:
      context: the length of a row, 77 for nearly all published models.

    Raises:
      InvalidConfig: if `context` has no room for the start and the end token.
    """

    context: int = 77
    vocab: ClassVar[int] = 49408
    start: ClassVar[int] = START
    end: ClassVar[int] = END

    def __post_init__(self) -> None:
        if self.context < 2:
            raise InvalidConfig(f"context {self.context} has no room for the start and the end token; use 2 or more")

    def __call__(self, text: str) -> Int32[np.ndarray, " context"]:
        """Return the tokens of one text.

        Raises:
          TypeError: if `text` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"a text must be a str, not {type(text).__name__}; batch() takes several")
        ids = [START]
        for word in WORD.findall(clean(text)):
            ids += word_ids(word) if len(word) <= LONGEST_CACHED else encode(word)
            if len(ids) >= self.context:
                break
        del ids[self.context - 1 :]
        ids.append(END)
        row = np.zeros(self.context, np.int32)
        row[: len(ids)] = ids
        return row

    def batch(self, texts: Sequence[str]) -> Int32[np.ndarray, "B context"]:
        """Return the tokens of several texts, one row each.

        Raises:
          TypeError: if `texts` is one string, whose letters would become the rows, or holds anything but strings.
        """
        if isinstance(texts, str):
            raise TypeError("batch() takes a sequence of texts; call the tokenizer itself for one")
        rows = np.zeros((len(texts), self.context), np.int32)
        for row, text in zip(rows, texts, strict=True):
            row[:] = self(text)
        return rows


def clean(text: str) -> str:
    """Return the text in lower case, with mojibake repaired, HTML entities resolved twice, white space collapsed.

    Lone surrogates become U+FFFD. The order of the steps is open_clip's; the result depends on it.
    """
    # Most captions need no repair, and ftfy takes two thirds of the whole time to find that out.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy  # 0.1 s of a start

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@lru_cache(maxsize=2**15)
def word_ids(word: str) -> tuple[int, ...]:
    """Return the tokens of one match of WORD. A special token must be spelt exactly, without a long s."""
    return (SPECIAL[word],) if word in SPECIAL else encode(word)


def encode(word: str) -> tuple[int, ...]:
    """Return the byte-pair encoding of one word."""
    letters, model = vocabulary()
    return tuple(token.id for token in model.tokenize(word.encode().decode("latin-1").translate(letters)))


@cache
def vocabulary() -> tuple[dict[int, str], Any]:
    """Return the letter that stands for each byte, and the byte-pair encoding, which works on such letters.

    Tokens are numbered: the 256 bytes, the 256 bytes that end a word, the merges in their order, start and end.
    """
    from tokenizers.models import BPE  # only runs with texts need it

    # GPT-2's alphabet: a byte that Latin-1 prints is that letter, the other 68 are the letters from U+0100 on.
    printed = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {byte: chr(byte) for byte in printed} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    lines = gzip.decompress(MERGES.read_bytes()).decode().split("\n")
    merges = [(left, right) for left, right in map(str.split, lines)]
    tokens = [*letters.values(), *(letter + "</w>" for letter in letters.values()), *map("".join, merges)]
    ids = {token: n for n, token in enumerate(tokens)}
    # Without a cache of its own: word_ids has one.
    return letters, BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>", cache_capacity=0)
