"""GLUE's tasks and one's own: their columns and labels, how they are read, what they are scored with."""
import contextlib
import csv
import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.cli import NUMBER, UserError, shown
from plumbing.rows import KIND, NoText, label_of, quoted, table


class Task(NamedTuple):
    folder: str             # of the official TSVs; one's own: a file or a folder
    text: tuple             # names of the columns of sentences, in lower case
    label: str              # name of the column of the label
    columns: tuple          # the sentences' names on the Hub; (): one's own
    labels: tuple | None   # the labels in the order of their numbers; (): a score; None: whole numbers from 0
    metrics: tuple          # of METRICS; the first picks the grid point and stands for the task
    rows: dict              # {file: official number of examples}: train, then one dev set or two
    header: bool = True

    def classes(self, y):
        """How many classes the labels y are of; None where they are scores."""
        return None if self.labels == () else len(self.labels or ()) or int(y.max()) + 1


BINARY, ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
ONE, TWO, STRINGS = ("sentence",), ("sentence1", "sentence2"), ("#1 string", "#2 string")
QUESTIONS, ANSWERED = ("question1", "question2"), ("question", "sentence")
TASKS = {
    "cola": Task("CoLA", ("column 4",), "column 2", ONE, BINARY, ("matthews",), dict(train=8551, dev=1043), False),
    "sst2": Task("SST-2", ONE, "label", ONE, BINARY, ("accuracy",), dict(train=67349, dev=872)),
    "mrpc": Task("MRPC", STRINGS, "quality", TWO, BINARY, ("f1", "accuracy"), dict(train=3668, dev=408)),
    "stsb": Task("STS-B", TWO, "score", TWO, (), ("pearson", "spearman"), dict(train=5749, dev=1500)),
    "qqp": Task("QQP", QUESTIONS, "is_duplicate", QUESTIONS, BINARY, ("accuracy", "f1"), dict(train=363846, dev=40430)),
    "mnli": Task("MNLI", TWO, "gold_label", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
                 ("accuracy",), dict(train=392702, dev_matched=9815, dev_mismatched=9832)),
    "qnli": Task("QNLI", ANSWERED, "label", ANSWERED, ENTAILMENT, ("accuracy",), dict(train=104743, dev=5463)),
    "rte": Task("RTE", TWO, "label", TWO, ENTAILMENT, ("accuracy",), dict(train=2490, dev=277)),
    "wnli": Task("WNLI", TWO, "label", TWO, BINARY, ("accuracy",), dict(train=635, dev=71)),
}
PAPER = ("qnli", "sst2", "mnli", "mrpc", "qqp", "rte", "cola")  # Table 2's columns, which it averages
# Names of a column of labels, and of one that numbers the rows, as pandas does too
LABELS = ("label", "labels", "class", "category", "target", "sentiment", "stars", "rating", "score")
ROW_NUMBER = re.compile(r"(.*[\W_])?(id|idx|index|guid|uuid)|(unnamed: [\d.]+)?|(__index_)?level_\d+(__)?")


def parse_tasks(names, columns=None, say=print):
    """{name: Task} of "cola,mine=FILE_OR_DIR"; `columns`: text,label or text,text,label of one's own."""
    tasks, ours = {}, "|".join(TASKS)
    parts = re.split(rf",(?=\s*(?:[\w.-]+=|(?:{ours})\s*(?:,|$)))", names)          # a path may hold commas
    for name, _, own in (part.strip().partition("=") for part in parts):
        if not re.fullmatch(r"[\w.-]+", name) or name in tasks or (not own and name not in TASKS):
            raise UserError(f"--tasks {name!r}: unknown or given twice; of {', '.join(TASKS)}, or name=PATH for your "
                            f"own labelled text: a file, or a directory with train.tsv and dev.tsv")
        tasks[name] = TASKS[name] if not own else own_task(
            Path(own), columns, lambda line, name=name: say(f"{name}: {line}"))
    if columns and all(task.columns for task in tasks.values()):
        raise UserError("--columns names the columns of labelled text of your own (--tasks name=PATH)")
    return tasks


def own_files(path):
    """{"train": file, "dev": file}; of a single file, or where there is no dev: {"train": file}."""
    if not path.is_dir():
        return dict(train=path)
    files = dict(train=path / "train.tsv")
    for part in ("train", "dev"):
        found = [f for f in sorted(path.glob(f"{part}.*")) if KIND.fullmatch(f.name, len(part))]
        if len(found) > 1:
            raise UserError(f"{path}: both {found[0].name} and {found[1].name}: leave one of them there")
        files.update((part, file) for file in found)
    return files


def own_task(path, columns=None, say=print):
    """The Task of one's own file or directory: its columns by name, its labels as they stand there."""
    file = own_files(path)["train"]
    with table(file, Counter()) as rows:
        names = rows.names
        *text, label = wanted = named(columns) if columns else guessed(names)
        rows.positions(wanted)
        asked, seen = [] if columns else text, Counter()
        pairs = {name: set() for name in asked}                         # (label, what stands in the column)
        for _, cells in rows.cells(rows.positions([label, *asked])):
            with contextlib.suppress(ValueError):
                value = label_of(None if isinstance(cells, str) else cells[0], rows.met)
                seen[value] += 1
                for name, cell in zip(asked, cells[1:], strict=True):
                    pairs[name].add((value, str(cell or "")))
    few = seen.total() >= 2 * len(seen)                                 # else nothing speaks against it
    telling = [name for name in asked if few and len(pairs[name]) <= len(seen)]
    if telling and (others := [name for name in text if name not in telling]):
        say(f"no sentence: {quoted(telling)}: it says no more than the label")
        text = others
    if len(text) not in (1, 2) or not columns and {"label", "score"} & set(text):
        raise UserError(f"{file}, line 1: the columns are {quoted(names)}: which are one or two columns of text and "
                        f"which is the label? Say it with --columns text,label")
    labels = () if label == "score" else own_labels(file, seen, columns)
    say(f"text from {quoted(text)}, {'scores' if labels == () else 'labels'} from {label!r} ({file.name})"
        + (f": {', '.join(map(shown, labels))}" if labels else ""))
    return Task(str(path), tuple(text), label, (), labels,
                ("accuracy",) if labels != () else ("pearson", "spearman"), dict.fromkeys(own_files(path)))


def guessed(names):
    """[text, ..., label] by the names alone: what is named after the label is no text."""
    left = [n for n in names if not ROW_NUMBER.fullmatch(n)] or [""]
    label = next((n for n in (left[-1], *LABELS) if n in left and n in LABELS), left[-1])
    text = [n for n in left if n != label]
    return [*([n for n in text if n not in (f"{label}_text", f"{label}_name")] or text), label]


def named(columns):
    """The names in --columns; one with a comma stands in quotes."""
    wanted = [c.strip().lower() for c in next(csv.reader([columns], skipinitialspace=True))]
    if len(set(wanted)) < len(wanted):
        raise UserError(f"--columns {columns}: one is given twice")
    return wanted


def text_columns(rows, columns):
    """The positions of the columns of text: those in --columns, else `text`, else those that fine-tuning would take."""
    names = rows.names
    *text, label = guessed(names)
    if columns or "text" in names:
        text = named(columns or "text")
    else:
        found = rows.look(names.index(label))
        labels = label in LABELS or len(set(found)) <= len(found) / 2 + 1
        if len(found) < 2 or len(text) > 2 or text and not labels:
            raise NoText(rows.name, "a table without a column 'text'",
                         f"which of {quoted(names)} are text? Say it with --columns")
        text = text or [label]
        rows.met[f"tables with the text in {quoted(text)}"] += 1
    return rows.positions(text)


def own_labels(path, seen, columns):
    """None: whole numbers from 0; else the labels in their numbers' order: words, or whole numbers from 1."""
    numbers = {label for label in seen if NUMBER.fullmatch(label)}
    if 2 * sum(seen[label] for label in numbers) >= seen.total():
        whole = sorted(int(label) for label in seen if re.fullmatch("[0-9]{1,9}", label))           # 1 to 5 stars, say
        many = len(seen) == len(whole) > 1 and whole[0] > 0
        return tuple(map(str, whole)) if many and whole == [whole[0] + i for i in range(len(whole))] else None
    if len(seen) < 2 or len(seen) > (seen.total() - 1 if columns else max(20, seen.total() / 2)):
        raise UserError(f"{path}: {seen.total():,} rows have {len(seen):,} different labels, such as "
                        f"{next(iter(seen))[:40]!r}: is that the column of labels? Say it with --columns text,label")
    return tuple(sorted(seen))


def number(task, label):
    """The label as a number; ValueError where it is none of the task's."""
    if task.labels:
        return task.labels.index(label)
    if task.labels is None and not re.fullmatch("[0-9]+", label) or not abs(float(label)) < 1e38:  # float32's
        raise ValueError
    return float(label) if task.labels == () else int(label)


def read_rows(path, task, say=print):
    """(sentences, labels, rows left out): tuples of one or two sentences, and numbers.  A row of another width than the
    header, without text or with an unknown label is left out and listed; more than 0.1% of them are refused."""
    sentences, labels, bad, met = [], [], [], Counter()
    with table(path, met, task.header) as rows:
        wanted = (*task.text, task.label)
        *text, label = rows.positions(wanted, f"GLUE's {task.folder}" if task.columns else "the training examples")
        if (rest := [n for n in rows.names if n not in wanted]) and not task.columns:
            say(f"{path}: left out: the column{'s' * (len(rest) > 1)} {quoted(rest)}")
        for place, values, fault in rows.pick(text, label):
            try:
                if not fault:
                    labels.append(number(task, values[-1]))
                    sentences.append(values[:-1])
            except ValueError:
                fault = f"has the unknown label {values[-1][:40]!r}"
            if fault:
                bad.append(f"{place} {fault}")
    listed = "; ".join(bad[:10]) + f"; and {len(bad) - 10} more" * (len(bad) > 10)
    total = len(labels) + len(bad)
    if len(bad) > 0.001 * total:
        kind = f"one of {', '.join(map(shown, task.labels))}" if task.labels else (
            "a number" if task.labels == () else "a whole number, 0 for the first class, or a word")
        raise UserError(f"{path}: {len(bad)} of {total:,} rows cannot be read: {listed}"
                        + f" (a label here is {kind})" * ("label" in listed))
    if bad:
        say(f"{path}: left out: {listed}")
    if met["nul_lines"] or met["lone_surrogates"]:
        say(f"{path}: NUL was removed from {met['nul_lines']:,} lines, {met['lone_surrogates']:,} lone surrogates "
            f"became U+FFFD")
    for name, column in zip(task.text, zip(*sentences, strict=True), strict=False):
        if not any(c.isalpha() for sentence in column for c in sentence):
            raise UserError(f"{path}: the column {name!r} holds no letter: is it text? Say so with --columns")
    return sentences, labels, len(bad)


def rows_of_text(path, columns, known):
    """What the text's columns are, in words; then (place, sentences, what is wrong or None) of each row.  They are
    those in --columns without the label, else the `known` ones, else all not like a label."""
    with table(path, Counter()) as rows:
        names = rows.names
        if columns:
            text = [c for c in named(columns) if c not in LABELS][:len(known) or None]
        elif known and set(known) <= set(names):
            text = list(known)
        else:
            text = [n for n in names if not ROW_NUMBER.fullmatch(n) and n not in LABELS]
        if len(text) != (len(known) or len(text[:2])) or not text:
            raise UserError(f"--predict {path}: the columns are {quoted(names)}: which are the "
                            f"{len(known) or 'one or two'} of text? Say it with --columns")
        at = rows.positions(text)
        yield quoted(text)
        yield from rows.pick(at)


def hub_task(name, task, file):
    """(file, Task) of nyu-mll/glue, from huggingface_hub's cache or the network: its labels are numbers."""
    split = file.replace("dev", "validation")
    try:
        import huggingface_hub  # comes with tokenizers
        path = Path(huggingface_hub.hf_hub_download(
            "nyu-mll/glue", f"{name}/{split}-00000-of-00001.parquet", repo_type="dataset"))
    except Exception as e:      # no network, no such file: whatever the library raises
        raise UserError(f"nyu-mll/glue, {name}/{split} is not to be had ({shown(e)}): give --glue-dir with "
                        f"{task.folder}/ in it, or leave {name} out of --tasks") from None
    labels = tuple(map(str, range(len(task.labels))))
    return path, task._replace(text=task.columns, label="label", columns=(), labels=labels)


def read_task(name, task, glue_dir, say=print):
    """{file: (sentences, labels)}, train first; labels are whole numbers, or scores in float32."""
    if glue_dir and not os.path.isdir(glue_dir):
        raise UserError(f"--glue-dir {glue_dir}: no such directory")
    folder, parts = Path(glue_dir or "", task.folder), {}
    from_hub, own = task.columns and not (glue_dir and folder.exists()), not task.columns
    files = own_files(Path(task.folder)) if own else {file: folder / f"{file}.tsv" for file in task.rows}
    for file, official in task.rows.items():
        where = f"nyu-mll/glue, {name}/{file}" if from_hub else files[file]
        sentences, labels, bad = read_rows(*hub_task(name, task, file)) if from_hub else read_rows(where, task, say)
        n, slack = len(labels), 1e-5 * (official or 0)     # QQP's count differs by 3 rows between its readers
        if not n:
            raise UserError(f"{where}: no examples in it")
        if official and not n - slack <= official <= n + bad + slack:
            raise UserError(f"{where}: {n:,} examples, but GLUE's {task.folder} has {official:,}: the file "
                            f"is cut, of another version, or without its header line")
        parts[file] = sentences, labels
    if own and "dev" not in parts:
        parts = split(files["train"], *parts["train"])
    if task.labels is None:
        classes = set(parts["train"][1])
        if len(classes) < 2 or max(classes) >= len(classes) or not set(parts["dev"][1]) <= classes:
            raise UserError(f"{folder}: the labels of the training examples are not 0, 1, ... without a gap, "
                            f"or dev has others (a column of scores is called `score` in the header)")
    return {file: (x, np.array(y, np.float32 if task.labels == () else np.int64)) for file, (x, y) in parts.items()}


def split(path, sentences, labels):
    """A tenth of the examples as dev, by the hash of their text: always the same, no text on both sides."""
    dev = [int(hashlib.sha256("\t".join(s).encode()).hexdigest()[:16], 16) % 10 == 0 for s in sentences]
    parts = {part: [i for i, held in enumerate(dev) if held == (part == "dev")] for part in ("train", "dev")}
    if not all(parts.values()):
        raise UserError(f"{path}: {len(labels)} examples are too few to set a tenth of them apart as dev: give a "
                        f"directory with train.tsv and dev.tsv")
    return {part: ([sentences[i] for i in of], [labels[i] for i in of]) for part, of in parts.items()}


def accuracy(p, y):
    return np.mean(p == y)


def f1(p, y):
    """Of class 1: 2 TP / (2 TP + FP + FN)."""
    positives = np.sum(p == 1) + np.sum(y == 1)
    return 2 * np.sum((p == 1) & (y == 1)) / positives if positives else 0.0


def pearson(p, y):
    """Covariance over the product of standard deviations; 0 where one of them is 0 (undefined)."""
    p, y = np.asarray(p, np.float64), np.asarray(y, np.float64)
    if np.ptp(p) == 0 or np.ptp(y) == 0:     # asked of the values: after p - mean(p) rounding may leave 1e-17
        return 0.0
    p, y = p - p.mean(), y - y.mean()
    return p @ y / np.sqrt((p @ p) * (y @ y))


def spearman(p, y):
    """Pearson of the ranks; equal values share the average of their ranks."""
    def ranks(x):
        _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[which]
    return pearson(ranks(p), ranks(y))


METRICS = dict(accuracy=accuracy, f1=f1, matthews=pearson, pearson=pearson, spearman=spearman)  # 0 and 1: the same


def evaluate(task, p, labels):
    """({metric: percent}, collapsed) of predictions; collapsed: one class, or within 1% of the range."""
    return {m: 100 * float(METRICS[m](p, labels)) for m in task.metrics}, bool(np.ptp(p) <= 0.01 * np.ptp(labels))
