"""GLUE's tasks and one's own: their columns and labels, how they are read, what they are scored with."""
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.cli import UserError

# ---------------------------------------------------------------------------------------------------------- tasks

class Task(NamedTuple):
    folder: str             # of the official TSVs, or of one's own
    text: tuple             # columns of the sentences, counted from 0; of one's own: their names in the header
    label: int | str        # column of the label; -1: the last
    columns: tuple          # the sentences' names on the Hub; (): one's own
    labels: tuple | None    # the TSV's labels in the order of their numbers; (): a score; None: whole numbers
    metrics: tuple          # of METRICS; the first picks the grid point and stands for the task
    rows: dict              # {file: official number of examples}: train, then one dev set or two
    header: bool = True


BINARY, ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
TASKS = {
    "cola": Task("CoLA", (3,), 1, ("sentence",), BINARY, ("matthews",), dict(train=8551, dev=1043), header=False),
    "sst2": Task("SST-2", (0,), 1, ("sentence",), BINARY, ("accuracy",), dict(train=67349, dev=872)),
    "mrpc": Task("MRPC", (3, 4), 0, ("sentence1", "sentence2"), BINARY, ("f1", "accuracy"),
                 dict(train=3668, dev=408)),
    "stsb": Task("STS-B", (7, 8), -1, ("sentence1", "sentence2"), (), ("pearson", "spearman"),
                 dict(train=5749, dev=1500)),
    "qqp": Task("QQP", (3, 4), 5, ("question1", "question2"), BINARY, ("accuracy", "f1"),
                dict(train=363846, dev=40430)),
    "mnli": Task("MNLI", (8, 9), -1, ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
                 ("accuracy",), dict(train=392702, dev_matched=9815, dev_mismatched=9832)),
    "qnli": Task("QNLI", (1, 2), -1, ("question", "sentence"), ENTAILMENT, ("accuracy",),
                 dict(train=104743, dev=5463)),
    "rte": Task("RTE", (1, 2), -1, ("sentence1", "sentence2"), ENTAILMENT, ("accuracy",),
                dict(train=2490, dev=277)),
    "wnli": Task("WNLI", (1, 2), -1, ("sentence1", "sentence2"), BINARY, ("accuracy",), dict(train=635, dev=71)),
}
PAPER = ("qnli", "sst2", "mnli", "mrpc", "qqp", "rte", "cola")     # the columns of its Table 2, which it averages
ROW_NUMBER = re.compile(r"(.*[\W_])?(id|idx|index|guid|uuid)|(unnamed: \d+)?")     # pandas' own index has no name


def parse_tasks(names):
    """{name: Task} of "cola,mine=DIR"."""
    tasks = {}
    for name, _, directory in (part.strip().partition("=") for part in names.split(",")):
        if not re.fullmatch(r"[\w.-]+", name) or name in tasks or (not directory and name not in TASKS):
            raise UserError(f"--tasks {name!r}: unknown or given twice; of {', '.join(TASKS)}, or name=DIR for a "
                            f"directory of your own with train.tsv and dev.tsv")
        if directory and not os.path.isdir(directory):
            raise UserError(f"--tasks {name}={directory}: not a directory (it takes one with train.tsv and dev.tsv)")
        tasks[name] = own_task(Path(directory)) if directory else TASKS[name]
    return tasks


def own_task(directory):
    path = directory / "train.tsv"
    names = own_header(path, read_lines(path)[0])
    *text, label = [n for n in names if not ROW_NUMBER.fullmatch(n)] or [""]
    if len(text) not in (1, 2) or {"label", "score"} & set(text):
        raise UserError(f"{path}, line 1: the columns are {quoted(names)}: a header of one or two columns of text and "
                        f"then the label belongs here")
    score = label == "score"
    return Task(str(directory), tuple(text), label, (), () if score else None,
                ("pearson", "spearman") if score else ("accuracy",), dict(train=None, dev=None))


def own_header(path, line):
    """The names of the columns, in lower case."""
    names = [name.strip().lower() for name in line.split("\t")]
    if len(names) == 1:
        raise UserError(f"{path}, line 1: {one_column(line)}")
    if numbers := [name for name in names if re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", name)]:
        raise UserError(f"{path}, line 1 looks like an example (it holds {numbers[-1]}): a header, such as "
                        f"sentence<tab>label, belongs above the examples")
    if len(set(names)) < len(names):
        raise UserError(f"{path}, line 1: two columns have one name: {quoted(names)}")
    return names


def quoted(names):
    return ", ".join(repr(name[:40]) for name in names)


def one_column(line):
    other = next((name for mark, name in ((",", "commas"), (";", "semicolons")) if mark in line), None)
    return f"one column: tabs separate the columns of a TSV{f', not {other}' if other else ''}"


# -------------------------------------------------------------------------------------------------------- reading

def read_lines(path):
    try:
        # not splitlines(), which also breaks at U+2028; no csv quoting, since the official files have none
        with open(path, encoding="utf-8-sig", newline="\n") as f:
            lines = f.read().rstrip("\n").split("\n")
    except OSError as e:
        hint = ": a task's directory holds train.tsv and dev.tsv (MNLI: dev_matched.tsv, dev_mismatched.tsv)"
        raise UserError(f"{path}: {e.strerror.lower()}{hint * isinstance(e, FileNotFoundError)}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 (byte {e.start:,})") from None
    return [line.rstrip("\r") for line in lines]


def number(task, field):
    """The label as a number; ValueError where it is none of the task's."""
    if task.labels:
        return task.labels.index(field)
    if task.labels is None and not field.isdecimal() or not abs(float(field)) < 1e38:       # what float32 holds
        raise ValueError
    return float(field) if task.labels == () else int(field)


def read_tsv(path, task, say=print):
    """(sentences, labels, rows left out): tuples of one or two sentences, and numbers.

    A row of another width than the first line's (an extra tab, a field missing) or with an unknown label is left
    out and listed; more than 0.1% of them are refused."""
    lines = read_lines(path)
    width, sentences, labels, bad = lines[0].count("\t") + 1, [], [], []
    text, label = task.text, task.label
    if not task.columns:                                # one's own: by name, whatever their order in this file
        names, wanted = own_header(path, lines[0]), (*text, label)
        rest = [n for n in names if n not in wanted]
        if not set(wanted) <= set(names) or not all(map(ROW_NUMBER.fullmatch, rest)):
            raise UserError(f"{path}, line 1: the columns are {quoted(names)}, but those of train.tsv are "
                            f"{quoted(wanted)}: give both files the same")
        if rest:
            say(f"{path}: left out: the column {quoted(rest)}")
        text, label = [names.index(n) for n in text], names.index(label)
    elif width <= max(*text, label) + (label < 0):
        raise UserError(f"{path}, line 1: " + (one_column(lines[0]) if width == 1 else
                        f"{width} columns: GLUE's {task.folder} has more"))
    for at, line in enumerate(lines[task.header:], 1 + task.header):
        fields = line.split("\t")
        try:
            if len(fields) != width:
                raise IndexError
            labels.append(number(task, fields[label]))
            sentences.append(tuple(fields[i] for i in text))
        except IndexError:
            bad.append(f"line {at} has {len(fields)} fields, not {width}")
        except ValueError:
            bad.append(f"line {at} has the unknown label {fields[label][:40]!r}")
    listed = "; ".join(bad[:10]) + (f"; and {len(bad) - 10} more" if len(bad) > 10 else "")
    if len(bad) > 0.001 * (len(lines) - task.header):
        kind = (f"one of {', '.join(task.labels)}" if task.labels else "a number" if task.labels == () else
                "a whole number, 0 for the first class; any number where the header calls the column `score`")
        raise UserError(f"{path}: {len(bad)} of {len(lines) - task.header:,} rows cannot be read: {listed}"
                        + f" (a label here is {kind})" * ("label" in listed))
    if bad:
        say(f"{path}: left out: {listed}")
    for name, column in () if task.columns else zip(task.text, zip(*sentences, strict=True), strict=False):
        if not any(c.isalpha() for sentence in column for c in sentence):
            raise UserError(f"{path}: the column {name!r} holds no letter: is it text?  A column that is called id is "
                            f"left out")
    return sentences, labels, len(bad)


def read_hub(name, task, file):
    """As read_tsv, from nyu-mll/glue: huggingface_hub's cache or the network."""
    split = file.replace("dev", "validation")
    where = f"nyu-mll/glue, {name}/{split}"
    try:
        import huggingface_hub  # comes with tokenizers
        import pyarrow.parquet
        parquet = huggingface_hub.hf_hub_download(
            "nyu-mll/glue", f"{name}/{split}-00000-of-00001.parquet", repo_type="dataset")
        table = pyarrow.parquet.read_table(parquet, columns=[*task.columns, "label"]).to_pydict()
    except ImportError:
        raise UserError(f"{where} needs pyarrow: pip install pyarrow, or give --glue-dir with {task.folder}/ in "
                        f"it") from None
    except Exception as e:      # no network, no such file, not a parquet: whatever the two libraries raise
        raise UserError(f"{where} is not to be had ({type(e).__name__}): give --glue-dir with {task.folder}/ in "
                        f"it, or leave {name} out of --tasks") from None
    if task.labels and not set(table["label"]) <= set(range(len(task.labels))):     # -1 in the test splits
        raise UserError(f"{where}: labels beyond 0 to {len(task.labels) - 1}: these are not the labelled examples")
    return list(zip(*(table[c] for c in task.columns), strict=True)), table["label"], 0


def read_task(name, task, glue_dir, say=print):
    """{file: (sentences, labels)}, train first; labels are whole numbers, or scores in float32."""
    if glue_dir and not os.path.isdir(glue_dir):
        raise UserError(f"--glue-dir {glue_dir}: no such directory")
    folder, parts = Path(glue_dir or "", task.folder), {}
    from_hub = task.columns and not (glue_dir and folder.exists())
    for file, official in task.rows.items():
        where = f"nyu-mll/glue, {name}/{file}" if from_hub else folder / f"{file}.tsv"
        sentences, labels, bad = read_hub(name, task, file) if from_hub else read_tsv(where, task, say)
        n, slack = len(labels), 1e-5 * (official or 0)      # QQP's count differs by 3 rows between its readers
        if not n:
            raise UserError(f"{where}: no examples in it")
        if official and not n - slack <= official <= n + bad + slack:
            raise UserError(f"{where}: {n:,} examples, but GLUE's {task.folder} has {official:,}: the file is "
                            f"cut, of another version, or without its header line")
        parts[file] = sentences, labels
    if task.labels is None:
        classes = set(parts["train"][1])
        if len(classes) < 2 or max(classes) >= len(classes) or not set(parts["dev"][1]) <= classes:
            raise UserError(f"{folder}: the labels of train.tsv are not 0, 1, ... without a gap, or dev.tsv has "
                            f"others (a column of scores is called `score` in the header)")
    return {file: (x, np.array(y, np.float32 if task.labels == () else np.int64)) for file, (x, y) in parts.items()}


# -------------------------------------------------------------------------------------------------------- metrics

def accuracy(p, y):
    return np.mean(p == y)


def f1(p, y):
    """Of class 1: 2 TP / (2 TP + FP + FN)."""
    positives = np.sum(p == 1) + np.sum(y == 1)
    return 2 * np.sum((p == 1) & (y == 1)) / positives if positives else 0.0


def matthews(p, y):
    """(TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)); 0 where the denominator is."""
    tp, tn, fp, fn = (float(np.sum((p == a) & (y == b))) for a, b in ((1, 1), (0, 0), (1, 0), (0, 1)))
    denominator = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / denominator if denominator else 0.0


def pearson(p, y):
    """Covariance over the product of standard deviations; 0 where one of them is 0 (undefined)."""
    p, y = np.asarray(p, np.float64), np.asarray(y, np.float64)
    if np.ptp(p) == 0 or np.ptp(y) == 0:        # asked of the values: after p - mean(p) rounding may leave 1e-17
        return 0.0
    p, y = p - p.mean(), y - y.mean()
    return p @ y / np.sqrt((p @ p) * (y @ y))


def spearman(p, y):
    """Pearson of the ranks; equal values share the average of their ranks."""
    def ranks(x):
        _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[which]
    return pearson(ranks(p), ranks(y))


METRICS = dict(accuracy=accuracy, f1=f1, matthews=matthews, pearson=pearson, spearman=spearman)


def evaluate(task, p, labels):
    """({metric: percent}, collapsed) of predictions; collapsed: all one class, or within 1% of the scores' range."""
    return ({m: 100 * float(METRICS[m](p, labels)) for m in task.metrics},
            bool(np.ptp(p) <= 0.01 * np.ptp(labels)))
