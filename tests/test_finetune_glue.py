"""Reading, scoring, batching and fine-tuning labelled tasks; trials that survive a kill; what is saved."""
import builtins
import dataclasses
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune_glue as ft
from plumbing import checkpoint, cli, glue
from plumbing.cli import UserError
from train import learning_rate

# one row per task as the official TSVs lay it out, with {} for the label
ROWS = {
    "cola": ["gj04\t{}\t\tA sentence", "gj04\t{}\t*\tA sentence"],
    "sst2": ["sentence\tlabel", "A sentence \t{}"],
    "mrpc": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{}\t7\t8\tA sentence\tAnother"],
    "stsb": ["index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
             "0\tg\tf\t2012\t1\tnone\tnone\tA sentence\tAnother\t{}"],
    "qqp": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tA sentence\tAnother\t{}"],
    "mnli": ["index\tpromptID\tpairID\tgenre\tp1\tp2\tp3\tp4\tsentence1\tsentence2\tlabel1\tgold_label",
             "0\t1\t2\tg\t( A )\t( B )\tx\ty\tA sentence\tAnother\tneutral\t{}"],
    "qnli": ["index\tquestion\tsentence\tlabel", "0\tA sentence\tAnother\t{}"],
    "rte": ["index\tsentence1\tsentence2\tlabel", "0\tA sentence\tAnother\t{}"],
    "wnli": ["index\tsentence1\tsentence2\tlabel", "0\tA sentence\tAnother\t{}"]}
# the TSVs' labels in the official order of their numbers; () is a score
ORDER = dict.fromkeys(("cola", "sst2", "mrpc", "qqp", "wnli"), ("0", "1")) | dict.fromkeys(
    ("qnli", "rte"), ("entailment", "not_entailment")) | dict(
    mnli=("entailment", "neutral", "contradiction"), stsb=())
# how many of train and dev have each label, in that order
COUNTS = {"cola": [(2528, 6023), (322, 721)], "sst2": [(29780, 37569), (428, 444)],
          "mrpc": [(1194, 2474), (129, 279)], "rte": [(1249, 1241), (146, 131)], "stsb": None}


def tsv(path, name, n, labels=None):
    """A file of task `name` with n rows."""
    names = labels or ORDER[name] or ("0.000", "4.750")
    lines = ROWS[name][:1] * glue.TASKS[name].header + [ROWS[name][1].format(names[i % len(names)]) for i in range(n)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def own(path, rows, header="sentence\tlabel"):
    path.mkdir(exist_ok=True)
    for name, part in zip(("train", "dev"), rows, strict=True):
        (path / f"{name}.tsv").write_text("\n".join([header, *part]) + "\n", encoding="utf-8")
    return path


def read_own(path):
    return glue.read_task("own", glue.own_task(path), None)


# -------------------------------------------------------------------------------------------------------- reading

@pytest.mark.parametrize("name", COUNTS)
def test_the_official_files_give_the_official_counts(name, real_data):
    parts = glue.read_task(name, glue.TASKS[name], real_data / "glue", say=pytest.fail)
    assert {file: len(y) for file, (_, y) in parts.items()} == glue.TASKS[name].rows
    assert all(len(x) == len(y) and all(len(s) == len(glue.TASKS[name].text) for s in x) for x, y in parts.values())
    if COUNTS[name]:
        assert [tuple(np.bincount(y)) for _, y in parts.values()] == COUNTS[name]
    else:
        assert all(y.dtype == np.float32 and y.min() == 0 and y.max() == 5 for _, y in parts.values())


@pytest.mark.parametrize("name", ROWS)
def test_every_tasks_columns_and_labels(name, tmp_path):
    """The sentences come from the official columns, and a label's number is its place in the official order."""
    task = glue.TASKS[name]
    tsv(tmp_path / "t.tsv", name, 6)
    sentences, labels, bad = glue.read_rows(tmp_path / "t.tsv", task)
    strip = {tuple(s.strip() for s in pair) for pair in sentences}
    assert strip == {("A sentence", "Another")[:len(task.text)]} and len(sentences) == 6 and bad == 0
    assert labels == [i % len(ORDER[name]) for i in range(6)] if ORDER[name] else labels == [0, 4.75] * 3


def test_a_row_count_other_than_the_official_one_is_refused(tmp_path):
    folder = tmp_path / "RTE"
    folder.mkdir()
    for train, dev in ((2490, 277), (2489, 277), (2490, 276), (2491, 277)):
        tsv(folder / "train.tsv", "rte", train)
        tsv(folder / "dev.tsv", "rte", dev)
        if (train, dev) == (2490, 277):
            assert len(glue.read_task("rte", glue.TASKS["rte"], tmp_path)["train"][1]) == 2490
        else:
            with pytest.raises(UserError, match="2,490|277"):
                glue.read_task("rte", glue.TASKS["rte"], tmp_path)


def test_mnli_has_two_dev_sets(tmp_path, monkeypatch):
    task = glue.TASKS["mnli"]._replace(rows=dict(train=30, dev_matched=6, dev_mismatched=9))
    (tmp_path / "MNLI").mkdir()
    for file, n in task.rows.items():
        tsv(tmp_path / f"MNLI/{file}.tsv", "mnli", n)
    parts = glue.read_task("mnli", task, tmp_path)
    assert [(file, tuple(np.bincount(y))) for file, (_, y) in parts.items()] == [
        ("train", (10, 10, 10)), ("dev_matched", (2, 2, 2)), ("dev_mismatched", (3, 3, 3))]


@pytest.mark.parametrize("name, damage, listed", [
    ("qqp", lambda row: "\t".join(row.split("\t")[:4]), "line 5 has 4 fields, not 6"),      # as in the official file
    ("qnli", lambda row: row.replace("Another", "An\tother"), "line 5 has 5 fields, not 4"),
    ("mnli", lambda row: row.rpartition("\t")[0] + "\t-", "line 5 has the unknown label '-'"),
    ("cola", lambda row: row.replace("\t1\t", "\tx\t").replace("\t0\t", "\tx\t"), "line 5 has the unknown label 'x'"),
    ("stsb", lambda row: row.rpartition("\t")[0] + "\tnan", "line 5 has nothing in 'score'"),
    ("stsb", lambda row: row.rpartition("\t")[0] + "\tinf", "line 5 has the unknown label 'inf'"),
    ("cola", lambda row: row.replace("\t1\t", "\t\t").replace("\t0\t", "\t\t"), "line 5 has nothing in 'column 2'"),
    ("wnli", lambda row: "no more", "line 5 has 1 fields, not 4")])
def test_bad_rows_are_left_out_and_listed_up_to_a_thousandth(name, damage, listed, tmp_path):
    path, said = tmp_path / "t.tsv", []
    lines = tsv(path, name, 2000)
    lines[4] = damage(lines[4])
    path.write_text("\n".join(lines), encoding="utf-8")
    sentences, labels, bad = glue.read_rows(path, glue.TASKS[name], said.append)
    assert len(sentences) == len(labels) == 1999 and bad == 1 and listed in said[0]
    lines[6], lines[8] = damage(lines[6]), damage(lines[8])
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=f"3 of 2,000 rows cannot be read: {listed}.*line 7 .*line 9 "):
        glue.read_rows(path, glue.TASKS[name])


@pytest.mark.parametrize("name", ["qqp", "mnli", "qnli", "wnli"])
def test_quotes_bom_crlf_and_line_separators_are_text(name, tmp_path):
    path = tmp_path / "t.tsv"
    lines = tsv(path, name, 4)
    for i, text in enumerate(('an "unbalanced quote', '"', "line\u2028separator", "next\x85line")):
        lines[i + 1] = lines[i + 1].replace("A sentence", text)
    path.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    sentences, labels, _ = glue.read_rows(path, glue.TASKS[name], pytest.fail)
    assert [s[0] for s in sentences] == ['an "unbalanced quote', '"', "line\u2028separator", "next\x85line"]
    assert labels == [i % len(glue.TASKS[name].labels) for i in range(4)]


def test_a_task_absent_from_the_folder_comes_from_the_hub(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    import huggingface_hub
    rows = dict(train=12, dev_matched=6, dev_mismatched=3)
    asked = []

    def download(repo, file, repo_type):
        asked.append((repo, file, repo_type))
        n = rows[asked_file(file)]
        parquet.write_table(arrow.table(dict(premise=["A"] * n, hypothesis=["B"] * n, label=[i % 3 for i in range(n)],
                                             idx=list(range(n)))), tmp_path / "x.parquet")
        return tmp_path / "x.parquet"

    def asked_file(file):
        return file.partition("/")[2].partition("-")[0].replace("validation", "dev")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    task = glue.TASKS["mnli"]._replace(rows=rows)
    for glue_dir in (None, tmp_path):
        parts = glue.read_task("mnli", task, glue_dir)
        assert {file: len(y) for file, (_, y) in parts.items()} == rows
        assert parts["dev_matched"][0][0] == ("A", "B") and parts["dev_matched"][1].tolist() == [0, 1, 2] * 2
    assert asked[:3] == [("nyu-mll/glue", f"mnli/{split}-00000-of-00001.parquet", "dataset")
                         for split in ("train", "validation_matched", "validation_mismatched")]
    with pytest.raises(UserError, match="12 examples, but GLUE's MNLI has 392,702"):
        glue.read_task("mnli", glue.TASKS["mnli"], None)
    with pytest.raises(UserError, match=r"4 of 12 rows cannot be read: row 3 has the unknown label '2'.*one of 0, 1\)"):
        glue.read_task("mnli", task._replace(labels=("a", "b")), None)

    def unreachable(*args, **kwargs):
        raise OSError
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match="--glue-dir with MNLI"):
        glue.read_task("mnli", task, tmp_path)


def test_ones_own_task_has_one_or_two_sentences_and_a_class_or_a_score(tmp_path):
    parts = read_own(own(tmp_path / "a", (["x\t0", "y\t1", "z\t2"], ["x\t1"])))
    assert parts["train"][0] == [("x",), ("y",), ("z",)] and parts["train"][1].tolist() == [0, 1, 2]
    parts = read_own(own(tmp_path / "b", (["x\ty\t0.5", "y\tz\t-2"], ["x\tz\t3"]), "first\tsecond\tscore"))
    assert parts["train"][0] == [("x", "y"), ("y", "z")] and parts["train"][1].tolist() == [0.5, -2]


@pytest.mark.parametrize("train, dev, header, message", [
    (["a\t0", "b\t1", "no label"], ["a\t0"], "sentence\tlabel", "train.tsv.*line 4 has 1 fields"),
    (["a\t0", "b\t1"], ["a\t1", "b\tx"], "sentence\tlabel", "dev.tsv.*line 3 .* label 'x'"),
    (["a\t0", "b\t-1"], ["a\t0"], "sentence\tlabel", "line 3 .* label '-1'"),
    (["a\t0.5", "b\t1.5"], ["a\t0"], "sentence\tlabel", "label '0.5'"),
    (["a\t0", "b\t2"], ["a\t0"], "sentence\tlabel", "without a gap"),
    (["a\t0", "b\t0"], ["a\t0"], "sentence\tlabel", "without a gap"),
    (["a\t0", "b\t99999999999"], ["a\t0"], "sentence\tlabel", "without a gap"),
    (["a\t0", "b\t1"], ["a\t2"], "sentence\tlabel", "or dev has others"),
    (["a\t0", "b\t1"], [], "sentence\tlabel", "dev.tsv: no examples"),
    (["a\t0"], ["a\t0"], "just one column", "the columns are 'just one column': which are one or two columns"),
    (["a\tinf"], ["a\t0"], "sentence\tscore", "label 'inf'"),
    (["a\t1e39"], ["a\t0"], "sentence\tscore", "label '1e39' .a label here is a number"),
    (["a\t0", "b\t" + "9" * 20], ["a\t0"], "sentence\tlabel", "without a gap"),
    (["a\t0", "b\t1", "c\tgood"], ["a\t1"], "sentence\tlabel", "label 'good'.* .a label here is a whole number, 0 "
     "for the first class, or a word"),
    (["a\tgood", "b\tbad"], ["a\tugly"], "sentence\tlabel", "label 'ugly' .a label here is one of bad, good"),
    (["a\tgood", "b\tgood"], ["a\tgood"], "sentence\tlabel", "2 rows have 1 different labels, such as 'good'"),
    ([f"a\tb{i}" for i in range(30)], ["a\tb1"], "sentence\tlabel", "30 rows have 30 different labels, .* is that the "
     "column of labels"),
    (["a,0", "b,1"], ["a,0"], "sentence,label", "line 1: the columns are 'sentence,label': which are one or two"),
    (["b\t1"], ["a\t0"], "a\t0", r"is without a header \(line 1 holds 0\): names"),
    (["b\tc\t3.75"], ["a\tc\t0"], "a\tb\t-1.5", r"is without a header \(line 1 holds -1.5\): names"),
    (["1\tb"], ["0\ta"], "0\ta", r"is without a header \(line 1 holds 0\): names"),
    (["a\tb\tc\t0"], ["a\tb\tc\t0"], "a\tb\tc\tlabel", "'a', 'b', 'c', 'label': which are one or two columns of "
     "text and which is the label. Say it with --columns text,label"),
    (["a\t0\t1"], ["a\t0\t1"], "a\tlabel\tscore", "which is the label"),
    (["a\tb\t0"], ["a\tb\t0"], "text\tText\tlabel", "two columns have one name: 'text', 'text', 'label'"),
    (["7\ta\t0", "8\tb\t1"], ["7\ta\t0"], "nr\ttext\tlabel", "the column 'nr' holds no letter: is it text")])
def test_what_is_wrong_with_ones_own_task_is_named(train, dev, header, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_own(own(tmp_path / "t", (train, dev), header))


def test_columns_are_matched_by_their_names(tmp_path):
    path, said = own(tmp_path / "t", (["1\tx\ty\t0", "2\ty\tz\t1"], []), "ID\tFirst\tsecond\tlabel"), []
    (path / "dev.tsv").write_text("label\tsecond\tguid\tfirst\n1\tb\tg1\ta\n", encoding="utf-8")
    parts = glue.read_task("own", glue.own_task(path), None, said.append)
    assert parts["train"][0] == [("x", "y"), ("y", "z")] and parts["dev"][0] == [("a", "b")]
    assert parts["train"][1].tolist() == [0, 1] and parts["dev"][1].tolist() == [1]
    assert said == [f"{path}/train.tsv: left out: the column 'id'", f"{path}/dev.tsv: left out: the column 'guid'"]
    for header, missing in (("first\tlabel", "second"), ("first\tthird\tlabel", "second"),
                            ("first\tsecond\tgold", "label")):
        row = "\t".join(["a"] * header.count("\t") + ["0"])
        (path / "dev.tsv").write_text(f"{header}\n{row}\n", encoding="utf-8")
        with pytest.raises(UserError) as e:
            read_own(path)
        assert str(e.value) == (f"{path}/dev.tsv is without the column {missing!r} of the training examples: it has "
                                f"{glue.quoted(header.split(chr(9)))}")


@pytest.mark.parametrize("name", ["id", "IDX", "index", "guid", "uuid", "#1 ID", "sentence_id", "Unnamed: 0", ""])
def test_what_numbers_the_rows_is_no_sentence(name, tmp_path):
    path = own(tmp_path / "t", (["7\tx\t0", "8\ty\t1"], ["9\tz\t1"]), f"{name}\ttext\tlabel")
    assert read_own(path)["train"][0] == [("x",), ("y",)]
    for other in ("valid", "indexed", "idea"):
        own(path, (["a\tx\t0", "b\ty\t1"], ["c\tz\t1"]), f"{other}\ttext\tlabel")
        assert read_own(path)["train"][0] == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize("name, line, message", [
    ("rte", ROWS["rte"][1].format(1), "the unknown label '1' (a label here is one of entailment, not_entailment)"),
    ("mrpc", ROWS["mrpc"][1].format("yes"), "the unknown label 'yes' (a label here is one of 0, 1)"),
    ("stsb", ROWS["stsb"][1].format("high"), "the unknown label 'high' (a label here is a number)"),
    ("rte", "0\tA sentence\t1", "3 fields, not 4")])
def test_an_official_task_names_the_labels_that_it_wants(name, line, message, tmp_path):
    (tmp_path / "t.tsv").write_text(f"{ROWS[name][0]}\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError) as e:
        glue.read_rows(tmp_path / "t.tsv", glue.TASKS[name])
    assert str(e.value) == f"{tmp_path}/t.tsv: 1 of 1 rows cannot be read: line 2 has {message}"


@pytest.mark.parametrize("name", ROWS)
def test_a_file_of_another_kind_is_refused_by_its_first_line(name, tmp_path):
    lines = tsv(tmp_path / "t.tsv", name, 3)
    task = glue.TASKS[name]
    (tmp_path / "t.tsv").write_text("\n".join(line.replace("\t", ",") for line in lines), encoding="utf-8")
    message = f"t.tsv is without the column '.*' of GLUE's {task.folder}: it has '"
    with pytest.raises(UserError, match=message):
        glue.read_rows(tmp_path / "t.tsv", task)
    names = lines[0].lower().split("\t") if task.header else [f"column {i}" for i in range(1, 5)]
    few = max(map(names.index, (*task.text, task.label)))       # one column less than are needed
    (tmp_path / "t.tsv").write_text("\n".join("\t".join(line.split("\t")[:few]) for line in lines), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        glue.read_rows(tmp_path / "t.tsv", task)


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(UserError, match="train.tsv cannot be read .No such file"):
        glue.own_task(tmp_path)
    (tmp_path / "RTE").mkdir()
    with pytest.raises(UserError, match="RTE/train.tsv cannot be read .No such file"):
        glue.read_task("rte", glue.TASKS["rte"], tmp_path)
    (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n")
    with pytest.raises(UserError, match=r"train.tsv, line 2: not UTF-8: convert it, as in  iconv"):
        glue.own_task(tmp_path)


# -------------------------------------------------------------------------------------------------------- metrics

def test_metrics_equal_those_of_scikit_learn_and_scipy():
    sk, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    cases = [(rng.integers(0, 2, n), rng.integers(0, 2, n)) for n in (1, 2, 3, 5, 50, 1000) for _ in range(20)]
    cases = [(p, y) for p, y in cases if len({*p, *y}) > 1]            # scikit-learn warns of a single class
    cases += [(np.full(9, a), y) for a in (0, 1) for y in (np.full(9, 1 - a), np.arange(9) % 2)]
    for p, y in cases:
        assert glue.accuracy(p, y) == pytest.approx(sk.accuracy_score(y, p), abs=1e-12)
        assert glue.f1(p, y) == pytest.approx(sk.f1_score(y, p, zero_division=0), abs=1e-12)
        assert glue.METRICS["matthews"](p, y) == pytest.approx(sk.matthews_corrcoef(y, p), abs=1e-12)
    scores = [(rng.normal(size=n).astype(np.float32), rng.normal(size=n)) for n in (2, 3, 100, 1500)]
    scores += [(rng.integers(0, 4, 60), rng.integers(0, 6, 60) / 5) for _ in range(20)]      # many ties
    scores += [(1e6 + rng.normal(size=50), rng.normal(size=50))]
    for p, y in scores:
        assert glue.pearson(p, y) == pytest.approx(stats.pearsonr(p, y)[0], abs=1e-6)
        assert glue.spearman(p, y) == pytest.approx(stats.spearmanr(p, y)[0], abs=1e-12)


def test_a_constant_scores_zero_and_is_flagged():
    y = np.linspace(0, 5, 30).astype(np.float32)
    for p in (np.full(30, 0.1, np.float32), np.full(30, 2.7)):          # 0.1 less its mean is not 0 in float32
        assert glue.evaluate(glue.TASKS["stsb"], p, y) == (dict(pearson=0, spearman=0), True)
    assert not glue.evaluate(glue.TASKS["stsb"], y + 1, y)[1]
    assert [glue.evaluate(glue.TASKS["stsb"], share * y, y)[1] for share in (0.009, 0.011)] == [True, False]
    y = np.array([1] * 279 + [0] * 129)                                 # MRPC's dev labels
    scores, collapsed = glue.evaluate(glue.TASKS["mrpc"], np.ones(408, int), y)
    assert collapsed and round(scores["accuracy"], 1) == 68.4 and round(scores["f1"], 1) == 81.2
    assert glue.evaluate(glue.TASKS["cola"], np.ones(408, int), y) == (dict(matthews=0), True)
    assert not glue.evaluate(glue.TASKS["cola"], np.array([0] + [1] * 407), y)[1]


# ---------------------------------------------------------------------------------------------------- fine-tuning

def examples_of(lengths, seed=0, pairs=True):
    rng = np.random.default_rng(seed)
    return [np.stack([rng.integers(5, 300, n), (np.arange(n) >= n // 2) * pairs]).astype(np.int32) for n in lengths]


def test_encoding_is_that_of_a_transformers_tokenizer(teacher):
    transformers = pytest.importorskip("transformers")
    ours = checkpoint.read_tokenizer(teacher)
    theirs = transformers.BertTokenizer(vocab=ours.get_vocab(), do_lower_case=True)
    words = [t for t in ours.get_vocab() if t.isalpha() and len(t) > 2]
    rng = np.random.default_rng(0)
    for lengths in ((3, 4), (3, 40), (40, 3), (40, 41), (40, 40)):
        text = tuple(" ".join(rng.choice(words, n)) for n in lengths)
        for pair in (text, text[:1]):
            ids, types = ft.encode(ours, [pair], 24)[0]
            want = theirs(*pair, truncation="longest_first", max_length=24)
            assert ids.tolist() == want["input_ids"] and types.tolist() == want["token_type_ids"]
    assert ours.truncation is None


def test_the_padding_is_masked_and_holds_no_second_sentence():
    ids, real, types = ft.pad(examples_of([6, 4]), 0)
    assert real.tolist() == [[True] * 6, [True] * 4 + [False] * 2] and types.tolist()[1] == [0, 0, 1, 1, 0, 0]
    assert (ids[1, 4:] == 0).all() and ft.pad(examples_of([6, 4], pairs=False), 0)[2] is None


def test_padded_to_a_multiple_as_on_a_gpu_the_logits_are_the_same(teacher):
    model = checkpoint.load_classifier(teacher, 3, seed=0).eval()
    examples = examples_of([20, 4, 17])
    shapes = [ft.pad(examples, 0, multiple, limit)[0].shape for multiple, limit in ((1, 64), (8, 64), (8, 22))]
    assert shapes == [(3, 20), (3, 24), (3, 22)] and ft.pad(examples, 0, 5)[0].shape == (3, 20)
    for training in (False, True):
        logits = []
        for multiple in (1, 8):
            with torch.set_grad_enabled(training):                      # two attentions
                logits.append(model(*ft.pad(examples, 0, multiple)))
        assert (logits[0] - logits[1]).abs().max() < 1e-6


def test_a_model_with_one_token_type_takes_no_pairs(teacher):
    model = checkpoint.load_classifier(teacher, 2, seed=0)
    model.config.type_vocab_size = 1
    assert ft.predict(model, examples_of([9, 5], pairs=False), 0).shape == (2, 2)
    for run in (lambda x: ft.predict(model, x, 0), lambda x: ft.finetune(model, x, np.zeros(2, int), 2, 1, 1e-3, 0, 0)):
        with pytest.raises(UserError, match="type_vocab_size is 1 .*, so it takes no pairs of sentences"):
            run(examples_of([9, 5]))


@pytest.mark.parametrize("labels", [np.zeros(20, np.int64), np.zeros(20, np.float32)])
def test_nothing_in_a_step_waits_for_the_device(labels, teacher, monkeypatch):
    """On the meta device there is no value to wait for: reading one, or a copy to the host, is an error.  The losses
    and the logits are read once, at the end."""
    model, stacked = checkpoint.load_classifier(teacher, 2, seed=0, dropout=0.1).to("meta"), []

    class Read(Exception):
        pass

    def end(tensors):
        stacked.append(len(tensors))
        raise Read
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, adamw=torch.optim.AdamW, **named: adamw(
        *args, fused=None, **named))                                    # there is no fused one for meta
    for read, run in (("stack", lambda: ft.finetune(model, examples_of([9] * 20), labels, 8, 2, 1e-3, 0, 0)),
                      ("cat", lambda: ft.predict(model, examples_of([9] * 20), 0, batch_size=8))):
        with monkeypatch.context() as m, pytest.raises(Read):
            m.setattr(torch, read, end)
            run()
    assert stacked == [6, 3]


def test_a_score_does_not_depend_on_the_evaluation_batch(teacher):
    model = checkpoint.load_classifier(teacher, 3, seed=0)
    examples = examples_of(np.random.default_rng(0).integers(3, 32, 50))
    one, many = ft.predict(model, examples, 0, batch_size=1), ft.predict(model, examples, 0, batch_size=17)
    assert np.abs(one - many).max() < 1e-5


def test_every_example_is_used_once_an_epoch_beside_others_of_its_length():
    lengths = np.random.default_rng(0).integers(3, 60, 5000)
    drawn = list(ft.shuffled_batches(lengths, 16, 2, seed=0))
    first, second = drawn[:313], drawn[313:]
    for epoch in (first, second):
        assert sorted(np.concatenate(epoch)) == list(range(5000)) and sorted(map(len, epoch))[:2] == [8, 16]
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))
    padded = sum(len(b) * lengths[b].max() for b in first)
    assert padded < 1.1 * lengths.sum()


@pytest.mark.slow
def test_a_compiled_step_is_one_graph_for_all_lengths_and_the_same_training(teacher, monkeypatch):
    from torch._dynamo.utils import counters
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    rng = np.random.default_rng(0)
    examples, y = examples_of(rng.integers(4, 32, 46)), rng.integers(0, 2, 46)
    losses = []
    for compiled in (False, True, True):                                # the second trial finds the first one's graph
        model = checkpoint.load_classifier(teacher, 2, seed=0, dropout=0.0)
        losses.append(ft.finetune(model, examples, y, 8, 3, 1e-3, 0, 0, compiled=compiled))
        ft.predict(model, examples, 0)                                  # as it is: in fp32, eager
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("num_labels", [3, 1])
def test_losses_are_those_of_a_plain_transformers_loop(num_labels, teacher, tmp_path, monkeypatch):
    """The same initial weights, batches and learning rates, no dropout, fp32: 50 steps within 1e-4."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(ft, "multiplies_in_bf16", lambda device: False)
    rng = np.random.default_rng(0)
    examples = examples_of(rng.integers(4, 32, 200))
    y = rng.integers(0, 3, 200) if num_labels == 3 else (5 * rng.random(200)).astype(np.float32)
    model = checkpoint.load_classifier(teacher, num_labels, seed=0, dropout=0.0)
    checkpoint.save_model(tmp_path / "model", model, checkpoint.read_tokenizer(teacher))
    losses = ft.finetune(model, examples, y, 20, 5, 1e-3, 0, 0)

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=num_labels)
    theirs.train()
    plain = [p for name, p in theirs.named_parameters() if name.endswith("bias") or "LayerNorm" in name]
    rest = [p for name, p in theirs.named_parameters() if not (name.endswith("bias") or "LayerNorm" in name)]
    optimizer = torch.optim.AdamW([dict(params=rest, weight_decay=0.01), dict(params=plain, weight_decay=0.0)])
    expected = []
    for step, picked in enumerate(ft.shuffled_batches(np.array([e.shape[1] for e in examples]), 20, 5, 0)):
        batch = np.zeros((3, len(picked), 32), np.int64)                # all padded to the longest there can be
        for row, i in enumerate(picked):
            n = examples[i].shape[1]
            batch[0, row, :n], batch[1, row, :n], batch[2, row, :n] = *examples[i], 1
        ids, types, real = torch.from_numpy(batch)
        loss = theirs(input_ids=ids, token_type_ids=types, attention_mask=real, labels=torch.from_numpy(y[picked])).loss
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / 50, 1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert len(losses) == 50 and np.abs(np.array(losses) - expected).max() < 1e-4
    assert losses[-1] != pytest.approx(losses[0], rel=0.01)


def test_the_head_follows_the_seed_and_the_encoder_does_not(teacher):
    a, b = (checkpoint.load_classifier(teacher, 2, seed) for seed in (0, 1))
    assert not torch.equal(a.classifier.weight, b.classifier.weight)
    assert torch.equal(a.bert.embeddings.word_embeddings.weight, b.bert.embeddings.word_embeddings.weight)


# --------------------------------------------------------------------------------------------------------- trials

@pytest.fixture
def task(teacher, tmp_path):
    """A task that a tiny model learns: the last word decides."""
    tokens = [t for t in checkpoint.read_tokenizer(teacher).get_vocab() if t.isalpha() and len(t) > 2][:20]
    rng = np.random.default_rng(0)

    def rows(n):
        for _ in range(n):
            label = rng.integers(2)
            yield " ".join([*rng.choice(tokens[2:], 4), tokens[label]]) + f"\t{label}"
    return own(tmp_path / "task", (list(rows(200)), list(rows(100))))


def config_of(teacher, task, **other):
    return ft.Config(**(dict(model=str(teacher), tasks=f"own={task}", batch_sizes="8,16", peak_lrs="2e-3,3e-3",
                             seeds=2, epochs=1, max_len=16, out=str(task.parent / "out"), device="cpu") | other))


def test_a_task_that_can_be_learned_is_learned_and_kept(teacher, task, tmp_path):
    config = config_of(teacher, task, batch_sizes="8", peak_lrs="3e-3", epochs=4, save=True)
    result = ft.score_model(config, say=lambda line: None)
    own = result["tasks"]["own"]
    assert own["mean"] > 90 > 70 > own["majority"] and own["n"] == 100 and len(own["scores"]) == own["trials"] == 2
    assert result["averaged"] == [] and result["average"] is None

    kept = tmp_path / "out/trials/own-b8-lr0.003-seed1"
    model = checkpoint.fill(ft.checkpoint.BertForSequenceClassification(checkpoint.read_config(kept), 2), kept).model
    (x, y) = read_own(task)["dev"]
    logits = ft.predict(model, ft.encode(checkpoint.read_tokenizer(kept), x, 16), 0)
    assert np.allclose(logits, np.load(f"{kept}.npy")) and 100 * glue.accuracy(logits.argmax(-1), y) == own["scores"][1]


def test_the_grid_runs_on_one_seed_and_one_point_on_fresh_ones(teacher, task, capsys):
    config, said = config_of(teacher, task), []
    ft.main(config)
    line = capsys.readouterr().out.splitlines()[-1]
    files = {f.name for f in (task.parent / "out/trials").glob("*.json")}
    grid = {f: json.loads((task.parent / "out/trials" / f).read_text()) for f in files if f.endswith("seed0.json")}
    fresh = [f for f in files if not f.endswith("seed0.json")]
    assert len(grid) == 4 and len(files) == 6 and {f[-6] for f in fresh} == {"1", "2"}
    assert len({f[:-6] for f in fresh}) == 1            # the best one: test_promises.py
    assert line.startswith("own: accuracy ") and "6 trials" in line and "n = 100" in line and "majority class" in line

    ft.score_model(config, said.append)
    assert [line for line in said if "labels from" not in line] == []  # nothing ran again
    ft.main(dataclasses.replace(config, quick=True, seeds=1, batch_sizes=None, peak_lrs=None))
    assert "± 0.0 over 1 seeds (batch 32, lr 0.0007; 1 trials)" in capsys.readouterr().out
    for change, value in (("epochs", 2), ("dropout", 0.2), ("examples", None)):
        if change == "examples":
            with open(task / "train.tsv", "a") as f:
                f.write("one more\t1\n")
        with pytest.raises(UserError, match=f"was run with another {change}: give another --out"):
            ft.score_model(dataclasses.replace(config, **{} if change == "examples" else {change: value}), said.append)


def test_the_grid_fits_the_width_where_no_flag_says_otherwise():
    wide, narrow = [1e-5, 3e-5, 5e-5, 8e-5], [1e-4, 3e-4, 7e-4, 1e-3]
    for width, lrs, quick in ((1024, wide, 5e-5), (512, wide, 5e-5), (511, narrow, 7e-4), (32, narrow, 7e-4)):
        assert ft.grid(ft.Config("m"), width) == [(batch, lr) for batch in (16, 32) for lr in lrs]
        assert ft.grid(ft.Config("m", quick=True), width) == [(32, quick)]
        assert ft.grid(ft.Config("m", quick=True, peak_lrs="2e-4"), width) == [(32, 2e-4)]
        assert ft.grid(ft.Config("m", batch_sizes="8"), width) == [(8, lr) for lr in lrs]


@pytest.mark.parametrize("recovers", [True, False])
def test_a_trial_of_one_class_is_repeated_once_at_half_its_rate(recovers, teacher, task, monkeypatch):
    """Logits, classifier and score are the repeat's where it is not collapsed, else the first's; both are kept."""
    rates, said, whole, predict = [], [], ft.finetune, ft.predict
    monkeypatch.setattr(ft, "finetune", lambda *args, **named: rates.append(args[5]) or whole(*args, **named))

    def one_class(model, examples, pad_id):
        logits = predict(model, examples, pad_id)
        return logits if recovers and rates[-1] < 2e-3 else logits * 0 + [[1, -1]]
    monkeypatch.setattr(ft, "predict", one_class)
    config = config_of(teacher, task, batch_sizes="8", peak_lrs="2e-3", epochs=4, seeds=1, save=True)
    own, kept = ft.score_model(config, said.append)["tasks"]["own"], task.parent / "out/trials/own-b8-lr0.002-seed0"
    record = json.loads(Path(f"{kept}.json").read_text())
    assert rates == [2e-3, 1e-3] and [a["peak_lr"] for a in record["attempts"]] == rates
    assert [a["collapsed"] for a in record["attempts"]] == [True, not recovers]
    counted = record["attempts"][recovers]
    assert {k: record[k] for k in counted} == counted and own["scores"] == [counted["scores"]["accuracy"]]
    assert (own["repeated"], own["collapsed"]) == (1, int(not recovers))
    assert "; 1 predicted one class and ran again at half the rate" in ft.line("own", own)
    assert "COLLAPSED" in said[1] and ("COLLAPSED" in said[2]) != recovers
    model, tokenizer = checkpoint.read_classifier(kept).model, checkpoint.read_tokenizer(kept)
    logits = one_class(model, ft.encode(tokenizer, read_own(task)["dev"][0], 16), 0)
    assert np.allclose(logits, np.load(f"{kept}.npy"), atol=1e-6)
    assert f"lr {counted['peak_lr']:g}" in (kept / "README.md").read_text()
    ft.score_model(config, said.append)
    assert rates == [2e-3, 1e-3]                                        # finished, and not tried again


def test_save_after_a_finished_run_saves(teacher, task):
    """What lacks its classifier runs again, to the same scores; what has one does not."""
    config, said = config_of(teacher, task, batch_sizes="8"), []
    first, trials = ft.score_model(config, said.append), task.parent / "out/trials"
    stamps = {f.name: f.stat().st_mtime_ns for f in trials.glob("*.json")}
    assert len(stamps) == 4 and not any(f.is_dir() for f in trials.iterdir())
    ft.score_model(dataclasses.replace(config, save=True), said.append)
    saved = sorted(f for f in trials.iterdir() if f.is_dir())
    assert len(saved) == 4
    for directory in (next(f for f in saved if f.name.endswith(seed)) for seed in ("seed0", "seed1")):
        shutil.rmtree(directory)
    del said[:]
    again = ft.score_model(dataclasses.replace(config, save=True), said.append)
    assert again == first
    assert {line.partition(":")[0] for line in said if "seed" in line} <= {
        f"own batch 8 lr {lr:g} seed {seed}" for lr in (1e-3, 1.5e-3, 2e-3, 3e-3) for seed in (0, 1)}
    assert {f.name for f in trials.iterdir() if f.is_dir()} == {name.removesuffix(".json") for name in stamps}
    del said[:]
    assert ft.score_model(dataclasses.replace(config, save=True), said.append) == first and len(said) == 1
    with pytest.raises(UserError, match="was run with another epochs"):         # before anything is overwritten
        ft.score_model(dataclasses.replace(config, save=True, epochs=2), said.append)


def test_what_is_cut_is_counted(teacher, task, capsys):
    word = read_own(task)["train"][0][0][0].split()[:1]                 # one of the vocabulary
    rows = [f"{' '.join(word * n)}\t{n % 2}" for n in (1, 5, 6, 7, 8, 20)]
    own(task, (rows, rows[:4]))
    result = ft.score_model(config_of(teacher, task, batch_sizes="8", peak_lrs="1e-3", max_len=8))
    assert result["tasks"]["own"]["truncated"] == dict(train=3, dev=1)
    assert "own: longer than --max-len 8 and cut: 3 of 6 in train, 1 of 4 in dev" in capsys.readouterr().out
    assert json.loads((task.parent / "out/glue.json").read_text())["tasks"] == result["tasks"]
    tokenizer = checkpoint.read_tokenizer(teacher)
    for pair, cut in (((1, 4), 0), ((1, 5), 1), ((5, 1), 1), ((9, 9), 1), ((3, 2), 0)):
        x = [tuple(" ".join(word * n) for n in pair)]
        assert ft.cut(tokenizer, x, ft.encode(tokenizer, x, 8), 8) == cut


def test_a_damaged_trial_is_named(tmp_path):
    for text in ('{"scores"', "[]", '{"scores": {}}', '{"settings": {"epochs": 1}, "scores": {"accuracy": "high"}}',
                 '{"settings": {"epochs": 1}, "scores": {"accuracy": NaN}}', '{"settings": []}', "[" * 10 ** 5):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(UserError, match="t.json is damaged or not ours .*: delete it"):
            ft.finished_trial(tmp_path / "t.json", dict(epochs=1))


def start(config):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(config).items()
             if v is not None and not isinstance(v, bool)]
    return subprocess.Popen([sys.executable, Path(ft.__file__), *flags], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_grid_goes_on_and_two_processes_share_it(teacher, task):
    """Killed at three random trials; then two at once run what is missing, each trial once, and print the same."""
    config, rng = config_of(teacher, task), random.Random(0)
    trials = Path(config.out) / "trials"
    kills = signal.SIGKILL, signal.SIGTERM, signal.SIGKILL
    for stop, how in zip(sorted(rng.sample(range(5), 3)), kills, strict=True):
        process = start(config)
        while len(list(trials.glob("*.json"))) < stop or not list(trials.glob("*.lock")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(how)
        process.communicate(timeout=10)
        assert process.returncode == (143 if how == signal.SIGTERM else -how)
    stamps = {f: f.stat().st_mtime_ns for f in trials.glob("*.json")}
    out = [p.communicate(timeout=60)[0].split("\n\n") for p in [start(config), start(config)]]
    ran = [line.partition(":")[0] for text, _ in out for line in text.splitlines() if "seed" in line]
    ran = [line for line in ran if line.split()[4] in ("0.002", "0.003")]       # else a repeat at half the rate
    assert len(ran) == len(set(ran)) == 6 - len(stamps)
    assert all(f.stat().st_mtime_ns == stamp for f, stamp in stamps.items())
    assert sorted(f.suffix for f in trials.iterdir() if f.suffix != ".part") == [".json"] * 6 + [".npy"] * 6
    whole = ft.score_model(dataclasses.replace(config, out=str(task.parent / "whole")), lambda line: None)
    assert out[0][1] == out[1][1] == ft.line("own", whole["tasks"]["own"]) + "\n"


def spoiled_config(model, **changes):
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | changes))


# (what is done to a copy of the model `m` and of the task `t`, what is asked for, the line that it is answered with)
WRONG = [
    (None, dict(tasks="cola,magic"), "--tasks 'cola,magic': unknown or given twice; of cola, sst2, mrpc, stsb, qqp, "
     "mnli, qnli, rte, wnli, or name=PATH for your own labelled text: a file, or a directory with train.tsv and "
     "dev.tsv"),
    (None, dict(tasks="rte,rte"), "--tasks 'rte': unknown or given twice; of cola, sst2, mrpc, stsb, qqp, mnli, qnli, "
     "rte, wnli, or name=PATH for your own labelled text: a file, or a directory with train.tsv and dev.tsv"),
    (None, dict(tasks="own=m/vocab.txt"), "m/vocab.txt: one of .tsv, .csv, .jsonl, .ndjson, .json (each also .gz, "
     ".xz, .bz2) or .parquet can be read, by the end of its name"),
    (None, dict(tasks="own=none"), "none cannot be read (No such file or directory): mend that, or leave it "
     "out"),
    (None, dict(columns="sentence,gold"), "t/train.tsv is without the column 'gold' of --columns: it has 'sentence', "
     "'label'"),
    (None, dict(columns="label"), "t/train.tsv, line 1: the columns are 'sentence', 'label': which are one or two "
     "columns of text and which is the label? Say it with --columns text,label"),
    (None, dict(columns="sentence,label,label"), "--columns sentence,label,label: one is given twice"),
    (None, dict(tasks="wnli", columns="sentence,label"), "--columns names the columns of labelled text of your own "
     "(--tasks name=PATH)"),
    (None, dict(tasks="own=m"), "m/train.tsv cannot be read (No such file or directory): mend that, or leave it "
     "out"),
    (None, dict(tasks="rte", glue_dir="none"), "--glue-dir none: no such directory"),
    (None, dict(tasks="rte", glue_dir="t/dev.tsv"), "--glue-dir t/dev.tsv: no such directory"),
    (None, dict(out="t/dev.tsv"), "--out t/dev.tsv: no directory to write in: t/dev.tsv: Not a directory"),
    (None, dict(out="t/dev.tsv/out"), "--out t/dev.tsv/out: no directory to write in: {here}/t/dev.tsv: Not a "
     "directory"),
    (None, dict(model="m/config.json"), "m/config.json is not a model directory (no config.json)"),
    (None, dict(model="none/of/them"), "none/of/them is neither a model directory nor a Hub id (no such directory)"),
    (None, dict(model="t"), "t is not a model directory (no config.json)"),
    (lambda m, t: (m / "tokenizer.json").write_text('{"version": "1.0", "trunc'), {}, "m/tokenizer.json is damaged "
     "or not ours (JSONDecodeError: Unterminated string starting at: line 1 column 20 (char 19)): get it again, or "
     "leave it out"),
    (lambda m, t: (m / "config.json").write_text("[1, 2]"), {}, "m/config.json is damaged or not "
     "ours (TypeError: 'list' object is not a mapping): get it again, or leave it out"),
    (lambda m, t: spoiled_config(m, hidden_size="wide"), {},
     "m/config.json: hidden_size is 'wide': a whole number from 1 belongs there"),
    (lambda m, t: spoiled_config(m, num_attention_heads=0), {},
     "m/config.json: num_attention_heads is 0: a whole number from 1 belongs there"),
    (lambda m, t: spoiled_config(m, layer_norm_eps="tiny"), {},
     "m/config.json: layer_norm_eps is 'tiny': a number from 0 to 1 belongs there"),
    (lambda m, t: spoiled_config(m, pad_token_id=300), {},
     "m/config.json: pad_token_id is 300: it lies beyond a vocab_size of 300"),
    (lambda m, t: spoiled_config(m, num_attention_heads=5), {},
     "m/config.json: hidden_size is 48: it is not a multiple of 5 heads"),
    (lambda m, t: (next(m.glob("model.s*")).unlink(), (m / "model.safetensors.index.json").write_text("{}")), {},
     "m/model.safetensors.index.json is damaged or not ours (KeyError: 'weight_map'): get it again, or leave it out"),
    (None, dict(batch_sizes="16,x"), "16,x"), (None, dict(peak_lrs="0"), "--peak-lrs"),
    (None, dict(seeds=0), "--seeds"), (None, dict(max_len=4000), "--max-len 4000: m takes 8 to 512")]


@pytest.mark.parametrize("spoil, change, line", WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_inputs_are_refused_in_one_line_before_anything_runs(spoil, change, line, teacher, task, monkeypatch):
    monkeypatch.chdir(task.parent)
    shutil.copytree(teacher, "m")
    task.rename("t")
    if spoil:
        spoil(Path("m"), Path("t"))
    with pytest.raises(UserError) as e:
        ft.score_model(config_of("m", Path("t"), **(dict(tasks="own=t", out="out") | change)))
    line = line.replace("{here}", str(task.parent))
    assert str(e.value) == line if " " in line else line in str(e.value)
    assert "\n" not in str(e.value) and not Path("out").exists()


@pytest.mark.parametrize("file", ["m/SHA256SUMS", "m/tokenizer.json", "m/config.json", "t/train.tsv", "t/dev.tsv"])
def test_what_may_not_be_read_is_not_called_damaged(file, teacher, task, monkeypatch):
    monkeypatch.chdir(task.parent)
    shutil.copytree(teacher, "m")
    task.rename("t")
    opened = open

    def guarded(path, *args, **kwargs):
        if str(path) == file:
            raise PermissionError(13, "Permission denied", file)
        return opened(path, *args, **kwargs)
    for module in (builtins, io):                       # pathlib's is that of io
        monkeypatch.setattr(module, "open", guarded)
    with pytest.raises((UserError, PermissionError)) as e:              # which cli.run says in one line
        ft.score_model(config_of("m", Path("t"), tasks="own=t", out="out"))
    assert file in str(e.value) and "Permission denied" in str(e.value) and "damaged" not in str(e.value)


def test_a_place_that_cannot_be_written_is_refused_before_the_first_trial(teacher, task, monkeypatch):
    monkeypatch.setattr(cli.tempfile, "TemporaryFile", lambda dir: open(task / "none/x"))
    with pytest.raises(UserError, match="--out .*/out: no directory to write in"):
        ft.score_model(config_of(teacher, task))


@pytest.mark.parametrize("names, average, without", [
    ("qnli,sst2,mnli,mrpc,qqp,rte,cola,stsb", "average over the paper's 7 tasks: 70.0", "without cola: 80.0"),
    ("sst2,cola", "average over sst2+cola alone: 45.0", "without cola: 80.0"), ("rte", "over rte alone: 80.0", "")])
def test_the_average_names_its_tasks(names, average, without, teacher, tmp_path, monkeypatch, capsys):
    texts = [("a b",), ("b a",)]
    monkeypatch.setattr(ft, "read_task", lambda name, task, *_: dict(train=(texts, [0, 1]), dev=(texts, [0, 1])))
    mean = dict(cola=10, stsb=0)
    monkeypatch.setattr(ft, "score_task", lambda setup, out: dict(
        mean=mean.get(setup.name, 80), std=1, metric="m", scores=[1], others={}, batch_size=1, peak_lr=1, trials=1, n=2,
        majority=50, repeated=0, collapsed=setup.name == "cola"))
    ft.main(ft.Config(str(teacher), tasks=names, out=str(tmp_path), max_len=16))
    *lines, last = capsys.readouterr().out.strip().splitlines()
    assert average in last and without in last and len(lines) == names.count(",") + 1
    assert all(line.endswith("COLLAPSED") == line.startswith("cola") for line in lines)


# --------------------------------------------------------------------------------------------------- transformers

def their_logits(path, sentences):
    """What a user of transformers gets from the directory, padded and cut by its own tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return np.concatenate([
            model(**tokenizer(*map(list, zip(*sentences[at:at + 64], strict=True)), padding=True, truncation=True,
                              return_tensors="pt")).logits.numpy() for at in range(0, len(sentences), 64)])


def assert_same_in_transformers(kept, sentences):
    ours, theirs = np.load(f"{kept}.npy"), their_logits(kept, sentences)
    print(f"{len(ours)} examples, {(ours.argmax(-1) != theirs.argmax(-1)).sum()} labels differ, logits by at most "
          f"{np.abs(ours - theirs).max():.1e}; they go from {ours.min():.2f} to {ours.max():.2f}")
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1e-5
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


def drawn(path, size, tokenizer, num_labels):
    """A model directory with weights so large that token types, positions and all else tell in the logits."""
    from model import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    config = BertConfig.of_size(size, 2, vocab_size=tokenizer.get_vocab_size())
    model = BertForSequenceClassification(config, num_labels)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    checkpoint.save_model(path, model, tokenizer)
    return path


@pytest.mark.parametrize("header", ["a\tb\tlabel", "a\tb\tscore", "a\tlabel"])
def test_a_saved_classifier_says_the_same_in_transformers(header, teacher, task, tmp_path):
    rng, tokenizer = np.random.default_rng(0), checkpoint.read_tokenizer(teacher)
    tokenizer.post_processor = None                     # as some tokenizer.json on the Hub are
    words, sentences = [t for t in tokenizer.get_vocab() if t.isalpha()], header.count("\t")
    rows = ["\t".join([" ".join(rng.choice(words, rng.integers(1, 20))) for _ in range(sentences)] + [str(i % 2)])
            for i in range(200)]
    own(task, (rows[:40], rows[40:]), header)
    model = drawn(tmp_path / "m", "2L32", tokenizer, 1 + header.endswith("label"))
    config = config_of(model, task, batch_sizes="32", peak_lrs="5e-5", seeds=1, save=True)
    ft.score_model(config, say=lambda line: None)
    kept, x = tmp_path / "out/trials/own-b32-lr5e-05-seed0", read_own(task)["dev"][0]
    assert_same_in_transformers(kept, x)

    transformers = pytest.importorskip("transformers")
    assert max(len(e) for e in transformers.AutoTokenizer.from_pretrained(kept)(
        *map(list, zip(*x, strict=True)), truncation=True)["input_ids"]) == config.max_len
    if header.endswith("score"):                        # a pipeline must not make a probability of it
        pair = dict(text=x[0][0], text_pair=x[0][1])
        found = transformers.pipeline("text-classification", str(kept), device="cpu")(pair)
        assert found["score"] == pytest.approx(np.load(f"{kept}.npy")[0, 0], abs=1e-5)
    elif sentences == 2:                                # without token types it would be another
        raw = json.loads((kept / "tokenizer_config.json").read_text())
        raw["model_input_names"].remove("token_type_ids")
        (kept / "tokenizer_config.json").write_text(json.dumps(raw))
        assert np.abs(their_logits(kept, x) - np.load(f"{kept}.npy")).max() > 0.1


@pytest.mark.parametrize("name", ["mrpc", "rte", "stsb"])
def test_a_dev_set_is_classified_the_same_in_transformers(name, real_data, tmp_path):
    """All of it, by a classifier of a few steps on all token types and lengths."""
    from plumbing.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(str(real_data / "vocab/bert-base-uncased-vocab.txt"))
    path = drawn(tmp_path / "m", "2L32", tokenizer, len(glue.TASKS[name].labels) or 1)
    (x, y), (dev, labels) = glue.read_task(name, glue.TASKS[name], real_data / "glue").values()
    some = [*(order := np.argsort(y, kind="stable"))[:160], *order[-160:]]              # of both classes
    parts = dict(train=(ft.encode(tokenizer, [x[i] for i in some], 128), y[some]),
                 dev=(ft.encode(tokenizer, dev, 128), labels))
    setup = ft.Setup(ft.Config(str(path), epochs=1, save=True), path, [], checkpoint.read_tokenizer(path),
                     torch.device("cpu"), name, glue.TASKS[name], parts, lambda line: None)
    ft.run_trial(setup, tmp_path / "c.json", 32, 1e-3, 0)
    assert_same_in_transformers(tmp_path / "c", dev)
    assert np.ptp(np.load(tmp_path / "c.npy"), axis=0).min() > 0.1                      # else equality says little


# ---------------------------------------------------------------------------------------------------------- speed

@pytest.mark.parametrize("name", ["cola", "sst2"])
def test_an_epoch_has_a_third_of_the_positions_that_it_had_padded_to_128(name, real_data):
    """Examples of like length go together and are padded to the longest of them: the first 640 in batches of 32."""
    from plumbing.tokenizer import load_tokenizer
    x, _ = glue.read_task(name, glue.TASKS[name], real_data / "glue")["train"]
    examples = ft.encode(load_tokenizer(str(real_data / "vocab/bert-base-uncased-vocab.txt")), x[:640], 128)
    drawn = ft.shuffled_batches(np.array([e.shape[1] for e in examples]), 32, 1, 0)
    positions = sum(ft.pad([examples[i] for i in picked], 0)[0].numel() for picked in drawn)
    assert sum(e.shape[1] for e in examples) <= positions < 640 * 128 / 3
