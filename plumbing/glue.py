"""GLUE's tasks and one's own: their columns and labels, how they are read, what they are scored with."""
import csv
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.cli import UserError

# ------------------------------------------------------------------------------------------------------ tasks

class Task(NamedTuple):
    folder: str             # of the official TSVs; one's own: a file or a folder
    text: tuple            # columns of the sentences, counted from 0; of one's own: their names in the header
    label: int | str        # column of the label; -1: the last
    columns: tuple          # the sentences' names on the Hub; (): one's own
    labels: tuple | None   # the labels in the order of their numbers; (): a score; None: whole numbers from 0
    metrics: tuple          # of METRICS; the first picks the grid point and stands for the task
    rows: dict              # {file: official number of examples}: train, then one dev set or two
    header: bool = True


BINARY, ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
TASKS = {
    "cola": Task("CoLA", (3,), 1, ("sentence",), BINARY, ("matthews",), dict(train=8551, dev=1043),
                 header=False),
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
    "wnli": Task("WNLI", (1, 2), -1, ("sentence1", "sentence2"), BINARY, ("accuracy",),
                 dict(train=635, dev=71)),
}
PAPER = ("qnli", "sst2", "mnli", "mrpc", "qqp", "rte", "cola")  # Table 2's columns, which it averages
FORMATS = (".tsv", ".csv", ".jsonl", ".ndjson", ".json", ".parquet")
# Names of a column of labels, and of one that numbers the rows: pandas' own has no name
LABELS = ("label", "labels", "class", "category", "target", "sentiment", "stars", "rating", "score")
ROW_NUMBER = re.compile(r"(.*[\W_])?(id|idx|index|guid|uuid)|(unnamed: \d+)?")


def parse_tasks(names, columns=None, say=print):
    """{name: Task} of "cola,mine=FILE_OR_DIR"; `columns`: text,label or text,text,label of one's own."""
    tasks = {}
    for name, _, own in (part.strip().partition("=") for part in names.split(",")):
        if not re.fullmatch(r"[\w.-]+", name) or name in tasks or (not own and name not in TASKS):
            raise UserError(f"--tasks {name!r}: unknown or given twice; of {', '.join(TASKS)}, or name=PATH "
                            f"for your own labelled text: a file, or a directory with train.tsv and dev.tsv")
        if own and not os.path.exists(own):
            raise UserError(f"--tasks {name}={own}: no such file or directory (a file of labelled text "
                            f"belongs there, or a directory with train.tsv and dev.tsv)")
        tasks[name] = TASKS[name] if not own else own_task(
            Path(own), columns, lambda line, name=name: say(f"{name}: {line}"))
    if columns and all(task.columns for task in tasks.values()):
        raise UserError("--columns names the columns of labelled text of your own (--tasks name=PATH)")
    return tasks


def own_files(path):
    """{"train": file, "dev": file}; of a single file, or where there is no dev: {"train": file}."""
    if not path.is_dir():
        if path.suffix.lower() not in FORMATS:
            raise UserError(f"{path}: one of {', '.join(FORMATS)} can be read, by the end of its name")
        return dict(train=path)
    files = {}
    for part in ("train", "dev"):
        found = [path / f"{part}{suffix}" for suffix in FORMATS if (path / f"{part}{suffix}").exists()]
        if len(found) > 1:
            raise UserError(f"{path}: both {found[0].name} and {found[1].name}: leave one of them there")
        if found or part == "train":
            files[part] = found[0] if found else path / "train.tsv"
    return files


def own_task(path, columns=None, say=print):
    """The Task of one's own file or directory: its columns by name, its labels as they stand there."""
    file = own_files(path)["train"]
    names, rows = table(file)
    if len(names) == 1:
        raise UserError(f"{file}, line 1: {one_column(file, names[0])}")
    names = header(file, names)
    *text, label = picked(file, names, columns)
    labels = () if label == "score" else own_labels(file, rows, names.index(label), len(names))
    say(f"text from {quoted(text)}, {'scores' if labels == () else 'labels'} from {label!r} ({file.name})"
        + (f": {', '.join(labels)}" if labels else ""))
    return Task(str(path), tuple(text), label, (), labels,
                ("accuracy",) if labels != () else ("pearson", "spearman"), dict.fromkeys(own_files(path)))


def header(path, names):
    """The names of the columns, in lower case."""
    names = [name.strip().lower() for name in names]
    if numbers := [name for name in names if re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", name)]:
        raise UserError(f"{path}, line 1 looks like an example (it holds {numbers[-1]}): a header, such as "
                        f"sentence<tab>label, belongs above the examples")
    if len(set(names)) < len(names):
        raise UserError(f"{path}, line 1: two columns have one name: {quoted(names)}")
    return names


def picked(path, names, columns):
    """[text, label] or [text, text, label]: as --columns says, else guessed from the names."""
    if columns:
        wanted = named(path, names, columns)
        if not 2 <= len(wanted) <= 3:
            raise UserError(f"--columns {columns}: one or two columns of text and then "
                            f"the label belong there")
        return wanted
    left = [n for n in names if not ROW_NUMBER.fullmatch(n)] or [""]
    label = next((n for n in (left[-1], *LABELS) if n in left and n in LABELS), left[-1])
    text = [n for n in left if n != label]
    if len(text) not in (1, 2) or {"label", "score"} & set(text):
        raise UserError(f"{path}, line 1: the columns are {quoted(names)}: which are one or two columns of "
                        f"text and which is the label? Say it with --columns text,label")
    return [*text, label]


def named(path, names, columns):
    """The names in --columns, of which each must be there."""
    wanted = [c.strip().lower() for c in columns.split(",")]
    if missing := [c for c in wanted if c not in names]:
        raise UserError(f"--columns {columns}: {path} has no column {missing[0]!r}, but {quoted(names)}")
    if len(set(wanted)) < len(wanted):
        raise UserError(f"--columns {columns}: one is given twice")
    return wanted


def own_labels(path, rows, at, width):
    """None: whole numbers from 0; else the labels in their numbers' order: words, or whole numbers from 1."""
    seen = Counter(fields[at].strip() for _, fields in rows if fields and len(fields) == width and fields[at])
    seen.pop("", None)
    numbers = {v for v in seen if re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", v.lower())}
    if 2 * sum(seen[v] for v in numbers) >= seen.total():
        whole = sorted(int(v) for v in seen if re.fullmatch(r"\d{1,9}", v))     # 1 to 5 stars, say
        many = len(seen) == len(whole) > 1 and whole[0] > 0
        return tuple(map(str, whole)) if many and whole == [whole[0] + i for i in range(len(whole))] else None
    if len(seen) < 2 or len(seen) > max(20, seen.total() / 2):
        raise UserError(f"{path}: {seen.total():,} rows have {len(seen):,} different labels, such as "
                        f"{next(iter(seen))[:40]!r}: is that the column of labels? Say it "
                        f"with --columns text,label")
    return tuple(sorted(seen))


def quoted(names):
    return ", ".join(repr(name[:40]) for name in names)


def one_column(path, line):
    marks = {"\t": "tabs", ",": "commas", ";": "semicolons"}
    if (own := {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())) is None:
        return f"one column, {line[:40]!r}: text and a label belong there"
    other = next((f", not {name}" for mark, name in marks.items() if mark in line and mark != own), "")
    return f"one column: {marks[own]} separate the columns of a {path.suffix[1:].upper()}{other}"


# ---------------------------------------------------------------------------------------------------- reading

def lines_of(path):
    """The lines of a text file, one after the other; blank ones at its end are none."""
    at, blank = 0, 0
    try:
        # not splitlines(), which also breaks at U+2028
        with open(path, "rb") as f:
            for line in f:
                text = line.decode("utf-8" if at else "utf-8-sig").rstrip("\r\n")
                at += len(line)
                if text:
                    yield from [""] * blank
                    yield text
                blank = 0 if text else blank + 1
    except OSError as e:
        hint = ": a task's directory holds train.tsv and dev.tsv (MNLI: dev_matched.tsv, dev_mismatched.tsv)"
        raise UserError(f"{path}: {e.strerror.lower()}{hint * isinstance(e, FileNotFoundError)}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 (byte {at + e.start:,})") from None


def table(path):
    """(names, rows) of a file: the first line's fields, and (place, fields) of each row, one after the other.

    A field is text, or None where there is nothing; fields is None where the row cannot be read at all."""
    rows = {".parquet": parquet_rows, ".csv": csv_rows, ".jsonl": json_rows, ".ndjson": json_rows,
            ".json": json_rows}.get(path.suffix.lower(), tsv_rows)(path)
    _, names = next(rows, (None, [""]))
    return names or [""], rows


def tsv_rows(path):
    """No quotes: the official files have some that are text."""
    return ((f"line {at}", line.split("\t")) for at, line in enumerate(lines_of(path), 1))


def csv_rows(path):
    lines = lines_of(path)
    first = next(lines, "")
    reader = csv.reader((f"{line}\n" for line in itertools.chain([first], lines)), strict=True,
                        delimiter=";" if ";" in first and "," not in first else ",")
    try:
        for fields in reader:
            yield f"line {reader.line_num}", fields
    except csv.Error as e:
        raise UserError(f"{path}, line {reader.line_num}: no CSV ({e}): a field with quotes in it stands in "
                        f"quotes, each of its own twice") from None


def json_rows(path):
    names = None
    for at, line in enumerate(lines_of(path), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        good = isinstance(row, dict)
        if names is None:
            if not good:
                raise UserError(f"{path}, line 1: no JSON object: one per line belongs there, such as "
                                f'{{"text": "...", "label": "..."}}')
            names = list(row)
            yield "", names
        yield f"line {at}", [as_text(row.get(name)) for name in names] if good else None


def parquet_rows(path):
    try:
        import pyarrow.parquet
        file = pyarrow.parquet.ParquetFile(path)
        yield "", file.schema_arrow.names
        rows = (row for batch in file.iter_batches(1000)
                for row in zip(*(column.to_pylist() for column in batch.columns), strict=True))
        for at, row in enumerate(rows, 1):
            yield f"row {at}", [as_text(v) for v in row]
    except ImportError:
        raise UserError(f"{path} needs pyarrow: pip install pyarrow") from None
    except pyarrow.ArrowException as e:
        raise UserError(f"{path} cannot be read as parquet "
                        f"({type(e).__name__}): it is cut or damaged") from None


def as_text(value):
    """A JSON or parquet value as a TSV would have it: 1.0 is 1, true is true."""
    if isinstance(value, float):
        value = None if value != value else int(value) if value.is_integer() else value
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str)


def number(task, field):
    """The label as a number; ValueError where it is none of the task's."""
    if task.labels:
        return task.labels.index(field)
    if task.labels is None and not field.isdecimal() or not abs(float(field)) < 1e38:     # what float32 holds
        raise ValueError
    return float(field) if task.labels == () else int(field)


def read_rows(path, task, say=print):
    """(sentences, labels, rows left out): tuples of one or two sentences, and numbers.

    A row of another width than the first line's (an extra tab, a field missing) or with an unknown label is
    left out and listed; more than 0.1% of them are refused."""
    names, rows = table(path)
    width, sentences, labels, bad = len(names), [], [], []
    text, label = task.text, task.label
    if not task.columns:                               # one's own: by name, whatever their order in this file
        names, wanted = header(path, names), (*text, label)
        if not set(wanted) <= set(names):
            raise UserError(f"{path}, line 1: the columns are {quoted(names)}, but those of the training "
                            f"examples are {quoted(wanted)}: give both files the same")
        if rest := [n for n in names if n not in wanted]:
            say(f"{path}: left out: the column{'s' * (len(rest) > 1)} {quoted(rest)}")
        text, label = [names.index(n) for n in text], names.index(label)
    elif width <= max(*text, label) + (label < 0):
        raise UserError(f"{path}, line 1: " + (one_column(path, names[0]) if width == 1 else
                        f"{width} columns: GLUE's {task.folder} has more"))
    for place, fields in rows if task.header else itertools.chain([("line 1", names)], rows):
        if fault := fault_of(fields, width, [*text, label]):
            bad.append(f"{place} {fault}")
            continue
        try:
            labels.append(number(task, fields[label] if task.columns else fields[label].strip()))
            sentences.append(tuple(fields[i] for i in text))
        except ValueError:
            bad.append(f"{place} has the unknown label {fields[label][:40]!r}")
    listed = "; ".join(bad[:10]) + f"; and {len(bad) - 10} more" * (len(bad) > 10)
    total = len(labels) + len(bad)
    if len(bad) > 0.001 * total:
        kind = (f"one of {', '.join(task.labels)}" if task.labels else "a number" if task.labels == () else
                "a whole number, 0 for the first class, or a word; any number where the header "
                "calls the column `score`")
        raise UserError(f"{path}: {len(bad)} of {total:,} rows cannot be read: {listed}"
                        + f" (a label here is {kind})" * ("label" in listed))
    if bad:
        say(f"{path}: left out: {listed}")
    for name, column in () if task.columns else zip(task.text, zip(*sentences, strict=True), strict=False):
        if not any(c.isalpha() for sentence in column for c in sentence):
            raise UserError(f"{path}: the column {name!r} holds no letter: is it text?  A column that "
                            f"is called id is left out")
    return sentences, labels, len(bad)


def rows_of_text(path, columns, known):
    """What the text's columns are, in words; then (place, sentences, what is wrong or None) of each row.

    The columns: those in --columns without the label, else the `known` ones, else all not like a label."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--predict {path}: one of {', '.join(FORMATS)} can be read, by the end of its name")
    if not path.is_file():
        raise UserError(f"--predict {path}: no such file")
    names, rows = table(path)
    names = header(path, names)
    if columns:
        text = [c for c in named(path, names, columns) if c not in LABELS][:len(known) or None]
    elif known and set(known) <= set(names):
        text = list(known)
    else:
        text = [n for n in names if not ROW_NUMBER.fullmatch(n) and n not in LABELS]
    if len(text) != (len(known) or len(text[:2])) or not text:
        raise UserError(f"--predict {path}: the columns are {quoted(names)}: which are the "
                        f"{len(known) or 'one or two'} of text? Say it with --columns")
    yield quoted(text)
    at = [names.index(n) for n in text]
    for place, fields in rows:
        fault = fault_of(fields, len(names), at)
        yield place, None if fault else tuple(fields[i] for i in at), fault


def fault_of(fields, width, wanted):
    """What keeps a row from being read, in words; None if nothing does."""
    if fields is None:
        return "is no JSON object"
    if len(fields) != width:
        return f"has {len(fields)} fields, not {width}"
    if any(fields[i] is None for i in wanted):
        return "has nothing in one of its columns"
    return None


def read_hub(name, task, file):
    """As read_rows, from nyu-mll/glue: huggingface_hub's cache or the network."""
    split = file.replace("dev", "validation")
    where = f"nyu-mll/glue, {name}/{split}"
    try:
        import huggingface_hub  # comes with tokenizers
        import pyarrow.parquet
        parquet = huggingface_hub.hf_hub_download(
            "nyu-mll/glue", f"{name}/{split}-00000-of-00001.parquet", repo_type="dataset")
        table = pyarrow.parquet.read_table(parquet, columns=[*task.columns, "label"]).to_pydict()
    except ImportError:
        raise UserError(f"{where} needs pyarrow: pip install pyarrow, or give --glue-dir "
                        f"with {task.folder}/ in it") from None
    except Exception as e:      # no network, no such file, not a parquet: whatever the two libraries raise
        raise UserError(f"{where} is not to be had ({type(e).__name__}): give --glue-dir with {task.folder}/ "
                        f"in it, or leave {name} out of --tasks") from None
    if task.labels and not set(table["label"]) <= set(range(len(task.labels))):     # -1 in the test splits
        raise UserError(f"{where}: labels beyond 0 to {len(task.labels) - 1}: these are "
                        f"not the labelled examples")
    return list(zip(*(table[c] for c in task.columns), strict=True)), table["label"], 0


def read_task(name, task, glue_dir, say=print):
    """{file: (sentences, labels)}, train first; labels are whole numbers, or scores in float32."""
    if glue_dir and not os.path.isdir(glue_dir):
        raise UserError(f"--glue-dir {glue_dir}: no such directory")
    folder, parts = Path(glue_dir or "", task.folder), {}
    from_hub = task.columns and not (glue_dir and folder.exists())
    own = {} if task.columns else own_files(Path(task.folder))
    for file, official in task.rows.items():
        where = own.get(file) or (f"nyu-mll/glue, {name}/{file}" if from_hub else folder / f"{file}.tsv")
        sentences, labels, bad = read_hub(name, task, file) if from_hub else read_rows(where, task, say)
        n, slack = len(labels), 1e-5 * (official or 0)     # QQP's count differs by 3 rows between its readers
        if not n:
            raise UserError(f"{where}: no examples in it")
        if official and not n - slack <= official <= n + bad + slack:
            raise UserError(f"{where}: {n:,} examples, but GLUE's {task.folder} has {official:,}: the file "
                            f"is cut, of another version, or without its header line")
        parts[file] = sentences, labels
    if own and "dev" not in parts:
        parts = split(own["train"], *parts["train"])
    if task.labels is None:
        classes = set(parts["train"][1])
        if len(classes) < 2 or max(classes) >= len(classes) or not set(parts["dev"][1]) <= classes:
            raise UserError(f"{folder}: the labels of the training examples are not 0, 1, ... without a gap, "
                            f"or dev has others (a column of scores is called `score` in the header)")
    return {file: (x, np.array(y, np.float32 if task.labels == () else np.int64))
            for file, (x, y) in parts.items()}


def split(path, sentences, labels):
    """A tenth of the examples as dev, by the hash of their text: always the same, no text on both sides."""
    digests = [hashlib.sha256("\t".join(s).encode("utf-8", "surrogatepass")).digest() for s in sentences]
    dev = [int.from_bytes(digest[:8], "big") % 10 == 0 for digest in digests]
    parts = {part: [i for i, held in enumerate(dev) if held == (part == "dev")] for part in ("train", "dev")}
    if not all(parts.values()):
        raise UserError(f"{path}: {len(labels)} examples are too few to set a tenth of them apart as dev: "
                        f"give a directory with train.tsv and dev.tsv")
    return {part: ([sentences[i] for i in of], [labels[i] for i in of]) for part, of in parts.items()}


# ---------------------------------------------------------------------------------------------------- metrics

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


METRICS = dict(accuracy=accuracy, f1=f1, matthews=matthews, pearson=pearson, spearman=spearman)


def evaluate(task, p, labels):
    """({metric: percent}, collapsed) of predictions; collapsed: one class, or within 1% of the range."""
    return ({m: 100 * float(METRICS[m](p, labels)) for m in task.metrics},
            bool(np.ptp(p) <= 0.01 * np.ptp(labels)))
