"""Labelled text of one's own: formats, columns, words as labels, the split, and a saved classifier's predictions."""
import csv
import io
import json
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
    assert said[-1].endswith("left out: line 5 is no JSON object; line 7 has nothing in one of its columns")
    lines[8] = "[1]"
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="3 of 2,000 rows cannot be read: line 5 is no JSON object"):
        read(tmp_path / "x.jsonl")


WRONG = [   # (file, its content, --columns, the message)
    ("x.csv", "text\tlabel\na\tb\n", None, "line 1: one column: commas separate the columns of a CSV, not tabs"),
    ("x.csv", "text\na\n", None, "line 1: one column: commas separate the columns of a CSV"),
    ("x.csv", 'text,label\n"a,b\nc,d\n', None, r"no CSV \(unexpected end of data\): a field with quotes"),
    ("x.csv", 'text,label\n"a"b,c\n', None, r"x.csv, line 2: no CSV"),
    ("x.csv", "text,label\n" + "a,b\nc,d\n" * 9 + "a,b,c\n", None, "rows cannot be read: line 20 has 3 fields, not 2"),
    ("x.csv", "", None, "line 1: one column"), ("x.csv", "text,label\n", None, "no examples|0 rows have 0"),
    ("x.csv", "3.5,label\na,b\n", None, "line 1 looks like an example"),
    ("x.csv", "text,text,label\na,b,c\n", None, "two columns have one name"),
    ("x.csv", "text,label\n" + "b,yes\nd,no\n" * 3, None, "6 examples are too few to set a tenth of them apart"),
    ("x.csv", "text,label\n" + "".join(f"a{i},b{i}\n" for i in range(50)), None, "50 rows have 50 different labels"),
    ("x.csv", "text,label\na,b\n", "body,label", "--columns body,label: .*x.csv has no column 'body', but "
     "'text', 'label'"),
    ("x.csv", "text,label\na,b\n", "text", "--columns text: one or two columns of text and then the label"),
    ("x.csv", "a,b,c,d\n1,2,3,4\n", None, "Say it with --columns text,label"),
    ("x.csv", "text,label\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(60)), None, "'text' holds no letter"),
    ("x.csv", b"text,label\na,\xff\n", None, r"x.csv: not UTF-8 \(byte 13\)"),
    ("x.jsonl", "[{}]\n", None, "x.jsonl, line 1: no JSON object: one per line belongs there"),
    ("x.jsonl", "text,label\n", None, "x.jsonl, line 1: no JSON object"),
    ("x.jsonl", '{"text": "a"}\n', None, "one column, 'text': text and a label belong there"),
    ("x.parquet", "not parquet", None, "x.parquet cannot be read as parquet"),
    ("x.xlsx", "", None, "x.xlsx: one of .tsv, .csv, .jsonl, .ndjson, .json, .parquet can be read"),
    ("x.tsv", "text,label\na,b\n", None, "one column: tabs separate the columns of a TSV, not commas")]


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
    with pytest.raises(UserError, match="both train.tsv and train.csv: leave one"):
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
    result = ft.score(ft.Config(str(teacher), tasks=f"reviews={here}/reviews.csv", batch_sizes="8", peak_lrs="3e-3",
                                epochs=5, seeds=1, max_len=16, out=str(here / "out"), save=True, device="cpu"),
                      said.append)
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


def test_predictions_come_as_they_are_made(classified, tmp_path):
    """The first thousand are written before the rest of the file is read."""
    kept, words = classified
    (tmp_path / "new.csv").write_bytes(b"review,x\n" + f"{words[0]},1\n".encode() * 1500 + b"\xff\n")
    out = io.StringIO()
    with pytest.raises(UserError, match="not UTF-8"):
        ft.label_rows(ft.Config(str(kept), predict=str(tmp_path / "new.csv"), device="cpu"), out)
    assert out.getvalue().count("\n") == 1000


@pytest.mark.parametrize("name, content, columns, message", [
    ("new.txt", "a\n", None, "--predict .*new.txt: one of .tsv, .csv"),
    ("none.csv", None, None, "none.csv: no such file"),
    ("new.csv", "a,b,c\n1,2,3\n", None, "the columns are 'a', 'b', 'c': which are the 1 of text. Say it with"),
    ("new.csv", "a,b\n1,2\n", "c", "has no column 'c', but 'a', 'b'")])
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
