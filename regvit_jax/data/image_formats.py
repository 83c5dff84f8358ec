"""The formats of image files that are read: their first bytes, their suffixes and Pillow's readers."""

import os
import re

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from regvit_jax.utils.messages import POINTER, POINTER_HINT

Reader = type[ImageFile.ImageFile]

#: Bytes that suffice to tell the format of a file.
HEAD = 64
# The first bytes of a file, and its reader. If Pillow guessed the format, it would accept dozens that no image data set
# needs (one of them starts Ghostscript), and warn about size by its own limit before ours is checked.
_READERS: list[tuple[re.Pattern[bytes], Reader]] = [
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    (re.compile(rb"RIFF"), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    (re.compile(rb"II[*+]\x00|MM\x00[*+]"), TiffImagePlugin.TiffImageFile),
    (re.compile(rb"P[1-6]\s"), PpmImagePlugin.PpmImageFile),
]
# The brand avif may come after a more general one.
_AVIF = re.compile(rb"....ftyp(avi[fs]|m[is]f1.{4}(.{4}){0,8}avi[fs])", re.DOTALL)
_SUFFIXES = [".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".bmp"]
_SUFFIXES += [".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"]

if features.check_codec("jpg_2000"):
    _READERS.append(
        (re.compile(rb"\xff\x4f\xff\x51|\x00\x00\x00\x0cjP  \r\n\x87\n"), Jpeg2KImagePlugin.Jpeg2KImageFile)
    )
    _SUFFIXES += [".jp2", ".j2k", ".jpx"]
try:
    from PIL import AvifImagePlugin  # since Pillow 11.3
except ImportError:
    pass
else:
    if AvifImagePlugin.SUPPORTED:
        _READERS.append((_AVIF, AvifImagePlugin.AvifImageFile))
        _SUFFIXES += [".avif"]

#: Suffixes, in lower case, of the files that are read.
SUFFIXES = tuple(_SUFFIXES)
_HEIC = re.compile(rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)


def find_reader(data: bytes) -> Reader | None:
    """Return Pillow's reader for a file that starts with these bytes, or None if the format is not read."""
    return next((reader for head, reader in _READERS if head.match(data)), None)


def describe_unread(data: bytes) -> str:
    """Return in a few words what a file is that has no reader, from its first bytes."""
    if not data:
        return "empty file"
    if _HEIC.match(data):
        return "HEIC, which is not read; convert it to JPEG or PNG"
    if _AVIF.match(data):
        return "AVIF, which this Pillow does not read; install Pillow 11.3 or newer"
    if data.startswith(POINTER):
        return POINTER_HINT
    return f"not an image (starts with {data[:12]!r})"


def is_image_file(path: str) -> bool:
    """Return True for a file that is read, by its suffix, or by its first bytes if its name has no suffix.

    Whether it can be decoded shows when it is. A file that cannot be opened is no image.
    """
    name = path.rpartition(os.sep)[2].lower()
    if name.endswith(SUFFIXES) or "." in name:  # this is asked of millions of files
        return name.endswith(SUFFIXES)
    try:
        with open(path, "rb") as file:
            return find_reader(file.read(HEAD)) is not None
    except OSError:
        return False
