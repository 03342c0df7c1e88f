"""How runs go and how they went: in the terminal, as a page to pass on; and what a model says.

    python watch.py runs/tinybert --follow              # one run, redrawn every few seconds until Ctrl-C
    python watch.py runs/*                              # several, finished or under way, as one table
    python watch.py runs/table2 --out table2.html       # all runs of a comparison: their table and curves in one file
    python watch.py --model runs/teacher/model --sentence "the [MASK] sat"          # its five likeliest words

It reads config.json and log.jsonl and writes nothing but --out, so no run notices.  The page holds its data and its
script and asks no server for anything.
"""
import contextlib
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torch

from comparison.report import MARKERS, aligned, curve_look
from plumbing.checkpoint import find_model, framed, load_mlm, read_tokenizer
from plumbing.cli import Checked, UserError, run, shown
from plumbing.files import claim_file, json_object, log_records, parsing, write_whole
from plumbing.screen import changes, quantity, spent

UNITS = {"hours": "charged hours", "flops": "FLOPs", "tokens": "tokens", "steps": "steps"}
NOT_A_TERM = ("step progress seconds lr epoch loss gradient_norm val d_order flops tokens tokens_per_second "
              "memory mfu").split()
COLUMNS = "run", "spent", "left", "loss", "validation", "tokens/s", "state", "terms", "loss so far"
PAGE = Path(__file__).parent / "plumbing/page.html"
POINTS = 500                # records of a curve
WARNING = "Losses of different strategies are different quantities: between runs, only the same term can be compared."


@dataclass
class Config(Checked):
    runs: list[str] = field(default_factory=list)   # run directories, or comparisons' directories
    follow: bool = False        # redraw every few seconds, the file of --out too; Ctrl-C ends it
    out: str | None = None      # FILE.html: a page with every curve, to pass on
    model: str | None = None    # instead of runs: a model directory or Hub id, to be asked
    sentence: str | None = None     # what it is asked: each [MASK] in it is filled


# ----------------------------------------------------------------------------------------------- reading runs

def read_log(file):
    """One record per step."""
    steps = {}
    for _, record in log_records(file.read_bytes().split(b"\n") if file.exists() else ()):
        steps.setdefault(record["step"], {}).update(record)
    return sorted(steps.values(), key=lambda record: record["step"])


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
        self.finished, self.records = (path / "summary.json").exists(), read_log(path / "log.jsonl")
        self.latest = {k: v for record in self.records for k, v in record.items()}
        self.terms = {k: v for k, v in self.latest.items() if k not in NOT_A_TERM and isinstance(v, int | float)}

        seen = [r for r in self.records if r.get("val")]
        self.validations = [(r, changes(r["val"], before.get("val", {})))
                            for r, before in zip(seen, [{}, *seen], strict=False)]
        every = math.ceil(len(self.records) / POINTS)
        kept = [r for i, r in enumerate(self.records[::-1]) if i % every == 0 or r.get("val")][::-1]
        self.axes = {unit: [self.at(r, unit) for r in kept] for unit in UNITS}
        keys = {"loss": "loss"} | {term: term for term in self.terms} | {
            "learning rate": "lr", "tokens/s": "tokens_per_second", "gradient norm": "gradient_norm",
            "D_order": "d_order"}
        curves = {name: [r.get(key) for r in kept] for name, key in keys.items()} | {
            f"validation {term}": [(r.get("val") or {}).get(term) for r in kept]
            for term in dict.fromkeys(term for r in seen for term in r["val"])}
        self.curves = {name: [y if isinstance(y, int | float) and math.isfinite(y) else None for y in values]
                       for name, values in curves.items()}              # JSON has no infinity

    def at(self, record, unit):
        """Where on the axis a record stands; None for the FLOPs of a run under another budget."""
        flops = record.get("progress", 0) * self.total if self.unit == "flops" else None
        step = record["step"]
        return dict(hours=record["seconds"] / 3600, flops=flops, tokens=step * self.tokens, steps=step)[unit]


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


# --------------------------------------------------------------------------------------------------- terminal

def sparkline(points, end, width=24):
    """The means of y over `width` equal parts of 0..end, as far as the points reach."""
    parts, line, level = {}, "", " "
    for x, y in points:
        parts.setdefault(min(width - 1, int(x / (end or 1) * width)), []).append(y)
    means = {i: sum(ys) / len(ys) for i, ys in parts.items()}
    low, high = min(means.values(), default=0), max(means.values(), default=0)
    for i in range(max(means, default=-1) + 1):
        level = "▁▂▃▄▅▆▇█"[round(7 * (means[i] - low) / (high - low or 1))] if i in means else level
        line += level
    return line


def facts(run, end):
    """{heading: text}: what a person wants to know of one run.  `end`: of its curve's axis, in charged hours."""
    if not run.records:
        return {"run": run.name, "state": "starting: no line in its log yet"}
    now, last = run.latest, run.records[-1]
    rate = run.at(last, "tokens") / max(last["seconds"], 1e-9) if run.finished else now.get("tokens_per_second")
    used, age = run.at(last, run.unit), time.time() - (run.path / "log.jsonl").stat().st_mtime
    left = last["seconds"] * max(0, run.total / used - 1) if used and not run.finished else None
    points = [(x, y) for x, y in zip(run.axes["hours"], run.curves["loss"], strict=True) if y is not None]
    return {"run": run.name, "state": "finished" if run.finished else f"last line {quantity(age / 3600, 'hours')} ago",
            "spent": spent(used, run.total, run.unit),
            "left": quantity(left / 3600, "hours") if left is not None else "",
            "loss": f"{now['loss']:.5g}" if "loss" in now else "",
            "terms": ", ".join(f"{term} {value:.5g}" for term, value in run.terms.items()),
            "tokens/s": f"{rate:,.0f}" if rate else "",
            "validation": f"{run.validations[-1][1]} [{len(run.validations)}]" if run.validations else "",
            "loss so far": sparkline(points, end)}


def run_table(runs):
    """The facts of all runs as rows, the heading first; their curves are on one axis."""
    end = max((run.at(run.records[-1], "hours") for run in runs if run.records), default=0)
    rows = [facts(run, end) for run in runs]
    head = [name for name in COLUMNS if any(row.get(name) for row in rows)]
    return [head, *([row.get(name, "") for name in head] for row in rows)]


def in_terminal(runs, width):
    """One run: a line per fact and per validation.  Several: a table, cut to `width`."""
    head, *rows = run_table(runs)
    if len(runs) != 1:
        return aligned(head, rows, width) if runs else "no run has begun"
    run, = runs
    return "\n".join([*(f"{name:14} {value}" for name, value in zip(head, *rows, strict=True)),
                      *(f"  at {quantity(run.at(r, run.unit), run.unit):>14}  {val}" for r, val in run.validations)])


# --------------------------------------------------------------------------------------------------- the page

def styles(runs):
    """How each run is drawn: those that differ only by seed alike, of the first 140 others no two."""
    arms = [each.name.split("-seed")[0] for each in runs]
    return [curve_look([*dict.fromkeys(arms)].index(arm)) for arm in arms]


def page(runs):
    """The whole page as text: its table made here, curves drawn by its own script from the JSON that it holds."""
    names = sorted(dict.fromkeys(name for each in runs for name, values in each.curves.items()
                                 if any(y is not None for y in values)),
                   key=lambda name: name.startswith("validation"))
    data = [dict(name=each.name, axes=each.axes, curves=each.curves, **look)
            for each, look in zip(runs, styles(runs), strict=True)]
    # Escaped: no name ends the script element
    data = json.dumps(dict(runs=data, markers=MARKERS)).replace("<", "\\u003c")
    body = "\n".join((
        f"<h2>Runs</h2><pre>{escape(in_terminal(runs, math.inf))}</pre>",
        f"<p>Written {time.strftime('%Y-%m-%d %H:%M')}. {WARNING}</p><p><label>against <select>",
        *(f'<option value="{unit}">{UNITS[unit]}</option>' for unit in UNITS
          if all(None not in each.axes[unit] for each in runs)), "</select></label>",
        *(f'<label><input type="checkbox" checked><svg class="key" width="40" height="12"></svg> {escape(each.name)}'
          f"</label>" for each in runs), '</p><div class="grid">',
        *(f'<figure data-curve="{escape(name)}"><figcaption>{escape(name)}</figcaption><svg viewBox="0 0 440 250">'
          f"</svg><output></output></figure>" for name in names),
        f'</div><script type="application/json" id="data">{data}</script>'))
    return PAGE.read_text(encoding="utf-8").replace("<!--body-->", body)


# ------------------------------------------------------------------------------------------------------- main

def main(config, say=print):
    if bool(config.runs) == bool(config.model) or bool(config.model) != bool(config.sentence):
        raise UserError("give run directories, as  python watch.py runs/*,  or --model MODEL and --sentence TEXT")
    (ask if config.model else watch)(config, say)


def watch(config, say=print):
    """Reads everything, shows it, writes the file; with --follow again and again."""
    if file := config.out and Path(config.out):
        if file.suffix != ".html":
            raise UserError(f"--out {config.out}: a name that ends in .html")
        claim_file(file).parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(KeyboardInterrupt) if config.follow else contextlib.nullcontext():     # how it ends
        while True:
            runs = find(config.runs)
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
            say("\033[H\033[2J" * config.follow + in_terminal(runs, width))
            if file:
                write_whole(file, page(runs).encode())
            if not config.follow:
                return
            time.sleep(5)


# ---------------------------------------------------------------------------------------------------- a model

@torch.no_grad()
def ask(config, say=print):
    """Fills the sentence's masks.  On the CPU: the GPU may be busy with a run."""
    path = find_model(config.model)
    tokenizer = read_tokenizer(path)
    model, missing, _ = load_mlm(path, tokenizer.get_vocab_size())
    model.eval()
    ids = torch.tensor([framed(tokenizer).encode(config.sentence).ids])
    masked = (ids == tokenizer.token_to_id("[MASK]")).nonzero()[:, 1]
    if ids.shape[1] > model.config.max_position_embeddings:
        raise UserError(f"--sentence has {ids.shape[1]:,} tokens, the model "
                        f"{model.config.max_position_embeddings} positions: give a shorter one")
    if not len(masked):
        raise UserError('--sentence has no [MASK] to fill: give one, as "the [MASK] sat" has')
    if missing:
        raise UserError(f"{config.model} has no LM head to fill a [MASK] with, as its strategy trains none")
    for i, p in enumerate(model(ids, masked[None])["logits"].softmax(-1), 1):           # (M, V)
        best = p.topk(min(5, len(p))).indices.tolist()
        say(f"[MASK] {i}: " + ", ".join(f"{tokenizer.id_to_token(k)} {p[k]:.1%}" for k in best))


if __name__ == "__main__":
    run(main, Config, __doc__)
