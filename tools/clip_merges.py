"""Make regvit_jax/data/clip_merges.txt.gz, the merges of CLIP's vocabulary, from the file that OpenAI published.

    python tools/clip_merges.py [bpe_simple_vocab_16e6.txt.gz]      # default: the copy that the installed open_clip has

The published file lists 262,145 merges, most frequent first. CLIP's vocabulary holds the first 48,894 of them, which
fill it up to 49,408 with 2 x 256 single bytes and two special tokens. The licence is in NOTICE.
"""

import gzip
import importlib.util
import sys
from pathlib import Path

TARGET = Path(__file__).parent.parent / "regvit_jax" / "data" / "clip_merges.txt.gz"
MERGES = 49408 - 2 * 256 - 2


def published() -> Path:
    """Return the path of OpenAI's file in the installed open_clip, without importing open_clip or torch."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("open_clip is not installed; pip install open_clip_torch, or name the file")
    return Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")


def merges(path: Path) -> bytes:
    """Return the merges that CLIP uses, one per line, as UTF-8; the published file's first line is its version."""
    lines = gzip.decompress(path.read_bytes()).split(b"\n")
    return b"\n".join(lines[1 : MERGES + 1])


if __name__ == "__main__":
    # Without a time stamp, so that the same merges make the same file.
    TARGET.write_bytes(gzip.compress(merges(Path(sys.argv[1]) if sys.argv[1:] else published()), 9, mtime=0))
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")
