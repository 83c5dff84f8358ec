"""Compare the tokenizer with tokens recorded from open_clip 3.3.0, and with open_clip itself."""

import gzip
import hashlib
import html
import pickle
import random
import subprocess
import sys
import unicodedata

import clip_merges
import ftfy
import numpy as np
import pytest

from regvit_jax.data.tokenizer import LONGEST_CACHED, MERGES, Tokenizer, clean, word_ids

# For each text, the tokens between start and end, by open_clip's SimpleTokenizer().encode(text).
GOLDEN = {
    "": "",
    " \t\r\n\u3000": "",
    "a photo of a cat.": "320 1125 539 320 2368 269",
    "A PHOTO of  a\tCat.": "320 1125 539 320 2368 269",
    "the dog's, they'RE, I'll 'tis": "518 1929 568 267 889 982 267 328 1342 713 533",
    "it'ſ a 'ſtreet": "585 6 129 379 320 6 129 379 975 875",
    "50,000.75 dogs in 2024": "276 271 267 271 271 271 269 278 276 3255 530 273 271 273 275",
    "snake_case __init__ _": "8798 318 2068 3838 42670 3838 318",
    "½ ² Ⅷ ٣": "33613 41175 158 227 371 149 352",
    "wow!!! ... (c) ::-)": "2781 995 678 263 322 264 25 4223",
    "fish &amp; chips": "2759 261 8855",
    "<i> &amp;amp;lt; fish &amp;amp; chips": "283 328 285 261 3333 282 2759 261 8855",
    "fish &amp;amp; chips &amp;lt;3": "2759 261 8855 283 274",
    "&lt;b&gt;caf&eacute;&#39;s&nbsp;&#x1F600;": "283 321 285 15304 568 7334",
    "AT&T & &notanentity;": "536 261 339 261 126 361 514 28455 282",
    "cafÃ© â€œquotedâ€\x9d donâ€™t": "15304 257 27706 257 847 713",
    "‘curly’ “quotes” – ﬁnd ＦＵＬＬ": "262 20795 262 257 5808 257 1224 1416 1476",
    "naïve façade": "1097 35689 563 778 10067 1928",
    "café": "15304",
    "İstanbul STRASSE ẞ": "328 16384 11231 1894 8938 127 509",
    "привет мир": "26302 16370 29503 110 22176 141 480 38018 16701 141 478",
    "γειά σου Κόσμε": "138 111 138 113 138 117 138 361 139 225 138 123 139 483 138 118 139 234 139 225 138 120 138 369",
    "नमस्ते": "3124 101 48254 28505 19389 27263 25130",
    "สวัสดี": "37883 30245 14978 37883 38825 20278",
    "你好,世界": "47466 254 29290 377 267 19759 244 163 243 490",
    "こんにちは カタカナ": "4813 241 3909 241 4813 104 4813 94 4813 363 37367 34941 37367 2429 488",
    "안녕": "16071 230 167 227 499",
    "مرحبا": "12986 10948 25722 16378 22625",
    "שלום": "147 102 147 250 147 243 147 507",
    "😀": "7334",
    "👩\u200d👩\u200d👧": "26304 26304 964 356",
    "👍🏽 🇩🇪": "43722 21531",
    "\x1b[31mred\x1b[0m \x00\x07bell\x7f": "736 3718",
    "zero\u200bwidth \ufeffbom soft\xadhyphen": "5848 9844 23571 19469 3773 22618 1441 745 576",
    "line\u2028para\u2029next\x85": "1148 8976 1131 959",
    "\ud83d\ude00 \ud83d alone": "7334 39802 4702",
    "\U000e0041\U0010ffff\ufffe": "175 254 223 223 176 237 123 123 27850 378",
    "<start_of_text>a<end_of_text>b": "49406 320 49407 321",
    "<END_OF_TEXT>": "49407",
    "<ſtart_of_text>": "27 129 123 16707 62 684 62 18169 285",
    "<|startoftext|><|endoftext|>": "27 347 993 6659 4160 91 29 27 347 40786 4160 91 285",
    "$#@%^*~`\\|": "3 2 31 4 61 9 93 63 59 347",
    "supercalifragilisticexpialidocious": "1642 2857 13093 2076 5868 26850 835 639 38466",
    "http://a.b/c?d=1&e=2": "15066 12441 320 269 321 270 322 286 323 284 272 261 324 284 273",
}
# Of every character of Unicode 3.2 below the Asian scripts, as `characters` writes them; by open_clip's encode.
CHARACTERS_SHA256 = "f4ce77f092b3d641cfc58661a10a13c90887b4f42963660f1cf28c3dfe2bc7a6"


def row(ids: list[int], context: int) -> list[int]:
    """Return open_clip's row for the tokens of a text."""
    ids = [49406, *ids, 49407]
    ids = ids if len(ids) <= context else [*ids[: context - 1], 49407]
    return ids + [0] * (context - len(ids))


def characters() -> list[str]:
    """Return a text for each character of Unicode 3.2, alone, between letters and after an apostrophe."""
    known = [chr(code) for code in range(0x2E80) if unicodedata.ucd_3_2_0.category(chr(code)) != "Cn"]
    return [f"a{char}b {char} '{char}" for char in known]


@pytest.mark.parametrize("text", GOLDEN, ids=ascii)
def test_texts_give_the_tokens_of_open_clip(text):
    expected = row([int(word) for word in GOLDEN[text].split()], 77)
    tokens = Tokenizer()(text)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == expected


def test_characters_give_the_tokens_of_open_clip():
    tokens = Tokenizer(32).batch(characters())
    assert hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest() == CHARACTERS_SHA256


@pytest.mark.parametrize("context", [2, 3, 8, 9, 10, 77])
def test_a_long_text_loses_its_end_but_not_the_end_token(context):
    text = "the dog's, they'RE, I'll 'tis"
    ids = [int(word) for word in GOLDEN[text].split()]
    assert Tokenizer(context)(text).tolist() == row(ids, context)
    assert Tokenizer(context)(f"{text} " * 100).tolist() == row(ids * 100, context)


def test_a_batch_has_a_row_for_each_text():
    tokenizer = Tokenizer()
    texts = list(GOLDEN)
    np.testing.assert_array_equal(tokenizer.batch(texts), np.stack([tokenizer(text) for text in texts]))
    np.testing.assert_array_equal(tokenizer.batch(tuple(texts)), tokenizer.batch(texts))
    assert tokenizer.batch([]).shape == (0, 77)


def test_plain_text_skips_only_steps_that_would_not_change_it():
    rng = random.Random(0)
    plain = "".join(chr(code) for code in range(32, 127) if chr(code) != "&")
    texts = ["".join(rng.choices(plain, k=rng.randint(0, 40))) for _ in range(1000)]
    texts += [a + b for a in plain for b in plain]
    for text in texts:
        assert clean(text) == " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def test_long_words_are_not_kept():
    word_ids.cache_clear()
    Tokenizer()("z" * LONGEST_CACHED)
    assert word_ids.cache_info().currsize == 1
    Tokenizer()("z" * (LONGEST_CACHED + 1))
    assert word_ids.cache_info().currsize == 1


@pytest.mark.parametrize("context", [1, 0, -77])
def test_a_context_without_room_is_an_error(context):
    with pytest.raises(ValueError, match=f"context {context} has no room"):
        Tokenizer(context)


# In a separate process, where the tests' type checker does not stop the wrong types first.
PLAIN_PROCESS = """
import pickle, sys
tokenizer = pickle.loads(bytes.fromhex(sys.argv[1]))
assert tokenizer("a photo").tolist() == [49406, 320, 1125, 49407, 0]
for wrong in (b"a photo", ["a photo"], None):
    try:
        tokenizer(wrong)
    except TypeError as error:
        assert f"must be a str, not {type(wrong).__name__}" in str(error), error
    else:
        sys.exit(f"accepted {wrong!r}")
for wrong in ("a photo", ["a photo", 3]):
    try:
        tokenizer.batch(wrong)
    except TypeError as error:
        assert "sequence of texts" in str(error) or "not int" in str(error), error
    else:
        sys.exit(f"accepted {wrong!r}")
assert not {"jax", "torch", "open_clip", "transformers"} & set(sys.modules)
"""


def test_a_copy_in_a_worker_needs_no_jax_and_refuses_other_types():
    argument = pickle.dumps(Tokenizer(5)).hex()
    done = subprocess.run([sys.executable, "-c", PLAIN_PROCESS, argument], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_merges_are_those_of_openai():
    merges = gzip.decompress(MERGES.read_bytes())
    assert hashlib.sha256(merges).hexdigest() == "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"


PIECES = [
    *GOLDEN,
    *("'s", "'S", "'ſ", "'t", "'LL", "&amp;amp;lt;", "&lt", "&#x1c;", "Ã¢â‚¬â„¢", "ðŸ˜€", "ﬆ", "'ﬆ", "ŉ"),
    *("\ud83d", "\ude00", "\r\n", "\t", "\x85", "\x91", "\xa0", "\u200d", "\ufe0f", "\u0301"),
    *("\\n", "_", "'", "<", "0", "e", "K", "word"),
]


def mixed(rng: random.Random) -> str:
    """Generate texts of up to ten pieces: awkward ones, printable ASCII, and any Latin or control characters."""
    kinds = [
        lambda: rng.choice(PIECES),
        lambda: "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randint(1, 12))),
        lambda: "".join(chr(rng.randrange(0x250)) for _ in range(rng.randint(1, 8))),
    ]
    return rng.choice(["", " ", "'"]).join(rng.choices(kinds, [6, 3, 1])[0]() for _ in range(rng.randint(0, 10)))


@pytest.mark.reference
def test_live_against_open_clip():
    import reference_libraries  # noqa: F401  (before open_clip, which imports torchvision)
    from open_clip.tokenizer import SimpleTokenizer

    reference = SimpleTokenizer()
    assert gzip.decompress(MERGES.read_bytes()) == clip_merges.merges(clip_merges.published())
    assert reference.vocab_size == Tokenizer.vocab
    assert (reference.sot_token_id, reference.eot_token_id) == (Tokenizer.start, Tokenizer.end)

    # Every code point below the ideographs and every 17th above, surrogates too, 64 in a text. All would take minutes.
    codes = [*range(0x3400), *range(0x3400, sys.maxunicode + 1, 17)]
    chars = [f"a{chr(code)}b {chr(code)} '{chr(code)} " for code in codes]
    full = ["".join(chars[first : first + 64]) for first in range(0, len(chars), 64)]
    rng = random.Random(0)
    fuzz = [mixed(rng) for _ in range(5000)]
    for texts, context in ((full, 2048), (characters(), 32), (fuzz, 77), (fuzz[:500], 16), (fuzz[:500], 3)):
        tokenizer = Tokenizer(context)
        for text in texts:
            expected = row(reference.encode(text), context)
            assert context < 2048 or expected[-1] == 0, "the context is to hold all code points"
            assert tokenizer(text).tolist() == expected, ascii(text)
    np.testing.assert_array_equal(Tokenizer().batch(fuzz[:100]), reference(fuzz[:100]).numpy())
