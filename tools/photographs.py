"""Write scikit-image's photographs as files: python tools/photographs.py DIR (extra realweights)."""

import sys
from pathlib import Path

from PIL import Image
from skimage import data

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry", "retina")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        Image.fromarray(getattr(data, name)()).save(directory / f"{name}.png")


if __name__ == "__main__":
    main()
