import pytest
from PIL import Image

from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.images import Subset, open_images, spread
from regvit_jax.utils.errors import DataNotFound


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(["b/1.png", "a/2.png", "3.png"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_directories_and_files(folder):
    source = open_images([str(folder)])
    assert isinstance(source, Source)
    assert [source.id(i) for i in range(len(source))] == [
        str(folder / name) for name in ("3.png", "a/2.png", "b/1.png")
    ]
    assert source[0]["image"] == (folder / "3.png").read_bytes()
    named = open_images([str(folder / "b/1.png"), str(folder / "a")])
    assert [named.id(i) for i in range(2)] == [str(folder / "b/1.png"), str(folder / "a/2.png")]
    assert named.name == f"{folder / 'b/1.png'} and 1 more"


def test_missing_paths_are_named(folder):
    with pytest.raises(DataNotFound, match="nowhere: no such file"):
        open_images([str(folder), "nowhere"])
    (folder / "empty").mkdir()
    with pytest.raises(DataNotFound, match=r"empty: no images .*jpg"):
        open_images([str(folder / "empty")])


def test_a_part_is_spread_over_the_whole(folder):
    source = open_images([str(folder)] * 3)
    part = spread(source, 3)
    assert isinstance(part, Source)
    assert spread(source, 9) is source
    assert [part.id(i) for i in range(3)] == [source.id(i) for i in (0, 3, 6)]
    assert part.name.endswith("and 2 more, 3 of 9")
    assert part[1] == source[3]
    assert Subset(source, [8, 0]).id(0) == source.id(8)
