"""How runs go and how they went: in the terminal, as a figure to pass on; and what a model says.

    python watch.py runs/tinybert --follow              # one run, redrawn every few seconds until Ctrl-C
    python watch.py runs/*                              # several, finished or under way, as one table
    python watch.py runs/table2 --out table2.png        # and the curves of all runs of a comparison in one figure
    python watch.py --model runs/teacher/model --sentence "the [MASK] sat"          # its five likeliest words

It reads config.json and log.jsonl and writes nothing but --out, so no run notices.
"""
import contextlib
import importlib.util
import io
import math
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from comparison.report import aligned, curve_look
from plumbing.checkpoint import find_model, framed, read_tokenizer
from plumbing.cli import Checked, UserError, run, shown
from plumbing.diagnose import masked_lm
from plumbing.files import OURS, claim_file, json_object, log_records, parsing, write_whole
from plumbing.screen import changes, quantity, spent

UNITS = "hours", "flops", "tokens", "steps"
CURVES = {"loss": "loss", "lr": "learning rate", "tokens_per_second": "tokens/s", "gradient_norm": "gradient norm",
          "d_order": "D_order"}                         # and each term of the loss
NOT_A_TERM = *"step progress seconds epoch val flops tokens memory mfu".split(), *CURVES
FIGURES = ".png", ".svg", ".pdf"
WARNING = "Losses of different strategies are different quantities: between runs, only the same term can be compared."


@dataclass
class Config(Checked):
    runs: list[str] = field(default_factory=list)   # run directories, or comparisons' directories
    follow: bool = False        # redraw every few seconds, the file of --out too; Ctrl-C ends it
    out: str | None = None      # FILE.png, .svg or .pdf: a figure with every curve, to pass on
    model: str | None = None    # instead of runs: a model directory or Hub id, to be asked
    sentence: str | None = None     # what it is asked: each [MASK] in it is filled


class LoggedRun:
    """One run directory as it is now; `validations`: [(record, each term's loss and its change in words)]."""

    def __init__(self, path):
        self.path, self.name, config = path, path.name, json_object(path / "config.json")
        if "model_type" in config:
            raise UserError(f"{path} is a model directory: give its run's directory, or  --model {path} --sentence ...")
        budgets = [unit for unit in UNITS if config.get(f"budget_{unit}")]
        if len(budgets) != 1 or not {"batch_size", "seq_len"} <= config.keys():
            raise UserError(f"{path}/config.json is not that of a run of train.py")
        self.unit, self.total = budgets[0], float(config[f"budget_{budgets[0]}"])
        self.tokens = int(config["batch_size"]) * int(str(config["seq_len"]).split(",")[-1])
        if not math.isfinite(self.total):
            raise ValueError("a budget that is not finite")
        log, steps = path / "log.jsonl", {}
        for _, record in log_records(log.read_bytes().split(b"\n") if log.exists() else ()):
            steps.setdefault(record["step"], {}).update(record)
        self.finished, self.records = (path / "summary.json").exists(), [steps[step] for step in sorted(steps)]
        self.latest = {k: v for record in self.records for k, v in record.items()}
        self.terms = {k: v for k, v in self.latest.items() if k not in NOT_A_TERM and isinstance(v, int | float)}

        seen = [r for r in self.records if r.get("val")]
        self.validations = [(r, changes(r["val"], before.get("val", {})))
                            for r, before in zip(seen, [{}, *seen], strict=False)]
        self.curves = {}                                # {name: [(charged hours, y)]}
        for r in self.records:
            values = {CURVES.get(k, k): v for k, v in r.items() if k in CURVES or k not in NOT_A_TERM}
            values |= {f"validation {term}": v for term, v in (r.get("val") or {}).items()}
            for name, y in values.items():
                if isinstance(y, int | float) and math.isfinite(y):
                    self.curves.setdefault(name, []).append((r["seconds"] / 3600, y))

    def used(self, record):
        """What of the budget was spent at a record, in the budget's unit."""
        return dict(hours=record["seconds"] / 3600, flops=record.get("progress", 0) * self.total,
                    tokens=record["step"] * self.tokens, steps=record["step"])[self.unit]


def find(paths):
    """[LoggedRun] of run directories and of comparisons' directories; their names differ."""
    found, runs = [], []
    for path in map(Path, paths):
        if (path / "config.json").is_file():
            found.append(path)
        elif (path / "runs").is_dir():
            # its teacher while it is pretrained: afterwards the curve of a longer run would only squeeze the others
            teacher = [] if (path / "teacher/summary.json").exists() else path.glob("teacher/config.json")
            found += [file.parent for file in (*teacher, *sorted(path.glob("runs/*/config.json")))]
        else:
            raise UserError(f"{shown(path)} is neither a run's directory (no config.json) nor a comparison's "
                            f"(no runs): give directories that train.py or compare.py wrote")
    for path in found:
        with parsing(path):
            runs.append(LoggedRun(path))
    names = [each.path.name for each in runs]
    for each in runs:
        each.name = shown(each.name if names.count(each.name) == 1 and each.name else each.path)
    return runs


def facts(run):
    """{heading: text}: what a person wants to know of one run."""
    if not run.records:
        return {"run": run.name, "state": "starting: no line in its log yet"}
    now, last = run.latest, run.records[-1]
    rate = last["step"] * run.tokens / max(last["seconds"], 1e-9) if run.finished else now.get("tokens_per_second")
    used, age = run.used(last), time.time() - (run.path / "log.jsonl").stat().st_mtime
    left = last["seconds"] * max(0, run.total / used - 1) if used and not run.finished else None
    return {"run": run.name, "spent": spent(used, run.total, run.unit),
            "left": quantity(left / 3600, "hours") if left is not None else "",
            "loss": f"{now['loss']:.5g}" if "loss" in now else "",
            "validation": f"{run.validations[-1][1]} [{len(run.validations)}]" if run.validations else "",
            "tokens/s": f"{rate:,.0f}" if rate else "",
            "state": "finished" if run.finished else f"last line {quantity(age / 3600, 'hours')} ago",
            "terms": ", ".join(f"{term} {value:.5g}" for term, value in run.terms.items())}


def run_table(runs):
    """The facts of all runs as rows, the heading first."""
    rows = [facts(run) for run in runs]
    head = [name for name in max(rows, key=len, default=()) if any(row.get(name) for row in rows)]
    return [head, *([row.get(name, "") for name in head] for row in rows)]


def in_terminal(runs, width):
    """One run: a line per fact and per validation.  Several: a table, cut to `width`."""
    head, *rows = run_table(runs)
    if len(runs) != 1:
        return aligned(head, rows, width) if runs else "no run has begun"
    run, = runs
    return "\n".join([*(f"{name:14} {value}" for name, value in zip(head, *rows, strict=True)),
                      *(f"  at {quantity(run.used(r), run.unit):>14}  {val}" for r, val in run.validations)])


def figure(runs):
    """A panel per curve, against charged hours; in each a line per run, named once below all of them.  Runs that
    differ only by seed look alike, of the first 140 others no two."""
    from matplotlib.figure import Figure
    names = sorted(dict.fromkeys(name for each in runs for name in each.curves) or ["loss"],
                   key=lambda name: name.startswith("validation"))
    rows, arms = math.ceil(len(names) / 3), [each.name.split("-seed")[0] for each in runs]
    fig = Figure((13, 1 + 2.8 * rows + 0.07 * len(runs)), layout="constrained")
    for at, name in enumerate(names, 1):
        axis, lines = fig.add_subplot(rows, 3, at), []
        axis.set_title(shown(name), parse_math=False)
        axis.set_xlabel("charged hours")
        axis.grid(color="0.92")
        for each, arm in zip(runs, arms, strict=True):
            points, look = each.curves.get(name, []), curve_look([*dict.fromkeys(arms)].index(arm))
            lines += axis.plot([x for x, _ in points], [y for _, y in points], **look, linewidth=1.4,
                               markevery=max(1, len(points) // 6), markersize=5, markerfacecolor="white")
    legend = fig.legend(lines, map(str, range(len(runs))), loc="outside lower center", ncols=3, title=WARNING)
    for text, each in zip(legend.get_texts(), runs, strict=True):       # set here: _ would hide it, $ begin a formula
        text.set(text=each.name, parse_math=False)
    return fig


def main(config, say=print):
    if bool(config.runs) == bool(config.model) or bool(config.model) != bool(config.sentence):
        raise UserError("give run directories, as  python watch.py runs/*,  or --model MODEL and --sentence TEXT")
    (ask if config.model else watch)(config, say)


def watch(config, say=print):
    """Reads everything, shows it, writes the file; with --follow again and again."""
    if file := config.out and Path(config.out):
        if not importlib.util.find_spec("matplotlib"):
            raise UserError("--out takes one more package: pip install matplotlib")
        if file.suffix not in FIGURES:
            raise UserError(f"--out {file}: a name that ends in one of {', '.join(FIGURES)}")
        claim_file(file).parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(KeyboardInterrupt) if config.follow else contextlib.nullcontext():     # how it ends
        while True:
            runs = find(config.runs)
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
            say("\033[H\033[2J" * config.follow + in_terminal(runs, width))
            if file:
                figure(runs).savefig(data := io.BytesIO(), format=file.suffix[1:], metadata=dict(Creator=OURS))
                write_whole(file, data.getvalue())
            if not config.follow:
                return
            time.sleep(5)


@torch.no_grad()
def ask(config, say=print):
    """Fills the sentence's masks.  On the CPU: the GPU may be busy with a run."""
    tokenizer = read_tokenizer(find_model(config.model))
    forward, shape = masked_lm(config.model, tokenizer)
    ids = torch.tensor([framed(tokenizer).encode(config.sentence).ids])
    masked = (ids == tokenizer.token_to_id("[MASK]")).nonzero()[:, 1]
    if ids.shape[1] > shape.max_position_embeddings:
        raise UserError(f"--sentence has {ids.shape[1]:,} tokens, the model {shape.max_position_embeddings} positions: "
                        f"give a shorter one")
    if not len(masked):
        raise UserError('--sentence has no [MASK] to fill: give one, as "the [MASK] sat" has')
    for i, p in enumerate(forward(ids, masked[None]).softmax(-1), 1):                   # (M, V)
        best = p.topk(min(5, len(p))).indices.tolist()
        say(f"[MASK] {i}: " + ", ".join(f"{tokenizer.id_to_token(k)} {p[k]:.1%}" for k in best))


if __name__ == "__main__":
    run(main, Config, __doc__)
