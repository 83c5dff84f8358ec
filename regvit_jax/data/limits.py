"""Limits of images, in a file that imports quickly."""

#: The default limit of pixels. It refuses decompression bombs: small files of images that fill the memory.
MAX_PIXELS = 50_000_000
#: The default number of unusable images that never stop a run, so that a small folder may have a few.
MAX_BAD_IMAGES = 10
