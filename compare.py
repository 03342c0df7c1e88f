"""Every strategy under one equal budget, fine-tuned and scored alike, in one table.  Read it seventh.

    python compare.py            # the demonstration: no data, no teacher, no GPU, no download; under ten minutes
    python compare.py --data data/wiki --teacher runs/teacher/model --task-dir glue/SST-2 --budget-hours 4 \\
                      --size 6L768 --out runs/wiki                                  # the same on your own

The demonstration takes the English documentation that is already on this disk (see prepare.py), trains a vocabulary
and a 4-layer teacher on it, gives each strategy the same 2-layer student and the same number of seconds, and
fine-tunes every student on a small task from the same text: which package does a docstring come from?  The task's
docstrings are validation documents, so no model has been pretrained on them.

A finished run is never run again: the same command goes on where it was stopped.
"""
import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import checkpoint
import finetune_glue
import prepare
import sources
import train
from arm import initial_student
from cli import UserError, run
from data import TokenDirectory
from kd_losses import STRATEGIES

# The demonstration's sizes: measured on two CPU cores, so that every arm learns something in its seconds
DEMO_VOCAB, DEMO_VAL_FRACTION = 4096, 0.1
DEMO_PACKAGES = ("torch", "sympy", "python", "networkx", "numpy")       # the labels of its task
DEMO_LABELLED, DEMO_CHARACTERS = 500, 160                               # training examples, and how long each is
DEMO_TEACHER = dict(size="4L128", budget_hours=150 / 3600)
DEMO_RECIPE = dict(seq_len=64, batch_size=32, micro_batch=32, dropout=0.0, peak_lr=1e-3, val_times=1, val_blocks=256)
DEMO = dict(size="2L128", budget_hours=45 / 3600, finetune_lr=7e-4, finetune_epochs=10, max_len=48, **DEMO_RECIPE)


@dataclass
class Config:
    data: str | None = None             # token directory; without it the demonstration runs
    teacher: str | None = None          # model directory or Hub id
    task_dir: str | None = None         # labelled task: train.tsv and dev.tsv in SST-2's form
    budget_hours: float | None = None   # budget of each arm, on train.py's clock
    budget_steps: int | None = None     # or the budget in optimizer steps
    strategies: str = "no_kd,vanilla_kd,tinybert,minilm"    # the arms
    out: str = "runs/compare"           # directory for the runs, table.md, results.json and figure.png
    size: str = "6L768"                 # student: layers L width
    heads: int | None = None            # attention heads; default: width / 64
    seed: int = 0                       # of every arm: initial weights, data order, masks
    seq_len: int = 128                  # positions in a block
    batch_size: int = 1024              # blocks per optimizer step
    micro_batch: int = 256              # blocks per forward pass
    peak_lr: float | None = None        # of every arm; default: the paper's, which differs by strategy
    dropout: float = 0.1                # of every arm
    val_blocks: int = 512               # validation blocks
    val_times: int = 4                  # validations over the budget
    finetune_seeds: int = 3             # fine-tuning runs per arm
    finetune_lr: float = 5e-5           # peak LR of fine-tuning
    finetune_epochs: int = 5            # passes over train.tsv
    max_len: int = 128                  # ids a labelled sentence is cut to


def demonstration(config):
    """Makes the corpus, the labelled task and the teacher; returns the config that compares the arms on them."""
    out = Path(config.out)
    data, task = out / "data", out / "package"
    if not ((data / "manifest.json").exists() and (task / "dev.tsv").exists()):
        print("reading the documentation on this disk")
        documents = list(tqdm(sources.docstrings(), unit=" docstrings", mininterval=2))
        write_task(task, documents)
        print(f"training a WordPiece vocabulary of {DEMO_VOCAB:,} tokens")
        prepare.prepare(prepare.Config(["docstrings"], str(data), None, DEMO_VOCAB, DEMO_VAL_FRACTION),
                        [text for _, text in documents])
    teacher = train.Config(strategy="no_kd", data=str(data), out=str(out / "teacher"), **(DEMO_RECIPE | DEMO_TEACHER))
    print(f"\nteacher: {teacher.size}, {teacher.budget_hours * 3600:.0f} s")
    train.train(teacher)
    return dataclasses.replace(config, data=str(data), task_dir=str(task), teacher=str(out / "teacher/model"), **DEMO)


def write_task(task, documents):
    """Which package does a docstring come from?  The validation documents, split by their hash's order."""
    held_out = {}
    for package, text in documents:
        key = prepare.document_key(text)
        if package in DEMO_PACKAGES and prepare.is_validation(key, DEMO_VAL_FRACTION):
            held_out.setdefault(key, f"{' '.join(text.split())[:DEMO_CHARACTERS]}\t{DEMO_PACKAGES.index(package)}\n")
    rows = [held_out[key] for key in sorted(held_out, key=lambda key: key[::-1])]
    task.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:DEMO_LABELLED]), ("dev", rows[DEMO_LABELLED:])):
        (task / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(part), encoding="utf-8")


def compare(config):
    """Trains and scores every arm; returns the rows of the table."""
    names, out = config.strategies.split(","), Path(config.out)
    for name in names:
        if name not in STRATEGIES:
            raise UserError(f"--strategies {name}: unknown; of {', '.join(STRATEGIES)}")
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(train.Config) if hasattr(config, f.name)}
    runs = [train.Config(**(shared | dict(strategy=name, out=str(out / name)))) for name in names]
    for each in runs:
        each.check()
    finetune_glue.read_task("task", finetune_glue.own_task(Path(config.task_dir)), None)    # before hours of training

    rows = []
    for i, each in enumerate(runs):
        print(f"\narm {i + 1} of {len(runs)}: {each.strategy}")
        rows.append(dict(train.train(each), name=each.strategy, model=f"{each.out}/model"))
    random = out / "random/model"
    if not random.exists():
        directory = TokenDirectory(config.data)
        checkpoint.save_model(random, initial_student(runs[0], directory), directory.read_tokenizer(), head=True)
    rows += [dict(name="random init", model=str(random)), dict(name="teacher", model=config.teacher)]
    rows[-1]["val"] = dict(mlm=next((row["teacher_mlm"] for row in rows if row.get("teacher_mlm")), None))
    print(f"\nfine-tuning {len(rows)} models on {Path(config.task_dir).name}, {config.finetune_seeds} seeds each")
    for row in rows:
        row["task"] = finetune_once(config, row["model"], out / "glue" / row["name"].replace(" ", "_"))
    base = next((row["task"]["mean"] for row in rows if row["name"] == "no_kd"), None)
    for row in rows:
        row["delta"] = None if base is None or row["name"] == "no_kd" else row["task"]["mean"] - base
    return rows


def finetune_once(config, model, out):
    """The scores of one model on the task; trials that `out` holds are not run again."""
    result = finetune_glue.score(finetune_glue.Config(
        model=model, tasks=f"task={config.task_dir}", batch_sizes="32", peak_lrs=str(config.finetune_lr),
        seeds=config.finetune_seeds, epochs=config.finetune_epochs, max_len=config.max_len, out=str(out)),
        lambda line: print(f"{model}: {line}"))
    return result["tasks"]["task"]


# ------------------------------------------------------------------------------------------------------- output

def table(rows, task):
    """The comparison as a markdown table: one row per arm, then the yardsticks."""
    base = next((row for row in rows if row["name"] == "no_kd"), rows[0])

    def cell(row, key, form):
        return form(row[key]) if row.get(key) is not None else ""
    lines = [f"| arm | peak LR | tokens | x {base['name']} | tokens/s | charged s | in teacher | val MLM "
             f"| {task}, accuracy | Δ |", "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        mlm = (row.get("val") or {}).get("mlm")
        lines.append("| " + " | ".join([
            row["name"], cell(row, "peak_lr", "{:g}".format), cell(row, "tokens", "{:,}".format),
            cell(row, "tokens", lambda v: f"{v / base['tokens']:.2f}"),
            cell(row, "tokens_per_second", "{:,.0f}".format), cell(row, "charged_seconds", "{:.1f}".format),
            cell(row, "teacher_share", "{:.0%}".format), "" if mlm is None else f"{mlm:.3f}",
            f"{row['task']['mean']:.1f} ± {row['task']['std']:.1f}", cell(row, "delta", "{:+.1f}".format)]) + " |")
    return "\n".join(lines)


def noise(rows):
    """One sentence on how much of the table is noise: both spreads that one pretraining seed can show."""
    n, seeds = rows[0]["task"]["n"], len(rows[0]["task"]["scores"])
    arms = [row for row in rows if "tokens" in row]
    p = np.mean([row["task"]["mean"] for row in arms]) / 100
    dev = 100 * np.sqrt(p * (1 - p) / n)
    seed = np.sqrt(np.mean([row["task"]["std"] ** 2 for row in arms]) / seeds)
    return (f"± is the standard deviation over {seeds} fine-tuning seeds; a score's standard error is {seed:.1f} "
            f"points from those seeds and {dev:.1f} from the {n:,} examples, so a difference of less than about "
            f"{2 * np.sqrt(2 * (seed ** 2 + dev ** 2)):.1f} points between two arms is noise, and with one pretraining "
            f"seed per arm even a larger one is a hint, not a result.")


def figure(rows, path, task):
    """Left: the score of each arm, with the yardsticks as lines.  Right: the tokens that the budget bought."""
    try:
        import matplotlib
    except ImportError:
        print("no figure.png: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    arms = [row for row in rows if "tokens" in row][::-1]
    names, height = [row["name"] for row in arms], range(len(arms))
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 0.5 * len(arms) + 1.6), sharey=True, layout="constrained")
    left.errorbar([row["task"]["mean"] for row in arms], height, xerr=[row["task"]["std"] for row in arms],
                  fmt="ko", capsize=4)
    for row, style in zip([row for row in rows if "tokens" not in row], (":", "--"), strict=True):
        left.axvline(row["task"]["mean"], color="0.4", linestyle=style, label=row["name"])
    left.set(yticks=height, yticklabels=names, ylim=(-0.6, len(arms) - 0.4),
             xlabel=f"{task}: accuracy, %; bars: ± std of fine-tuning")
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=2, frameon=False)
    right.barh(height, [row["tokens"] / 1e6 for row in arms], color="0.7", edgecolor="k")
    right.set(xlabel=f"million tokens in {arms[0]['charged_seconds']:.0f} s")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(config):
    began, out = time.monotonic(), Path(config.out)
    if config.data is None:
        given = [f.name for f in dataclasses.fields(Config)
                 if f.name not in ("out", "strategies") and getattr(config, f.name) != f.default]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} without --data: the demonstration, which runs without "
                            f"--data, has its own sizes; give --data, --teacher, --task-dir and a budget")
        config = demonstration(config)
    elif config.teacher is None or config.task_dir is None:
        raise UserError("--data needs --teacher and --task-dir with it")
    rows, task = compare(config), Path(config.task_dir).name
    text = table(rows, task) + "\n\n" + noise(rows)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    (out / "results.json").write_text(json.dumps(dict(config=dataclasses.asdict(config), rows=rows), indent=1) + "\n")
    figure(rows, out / "figure.png", task)
    print(f"\n{text}\n\nalso in {out}/table.md and results.json; {time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    run(main, Config, __doc__)
