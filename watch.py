"""How runs go and how they went: in the terminal, as a figure, as a page to pass on; and what a model says.

    python watch.py runs/tinybert --follow              # one run, redrawn every few seconds until Ctrl-C
    python watch.py runs/* --x tokens                   # several, finished or under way, as one table
    python watch.py runs/table2 --out table2.html       # a comparison: tables, verdict, figure and curves in one file
    python watch.py --model runs/teacher/model --sentence "the [MASK] sat"          # its five likeliest words
    python watch.py --model runs/teacher/model --sentence "the cat sat" --nearest FILE  # the nearest lines of FILE

It reads config.json, log.jsonl and summary.json and writes nothing but --out, so no run notices.  A page
(.html) holds its data and its script and asks no server for anything; a figure (.png) needs matplotlib.
--nearest looks at the first 10,000 different lines, by the cosine of mean-pooled last hidden states.
"""
import base64
import itertools
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from comparison.report import MARKERS, curve_look
from finetune_glue import embedded
from plumbing.checkpoint import find_model, framed, load_mlm, read_tokenizer
from plumbing.cli import Checked, UserError, in_turn, run
from plumbing.files import claim_file, json_object, log_records, parsing, write_whole
from plumbing.screen import RECENT, amount, changes, spent

UNITS = {"hours": "charged hours", "flops": "FLOPs", "tokens": "tokens", "steps": "steps"}
NOT_A_TERM = ("step progress seconds lr epoch loss gradient_norm val d_order flops tokens tokens_per_second "
              "memory mfu").split()
PAGE = Path(__file__).parent / "plumbing/page.html"
POINTS, LINES = 500, 10_000      # records of a curve; lines of --nearest
WARNING = ("Losses of different strategies are different quantities: between runs, only the same term can be "
           "compared.")


@dataclass
class Config(Checked):
    runs: list[str] = field(default_factory=list)   # run directories, or comparisons' directories
    x: Annotated[str, tuple(UNITS)] = "hours"   # the horizontal axis; hours: the charged ones
    follow: bool = False        # redraw every few seconds, the file of --out too; Ctrl-C ends it
    out: str | None = None      # FILE.html, a page to pass on, or FILE.png, a figure
    model: str | None = None    # instead of runs: a model directory or Hub id, to be asked
    sentence: str | None = None     # what it is asked: each [MASK] in it is filled
    nearest: str | None = None  # text file: which of its lines are nearest to the sentence?


# ----------------------------------------------------------------------------------------------- reading runs

def plain(text):
    """Names and lines come from users: what would move the cursor, or cannot be
    encoded, is a question mark."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def read_log(file):
    """One record per step."""
    steps = {}
    for _, record in log_records(file.read_bytes().split(b"\n") if file.exists() else ()):
        steps.setdefault(record["step"], {}).update(record)
    return sorted(steps.values(), key=lambda record: record["step"])


class Run:
    """One run directory as it is now."""

    def __init__(self, path):
        self.path, self.name, self.config = path, path.name, json_object(path / "config.json")
        if "model_type" in self.config:
            raise UserError(f"{path} is a model directory: give its run's directory, or  --model "
                            f"{path} --sentence ...")
        budgets = [unit for unit in UNITS if self.config.get(f"budget_{unit}")]
        if len(budgets) != 1 or not {"batch_size", "seq_len"} <= self.config.keys():
            raise UserError(f"{path}/config.json is not that of a run of train.py")
        self.length = in_turn(self.config["seq_len"], int)[-1][1]        # S of the run's end: tokens of a step
        self.unit, self.total = budgets[0], self.config[f"budget_{budgets[0]}"]
        self.summary = json_object(path / "summary.json") if (path / "summary.json").exists() else {}
        needed = ("tokens_per_second", "student_flops", "teacher_flops", "steps")
        numbers = self.total, self.config["batch_size"], *(self.summary.get(k, 1) for k in needed)
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a number that is not finite")
        self.records = read_log(path / "log.jsonl")
        self.latest = {k: v for record in self.records for k, v in record.items()}
        terms = [k for k, v in self.latest.items() if k not in NOT_A_TERM and isinstance(v, int | float)]

        every = math.ceil(len(self.records) / POINTS)
        kept = [r for i, r in enumerate(self.records[::-1]) if i % every == 0 or r.get("val")][::-1]
        self.axes = {unit: [self.at(r, unit) for r in kept] for unit in UNITS}
        took, tokens = ([b - a for a, b in zip([0, *self.axes[k]], self.axes[k], strict=False)]
                        for k in ("hours", "tokens"))
        self.curves = {name: [r.get(key) for r in kept] for name, key in (
            ("loss", "loss"), *zip(terms, terms, strict=True), ("learning rate", "lr"),
            ("tokens/s", "tokens_per_second"), ("gradient norm", "gradient_norm"), ("D_order", "d_order"))}
        self.curves["tokens/s"] = [logged or (n / t / 3600 if t > 0 else None) for logged, n, t in
                                   zip(self.curves["tokens/s"], tokens, took, strict=True)]
        for term in dict.fromkeys(term for r in kept for term in r.get("val") or ()):
            self.curves[f"validation {term}"] = [(r.get("val") or {}).get(term) for r in kept]
        self.curves = {name: [y if isinstance(y, int | float) and math.isfinite(y) else None for y in values]
                       for name, values in self.curves.items()}         # JSON has no infinity
        self.terms = {term: self.latest[term] for term in terms}

    def at(self, record, unit):
        """Where on the axis a record stands; None where it cannot be known."""
        step, s = record["step"], self.summary
        if unit == "flops":     # what the log says, else the finished run's price of a step, else a share
            if "flops" in record or "student_flops" not in s:
                share = self.total * record.get("progress", 0) if self.unit == "flops" else None
                return record.get("flops", share)
            return step * (s["student_flops"] + s["teacher_flops"]) / s["steps"]
        tokens = self.config["batch_size"] * self.length
        return dict(hours=record["seconds"] / 3600, tokens=step * tokens, steps=step)[unit]

    def rate(self, unit):
        """Units per charged second, over the last RECENT seconds or more."""
        last, start = self.records[-1], dict(step=0, seconds=0.0)
        first = next((r for r in self.records[::-1] if last["seconds"] - r["seconds"] >= RECENT), start)
        seconds = max(last["seconds"] - first["seconds"], 1e-9)
        return (self.at(last, unit) - (self.at(first, unit) or 0)) / seconds

    def points(self, name, unit):
        both = zip(self.axes[unit], self.curves.get(name, ()), strict=False)
        return [(x, y) for x, y in both if y is not None]

    def validations(self):
        """[(record, in words: each term's loss and its change since the last validation)]."""
        found, before = [], {}
        for r in self.records:
            if val := r.get("val"):
                found.append((r, changes(val, before)))
                before = val
        return found


def find(paths):
    """([Run], [directory of a comparison]); the names of the runs differ."""
    found, comparisons, runs = [], [], []
    for path in map(Path, paths):
        if (path / "config.json").is_file():
            found.append(path)
        elif (path / "results.json").is_file() or (path / "runs").is_dir():
            comparisons.append(path)
            # its teacher while it is pretrained: afterwards the curve of a longer run
            # would only squeeze the others
            teacher = [] if (path / "teacher/summary.json").exists() else path.glob("teacher/config.json")
            found += [file.parent for file in (*teacher, *sorted(path.glob("runs/*/config.json")))]
        else:
            raise UserError(f"{plain(path)} is neither a run's directory (no config.json) nor a comparison's "
                            f"(no results.json, no runs): give directories that train.py or compare.py wrote")
    for path in found:
        with parsing(path):
            runs.append(Run(path))
    names = [each.path.name for each in runs]
    for each in runs:
        each.name = plain(each.name if names.count(each.path.name) == 1 and each.name else each.path)
    return runs, comparisons


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


def facts(run, unit, end):
    """{heading: text}: what a person wants to know of one run.  `end`: where the axis of its curve ends."""
    if not run.records:
        return {"run": run.name, "state": "starting: no line in its log yet"}
    now, last, val = run.latest, run.records[-1], run.validations()
    rate = run.summary.get("tokens_per_second") or now.get("tokens_per_second") or run.rate("tokens")
    used, speed = run.at(last, run.unit), run.rate(run.unit)
    age = (time.time() - (run.path / "log.jsonl").stat().st_mtime) / 3600
    return {"run": run.name, "state": "finished" if run.summary else f"last line {amount(age, 'hours')} ago",
            "spent": spent(used, run.total, run.unit),
            **({UNITS[unit]: amount(run.at(last, unit), unit)} if unit != run.unit else {}),
            "left": "" if run.summary or speed <= 0 else
                    amount(max(0, run.total - used) / speed / 3600, "hours"),
            "loss": f"{now['loss']:.5g}" if "loss" in now else "",
            "terms": ", ".join(f"{term} {value:.5g}" for term, value in run.terms.items()),
            "tokens/s": f"{rate:,.0f}",
            "gradient norm": f"{now['gradient_norm']:.3g}" if "gradient_norm" in now else "",
            "validation": f"{val[-1][1]} [{len(val)}]" if val else "",
            "loss so far": sparkline(run.points("loss", unit), end)}


def table(runs, unit):
    """The facts of all runs as rows, the heading first; their curves are on one axis."""
    end = max((run.at(run.records[-1], unit) for run in runs if run.records), default=0)
    rows = [facts(run, unit, end) for run in runs]
    head = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row
                              if any(row.get(name) for row in rows)))
    return [head, *([row.get(name, "") for name in head] for row in rows)]


def in_terminal(runs, comparisons, unit, width):
    """One run: a line per fact and per validation.  Several: a table, what does not fit
    into `width` below it."""
    rows, lines = table(runs, unit), []
    if len(runs) == 1:
        lines = [*(f"{name:14} {value}" for name, value in zip(*rows, strict=True)),
                 *(f"  at {amount(runs[0].at(r, unit), unit):>14}  {val}"
                   for r, val in runs[0].validations())]
    else:
        columns = [[f"{cell:{max(map(len, column))}}" for cell in column]
                   for column in zip(*rows, strict=True)]
        part = columns[:1]
        for column in [*columns[1:], None]:
            if column is None or len(part) > 1 and sum(len(c[0]) + 2 for c in (*part, column)) - 2 > width:
                lines += [*("  ".join(row).rstrip() for row in zip(*part, strict=True)), ""]
                part = columns[:1]
            part.append(column)
    return "\n".join([*lines, *(plain(line) for path in comparisons for line in verdict(path))])


# ------------------------------------------------------------------------------------------- files to pass on

def styles(runs):
    """How each run is drawn: those that differ only by seed alike, of the first 140 others no two."""
    arms = list(dict.fromkeys(each.name.split("-seed")[0] for each in runs))
    at = [arms.index(each.name.split("-seed")[0]) for each in runs]
    return list(map(curve_look, at))


def verdict(path):
    with parsing(file := path / "results.json"):
        return [*map(str, json_object(file).get("verdict", []))] if file.exists() else []


def figure(runs, names, unit, file):
    """Every curve of all runs, as a PNG."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"--out {file} needs matplotlib: pip install matplotlib, or give a name that ends in "
                        f".html, which needs nothing") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = math.ceil(len(names) / 3)
    fig, panels = plt.subplots(rows, 3, figsize=(13, 3.2 * rows), layout="constrained", squeeze=False)
    for panel in panels.flat[len(names):]:
        panel.remove()
    for panel, name in zip(panels.flat, names, strict=False):
        for i, (each, look) in enumerate(zip(runs, styles(runs), strict=True)):
            points = each.points(name, unit)
            every = math.ceil(len(points) / 6) or 1
            panel.plot([x for x, _ in points], [y for _, y in points], label=each.name.replace("$", r"\$"),
                       color=look["colour"], linestyle=(0, look["dash"]) if look["dash"] else "-", linewidth=1.2,
                       marker=look["marker"], markevery=(i * 2 % every, every), markersize=5, markerfacecolor="white")
        panel.set(title=name.replace("$", r"\$"), xlabel=UNITS[unit])
        panel.grid(color="0.9")
    fig.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    fig.savefig(file, dpi=120, metadata=dict(Software="nanoKD"))
    plt.close(fig)


def as_html(head, *rows):
    lines = (("th", head), *(("td", row) for row in rows))
    rows = ("".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row) for kind, row in lines)
    return "<div><table>" + "\n".join(f"<tr>{row}</tr>" for row in rows) + "</table></div>"


def comparison(path):
    """Verdict, tables and their remarks (markdown) and the figure of a comparison, as
    far as they are there."""
    said = verdict(path)
    yield f"<h2>{escape(plain(path.resolve().name))}</h2>"
    yield "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in said) + "</ul>"
    for file in (path / "table.md", path / "costs.md"):
        for block in file.read_text(encoding="utf-8").strip().split("\n\n") if file.exists() else ():
            if block.startswith("|"):
                head, _, *rows = [[cell.strip() for cell in row.strip()[1:-1].split("|")]
                                  for row in block.split("\n")]
                yield as_html(head, *rows)
            elif block not in said:
                yield f"<p>{escape(block)}</p>"
    if (path / "figure.png").exists():
        image = base64.b64encode((path / "figure.png").read_bytes()).decode()
        yield f'<img src="data:image/png;base64,{image}" alt="figure of the comparison">'


def page(runs, comparisons, names, unit):
    """The whole page as text: tables made here, curves drawn by its own script from
    the JSON that it holds."""
    known = [u for u in UNITS if all(None not in each.axes[u] for each in runs)]
    data = [dict(name=each.name, axes=each.axes, curves=each.curves, **look)
            for each, look in zip(runs, styles(runs), strict=True)]
    # Escaped: no name ends the script element
    data = json.dumps(dict(runs=data, markers=MARKERS)).replace("<", "\\u003c")
    body = "\n".join((
        *(part for path in comparisons for part in comparison(path)),
        "<h2>Runs</h2>", as_html(*table(runs, unit)),
        f"<p>Written {time.strftime('%Y-%m-%d %H:%M')}. {WARNING}</p><p><label>against <select>",
        *(f'<option value="{u}"{" selected" * (u == unit)}>{UNITS[u]}</option>' for u in known),
        "</select></label>",
        *(f'<label><input type="checkbox" checked><svg class="key" width="40" height="12"></svg> {escape(each.name)}'
          f"</label>" for each in runs), '</p><div class="grid">',
        *(f'<figure data-curve="{escape(name)}"><figcaption>{escape(name)}</figcaption><svg viewBox="0 0 440 250">'
          f"</svg><output></output></figure>" for name in names),
        f'</div><script type="application/json" id="data">{data}</script>'))
    return PAGE.read_text(encoding="utf-8").replace("<!--body-->", body)


# ------------------------------------------------------------------------------------------------------- main

def main(config, say=print):
    if bool(config.runs) == bool(config.model) or bool(config.model) != bool(config.sentence):
        raise UserError("give run directories, as  python watch.py runs/*,  or --model "
                        "MODEL and --sentence TEXT")
    (ask if config.model else watch)(config, say)


def watch(config, say=print):
    file = Path(config.out) if config.out else None
    if file and file.suffix not in (".png", ".html"):
        raise UserError(f"--out {config.out}: a name that ends in .html or .png")
    if file:
        claim_file(file)
    try:
        while True:
            look(config, file, say)
            if not config.follow:
                return
            time.sleep(5)
    except KeyboardInterrupt:       # how --follow ends
        if not config.follow:
            raise


def look(config, file, say):
    """Reads everything, shows it, writes the file."""
    runs, comparisons = find(config.runs)
    for each in runs:
        if None in each.axes[config.x]:
            raise UserError(f"{each.path}: what it spends in FLOPs is known when it has finished: --x hours, "
                            f"tokens or steps until then")
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    say("\033[H\033[2J" * config.follow + in_terminal(runs, comparisons, config.x, width))
    names = sorted(dict.fromkeys(name for each in runs for name, values in each.curves.items()
                                 if any(y is not None for y in values)),
                   key=lambda name: name.startswith("validation"))
    try:
        if file and file.suffix == ".html":
            write_whole(file, page(runs, comparisons, names, config.x).encode())
        elif file and names:
            figure(runs, names, config.x, file)
    except OSError as e:
        raise UserError(f"--out {config.out} cannot be written: {e.strerror}") from None


# ---------------------------------------------------------------------------------------------------- a model

def nearest(model, tokenizer, sentence, file, count=5):
    """([(cosine, line)], the nearest first; how many lines were looked at), read as they are needed."""
    def pooled(texts):
        rows = embedded(model, tokenizer, texts, model.config.max_position_embeddings)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)                        # (B, D), of length 1
    try:
        with open(file, encoding="utf-8", errors="replace") as f:
            seen, kept, target = {""}, [], pooled([sentence])[0]
            lines = (line.strip() for line in iter(lambda: f.readline(2000), ""))    # a longer one is several
            new = itertools.islice((line for line in lines if not (line in seen or seen.add(line))), LINES)
            while batch := list(itertools.islice(new, 1000)):
                cosines = (pooled(batch) @ target).tolist()
                kept = sorted([*kept, *zip(cosines, batch, strict=True)], reverse=True)[:count]
    except OSError as e:
        raise UserError(f"--nearest {file} cannot be read: {e.strerror}") from None
    if not kept:
        raise UserError(f"--nearest {file}: no text in it")
    return kept, len(seen) - 1


@torch.no_grad()
def ask(config, say=print):
    """Fills the sentence's masks, then finds what is near to it.  On the CPU: the GPU
    may be busy with a run."""
    path = find_model(config.model)
    tokenizer = read_tokenizer(path)
    model, missing, _ = load_mlm(path, tokenizer.get_vocab_size())
    model.eval()
    ids = torch.tensor([framed(tokenizer).encode(config.sentence).ids])
    masked = (ids == tokenizer.token_to_id("[MASK]")).nonzero()[:, 1]
    if ids.shape[1] > model.config.max_position_embeddings:
        raise UserError(f"--sentence has {ids.shape[1]:,} tokens, the model "
                        f"{model.config.max_position_embeddings} positions: give a shorter one")
    if not len(masked) and not config.nearest:
        raise UserError('--sentence has no [MASK] to fill, as "the [MASK] sat" has: give '
                        'one, or --nearest FILE')
    if len(masked) and missing:
        raise UserError(f"{config.model} has no LM head to fill a [MASK] with, as its strategy trains none: "
                        f"give a --sentence without [MASK], and --nearest FILE")
    if len(masked):
        for i, p in enumerate(model(ids, masked[None])["logits"].softmax(-1), 1):       # (M, V)
            best = p.topk(min(5, len(p))).indices.tolist()
            say(f"[MASK] {i}: " + ", ".join(f"{tokenizer.id_to_token(k)} {p[k]:.1%}" for k in best))
    if config.nearest:
        found, count = nearest(model, tokenizer, config.sentence, config.nearest)
        say(f"the nearest of {count:,} lines" + " (those after them were not read)" * (count == LINES))
        for cosine, line in found:
            say(f"  {cosine:.3f}  {plain(line)}")


if __name__ == "__main__":
    run(main, Config, __doc__)
