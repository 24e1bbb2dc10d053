"""Files of rows: every kind that people have gives the same rows; what is no such file is one sentence."""

from __future__ import annotations

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from seedlora.datamodules.row_files import read_rows
from seedlora.datamodules.sources import Source
from seedlora.evaluation.items import load_items

ROWS = [{"question": f"{i}+{i}, \u00fc?\u2028", "answer": f"Sum:\n#### {2 * i}"} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
BOM = b"\xef\xbb\xbf"


def csv_of(rows, separator=","):
    quoted = [[f'"{value}"' for value in row.values()] for row in rows]
    return "\r\n".join([separator.join(rows[0]), *map(separator.join, quoted)]).encode()


FILES = {
    "a.jsonl": LINES,
    "ROWS.JSONL": LINES,
    "bom.jsonl": BOM + LINES.replace(b"\n", b"\r\n"),
    "return.jsonl": LINES.replace(b"\n", b"\r"),
    "raw.jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    "a.ndjson": LINES,
    "a.txt": LINES,
    "lines.json": LINES,
    "ROWS.JSON": BOM + json.dumps(ROWS).encode(),
    "list.jsonl": json.dumps(ROWS, indent=1).encode(),
    "several lines.jsonl": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "data.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "data.jsonl": json.dumps({"data": ROWS}, indent=2).encode(),
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "no ending of gzip.jsonl": gzip.compress(LINES, mtime=0),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode(), mtime=0),
    "a.csv": csv_of(ROWS),
    "a.csv.gz": gzip.compress(BOM + csv_of(ROWS), mtime=0),
    "a.TSV": csv_of(ROWS, "\t"),
}


def parquet(file, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


@pytest.mark.parametrize("name", [*FILES, "a.parquet"])
def test_training_rows_and_tasks_read_every_kind_of_file_alike(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(FILES[name]) if name in FILES else parquet(file, ROWS)
    rows = list(read_rows(file))
    assert [row.value for row in rows] == ROWS
    assert [row.error for row in rows] == [""] * 4
    assert all(0 < row.done <= 1 for row in rows)
    assert list(Source(file).rows()) == rows
    assert [item.gold for item in load_items("gsm8k", path=file)] == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("name", "content", "where", "error"),
    [
        ("a.jsonl", LINES + b"{\n", "line 5", "not JSON"),
        ("a.jsonl", b"{,\n" + LINES, "line 1", "not JSON"),
        ("a.jsonl", b"3\n" + LINES, "line 1", "a int, not an object"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n" + LINES, "line 1", "not JSON that can be read"),
        ("a.jsonl", b"[" * 50_000 + b"\n", None, "is not JSON"),
        ("a.jsonl", LINES + b'{"a": ' + b"[" * 50_000 + b"\n", "line 5", "nested too deeply"),
        ("a.jsonl", LINES + b"\xff\n", "line 5", "not UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], None, "is not whole as gzip"),
        ("a.json", b"[1, 2", None, "line 1 is not JSON"),
        ("a.json", b"[{}]\n[{}]", None, "line 2 is not JSON: something follows the list"),
        ("a.csv", csv_of(ROWS) + b"\n1,2,3\n", "line 10", "3 values, where the first line names 2 columns"),
        ("a.csv", b"a,a\n1,2\n", None, "line 1 names a column twice"),
        ("a.csv", b'a,b\n1,"2\n', None, "is not CSV"),
        ("a.csv", b"a,b\n1,\xff\n", None, "is not UTF-8"),
        ("a.jsonl", LINES.decode().encode("utf-16"), None, "is UTF-16; save it as UTF-8"),
        ("a.json", b'{"a": ["1", "2"], "b": ["3", "4"]}', None, "is a table by columns (a, b)"),
        ("a.json", b'{"train": [{}], "test": [{}]}', None, "holds several lists (train, test)"),
        ("a.parquet", LINES, None, "is not parquet"),
        ("a.txt", b"hello", None, "is no file of rows; those are JSON"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path, name, content, where, error):
    file = tmp_path / name
    file.write_bytes(content)
    if where is None:
        with pytest.raises(ValueError, match="^" + str(tmp_path)) as caught:
            list(read_rows(file))
        assert error in str(caught.value)
    else:
        (bad,) = [row for row in read_rows(file) if row.error]
        assert bad.where == f"{file}, {where}"
        assert error in bad.error


def test_one_object_is_one_row(tmp_path):
    for i, row in enumerate(({"messages": [{"role": "user"}]}, {"problem": "a", "data": "b"})):
        file = tmp_path / f"{i}.json"
        file.write_text(json.dumps(row, indent=1))
        assert [found.value for found in read_rows(file)] == [row]


def test_the_index_that_pandas_writes_is_a_column(tmp_path):
    (tmp_path / "a.csv").write_bytes(b",prompt,response\n0,a,b\n")
    assert [row.value for row in read_rows(tmp_path / "a.csv")] == [{"Unnamed: 0": "0", "prompt": "a", "response": "b"}]


def test_links_in_a_folder_are_followed(tmp_path):
    for place, part in (("data/part1", ROWS[:2]), ("disk/part2", ROWS[2:])):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "data/part2").symlink_to(tmp_path / "disk/part2")
    assert [row.value for row in Source(tmp_path / "data").rows()] == ROWS
    assert [row.value for row in Source(tmp_path / "data/part2").rows()] == ROWS[2:]
    (tmp_path / "data/part1/again").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match="part1/again is a link to a folder that holds it"):
        Source(tmp_path / "data")
    os.unlink(tmp_path / "data/part1/again")
    (tmp_path / "data/part3.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match=r"part3.jsonl is a link to .*gone.jsonl, which does not exist"):
        Source(tmp_path / "data")


def test_files_of_several_formats_in_a_folder_are_said(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.csv").write_bytes(csv_of(ROWS))
    with pytest.raises(ValueError, match=r"holds files of several formats \(csv, json\)"):
        Source(tmp_path)


def test_a_folder_without_training_files_by_name_gives_no_test_rows(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "test.jsonl", "validation.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    assert [file.name for file in Source(tmp_path).files] == ["a.jsonl", "b.jsonl"]
    assert [file.name for file in Source(tmp_path, split="val").files] == ["validation.jsonl"]
    assert [file.name for file in Source(tmp_path, split="test").files] == ["test.jsonl"]
