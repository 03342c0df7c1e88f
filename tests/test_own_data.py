"""Labelled text of one's own: what a row may be in each format, columns, words as labels, the split, and a saved
classifier's predictions."""
import bz2
import csv
import decimal
import gzip
import io
import json
import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import finetune_glue as ft
from plumbing import checkpoint, glue
from plumbing.cli import UserError

ROWS = [("Good, \"really\" good", "good"), ("bad; quite\tbad", "bad"), ("two\nlines", "good"),
        ("caf\u00e9 \u2028 bar", "ugly"), ("the end", "bad")] * 8


def write(path, rows=ROWS, names=("text", "label")):
    kind = path.suffix
    if kind == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({n: [r[i] for r in rows] for i, n in enumerate(names)}), path)
    elif kind == ".csv":
        file = io.StringIO()
        csv.writer(file).writerows([names, *rows])
        path.write_text(file.getvalue(), encoding="utf-8", newline="")
    elif kind == ".tsv":
        path.write_text("".join("\t".join(str(v).replace("\t", " ").replace("\n", " ") for v in r) + "\n"
                                for r in (names, *rows)), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(dict(zip(names, r, strict=True))) + "\n" for r in rows), encoding="utf-8")
    return path


def read(path, columns=None, say=lambda line: None):
    task = glue.parse_tasks(f"own={path}", columns, say)["own"]
    return task, glue.read_task("own", task, None, say)


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".ndjson", ".json", ".parquet", ".tsv"])
def test_every_format_gives_the_same_rows(kind, tmp_path):
    """Quotes, commas, tabs, line ends and U+2028 in a field are text (a TSV has no way to say a tab)."""
    for name, rows in (("train", ROWS), ("dev", ROWS[:3])):
        write(tmp_path / f"{name}{kind}", rows)
    said = []
    task, parts = read(tmp_path, say=said.append)
    want = [s.replace("\t", " ").replace("\n", " ") if kind == ".tsv" else s for s, _ in ROWS]
    assert [s for s, in parts["train"][0]] == want and len(parts["dev"][1]) == 3
    assert task.labels == ("bad", "good", "ugly") and parts["train"][1][:5].tolist() == [1, 0, 1, 2, 0]
    assert said == [f"own: text from 'text', labels from 'label' (train{kind}): bad, good, ugly"]


# ----------------------------------------------------------------------------------------------- what a row may be

@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r\r\n"])
def test_a_csv_is_read_as_csv_dictreader_reads_it(mark, ends, tmp_path):
    """Quotes, marks, line ends and blank lines in fields; blank lines between rows; a BOM; a name with a mark in it."""
    rng, pieces = np.random.default_rng(0), ["a", "b c", '"', ",", ";", "\t", "\n", "\n\n", " ", "\u2028", "\x85", ""]
    fields = [("".join(rng.choice(pieces, 4)), "".join(rng.choice(pieces, 3)) + "x", "pq"[i % 2]) for i in range(200)]
    file = io.StringIO()
    csv.writer(file, delimiter=mark, lineterminator=ends).writerows([("text", "other, x; y", "label"), *fields])
    whole = file.getvalue().replace(f"p{ends}", f"p{ends}{ends}{ends}")
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbf" + whole.encode())
    want = [tuple(row.values()) for row in csv.DictReader(io.StringIO(whole, newline=""), delimiter=mark)]
    task = glue.own_task(tmp_path / "x.csv", 'text,"other, x; y",label', lambda line: None)
    sentences, labels, bad = glue.read_rows(tmp_path / "x.csv", task)
    assert [(*s, "pq"[y]) for s, y in zip(sentences, labels, strict=True)] == want == fields and bad == 0


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("values, names, numbers", [
    ([0, 1], None, [0, 1]), ([0.0, 1.0], None, [0, 1]), (["0", "1"], None, [0, 1]), (["0.0", "1.0"], None, [0, 1]),
    ([1, 2.0, "3"], ("1", "2", "3"), [0, 1, 2]), (["01", "02"], ("1", "2"), [0, 1]),
    (["1e0", "2."], ("1", "2"), [0, 1]), ([True, False], ("false", "true"), [1, 0]),
    (["True", "FALSE"], ("false", "true"), [1, 0]), (["None", "n/a"], ("None", "n/a"), [0, 1]),
    (["a ", "b"], ("a", "b"), [0, 1])])
def test_the_same_value_means_the_same_label_in_every_format(kind, values, names, numbers, tmp_path):
    if kind == ".parquet":
        values = [v if type(v) is type(values[0]) else type(values[0])(v) for v in values]
    task, parts = read(write(tmp_path / f"x{kind}", [(f"text {i}", values[i % len(values)]) for i in range(60)]))
    assert task.labels == names
    for (sentence,), y in zip(*parts["train"], strict=True):
        assert y == numbers[int(sentence.split()[1]) % len(values)]


def test_parquet_has_more_types(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts, labels = [f"text {i}" for i in range(60)], ["ab"[i % 2] for i in range(60)]
    for text, label, names in (
            (pa.array(texts, pa.large_string()), pa.array(labels).dictionary_encode(), ("a", "b")),
            (pa.array(texts).dictionary_encode(), pa.array(labels, pa.string_view()), ("a", "b")),
            (texts, [decimal.Decimal(i % 2) for i in range(60)], None),
            (texts, pa.array([i % 2 for i in range(60)], pa.uint8()), None)):
        pq.write_table(pa.table({"re.text": text, "label": label, "n": pa.nulls(60), "N": pa.nulls(60)}),
                       tmp_path / "x.parquet")
        task, parts = read(tmp_path / "x.parquet", "re.text,label")
        assert task.labels == names and {s for part in parts.values() for s, in part[0]} == set(texts)
    pq.write_table(pa.table({"text": texts, "label": labels}), tmp_path / "y.parquet")
    whole = (tmp_path / "y.parquet").read_bytes()
    for damaged in (whole[:-1], whole[:80] + bytes(60) + whole[140:], b"PAR1" * 5):
        (tmp_path / "y.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match="y.parquet (is damaged or not ours|cannot be read) [(]") as e:
            read(tmp_path / "y.parquet")
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("value, fault", [
    (None, "nothing"), (["a", "b"], "a list"), ({"body": "a"}, "an object"), (3, "a number"), (3.5, "a number"),
    (float("nan"), "nothing"), (True, "no text"), (b"a", "bytes")])
def test_a_text_is_a_string_and_nothing_else(value, fault, tmp_path):
    """One in two thousand is left out and said, more are refused; lists, objects and bytes are no labels either."""
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(2000)]
    kinds = [".jsonl"] * (not isinstance(value, bytes)) + [".parquet"] * isinstance(value, bytes | list | dict)
    for kind, column in ((kind, column) for kind in kinds for column in ("text", "label")):
        at, said = column == "label", []
        if at and isinstance(value, int | float) and value == value:
            continue
        bad = [(value, "a"), ("text", value)][at]
        if kind == ".jsonl":
            read(write(tmp_path / f"x{kind}", [bad, *rows]), "text,label", said.append)         # the first row, too
            assert said[-1].endswith(f"x.jsonl: left out: line 1 has {fault} in {column!r}")
        else:
            rows = [bad] * 3
        with pytest.raises(UserError, match=f"rows cannot be read: (line|row) 1 has {fault} in {column!r}"):
            task = glue.Task(str(tmp_path), ("text",), "label", (), ("a", "b"), ("accuracy",), dict(train=None))
            glue.read_rows(write(tmp_path / f"x{kind}", [bad] * 3 + rows[:1000]), task)


def test_lone_surrogates_and_nul_are_mended_and_counted(tmp_path):
    rows = [(f"ok \ud83d {i} \0x", "a\udc00" if i % 2 else "b") for i in range(60)]
    said = []
    task, parts = read(write(tmp_path / "x.jsonl", rows), say=said.append)
    assert task.labels == ("a\ufffd", "b") and {s for part in parts.values() for s, in part[0]} == {
        f"ok \ufffd {i} x" for i in range(60)}
    assert said[-1].endswith("x.jsonl: NUL was removed from 60 lines, 90 lone surrogates became U+FFFD")


def test_blank_lines_and_rows_without_anything_are_none(tmp_path):
    """As csv.DictReader and pandas have it; so is what a spreadsheet leaves at the end, of a file or of a line."""
    for kind, mark in ((".csv", ","), (".tsv", "\t")):
        lines = [f"text {i}{mark}{'ab'[i % 2]}" for i in range(60)]
        lines = [f"text{mark}label", *lines[:20], "", "  ", *lines[20:40], *(line + mark * 2 for line in lines[40:])]
        (tmp_path / f"x{kind}").write_text("\n\n" + "\n".join(lines) + f"\n\n{mark}\n{mark}{mark}\n")
        parts = read(tmp_path / f"x{kind}")[1]
        assert sum(len(y) for _, y in parts.values()) == 60
    with open(write(tmp_path / "x.jsonl", [(f"text {i}", "ab"[i % 2]) for i in range(60)]), "a") as f:
        f.write('\n\ufeff\n \t\n{"text": "last", "label": "a"}\n\n')
    assert sum(len(y) for _, y in read(tmp_path / "x.jsonl")[1].values()) == 61


@pytest.mark.parametrize("pack, suffix", [(gzip.compress, ".gz"), (lzma.compress, ".xz"), (bz2.compress, ".bz2")])
def test_each_is_read_packed_and_refused_cut(pack, suffix, tmp_path):
    for kind in (".csv", ".tsv", ".jsonl"):
        content = write(tmp_path / f"x{kind}", [(f"text {i}", "ab"[i % 2]) for i in range(60)]).read_bytes()
        (tmp_path / f"x{kind}{suffix}").write_bytes(pack(content))
        (a, _), (b, _) = (read(tmp_path / f"x{kind}{s}")[1].values() for s in ("", suffix))
        assert a[0] == b[0] or a == b
        (tmp_path / f"cut{kind}{suffix}").write_bytes(pack(content)[:-20])
        with pytest.raises(UserError, match=f"cut{kind}{suffix} is damaged or not ours"):
            read(tmp_path / f"cut{kind}{suffix}")
        (tmp_path / f"w{kind}{suffix}").write_bytes(content)
        with pytest.raises(UserError, match=f"w{kind}{suffix} does not begin as its name says"):
            read(tmp_path / f"w{kind}{suffix}")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "cr"])
def test_other_encodings_and_line_ends_are_named(encoding, tmp_path):
    for kind in (".csv", ".tsv", ".jsonl"):
        text = write(tmp_path / f"x{kind}", [(f"t\xe9xt {i}", "ab"[i % 2]) for i in range(60)]).read_text("utf-8")
        text = text.replace("\n", "\r").encode() if encoding == "cr" else text.encode(encoding)
        (tmp_path / f"x{kind}").write_bytes(text)
        with pytest.raises(UserError, match=f"x{kind} is " + (
                "text whose lines end in CR alone: convert them first, as in  tr" if encoding == "cr" else
                "UTF-16 or UTF-32: convert it first, as in  iconv -f UTF-16")):
            read(tmp_path / f"x{kind}")


def test_fields_may_be_long_and_lines_may_not_be_endless(tmp_path, monkeypatch):
    long = "word " * 40_000
    for kind in (".csv", ".tsv", ".jsonl"):
        rows_ = [(f"{i} {long}" if i == 7 else f"text {i}", "ab"[i % 2]) for i in range(60)]
        parts = read(write(tmp_path / f"x{kind}", rows_))[1]
        assert f"7 {long}" in [s for part in parts.values() for s, in part[0]]
    with monkeypatch.context() as m:
        m.setattr("plumbing.rows.LONGEST", 100_000)
        for kind, line in ((".csv", 9), (".tsv", 9), (".jsonl", 8)):
            with pytest.raises(UserError, match=f"x{kind}, line {line} is longer than"):
                read(tmp_path / f"x{kind}")


@pytest.mark.parametrize("name", ["__index_level_0__", "Unnamed: 0", "Unnamed: 0.1", "level_0", "", "index", "row_id"])
def test_a_column_that_numbers_the_rows_is_left_out_also_where_it_is_words(name, tmp_path):
    for kind in (".csv", ".jsonl", ".parquet"):
        said = []
        rows_ = [(f"row {i}", f"text {i}", "ab"[i % 2]) for i in range(60)]
        task, _ = read(write(tmp_path / f"x{kind}", rows_, (name, "text", "label")), say=said.append)
        assert task.text == ("text",) and said[-1].endswith(f"left out: the column {name.lower()!r}")


@pytest.mark.parametrize("names, values, text, label", [
    (("text", "label", "label_text"), [(1, "yes"), (0, "no")], ("text",), "label"),
    (("label_name", "label", "text"), None, ("text",), "label"),
    (("text", "intent", "intent_name"), [("book a", "B"), ("cancel a", "C")], ("text",), "intent_name"),
    (("text", "sentiment", "what"), [("p", "positive"), ("n", "negative"), ("o", "other")], ("text",), "sentiment"),
    (("text", "label", "note"), [("p", ""), ("n", None)], ("text",), "label"),
    (("text", "label", "other"), [("p", "x"), ("n", "x")], ("text",), "label"),                 # tells nothing
    (("text", "label", "finer"), [("p", "x"), ("p", "y"), ("n", "z")], ("text", "finer"), "label")])
def test_what_says_the_label_in_other_words_is_no_sentence(names, values, text, label, tmp_path):
    for kind in (".csv", ".jsonl"):
        rows_ = [(f"words {i}", *values[i % len(values)]) if values else ("ab"[i % 2], i % 2, f"words {i}")
                 for i in range(60)]
        said = []
        task, _ = read(write(tmp_path / f"x{kind}", rows_, names), say=said.append)
        assert (task.text, task.label) == (text, label)
        if left := [repr(n) for n in names if n not in (*text, label)]:
            assert said[-1].endswith(f"left out: the column {left[0]}")
    said, two = [("a b", "p", "P"), ("c", "n", "N")] * 30, ("text", "label", "LABEL_TEXT")
    task = glue.own_task(write(tmp_path / "x.csv", said, two), "text,label_text,label", lambda line: None)
    assert task.text == ("text", "label_text")
    task = glue.own_task(write(tmp_path / "x.csv", [row[:2] for row in said]), None, lambda line: None)
    assert task.text == ("text",)                                       # else none would be left


def test_columns_without_a_name_and_twice_the_same_one_elsewhere_are_no_fault(tmp_path):
    rows_ = [("ab"[i % 2], f"words {i}", "", "", "") for i in range(60)]
    task, parts = read(write(tmp_path / "spam.csv", rows_, ("v1", "v2", "", "", "")), "v2,v1")
    assert task.text == ("v2",) and len(parts["train"][0][0]) == 1
    task, _ = read(write(tmp_path / "x.csv", [(f"w {i}", 1, 2, "ab"[i % 2]) for i in range(60)], ("t", "n", "n", "y")),
                   "t,y")
    assert task.text == ("t",)


def test_labels_may_be_many_where_columns_says_which_they_are(tmp_path):
    path = write(tmp_path / "x.csv", [(f"words {i}", f"intent {i % 60}") for i in range(100)])
    assert len(read(path, "text,label")[0].labels) == 60
    with pytest.raises(UserError, match="100 rows have 60 different labels, such as 'intent 0'"):
        read(path)
    with pytest.raises(UserError, match="100 rows have 100 different labels"):
        read(path, "label,text")


def test_paths_and_columns_may_hold_commas(tmp_path):
    (tmp_path / "a, dir").mkdir()
    names = ('a "b", c', "label")
    path = write(tmp_path / "a, dir/r,rt.csv", [(f"text {i}", "ab"[i % 2]) for i in range(60)], names)
    tasks = glue.parse_tasks(f"rte,x={path}, y={path},cola", '"a ""b"", c",label', lambda line: None)
    assert list(tasks) == ["rte", "x", "y", "cola"] and tasks["x"].folder == tasks["y"].folder == str(path)
    assert tasks["x"].text == ('a "b", c',)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, teacher):
    fifo = tmp_path / "x.csv"
    os.mkfifo(fifo)
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d/train.csv")
    for path in (fifo, tmp_path / "d"):
        with pytest.raises(UserError, match="x.csv|train.csv is a directory, a FIFO or a device: give a file"):
            glue.own_task(path)
    with pytest.raises(UserError, match="x.csv is a directory, a FIFO or a device: give a file"):
        next(glue.rows_of_text(fifo, None, ["text"]))
    model = shutil.copytree(teacher, tmp_path / "m")
    (model / "tokenizer.json").unlink()
    (model / "vocab.txt").unlink(missing_ok=True)
    os.mkfifo(model / "vocab.txt")
    with pytest.raises(UserError, match="neither tokenizer.json nor vocab.txt is in "):
        checkpoint.read_tokenizer(model)
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    with pytest.raises(UserError, match="is not a model directory"):
        checkpoint.find_model(str(model))


def test_what_a_file_names_reaches_no_terminal_with_escapes(tmp_path):
    names, said = ("text", "label", "\x1b[31m\ud800", "z\n"), []
    rows_ = [(f"text {i}", ("a\x1b[2J", "b\nc")[i % 2], f"x{i}", i) for i in range(60)]
    write(tmp_path / "x.jsonl", rows_, names)
    read(tmp_path / "x.jsonl", "text,label", said.append)
    with pytest.raises(UserError) as e:
        read(tmp_path / "x.jsonl")
    rows_[0] = ("text", "\x1b[2Jnew", "x", 1)
    task = glue.own_task(tmp_path / "x.jsonl", "text,label", said.append)
    with pytest.raises(UserError) as f:
        glue.read_rows(write(tmp_path / "y.jsonl", rows_, names), task)
    assert "which are one or two columns" in str(e.value) and "unknown label" in str(f.value)
    for line in (*said, str(e.value), str(f.value)):
        assert line.isprintable()


def test_a_csv_of_semicolons_with_bom_and_crlf(tmp_path):
    (tmp_path / "x.csv").write_bytes(("\ufeffText;Label\r\n" + '"a; ""b""";yes\r\nc;no\r\n' * 30).encode())
    task, parts = read(tmp_path / "x.csv")
    assert {*parts["train"][0], *parts["dev"][0]} <= {('a; "b"',), ("c",)} and task.labels == ("no", "yes")


def test_one_file_is_split_by_the_hash_of_its_text(tmp_path):
    rows = [(f"text {i % 500}", str(i % 2)) for i in range(1000)]
    parts = read(write(tmp_path / "a.csv", rows))[1]
    assert len(parts["train"][1]) + len(parts["dev"][1]) == 1000 and 60 <= len(parts["dev"][1]) <= 140
    train, dev = ({s for s, in x} for x, _ in parts.values())
    assert not train & dev
    again = read(write(tmp_path / "b.jsonl", rows[::-1]))[1]            # another order, another format, more rows
    assert {s for s, in again["dev"][0]} == dev
    assert {s for s, in read(write(tmp_path / "c.csv", [*rows, ("new", "1")]))[1]["dev"][0]} - {"new"} == dev


@pytest.mark.parametrize("values, labels", [
    (["0", "1", "2"], None), ([0, 1], None), ([0.0, 1.0], None), (["1", "2", "3", "4", "5"], ("1", "2", "3", "4", "5")),
    ([True, False], ("false", "true")), (["1st", "2nd"], ("1st", "2nd")), ([" no", "yes "], ("no", "yes"))])
def test_labels_are_numbers_from_0_or_names(values, labels, tmp_path):
    rows = [(f"text {i}", values[i % len(values)]) for i in range(60)]
    for kind in (".jsonl", ".parquet"):
        task, parts = read(write(tmp_path / f"x{kind}", rows))
        assert task.labels == labels and set(parts["train"][1]) == set(range(len(values)))


@pytest.mark.parametrize("names, columns, text, label", [
    (("label", "text"), None, ("text",), "label"), (("id", "review", "stars"), None, ("review",), "stars"),
    (("premise", "hypothesis", "class"), None, ("premise", "hypothesis"), "class"),
    (("text", "verdict"), None, ("text",), "verdict"), (("a", "b", "c", "d"), "C,A", ("c",), "a"),
    (("a", "b", "c", "d"), "b, d, a", ("b", "d"), "a"),
    (("text", "label", "source"), "text,label", ("text",), "label")])
def test_columns_are_guessed_or_said(names, columns, text, label, tmp_path):
    rows = [[f"w{j} {i}" if n != label else "xyz"[i % 3] for j, n in enumerate(names)] for i in range(60)]
    task, parts = read(write(tmp_path / "x.csv", rows, names), columns)
    assert (task.text, task.label) == (text, label) and len(parts["train"][0][0]) == len(text)
    want = {(*(row[names.index(t)] for t in text), "xyz".index(row[names.index(label)])) for row in rows}
    assert {(*x, y) for part in parts.values() for x, y in zip(*part, strict=True)} == want


def test_a_score_is_a_score_in_every_format(tmp_path):
    for kind in (".csv", ".jsonl", ".parquet"):
        rows = [(f"text {i}", f"more {i}", i / 4) for i in range(60)]
        task, parts = read(write(tmp_path / f"x{kind}", rows, ("a", "b", "score")))
        assert task.labels == () and parts["train"][1].dtype == np.float32 and parts["train"][1].max() > 10


def test_bad_rows_are_listed_up_to_a_thousandth(tmp_path):
    rows, said = [(f"text {i}", "ab"[i % 2]) for i in range(2000)], []
    lines = write(tmp_path / "x.jsonl", rows).read_text().splitlines()
    lines[4] = "{"
    lines[6] = '{"text": "no label"}'
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n\n")
    parts = read(tmp_path / "x.jsonl", say=said.append)[1]
    assert sum(len(y) for _, y in parts.values()) == 1998
    assert said[-1].endswith("left out: line 5 is no JSON object; line 7 has nothing in 'label'")
    lines[8] = "[1]"
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="3 of 2,000 rows cannot be read: line 5 is no JSON object"):
        read(tmp_path / "x.jsonl")


WRONG = [   # (file, its content, --columns, the message)
    ("x.csv", "text\na\n", None, "line 1: the columns are 'text': which are one or two columns of text"),
    ("x.csv", 'text,label\n"a,b\nc,d\n', None, r"no CSV \(unexpected end of data\): quotes in a field stand twice"),
    ("x.csv", 'text,label\n"a"b,c\n', None, r"x.csv, line 2: no CSV"),
    ("x.csv", "text,label\n" + "a,b\nc,d\n" * 9 + "a,b,c\n", None, "rows cannot be read: line 20 has 3 fields, not 2"),
    ("x.csv", "", None, "x.csv is empty"), ("x.csv", "text,label\n", None, "no examples|0 rows have 0"),
    ("x.csv", "3.5,label\na,b\n", None, "is without a header .line 1 holds 3.5.: names"),
    ("x.csv", "text,text,label\na,b,c\n", None, "two columns have one name"),
    ("x.csv", "text,label\n" + "b,yes\nd,no\n" * 3, None, "6 examples are too few to set a tenth of them apart"),
    ("x.csv", "text,label\n" + "".join(f"a{i},b{i}\n" for i in range(50)), None, "50 rows have 50 different labels"),
    ("x.csv", "text,label\na,b\n", "body,label", "x.csv is without the column 'body' of --columns: "
     "it has 'text', 'label'"),
    ("x.csv", "text,label\na,b\n", "text", "which are one or two columns of text and which is the label"),
    ("x.csv", "a,b,c,d\n1,2,3,4\n", None, "Say it with --columns text,label"),
    ("x.csv", "text,label\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(60)), None, "'text' holds no letter"),
    ("x.csv", b"text,label\na,\xff\n", None, "x.csv, line 2: not UTF-8: convert it, as in  iconv"),
    ("x.jsonl", "[{}]\n", None, "x.jsonl is one JSON array: make it one object per line first, as in  jq"),
    ("x.jsonl", "[1]\n", None, "x.jsonl is no JSON lines: make it one object per line first, as in  jq"),
    ("x.jsonl", "text,label\n", None, "x.jsonl is no JSON lines"),
    ("x.jsonl", '{"text": "a"}\n', None, "the columns are 'text': which are one or two"),
    ("x.parquet", "not parquet", None, "x.parquet does not begin as its name says"),
    ("x.xlsx", "", None, "x.xlsx: one of .tsv, .csv, .jsonl, .ndjson, .json .* or .parquet can be read"),
    ("x.tsv", "text,label\na,b\n", None, "the columns are 'text,label': which are one or two columns")]


@pytest.mark.parametrize("name, content, columns, message", WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_files_are_refused_in_one_line(name, content, columns, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=message) as e:
        read(tmp_path / name, columns)
    assert "\n" not in str(e.value)


def test_two_formats_of_one_part_are_refused(tmp_path):
    write(tmp_path / "train.csv"), write(tmp_path / "train.tsv")
    with pytest.raises(UserError, match="both train.csv and train.tsv: leave one"):
        read(tmp_path)


# -------------------------------------------------------------------------------------------------------- predict

@pytest.fixture(scope="module")
def classified(teacher, tmp_path_factory):
    """(the directory of a saved classifier of reviews.csv, words: the last is 0 or 1 and decides)."""
    words = sorted(t for t in checkpoint.read_tokenizer(teacher).get_vocab() if t.isalpha() and len(t) > 2)[:20]
    rng, here, said = np.random.default_rng(0), tmp_path_factory.mktemp("classified"), []
    rows = [(", ".join([" ".join(rng.choice(words[2:], 3)), words[i % 2]]), ("not so, good", "good")[i % 2])
            for i in range(300)]
    write(here / "reviews.csv", rows, ("review", "verdict"))
    result = ft.score_model(ft.Config(str(teacher), tasks=f"reviews={here}/reviews.csv", batch_sizes="8",
                                      peak_lrs="3e-3", epochs=8, seeds=1, max_len=16, out=str(here / "out"), save=True,
                                      device="cpu"), said.append)
    assert said[0] == "reviews: text from 'review', labels from 'verdict' (reviews.csv): good, not so, good"
    assert result["tasks"]["reviews"]["mean"] > 90
    kept, = (p for p in (here / "out/trials").iterdir() if p.is_dir())
    return kept, words


def predictions(kept, file, capsys, **other):
    ft.main(ft.Config(str(kept), predict=str(file), device="cpu", **other))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet", ".tsv"])
def test_from_a_csv_with_words_to_the_pipeline_and_to_predictions(kind, classified, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    kept, words = classified
    texts = [f"{words[5]}, {words[6]}, {words[i % 2]}" for i in range(1205)]     # more than are read in one go
    found = predictions(kept, write(tmp_path / f"new{kind}", [(i, t) for i, t in enumerate(texts)], ("id", "review")),
                        capsys)
    assert len(found) == 1205 and [f["label"] for f in found[:2]] == ["not so, good", "good"]
    pipeline = transformers.pipeline("text-classification", str(kept), device="cpu")
    for ours, theirs in zip(found[:4], pipeline(texts[:4]), strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["probabilities"][ours["label"]] == pytest.approx(theirs["score"], abs=1e-4)
        assert sum(ours["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_every_row_has_a_line_also_a_bad_one_and_the_columns_may_have_other_names(classified, tmp_path, capsys):
    kept, words = classified
    (tmp_path / "new.csv").write_text(f"id,body,label\n1,{words[0]},x\n2,{words[0]}\n3,{words[1]},y\n")
    for columns in (None, "body", "body,label"):
        found = predictions(kept, tmp_path / "new.csv", capsys, columns=columns)
        assert [list(f) for f in found] == [["label", "probabilities"], ["error"], ["label", "probabilities"]]
        assert found[1]["error"] == "line 3 has 2 fields, not 3"


def test_rows_to_predict_are_read_as_rows_to_learn_from(classified, tmp_path, capsys):
    kept, words = classified
    one, other = (f"{' '.join(words[2:5])}, {last}" for last in words[:2])          # as it has learned them
    rows_ = [dict(review=one), dict(review=None), dict(review=[one]), dict(other=1),
             dict(review=f"\ud83d {other} \0")]
    (tmp_path / "new.jsonl").write_text("\n\n".join(["{", *map(json.dumps, rows_), "  "]))
    (tmp_path / "new.csv.gz").write_bytes(gzip.compress(f'review\n"{one}"\n\n"{other}"\n'.encode()))
    found = predictions(kept, tmp_path / "new.jsonl", capsys)
    assert [f.get("error") for f in found] == [
        "line 1 is no JSON object", None, "line 5 has nothing in 'review'", "line 7 has a list in 'review'",
        "line 9 has nothing in 'review'", None]
    again = predictions(kept, tmp_path / "new.csv.gz", capsys)
    assert [f["label"] for f in again] == [found[1]["label"], found[5]["label"]] == ["not so, good", "good"]


def test_predictions_come_as_they_are_made(classified, tmp_path):
    """The first thousand are written before the rest of the file is read."""
    kept, words = classified
    (tmp_path / "new.csv").write_bytes(b"review,x\n" + f"{words[0]},1\n".encode() * 1500 + b"\xff\n")
    out = io.StringIO()
    with pytest.raises(UserError, match="not UTF-8"):
        ft.label_rows(ft.Config(str(kept), predict=str(tmp_path / "new.csv"), device="cpu"), out)
    assert out.getvalue().count("\n") == 1000


@pytest.mark.parametrize("name, content, columns, message", [
    ("new.txt", "a\n", None, "new.txt: one of .tsv, .csv"),
    ("none.csv", None, None, "none.csv cannot be read .No such file"),
    ("new.csv", "a,b,c\n1,2,3\n", None, "the columns are 'a', 'b', 'c': which are the 1 of text. Say it with"),
    ("new.csv", "a,b\n1,2\n", "c", "is without the column 'c' of --columns: it has 'a', 'b'")])
def test_what_cannot_be_predicted_is_refused(name, content, columns, message, classified, tmp_path, capsys):
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        predictions(classified[0], tmp_path / name, capsys, columns=columns)


def test_what_is_no_classifier_is_refused(teacher, classified, tmp_path, capsys):
    write(tmp_path / "new.csv")
    with pytest.raises(UserError, match="is no classifier .*BertForMaskedLM.*fine-tune one with --save"):
        predictions(teacher, tmp_path / "new.csv", capsys)
    kept = shutil.copytree(classified[0], tmp_path / "kept")
    config = Path(kept, "config.json")
    raw = json.loads(config.read_text())
    for change, message in ((dict(id2label=[1]), "config.json is damaged or not ours"), (
            dict(id2label={"1": "a", "2": "b"}), "config.json is damaged or not ours .KeyError: 0"), (
            dict(problem_type="multi_label_classification"), "any number of labels"),
            (dict(id2label={"0": "a", "1": "b", "2": "c"}), "classifier.* is ")):
        config.write_text(json.dumps(raw | change))
        with pytest.raises(UserError, match=message):
            predictions(kept, tmp_path / "new.csv", capsys)
    config.write_text(json.dumps(raw))
    Path(kept, "tokenizer_config.json").write_text('{"model_max_length": 0}')
    with pytest.raises(UserError, match="tokenizer_config.json is damaged or not ours .ValueError: model_max_length 0"):
        predictions(kept, tmp_path / "new.csv", capsys)
