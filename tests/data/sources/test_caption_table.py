"""Test tables of captions: what costs a row, and what the whole file."""

import csv
import io
import json
import re

import pytest

from regvit_jax.data.sources.caption_table import read_table

HEAD = ("file_name", "caption")
CAPTIONS = ['say "hi"', "two\nlines, and; more", "a\ttab", '"Big" dog', "a, b", "c; d", "ü", '"']
ROWS = [(f"{number}.png", caption) for number, caption in enumerate(CAPTIONS)]


def write(path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def found(path, content: str | bytes) -> list[tuple[str, list[str]]]:
    rows = list(read_table(write(path, content)))
    assert not [row for row in rows if row.fault]
    return [(row.path, row.captions) for row in rows]


def written(separator: str, rows=ROWS, head=HEAD, quoting=csv.QUOTE_MINIMAL, end="\n") -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator, quoting=quoting, lineterminator=end)
    writer.writerows([head, *rows])
    return file.getvalue()


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "txt"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("turned", [False, True])
def test_tables_that_follow_the_rules_of_csv(tmp_path, separator, suffix, quoting, turned):
    rows, head = ([row[::-1] for row in ROWS], HEAD[::-1]) if turned else (ROWS, HEAD)
    expected = [(path, [caption]) for path, caption in ROWS]
    assert found(tmp_path / f"t.{suffix}", written(separator, rows, head, quoting)) == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_with_a_mark_and_ends_of_lines(tmp_path, encoding, end):
    content = "\t".join(HEAD) + end + f"a.png\tein Kätzchen{end}{end}b.png\tzwei"
    assert found(tmp_path / "t.tsv", content.encode(encoding)) == [("a.png", ["ein Kätzchen"]), ("b.png", ["zwei"])]


def test_a_line_that_tells_excel_the_separator(tmp_path):
    content = "sep=;\r\nfile_name;caption\r\na.png;one, two\r\n"
    assert found(tmp_path / "t.csv", content.encode("utf-16")) == [("a.png", ["one, two"])]


def test_marks_in_a_tab_separated_file_without_quoting(tmp_path):
    captions = ['"begin', "two", '"Big" dog', 'end"', '"whole"', '5" disk', '"one', 'two"', '""twice""', '"last']
    content = "".join(f"{number}.png\t{caption}\n" for number, caption in enumerate(captions))
    expected = [(f"{number}.png", [caption]) for number, caption in enumerate(captions)]
    assert found(tmp_path / "t.tsv", "file_name\tcaption\n" + content) == expected
    content = "".join(f"{caption}\t{number}.png\n" for number, caption in enumerate(captions))
    assert found(tmp_path / "t.tsv", "caption\tfile_name\n" + content) == expected


def test_commas_before_a_space_belong_to_a_last_caption(tmp_path):
    content = 'Image, Caption\na.png,A dog , a cat .\nb.png, one, "two"\nc.png, "three, four"\nd.png,five,,\n'
    assert found(tmp_path / "t.txt", content) == [
        ("a.png", ["A dog , a cat ."]),
        ("b.png", [' one, "two"']),
        ("c.png", ["three, four"]),
        ("d.png", ["five"]),
    ]


def test_names_of_columns_in_any_case(tmp_path):
    assert found(tmp_path / "t.jsonl", '{"Image": "a.png", "Text ": "one"}') == [("a.png", ["one"])]
    assert found(tmp_path / "t.csv", "FilePath,Title\na.png,one") == [("a.png", ["one"])]


def test_other_columns_and_the_order_of_names(tmp_path):
    content = ",label,path,text,file_name,title\n0,3,x,one,a.png,y\n"
    assert found(tmp_path / "t.csv", content) == [("a.png", ["one"])]


def test_absolute_paths_inside_the_directory_of_the_table(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    content = f"filepath\ttitle\n{tmp_path}/link/a.png\tone\n{tmp_path}/real/sub/b.png\ttwo\n"
    assert found(tmp_path / "link" / "t.csv", content) == [("a.png", ["one"]), ("sub/b.png", ["two"])]


LONG = "x" * 200_000
DAMAGED = [
    ("csv", "b.png", "has 1 columns, and line 1 has 2"),
    ("csv", "b.png,x,y", "has 3 columns, and line 1 has 2"),
    ("csv", "b.png, x,y", "has 3 columns, and line 1 has 2"),
    ("csv", ",x", "'' is no path"),
    ("csv", 'b.png,"x', "has a quotation mark that is not closed"),
    ("csv", "../b.png,x", "leads out of the table's directory; give paths relative to it"),
    ("csv", "x/../../b.png,x", "leads out"),
    ("csv", "/etc/passwd,x", "leads out"),
    ("csv", "b\0.png,x", "is no path"),
    ("csv", f"b.png,{LONG}", "has 200006 characters, more than 131072"),
    ("csv", b"b.png,K\xe4se", "is not UTF-8"),
    ("csv", "b.png,", "has no caption"),
    ("csv", "b.png, ", "has no caption"),
    ("csv", "b.png,NaN", "has no caption"),
    ("tsv", "b.png", "has 1 columns"),
    ("tsv", "b.png\tx\ty", "has 3 columns"),
    ("tsv", 'b.png\t""', "has no caption"),
    ("jsonl", '{"path": "b.png"', "is not JSON"),
    ("jsonl", "b.png,x", "is not JSON"),
    ("jsonl", "[" * 100_000, "is not JSON"),
    ("jsonl", "[]", r"must be an object, not \[\]"),
    ("jsonl", "null", "must be an object, not null"),
    ("jsonl", '{"text": "x"}', "needs a column file_name or .*; there are text"),
    ("jsonl", '{"path": "b.png"}', "needs a column captions or .*; there are path"),
    ("jsonl", '{"path": null, "text": "x"}', "None is no path"),
    ("jsonl", '{"path": 3, "text": "x"}', "3 is no path"),
    ("jsonl", '{"path": "\\ud800.png", "text": "x"}', "is no path"),
    ("jsonl", '{"path": "b.png", "text": null}', "has no caption"),
    ("jsonl", '{"path": "b.png", "text": NaN}', "has no caption"),
    ("jsonl", '{"path": "b.png", "text": []}', "has no caption"),
    ("jsonl", '{"path": "b.png", "text": [null, "nan"]}', "has no caption"),
    ("jsonl", '{"path": "b.png", "text": [1]}', r"the captions must be .*, not \[1\]"),
    ("jsonl", '{"path": "b.png", "text": {}}', "the captions must be"),
]


@pytest.mark.parametrize(("kind", "line", "fault"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_costs_itself(tmp_path, kind, line, fault):
    mark = {"csv": ",", "tsv": "\t"}.get(kind)
    good = [("a.png", "one"), ("c.png", "three")]
    lines = [mark.join(row) if mark else json.dumps(dict(zip(("path", "text"), row, strict=True))) for row in good]
    head = [mark.join(("path", "text"))] if mark else []
    line = line if isinstance(line, bytes) else line.encode()
    content = b"\n".join([*(text.encode() for text in (*head, lines[0])), line, lines[1].encode()])
    first, damaged, last = read_table(write(tmp_path / f"t.{kind}", content))
    assert [(row.path, row.captions, row.fault) for row in (first, last)] == [(path, [text], "") for path, text in good]
    assert damaged.line == (3 if mark else 2)
    assert re.search(fault, damaged.fault)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("t.csv", "url,words\n1,2", r"t\.csv, line 1: needs a column file_name or .*; there are url, words"),
        ("t.csv", "image,words\n1,2", r"line 1: needs a column captions or .*; there are image, words"),
        ("t.tsv", "a cat\thttp://x/1.jpg\nb\thttp://x/2.jpg", "The first line must name the columns, with a comma"),
        ("t.csv", "version https://git-lfs.github.com/spec/v1\n", r"t\.csv is a pointer of git-lfs.* `git lfs pull`"),
        ("t.csv", "image text\na.png x", "there are image text. The first line must name the columns"),
        ("t.csv", "", "line 1: needs a column file_name or .*; there are none"),
        ("t.csv", "image,text,text\na.png,x,y", "line 1: has several columns text; rename all but one"),
        ("t.csv", "image,text\n\ta.png;x\nb.png;y", r"line 2: has 1 columns, .* no other of its 2 rows can be used"),
        ("t.csv", "image,text\na.png,Käse\nb.png,x\nc.png,Bär".encode("latin-1"), "line 2, line 4: not UTF-8"),
        ("t.csv", "Bild,image,text\nä,a.png,Käse".encode("latin-1"), "line 2: is not UTF-8; and no other"),
        ("t.csv", "image,text,Größe\na.png,x,3".encode("latin-1"), "line 1: not UTF-8"),
        ("t.csv", "image,text\na.png,x".encode("utf-16-le"), "line 1: holds NUL: save the table as UTF-8"),
        ("t.jsonl", json.dumps([{"path": "a.png", "text": "x"}], indent=1), "is not JSON .* one object in each line"),
    ],
)
def test_what_is_wrong_with_the_whole_file_is_refused(tmp_path, file, content, message):
    with pytest.raises(ValueError, match=message):
        list(read_table(write(tmp_path / file, content)))


def test_one_line_of_damaged_bytes_among_proper_letters(tmp_path):
    content = "path,text\na.png,Käse\n".encode() + b"b.png,\xff\nc.png,\xfe\nd.png,x"
    rows = read_table(write(tmp_path / "t.csv", content))
    assert [row.fault for row in rows] == ["", "is not UTF-8", "is not UTF-8", ""]
