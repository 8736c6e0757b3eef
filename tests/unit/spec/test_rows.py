import csv
import json
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import parquet

from trainbox.errors import DataError
from trainbox.spec.rows import READERS, read_rows

ROWS = [{"a": "1", "b": 'é, "x"\nline'}, {"a": "2", "b": "日本"}]


@pytest.fixture
def rows(tmp_path):
    """The placed rows of a file with this name and content."""

    def of(name: str, data: str | bytes):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return list(read_rows(path))

    return of


def write(path: Path) -> None:
    """ROWS as this kind of file."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["a", "b"], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.tsv", "x.parquet", "x.JSONL"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    write(tmp_path / name)
    assert [row for _, row in read_rows(tmp_path / name)] == ROWS


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt", "x.conll"])
def test_a_byte_order_mark_is_no_part_of_the_text(rows, name):
    text = {"x.csv": "a\nb\n", "x.txt": "b", "x.conll": "a b"}.get(name, '{"a": "b"}')
    [(_, row)] = rows(name, "\ufeff" + text)
    assert row == {"x.txt": {"text": "b"}, "x.conll": {"tokens": ["a"], "tags": ["b"]}}.get(name, {"a": "b"})


def test_windows_line_ends_and_blank_lines_count_as_lines_but_not_as_rows(rows):
    found = rows("x.jsonl", '{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert found == [("x.jsonl:1", {"a": 1}), ("x.jsonl:4", {"a": 2})]
    assert rows("x.csv", "a,b\r\n1,2\r\n") == [("x.csv:2", {"a": "1", "b": "2"})]


@pytest.mark.parametrize("end", ["\u2028", "\u0085", "\u001c"])
def test_only_a_line_feed_ends_a_line(rows, end):
    text = json.dumps({"a": f"x{end}y"}, ensure_ascii=False)
    assert rows("x.jsonl", text + "\n") == [("x.jsonl:1", {"a": f"x{end}y"})]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
        (' \n[{"a": 1}]\n', [{"a": 1}]),
        ('{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ('{\n  "a": 1\n}\n', [{"a": 1}]),
        ("[]", []),
    ],
)
def test_json_is_a_list_of_rows_or_rows_line_by_line_or_one_row(rows, text, found):
    assert [row for _, row in rows("x.json", text)] == found


@pytest.mark.parametrize("name", sorted(f"x{ending}" for ending in READERS if ending != ".parquet"))
def test_an_empty_file_has_no_rows(rows, name):
    assert rows(name, "") == []
    assert rows(name, " \n\n") == [] or name in ("x.csv", "x.tsv")


def test_a_text_file_is_one_row(rows):
    assert rows("x.txt", "one\ntwo\n") == rows("x.txt", "one\ntwo\n")
    assert rows("x.md", "one\ntwo\n") == [("x.md", {"text": "one\ntwo\n"})]


CONLL = """\
-DOCSTART- -X- O O

# text = Ida Holm sails.
Ida NNP I-NP B-PER
Holm NNP I-NP I-PER
sails VBZ I-VP O
. . O O


Berth 4\tB-LOC
\t
# NN O
4 CD O
"""
"""Columns between spaces or tabs, a document's beginning, a comment, blank lines, a word that looks like a comment."""
SENTENCES = [
    ("x.conll:4", {"tokens": ["Ida", "Holm", "sails", "."], "tags": ["B-PER", "I-PER", "O", "O"]}),
    ("x.conll:10", {"tokens": ["Berth"], "tags": ["B-LOC"]}),
    ("x.conll:12", {"tokens": ["#", "4"], "tags": ["O", "O"]}),
]


@pytest.mark.parametrize("text", [CONLL, CONLL.replace("\n", "\r\n"), CONLL.rstrip(), CONLL + "\n\n"])
def test_conll_has_a_sentence_a_row_with_the_place_where_it_begins(rows, text):
    assert rows("x.conll", text) == SENTENCES


@pytest.mark.parametrize("name", ["x.iob", "x.iob2", "x.bio", "x.CONLL"])
def test_conll_goes_by_several_endings(rows, name):
    assert [row for _, row in rows(name, CONLL)] == [row for _, row in SENTENCES]


def test_a_file_may_be_taken_for_another_kind_than_its_ending_says(tmp_path):
    (tmp_path / "x.txt").write_text("a O\n")
    assert list(read_rows(tmp_path / "x.txt", ".conll")) == [("x.txt:1", {"tokens": ["a"], "tags": ["O"]})]


@pytest.mark.parametrize("space", ["\u00a0", "\u2009", "\u2028", "\u0085", "\x1c"])
def test_only_spaces_and_tabs_part_the_columns_of_conll(rows, space):
    assert rows("x.conll", f"10{space}000 CD\n") == [("x.conll:1", {"tokens": [f"10{space}000"], "tags": ["CD"]})]


def test_lists_and_objects_come_out_of_parquet_without_the_fields_of_other_rows(tmp_path):
    calls = [{"name": "berth", "arguments": {"number": 4}}, {"name": "tide", "arguments": {"port": "Gull Point"}}]
    table = [{"messages": [{"role": "assistant", "call": call}], "note": None} for call in calls]
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "x.parquet")
    assert [row for _, row in read_rows(tmp_path / "x.parquet")] == table


# --- faults


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.jsonl", '{"a": 1}\n\n{"a": \n', ("x.jsonl:3", "is not JSON", "column 7", "mend or remove the line")),
        ("x.jsonl", '{"a": 1} {"a": 2}\n', ("x.jsonl:1", "is not JSON: Extra data at column 10")),
        ("x.jsonl", '{"a": 1}\n["b"]\n', ("x.jsonl:2", "is not a JSON object")),
        ("x.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', ("x.jsonl:2", "is not UTF-8: byte 0xe9 at column 11")),
        ("x.jsonl", '{"a": "b"}\n'.encode("utf-16"), ("x.jsonl:1", "is not UTF-8")),
        ("x.jsonl", '{"a": "\\ud83d"}\n', ("x.jsonl:1", "half a character")),
        ("x.jsonl", '{"a": "\\uDE00 \\uD83D"}\n', ("x.jsonl:1", "half a character")),
        ("x.jsonl", '{"a": ' + "9" * 5000 + "}\n", ("x.jsonl:1", "is not JSON")),
        ("x.jsonl", '{"a": ' + "[" * 100_000 + "\n", ("x.jsonl:1", "is not JSON")),
        ("x.json", '[{"a": 1},\n {"a": }]', ("x.json:2", "is not JSON")),
        ("x.json", '{\n"a": }', ("x.json:", "is not JSON")),
        ("x.json", '[{"a": 1}, 2]', ("x.json: row 2", "is not a JSON object")),
        ("x.json", "3", ("x.json: row 1", "is not a JSON object")),
        ("x.json", '"\\ud800"', ("x.json:1",)),
        ("x.json", '[{"a": "b"}]'.encode("utf-16"), ("x.json", "is not UTF-8")),
        ("x.csv", "a,b\n1\n", ("x.csv:2", "fewer values than the header")),
        ("x.csv", "a,b\n1,2,3\n", ("x.csv:2", "more values than the header", "quote values")),
        ("x.csv", 'a,b\n1,2\n1,"2\n', ("x.csv:", "is not CSV: unexpected end of data")),
        ("x.csv", "a,b,a\n1,2,3\n", ("x.csv:1", "'a' twice")),
        ("x.csv", b"a,b\n" + b"1,2\n" * 5000 + b"caf\xe9,2\n", ("x.csv:5002", "is not UTF-8: byte 0xe9 at column 4")),
        ("x.csv", "a,b\n1,2\n".encode("utf-16"), ("x.csv:1", "is not UTF-8")),
        ("x.tsv", "a\tb\n1\n", ("x.tsv:2", "fewer values")),
        ("x.txt", b"caf\xe9", ("x.txt", "is not UTF-8: byte 0xe9")),
        ("x.conll", "a O\n\nb O\nc\n", ("x.conll:4: has the word 'c' but no tag", "write: word TAG")),
        ("x.conll", b"a O\ncaf\xe9 O\n", ("x.conll:2", "is not UTF-8: byte 0xe9 at column 4")),
        ("x.parquet", b"", ("x.parquet", "is not Parquet")),
        ("x.parquet", b"PAR1 no PAR1", ("x.parquet", "is not Parquet")),
        ("x.xlsx", b"PK", (".xlsx is not a known kind of data file", ".jsonl", ".parquet")),
        ("x", b"{}", ("a file without ending is not a known kind",)),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_place(rows, refuses, name, data, words):
    with refuses(3, *words):
        rows(name, data)


def test_a_file_that_is_not_there_is_refused(tmp_path, refuses):
    with refuses(3, "there is no such file"):
        list(read_rows(tmp_path / "x.jsonl"))
    (tmp_path / "y.jsonl").mkdir()
    with refuses(3, "there is no such file"):
        list(read_rows(tmp_path / "y.jsonl"))


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
@pytest.mark.parametrize(
    ("error", "words"), [(PermissionError(13, "no"), "not readable by you"), (OSError(5, "I/O error"), "I/O error")]
)
def test_a_file_that_the_system_does_not_give_is_refused(monkeypatch, tmp_path, refuses, name, error, words):
    def fail(*_args, **_kwargs):
        raise error

    write(tmp_path / name)
    monkeypatch.setattr(Path, "open", fail)
    monkeypatch.setattr(parquet, "ParquetFile", fail)
    with refuses(3, name, words):
        list(read_rows(tmp_path / name))


def test_rows_before_a_fault_are_given_first(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\nbroken\n')
    found = read_rows(tmp_path / "x.jsonl")
    assert next(found) == ("x.jsonl:1", {"a": 1})
    with pytest.raises(DataError):
        next(found)


# --- whatever a file holds, it is read or refused

JSONISH = st.text(st.sampled_from('{}[]",:\\ud8 \n\r\t01eE.-nulNaN'), max_size=40)
BYTES = (
    st.binary()
    | st.text().map(str.encode)
    | JSONISH.map(str.encode)
    | st.text(st.sampled_from(',"\n\r\t\0ab'), max_size=40).map(str.encode)
)


@pytest.mark.parametrize("ending", sorted(READERS))
@given(data=BYTES)
@example(data=b"")
@example(data=b"\xff\xfe{\0}\0")
@example(data=b"[" * 100_000)
@example(data=b'{"a":' * 100_000)
@example(data=b"9" * 5000)
@example(data=b"[" + b"9" * 5000 + b"]")
@example(data=b'[{"a": "\\ud800"}]')
@example(data=b'{"\\udfff": 1}')
def test_any_bytes_are_read_or_refused(tmp_path, ending, data):
    path = tmp_path / f"x{ending}"
    path.write_bytes(data)
    with suppress(DataError):
        for place, row in read_rows(path):
            assert place.startswith(path.name)
            json.dumps(row, ensure_ascii=False).encode()


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 10_000))
def test_a_damaged_parquet_file_is_read_or_refused(tmp_path, at, byte, cut):
    path = tmp_path / "x.parquet"
    write(path)
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(data[: cut + 1] if cut % 3 == 0 else data)
    with suppress(DataError):
        list(read_rows(path))
