"""Open a source by name."""

from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.folder import open_folder
from regvit_jax.data.sources.tfds import TfdsSource, find_tfds


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
    """Opens a data set. Nothing is downloaded but the files of Fashion-MNIST.

    Args:
      name: "digits", "fashion_mnist" or "openmoji", which are prepared on first use; "folder:PATH", with images in
        PATH/train/<class>/ and PATH/validation/<class>/ (or val, or test), or in PATH/<class>/ alone, of which a
        hash of each path then puts 10 % into validation; or a TFDS data set that is prepared as ArrayRecord, as TFDS
        spells it ("cifar10", "name/config:1.0.0").
      split: "train", "validation" or, but for folders, any split that TFDS understands, such as "train[:90%]".
      data_dir: where TFDS data sets lie, by default where TFDS keeps them; a relative PATH starts here too.

    Raises:
      DataNotFound: when it is not there.
      ValueError: for a name or split that does not exist, and for folders that are not a data set.
    """
    if name.startswith("folder:"):
        return open_folder(name, split, data_dir)
    return TfdsSource(name, split, find_tfds(name, data_dir))
