"""The demonstration's text, task and sizes: what `python compare.py` runs on where nobody gives it data."""
import atexit
import bisect
import dataclasses
import os
import tempfile
from pathlib import Path

from tqdm import tqdm

import prepare
import watch
from plumbing import sources
from plumbing.cli import UserError
from plumbing.files import claim, claim_each, write_whole
from plumbing.settle import BOX as TEACHER
from plumbing.settle import VAL_FRACTION

PACKAGES = ("torch", "sympy", "python", "networkx", "numpy")    # the labels of the task
LABELLED, CHARACTERS = 2000, 160                        # training examples to draw from, and how long each is
# Chosen on two CPU cores: FLOPs, so that a busy machine changes how long it takes and not what comes out
SETTING = dict(teacher=str(TEACHER), size="2L128", budget_flops="5e12", seq_len=64, batch_size=32,
               micro_batch=32, dropout=0.0, val_times=1, val_blocks=256, labels=200,
               finetune_batch_sizes="32", finetune_lrs="7e-4", finetune_epochs=10, finetune_seeds=3, max_len=48,
               teacher_flops=1.4835e14)
# Each at the recipe and rate with which its own validation loss ended lowest on a seed that is not shown (RECORDS.md)
ARMS = "no_kd@short:8e-3,tinybert@short:1.6e-2,no_kd+init@paper:2e-3"
MASKED = "returns a new [MASK] with the same shape as the input."


def package_task(task, documents):
    """The built-in task: which package does a docstring come from?  Of validation documents, by hash order.

    Rows are told apart as an uncased vocabulary sees them, after the cut; what occurs in two packages has no
    label, and what begins a training document (a short text does, although longer ones are on the side of their
    beginning) has been pretrained on: neither is a row."""
    packages, held_out, trained = {}, {}, []
    for package, text in documents:
        row = " ".join(text.split())[:CHARACTERS]
        seen = prepare.docstring_head(row)
        packages.setdefault(seen, set()).add(package)
        head = prepare.docstring_head(text)
        key = prepare.document_key(head.encode("utf-8", "replace"))
        if not prepare.is_validation(key, VAL_FRACTION):
            trained.append(head)
        elif package in PACKAGES:
            held_out.setdefault(seen, (key[::-1], f"{row}\t{PACKAGES.index(package)}\n"))
    trained.sort()

    def begins_a_trained_one(seen):
        at = bisect.bisect_left(trained, seen)
        return at < len(trained) and trained[at].startswith(seen)
    rows = [row for _, row in sorted(value for seen, value in held_out.items()
                                     if len(packages[seen]) == 1 and not begins_a_trained_one(seen))]
    task.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:LABELLED]), ("dev", rows[LABELLED:])):
        write_whole(task / f"{name}.tsv", ("sentence\tlabel\n" + "".join(part)).encode())


def written(out, dry_run=False):
    """(token directory, --tasks) of the demonstration, under OUT; what is there stays.  A dry run makes nothing
    there, but what goes with the process."""
    if dry_run and not Path(out, "data/manifest.json").exists():
        scratch = tempfile.TemporaryDirectory()
        atexit.register(scratch.cleanup)
        out = f"{scratch.name}/compare"
    task, data = Path(out) / "package", Path(out) / "data"

    def make(_):
        if (task / "dev.tsv").exists() and (data / "manifest.json").exists():
            return
        print("reading the documentation on this disk")
        documents = list(tqdm(sources.docstrings(), unit=" docstrings", mininterval=2))
        package_task(task, documents)
        prepare.prepare(prepare.Config(["docstrings"], str(data), str(TEACHER), val_fraction=VAL_FRACTION),
                        [text for _, text in documents])
    claim(out, "compare")
    claim_each([out], make)
    return str(data), f"package={task}"


def demonstrated(config):
    """The configuration of the demonstration, its text and task on disk.  Its sizes are its own."""
    free = ("out", "arms", "seeds", "dry_run", "jobs", "device", "compile", "bf16")
    given = [f.name for f in dataclasses.fields(config)
             if f.name not in free and getattr(config, f.name) != f.default]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} without --data: the demonstration, which runs without "
                        f"--data, has its own sizes; give --data, --teacher and a budget")
    config = dataclasses.replace(config, arms=config.arms or ARMS)
    data, tasks = written(config.out, config.dry_run)
    jobs = config.jobs or os.cpu_count() or 1
    return dataclasses.replace(config, **SETTING, jobs=jobs, data=data, tasks=tasks)


def look(results):
    """A masked sentence as each student of the first seed fills it in."""
    print(f"To look at (seed 0): \"{MASKED}\"")
    for each in results:
        if each["seed"] == 0 and each["budget"] == results[0]["budget"]:
            said = ["[MASK] 1: (no LM head)"]
            if "mlm" in each["val"]:                                    # it has trained an LM head
                watch.ask(watch.Config(model=each["model"], sentence=MASKED), said.append)
            print(f"{each['strategy']:12} {said[-1].removeprefix('[MASK] 1: ')}")
    print("\nYour own text:\n    python prepare.py my_text/ --vocab TEACHER --out data/mine\n"
          "    python compare.py --data data/mine --teacher TEACHER --total-hours 4 \\\n"
          "                      --tasks reviews=reviews.csv --dry-run")
