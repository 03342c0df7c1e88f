"""Fine-tune a model directory on GLUE, or on labelled text of your own, and score it.  Read it sixth.

    python finetune_glue.py --model runs/tinybert/model --glue-dir glue                 # the paper's grid, 3 seeds
    python finetune_glue.py --model runs/tinybert/model --glue-dir glue --tasks rte,cola --quick    # one grid point
    python finetune_glue.py --model runs/tinybert/model --tasks reviews=data/reviews/   # train.tsv and dev.tsv

`--glue-dir` holds the official TSVs (CoLA/train.tsv, ...); a task absent there comes from the Hub (nyu-mll/glue).
Your own TSV has a header line: one or two columns of text, then the label, a whole number from 0, or a score where
the header calls that column `score`.  A column that numbers the rows (id, index, ...) is left out.

The recipe is the paper's (arXiv 2404.19319): AdamW, batch {16, 32} x lr {1e-5, 3e-5, 5e-5, 8e-5}, 5 epochs,
linear decay, 128 ids, dropout 0.1.  Ours: 6% warm-up, of which the paper says nothing; the grid runs on seed 0 and
the point that it picks on other seeds, because the best of a grid on dev is too good to be true; the score is that
of the last step.  A seed sets the new head, the order of the examples and dropout.

Every trial (task, batch, lr, seed) is a file, OUT/trials/*.json, with the dev logits beside it (.npy).  What is
finished never runs again, so the same command goes on after a kill, and processes that share OUT share the work.
"""
import fcntl
import hashlib
import itertools
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm

import checkpoint
from arm import choose_device, multiplies_in_bf16
from cli import Checked, Count, Counts, Positives, Seed, Share, UserError, run
from data import hashed
from train import learning_rate


@dataclass
class Config(Checked):
    model: str                              # model directory or Hub id
    glue_dir: str | None = None             # folder of the official TSVs; a task absent there comes from the Hub
    tasks: str = "cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte"    # GLUE's names (wnli too); name=DIR: your own TSVs
    batch_sizes: Counts = "16,32"           # the grid: examples per step ...
    peak_lrs: Positives = "1e-5,3e-5,5e-5,8e-5"     # ... times learning rates, each reached after 6% of the steps
    quick: bool = False                     # one grid point, batch 32 and lr 5e-5, in the grid's place
    seeds: Count = 3                        # runs of the chosen point: mean and standard deviation over them
    first_seed: Seed | None = None          # of those runs; default: 1 after a grid, which runs on seed 0, else 0
    epochs: Count = 5                       # passes over the training examples
    max_len: Annotated[int, "[8, inf)"] = 128       # ids an example is cut to, [CLS] and [SEP] included
    dropout: Share = 0.1                    # in the encoder and before the classifier
    shard: str | None = None                # i/n: only every n-th trial from the i-th; 1/2 and 2/2 share the work
    out: str | None = None                  # directory of trials and glue.json; default: runs/glue/MODEL
    save: bool = False                      # keep each trial's classifier too, a model directory beside its scores
    device: str | None = None               # cpu, cuda or cuda:N; default: cuda where there is one, else cpu


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
QUICK = (32, 5e-5)
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


# ---------------------------------------------------------------------------------------------------- fine-tuning

def encode(tokenizer, sentences, max_len):
    """One (2, S) array per example: ids, [CLS] a [SEP] or [CLS] a [SEP] b [SEP], over token types, 0 or 1.

    What is longer than max_len loses the end of its longer sentence, or of both."""
    tokenizer = checkpoint.framed(tokenizer)
    tokenizer.enable_truncation(max_len)
    examples = []
    for at in range(0, len(sentences), 10_000):     # an Encoding takes a few kB, and MNLI has 400,000 of them
        batch = [s if len(s) == 2 else s[0] for s in sentences[at:at + 10_000]]
        examples += [np.array([e.ids, e.type_ids], np.int32) for e in tokenizer.encode_batch(batch)]
    return examples


def cut(tokenizer, sentences, examples, max_len):
    """How many of the examples are cut: those of max_len ids that would be longer if they could."""
    full = [s for s, e in zip(sentences, examples, strict=True) if e.shape[1] == max_len]
    return sum(e.shape[1] > max_len for e in encode(tokenizer, full, max_len + 1))


def pad(examples, pad_id):
    """(ids, real, token_types), each (B, S) with S the longest of these examples; token_types None if all are 0."""
    lengths = np.array([e.shape[1] for e in examples])
    ids, types = np.full((len(examples), lengths.max()), pad_id), np.zeros((len(examples), lengths.max()), np.int64)
    for row, type_row, example in zip(ids, types, examples, strict=True):
        row[:example.shape[1]], type_row[:example.shape[1]] = example
    real = np.arange(ids.shape[1]) < lengths[:, None]
    return torch.from_numpy(ids), torch.from_numpy(real), torch.from_numpy(types) if types.any() else None


def forward(model, examples, pad_id):
    device = next(model.parameters()).device
    return model(*(x if x is None else x.to(device) for x in pad(examples, pad_id)))


def batches(lengths, batch_size, epochs, seed):
    """Index arrays: every example once an epoch, examples of like length together, as `seed` draws them."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        # shuffled, then sorted by length within windows of 50 batches: little padding, and still another order
        order = rng.permutation(len(lengths))
        windows = [w[np.argsort(lengths[w], kind="stable")] for w in np.split(
            order, range(50 * batch_size, len(order), 50 * batch_size))]
        epoch = np.split(np.concatenate(windows), range(batch_size, len(order), batch_size))
        yield from (epoch[at] for at in rng.permutation(len(epoch)))


def finetune(model, examples, labels, batch_size, epochs, peak_lr, seed, pad_id, name=""):
    """Trains in place: cross-entropy for classes, mean squared error for scores.  Returns the loss of each step."""
    device = next(model.parameters()).device
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim < 2]           # biases and LayerNorm
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
                                  lr=peak_lr, fused=True)
    total, losses = epochs * -(-len(examples) // batch_size), []
    order = batches(np.array([e.shape[1] for e in examples]), batch_size, epochs, seed)
    model.train()
    for step, picked in enumerate(tqdm(order, desc=name, total=total, leave=False, disable=None)):
        torch.manual_seed(int(hashed(seed, step) >> np.uint64(1)))                          # dropout
        with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_in_bf16(device)):
            logits = forward(model, [examples[i] for i in picked], pad_id).float()          # (B, num_labels)
        y = torch.from_numpy(labels[picked]).to(device)
        loss = F.mse_loss(logits[:, 0], y) if y.is_floating_point() else F.cross_entropy(logits, y)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / total, peak_lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())                    # read at the end: .item() here would wait for the device
    return torch.stack(losses).tolist()


@torch.no_grad()
def predict(model, examples, pad_id, batch_size=64):
    """(n, num_labels) logits, in the examples' order; in fp32, where they do not depend on the batch size."""
    model.eval()
    order = np.argsort([e.shape[1] for e in examples], kind="stable")
    logits = [None] * len(examples)
    for at in range(0, len(order), batch_size):
        picked = order[at:at + batch_size]
        rows = forward(model, [examples[i] for i in picked], pad_id).float().cpu().numpy()
        for i, row in zip(picked, rows, strict=True):
            logits[i] = row
    return np.nan_to_num(np.stack(logits))     # a run that diverged predicts one class, and is flagged


# --------------------------------------------------------------------------------------------------------- trials

def write(file, dump):
    """dump(open file) under a name of its own first, so that `file` is always whole."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    with open(part, "wb") as f:
        dump(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, file)


def finished(file, settings, save=False):
    """The result of a trial that ran before, and with `save` has its classifier beside it; else None."""
    if not file.exists():
        return None
    try:
        result = json.loads(file.read_text())
        differ = [k for k in settings if settings[k] != result["settings"].get(k)]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged: delete it and run this again") from None
    if differ:
        raise UserError(f"{file} was run with another {', '.join(differ)}: give another --out, or delete it")
    return result if not save or file.with_suffix("").is_dir() else None


def trial(file, settings, run, save=False):
    """The result of one trial: from its file, or of run() now; None while another process is running it."""
    result = finished(file, settings, save)
    if result is None:
        lock = file.with_suffix(".lock")
        with open(lock, "w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)       # the system unlocks it when its process dies
            except BlockingIOError:
                return None
            result = finished(file, settings, save)     # the other process may have ended between the two questions
            if result is None:
                result, logits = run()
                write(file.with_suffix(".npy"), lambda f: np.save(f, logits))
                write(file, lambda f: f.write(json.dumps(dict(result, settings=settings), indent=1).encode()))
        lock.unlink(missing_ok=True)
    return result


class Setup(NamedTuple):
    """What the trials of one task share."""
    config: Config
    path: Path              # the model directory
    digests: list           # of its config.json and weights
    tokenizer: Tokenizer
    device: torch.device
    name: str
    task: Task
    parts: dict             # {file: (examples, labels)}, train first
    say: object


def fit(setup, file, batch, lr, seed):
    """One fine-tuning: (result, dev logits)."""
    config, name, task, device = setup.config, setup.name, setup.task, setup.device
    (x, y), *dev = setup.parts.values()
    began, pad_id = time.monotonic(), setup.tokenizer.token_to_id("[PAD]")
    num_labels = 1 if task.labels == () else len(task.labels or ()) or int(y.max()) + 1
    model = checkpoint.load_classifier(setup.path, num_labels, seed, config.dropout).to(device)
    losses = finetune(model, x, y, batch, config.epochs, lr, seed, pad_id, file.stem)
    logits, scores, collapsed = [], {}, False
    for (x, y), where in zip(dev, ("", " mismatched"), strict=False):       # two dev sets: MNLI
        logits.append(predict(model, x, pad_id))
        values, same = evaluate(task, logits[-1][:, 0] if task.labels == () else logits[-1].argmax(-1), y)
        scores |= {m + where: v for m, v in values.items()}
        collapsed |= same
    text = ", ".join(f"{m} {v:.1f}" for m, v in scores.items()) + (", COLLAPSED" if collapsed else "")
    seconds = time.monotonic() - began
    setup.say(f"{name} batch {batch} lr {lr:g} seed {seed}: {text} ({seconds:.0f} s, {len(losses)} steps)")
    if config.save:
        checkpoint.save_model(file.with_suffix(""), model, setup.tokenizer, max_len=config.max_len, card=(
            f"---\nlibrary_name: transformers\ntags: [bert, nanokd]\n---\n\n`{config.model}` fine-tuned by nanoKD "
            f"on {name} (batch {batch}, lr {lr:g}, seed {seed}): {text} on {len(dev[0][1]):,} dev examples.\n"))
    return dict(scores=scores, collapsed=collapsed, seconds=seconds), np.concatenate(logits)


def run_trials(setup, out, points):
    """{point: result} of (batch, lr, seed) points; None if some are another shard's and not finished."""
    config, results = setup.config, {}
    i, n = map(int, (config.shard or "1/1").split("/"))
    # the examples as the model sees them: another TSV, tokenizer or max_len makes another trial
    examples = hashlib.sha256(b"".join(a.tobytes() for x, y in setup.parts.values() for a in (*x, y)))
    settings = dict(model=setup.digests, examples=examples.hexdigest()[:16],
                    epochs=config.epochs, dropout=config.dropout, bf16=multiplies_in_bf16(setup.device))
    trials = [(point, out / f"{setup.name}-b{point[0]}-lr{point[1]:g}-seed{point[2]}.json", at % n == i - 1)
              for at, point in enumerate(points)]
    again = sum(mine and file.exists() and not finished(file, settings, config.save) for _, file, mine in trials)
    if again:
        setup.say(f"{setup.name}: {again} finished trials kept no classifier: they run again (--save)")
    while True:
        for point, file, mine in trials:
            if not results.get(point) and (mine or file.exists()):
                results[point] = trial(file, settings, partial(fit, setup, file, *point), config.save and mine)
        if all(results.get(p) for p in points[i - 1::n]):
            return results if len(results) == len(points) else None
        time.sleep(1)       # another process runs it: wait, and run it here should that one die


def score_task(setup, out):
    """The grid on seed 0, the best point on fresh seeds.  None while trials of other shards are missing."""
    points, first, trials, metric = grid(setup.config), setup.config.first_seed, 0, setup.task.metrics[0]
    if first is None:
        first = int(len(points) > 1)
    if len(points) > 1:     # else there is nothing to choose, and seed 0 is as fresh as any
        chosen = run_trials(setup, out, [(*p, 0) for p in points])
        if not chosen:
            return None
        points = [max(points, key=lambda p: chosen[*p, 0]["scores"][metric])]
        trials = len(chosen)
    results = run_trials(setup, out, [(*points[0], seed) for seed in range(first, first + setup.config.seeds)])
    if not results:
        return None
    results, (_, (_, y), *_) = list(results.values()), setup.parts.values()
    majority = np.full(len(y), 0 if setup.task.labels == () else np.bincount(y).argmax())
    mean = {m: dict(scores=[r["scores"][m] for r in results]) for m in results[0]["scores"]}
    for values in mean.values():
        values |= dict(mean=float(np.mean(values["scores"])),
                       std=float(np.std(values["scores"], ddof=1)) if len(results) > 1 else 0.0)
    return dict(mean.pop(metric), metric=metric, others=mean, batch_size=points[0][0], peak_lr=points[0][1],
                trials=trials + len(results), n=len(y), majority=evaluate(setup.task, majority, y)[0][metric],
                collapsed=sum(r["collapsed"] for r in results))


def line(name, r):
    """A task's result in one line."""
    values = [f"{m} {v['mean']:.1f} ± {v['std']:.1f}" for m, v in [(r["metric"], r), *r["others"].items()]]
    return (f"{name}: {', '.join(values)} over {len(r['scores'])} seeds (batch {r['batch_size']}, "
            f"lr {r['peak_lr']:g}; {r['trials']} trials), n = {r['n']:,}, majority class {r['majority']:.1f}"
            + (f"; {r['collapsed']} of {len(r['scores'])} COLLAPSED" if r["collapsed"] else ""))


# ------------------------------------------------------------------------------------------------------------ all

def grid(config):
    """[(batch size, peak lr)]"""
    try:
        sizes, lrs = map(int, config.batch_sizes.split(",")), map(float, config.peak_lrs.split(","))
        points = list(itertools.product(sizes, lrs))
    except ValueError:
        raise UserError(f"--batch-sizes {config.batch_sizes} --peak-lrs {config.peak_lrs}: numbers separated by "
                        f"commas belong there") from None
    if min(min(p) for p in points) <= 0:
        raise UserError("--batch-sizes and --peak-lrs must be above 0")
    return [QUICK] if config.quick else points


def score(config, say=print):
    """Fine-tunes and scores on every task; returns what glue.json holds, scores in percent."""
    grid(config)
    shard = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", config.shard or "1/1")
    if not shard or int(shard[1]) > int(shard[2]):
        raise UserError(f"--shard {config.shard}: i/n with i from 1 to n, such as 1/2, belongs here")
    if min(config.seeds, config.epochs) < 1:
        raise UserError("--seeds and --epochs must be at least 1")
    path, tasks = checkpoint.find_model(config.model), parse_tasks(config.tasks)
    model, tokenizer = checkpoint.read_config(path), checkpoint.read_tokenizer(path)
    digests = [checkpoint.sha256(f)[:16] for f in (path / "config.json", *checkpoint.weight_files(path))]
    if not 8 <= config.max_len <= model.max_position_embeddings:
        raise UserError(f"--max-len {config.max_len}: {path} takes 8 to {model.max_position_embeddings}")
    if tokenizer.get_vocab_size() > model.vocab_size:
        raise UserError(f"{path}: config.json has vocab_size {model.vocab_size}, its tokenizer "
                        f"{tokenizer.get_vocab_size()} tokens")
    texts = {name: read_task(name, task, config.glue_dir, say) for name, task in tasks.items()}     # all before any
    device = choose_device(config.device)
    out = Path(config.out or Path("runs/glue", config.model.strip("/.").replace("/", "_")))
    try:
        (out / "trials").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: no directory can be made there ({e.strerror})") from None
    if not all(os.access(folder, os.W_OK) for folder in (out, out / "trials")):
        raise UserError(f"--out {out}: nothing can be written there")

    results = {}
    for name, task in tasks.items():
        parts, truncated = {}, {}
        for file, (x, y) in texts.pop(name).items():
            parts[file] = encode(tokenizer, x, config.max_len), y
            truncated[file] = cut(tokenizer, x, parts[file][0], config.max_len)
        if any(truncated.values()):
            say(f"{name}: longer than --max-len {config.max_len} and cut: " + ", ".join(
                f"{n:,} of {len(parts[file][1]):,} in {file}" for file, n in truncated.items()))
        setup = Setup(config, path, digests, tokenizer, device, name, task, parts, say)
        results[name] = score_task(setup, out / "trials")
        if results[name]:
            results[name]["truncated"] = truncated
        else:
            say(f"{name}: trials of other shards are missing: run this again when they are done")
    done = {name: r for name, r in results.items() if r}
    averaged = [name for name in PAPER if name in done and tasks[name] is TASKS[name]]
    result = dict(model=config.model, tasks=done, averaged=averaged)
    for key, names in (("average", averaged), ("average_without_cola", [n for n in averaged if n != "cola"])):
        result[key] = float(np.mean([done[n]["mean"] for n in names])) if names else None
    write(out / "glue.json", lambda f: f.write((json.dumps(result, indent=1) + "\n").encode()))
    return result


def main(config):
    result = score(config)
    print()
    for name, r in result["tasks"].items():
        print(line(name, r))
    if result["averaged"]:
        of = "the paper's 7 tasks" if len(result["averaged"]) == 7 else "+".join(result["averaged"]) + " alone"
        without = result["average_without_cola"]
        print(f"average over {of}: {result['average']:.1f}"
              + (f"; without cola: {without:.1f}" if without is not None and "cola" in result["averaged"] else ""))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    run(main, Config, __doc__)
