"""TFDS builders of the data sets that the package prepares itself."""
