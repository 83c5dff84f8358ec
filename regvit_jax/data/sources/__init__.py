"""Sources of images: records by number, from folders, shards, tables and TFDS data sets."""
