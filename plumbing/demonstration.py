"""The demonstration's text, task and sizes: what `python compare.py` runs on where nobody gives it data."""
import bisect
import dataclasses
from pathlib import Path

from tqdm import tqdm

import prepare
from plumbing import sources
from plumbing.files import share, write_whole

# The demonstration's sizes: measured on two CPU cores, so that every arm learns something in its seconds
DEMO_VOCAB, DEMO_VAL_FRACTION = 4096, 0.1
DEMO_PACKAGES = ("torch", "sympy", "python", "networkx", "numpy")       # the labels of its task
DEMO_LABELLED, DEMO_CHARACTERS = 500, 160                               # training examples, and how long each is
DEMO = dict(teacher="train", teacher_size="4L128", teacher_budget=150 / 3600, size="2L128", budget_hours=f"{45 / 3600}",
            seq_len=64, batch_size=32, micro_batch=32, dropout=0.0, peak_lrs="1e-3", val_times=1, val_blocks=256,
            finetune_batch_sizes="32", finetune_lrs="7e-4", finetune_epochs=10, max_len=48)


def package_task(task, documents):
    """The built-in task: which package does a docstring come from?  Of the validation documents, by hash order.

    Rows are told apart as an uncased vocabulary sees them, after the cut; what occurs in two packages has no label, and
    what begins a training document (a short text does, although longer ones are on the side of their beginning) has
    been pretrained on: neither is a row."""
    packages, held_out, trained = {}, {}, []
    for package, text in documents:
        row = " ".join(text.split())[:DEMO_CHARACTERS]
        seen = prepare.docstring_head(row)
        packages.setdefault(seen, set()).add(package)
        key = prepare.docstring_key(text)
        if not prepare.is_validation(key, DEMO_VAL_FRACTION):
            trained.append(prepare.docstring_head(text))
        elif package in DEMO_PACKAGES:
            held_out.setdefault(seen, (key[::-1], f"{row}\t{DEMO_PACKAGES.index(package)}\n"))
    trained.sort()

    def begins_a_trained_one(seen):
        at = bisect.bisect_left(trained, seen)
        return at < len(trained) and trained[at].startswith(seen)
    rows = [row for _, row in sorted(value for seen, value in held_out.items()
                                     if len(packages[seen]) == 1 and not begins_a_trained_one(seen))]
    task.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:DEMO_LABELLED]), ("dev", rows[DEMO_LABELLED:])):
        write_whole(task / f"{name}.tsv", ("sentence\tlabel\n" + "".join(part)).encode())


def prepare_built_in(config):
    """Writes the built-in task and, for the demonstration, the corpus; what is there stays."""
    task, data = Path(config.out) / "package", Path(config.out) / "data"
    demonstration = config.data is None

    def make(_):
        if not (task / "dev.tsv").exists() or (demonstration and not (data / "manifest.json").exists()):
            print("reading the documentation on this disk")
            documents = list(tqdm(sources.docstrings(), unit=" docstrings", mininterval=2))
            package_task(task, documents)
            if demonstration:
                print(f"training a WordPiece vocabulary of {DEMO_VOCAB:,} tokens")
                prepare.prepare(prepare.Config(["docstrings"], str(data), None, DEMO_VOCAB, DEMO_VAL_FRACTION),
                                [text for _, text in documents])
    Path(config.out).mkdir(parents=True, exist_ok=True)
    share([config.out], make)
    config = dataclasses.replace(config, tasks=f"package={task}")
    return dataclasses.replace(config, data=str(data), **DEMO) if demonstration else config
