"""From the results of many runs to tables, a figure and a verdict: nothing is trained here.

Read it with compare.py; who is ahead of whom is judge.py's, and how sure that is statistics.py's.  The first line
says what to do.  A result is a dict, see judge.py.
"""
import dataclasses
import json
import math
import textwrap
from pathlib import Path

import numpy as np

from comparison import judge, statistics
from comparison.judge import amount, averaged, base_of, groups, setting
from plumbing.cli import numbers
from plumbing.files import claim_each, read_json, write_whole
from plumbing.glue import PAPER


def spread(values):
    std = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{std}" if len(values) else "collapsed"


def signed(d):
    """The difference with its plain 95% interval; "" where one side has no score left."""
    if math.isnan(d.d):
        return ""
    within = f" [{d.d - d.half:+.1f}, {d.d + d.half:+.1f}]" if math.isfinite(d.half) else ""
    return f"{d.d:+.1f}" + within


def rate_of(run):
    """Recipe, where it is not the paper's, and peak LR."""
    recipe = run.get("recipe", "paper")
    return f"{recipe} " * (recipe != "paper") + f"{run['peak_lr']:g}"


def markdown(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def aligned(head, rows, width=80):
    """The same as text for a terminal: columns aligned, names in the first one cut to what the others leave of
    `width`.  A row of that cell alone is a heading."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*(row for row in cells if any(row[1:])), strict=True)]
    widths[0] = min(widths[0], max(8, width - sum(2 + w for w in widths[1:])))
    for row in cells:
        if any(row[1:]) and len(row[0]) > widths[0]:
            row[0] = row[0][:widths[0] - 1] + "…"
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(line if len(line) <= width else line[:width - 1] + "…" for line in lines)


def score_rows(results, yardsticks):
    """[(budget, setting, name, runs, values, Difference or None)] of every row: values are the scores, averaged over
    the tasks that measure, of the pretraining seeds (of a single one, or of a yardstick: of its fine-tunings)."""
    tasks, found = judge.tasks_of(results, yardsticks), []
    for key, arms in groups(results).items():
        against = judge.differences(arms, yardsticks, tasks)
        for name, runs in arms.items():
            of = [runs[s] for s in sorted(runs)]
            found.append((key[2], key[:2], name, of, values_of(judge.arm(name, of, tasks)), against.get(name)))
    for y in yardsticks:
        d = against.get(y["name"]) if len(groups(results)) == 1 else None
        found.append((None, None, y["name"], y["runs"], values_of(judge.yardstick_arm(y, tasks)), d))
    return found


def values_of(a):
    """The scores that a row shows: of each seed, or of a single seed's fine-tunings."""
    return a.means if len(a.means) > 1 else [x for of in a.scores for x in of]


def score_table(results, yardsticks=()):
    """Scores, mean ± standard deviation over pretraining seeds (of a single one over its fine-tuning runs), and the
    difference to the base row with its plain 95% interval and the word for it.  It holds nothing that depends on the
    machine's speed.  `yardsticks`: {name, runs: [as results]}."""
    tasks, many = list(results[0]["scores"]), len(results[0]["scores"]) > 1
    used = judge.tasks_of(results, yardsticks)
    base, rows = base_of(next(iter(groups(results).values())), yardsticks), []
    for budget, kind, name, of, values, d in score_rows(results, yardsticks):
        arm = budget is not None
        val = [r["val"]["mlm"] for r in of if "mlm" in r.get("val", ())] if arm else []
        by_task = [spread(values_of(judge.arm(name, of, [t], given=not arm and name != judge.RANDOM))) for t in tasks]
        rows.append([amount(budget, of[0]["unit"]) if arm else "", setting(*kind) if arm else "", name,
                     rate_of(of[0]) if arm else "",
                     f"{np.mean([r['tokens'] for r in of]):,.0f}" if arm else "",
                     f"{np.mean([r['epochs'] for r in of]):.2g}" if arm else "", f"{np.mean(val):.2f}" if val else "",
                     *by_task, *([spread(values)] if many else []),
                     signed(d) if d else "", d.says if d else ""])
    of = "the paper's 7" if set(PAPER) <= set(tasks) and used == averaged(tasks) else "+".join(used)
    head = ["budget", "data", "arm", "peak LR", "tokens", "epochs", "val MLM", *tasks,
            *([f"average of {of}"] if many else []), f"Δ to {base} [95%]", "so"]
    if all(r["unique_tokens"] is None for r in results):                # one setting needs no column
        head, *rows = ([row[0], *row[2:]] for row in (head, *rows))
    return markdown(head, rows)


def screen_table(results, yardsticks=()):
    """The table as a terminal shows it: at most 80 columns."""
    base, rows, last = base_of(next(iter(groups(results).values())), yardsticks), [], None
    for budget, kind, name, of, values, d in score_rows(results, yardsticks):
        where = f"{amount(budget, of[0]['unit'])} on {setting(*kind)}" if budget is not None else last
        if where != last:
            rows.append([where, "", "", ""])
        last = where
        word = d.word.split(",")[0].replace("not told apart; differs by less than", "within") if d else ""
        rows.append([f"  {name}", spread(values), signed(d) if d else "", word])
    return aligned(["", "score", f"Δ to {base} [95%]", ""], rows)


def probes_of(r):
    """{name of a probe: value} of one pretrained model; {} of what has none."""
    if not r.get("probes"):
        return {}
    return {f"{task} {kind}": found[kind] for task, found in r["probes"]["tasks"].items()
            for kind in ("linear", "similarity") if kind in found}


def probe_table(results, yardsticks):
    """What the frozen encoders know: mean ± std over pretraining seeds."""
    columns, rows = list(dict.fromkeys(name for r in results for name in probes_of(r))), []

    def cells(runs):
        values = [[p[name] for p in map(probes_of, runs) if name in p] for name in columns]
        return [spread(v) if v else "" for v in values]
    for (*kind, budget), arms in groups(results).items():
        where = f"{amount(budget, results[0]['unit'])} on {setting(*kind)}"
        rows += [[where, name, *cells(runs.values())] for name, runs in arms.items()]
    rows += [["", y["name"], *cells(y["runs"])] for y in yardsticks if any(map(probes_of, y["runs"]))]
    return "\n\n".join([
        "Probes of the frozen encoders, which no fine-tuned score holds. linear: a regression on the "
        "pooled last hidden state, scored as the task is; similarity: Spearman of the cosine with the "
        "score, untrained; word order: have two neighbours in a block of 32 changed places.",
        markdown(["budget", "arm", *columns], rows)])


def cost_table(results, teacher_flops=None):
    """What the budget bought: means over seeds.  Seconds and rates are this machine's."""
    head, rows = ["budget", "data", "arm", "tokens", "x base", "charged s", "tokens/s", "in teacher", "FLOPs",
                  "with the teacher's"], []
    formats = dict(charged_seconds="{:,.1f}", tokens_per_second="{:,.0f}", teacher_share="{:.0%}")
    for (*kind, budget), arms in groups(results).items():
        tokens = {name: np.mean([r["tokens"] for r in runs.values()]) for name, runs in arms.items()}
        for name, runs in arms.items():
            row = judge.Row(name, [*runs.values()], budget)
            whole = row.flops + (teacher_flops or math.nan) if row.needs_teacher else row.flops
            cells = [form.format(np.mean([r[k] for r in row.runs])) for k, form in formats.items()]
            rows.append([amount(budget, results[0]["unit"]), setting(*kind), name, f"{tokens[name]:,.0f}",
                         f"{tokens[name] / tokens[base_of(arms)]:.2f}", *cells, f"{row.flops:.3g}",
                         "" if math.isnan(whole) else f"{whole:.3g}"])
    return markdown(head, rows)


def verdict(results, yardsticks=(), teacher_flops=None, layers=""):
    """The table in plain words: what to do; what measures nothing; who is ahead of whom at each budget; ceilings."""
    lines = judge.instruction(results, yardsticks, teacher_flops, layers)
    told = judge.measuring(results, yardsticks)
    for task, floor in (told[1] if told else {}).items():
        lines.append(f"{task} measures nothing here: no arm and no teacher is ahead of {floor}, outside the noise."
                     + " No average has it." * bool(told[0] and len(results[0]["tasks"]) > 1))
    for key, arms in groups(results).items():
        lines += who_is_ahead(key, arms, yardsticks, judge.tasks_of(results, yardsticks))
    return lines


def who_is_ahead(key, arms, yardsticks, tasks):
    """[one line] for a budget: each row against the base, by its word; best against runner-up; a ceiling."""
    (unique, static, budget), by_word = key, {}
    against, base = judge.differences(arms, yardsticks, tasks), base_of(arms, yardsticks)
    floors = judge.CONSTANT, judge.RANDOM, judge.NGRAMS
    for d in against.values():
        if math.isnan(d.d) or d.name == judge.TEACHER or d.name in floors and d.word.startswith("behind"):
            continue                                                    # as it should be
        word = d.word.split(";")[0].replace("ahead,", "ahead of it,").replace("behind,", "behind it,")
        less = f" (by less than {d.less:.1f})" * ("not told apart" in word)
        by_word.setdefault(word, []).append(f"{d.name} {d.d:+.1f}{less}")
    unit = next(iter(next(iter(arms.values())).values()))["unit"]
    where = f"At {amount(budget, unit)} on {setting(unique, static)}"
    line = f"{where}, against {base}: " + "; ".join(f"{word}: {', '.join(of)}" for word, of in by_word.items())
    if any(d.scope for d in against.values() if math.isfinite(d.half)):
        line += " (on this dev set only)"
    lines = [line + "."] if by_word else []
    table = judge.table_of(arms, yardsticks, tasks)
    trained = sorted((a for a in table if a.name in arms and a.means), key=lambda a: -np.mean(a.means))
    if len(trained) > 1 and min(len(a.means) for a in trained[:2]) > 2:
        d = statistics.pair(table, trained[0].name, trained[1].name)
        lines.append(f"{where}, {trained[0].name} scores highest; against {trained[1].name}, the next, {signed(d)}.")
    teacher = next((a for a in table if a.name == judge.TEACHER and a.means), None)
    full = [a.name for a in trained if teacher and np.mean(a.means) > np.mean(teacher.means) - 1]
    if full:
        lines.append(f"{where}, {', '.join(full)} {'is' if len(full) == 1 else 'are'} within 1 point of the teacher: "
                     f"a ceiling, under which leads shrink.")
    collapsed = [f"{a.name} {a.collapsed} of {a.trials}" for a in table if a.collapsed]
    if collapsed:
        lines.append(f"{where}, fine-tunings that predicted one class are left out of scores: {', '.join(collapsed)}. "
                     + " ".join(d.collapsed + "." for d in against.values() if d.collapsed and d.p < 0.05))
    return [line.strip() for line in lines]


def remarks(results):
    """What the spreads and intervals mean here."""
    counts = sorted(len(runs) for arms in groups(results).values() for runs in arms.values())
    seeds, most = counts[0], counts[-1]
    if most > 1:
        of = f"{seeds} to {most}" if seeds < most else f"{seeds}"
        computed = " and ".join(sorted({r["computed"] for r in results if "computed" in r}))
        lines = [f"Computed in {computed}. " * bool(computed) + f"± is the standard deviation over {of} pretraining "
                 f"seeds; of a model that nobody here trained over its fine-tunings. Δ has a plain 95% interval for "
                 f"other seeds and, where predictions were kept, other dev examples; its word is corrected for all "
                 f"rows of a budget (Dunnett). How it is judged: docs/judged.md."]
    else:
        lines = ["One pretraining seed per arm: ± is the standard deviation over the fine-tunings of one pretrained "
                 "model, and no difference here can be told from noise; give --seeds 3 or more."]
    devices = sorted({str(r["device"]) for r in results})
    if len(devices) > 1:
        lines.append(f"Beware: the runs were made on different devices ({', '.join(devices)}).")
    rates = [[r["tokens_per_second"] for r in runs.values()]
             for arms in groups(results).values() for runs in arms.values()]
    apart = max(max(of) / min(of) for of in rates)
    if results[0]["unit"] == "hours" and apart > 1.1:
        lines.append(f"Beware: runs of one arm went at up to {apart:.1f} times each other's tokens/s, so an hour was "
                     f"not the same for all: give --budget-flops.")
    return lines


def spent_before(results):
    """What of the budget was spent before the first step, on the data that a run reads."""
    lines, unit = [], results[0]["unit"]
    for (*kind, budget), arms in groups(results).items():
        for name, of in arms.items():
            spent = np.mean([r["spent_before"] for r in of.values()])
            if spent or name.startswith("miniplm"):
                lines.append(f"{name}: of {amount(budget, unit)} on {setting(*kind)}, {spent / budget:.0%} was spent "
                             f"before the first step.")
    return lines


def write_report(config, results, yardsticks, labels, teacher_flops, told=()):
    """The tables, the verdict and the figure, under OUT and on the screen.  `labels`: {task: of its dev examples};
    `told`: what a comparison remarked on the way."""
    out, layers = Path(config.out), ", ".join(map(str, numbers(config.init_layers or "", int)))
    for each in (*results, *(r for y in yardsticks for r in y["runs"])):
        judge.keep_examples(each, each.get("predicted", {}), labels)
    said = verdict(results, yardsticks, teacher_flops, layers)
    notes = [*remarks(results), *told]
    table = score_table(results, yardsticks)
    probes = probe_table(results, yardsticks) if config.probe else ""
    text = "\n\n".join([said[0], table, *said[1:], *notes, probes])
    costs = [cost_table(results, teacher_flops), *judge.pays_from(results, yardsticks, teacher_flops)]

    def plain(models):                                  # their arrays are in results.npz
        return [{k: v for k, v in r.items() if k not in ("predicted", "examples")} for r in models]
    everything = dict(config=dataclasses.asdict(config), verdict=said, teacher_flops=teacher_flops,
                      results=plain(results), yardsticks=[dict(y, runs=plain(y["runs"])) for y in yardsticks])
    if (inputs := out / "inputs.json").exists():
        everything["data"] = read_json(inputs).get("contents of data")

    def write(_):
        for name, content in (("table.md", text), ("costs.md", "\n\n".join(costs)),
                              ("results.json", json.dumps(everything, indent=1))):
            write_whole(out / name, f"{content.rstrip()}\n".encode())
        write_whole(out / "results.npz", judge.compressed(judge.arrays_of(results, yardsticks, labels)))
        figure(results, yardsticks, out / "figure.png", teacher_flops)
    claim_each([out], write)
    print("\n" + "\n\n".join([
        textwrap.fill(said[0], 80), screen_table(results, yardsticks),
        *(textwrap.fill(line, 80) for line in (*said[1:], *notes)),
        f"also in {out}/table.md{' (probes too)' * bool(probes)}, costs.md and results.json"]))


# The colours of Okabe and Ito without the yellow, and markers: 35 curves differ
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
MARKERS = "os^Dv"


def curve_look(i):
    """Colour and marker of the i-th curve, as matplotlib takes them."""
    return dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)])


def figure(results, yardsticks, path, teacher_flops=None):
    """Score against total FLOPs: a line per arm, the teacher charged (solid) and free (faint), its band the 95%
    interval of the arm's mean; yardsticks as horizontal lines, named at the right edge."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        print(f"no {path.name}: pip install matplotlib")
        return
    tasks = judge.tasks_of(results, yardsticks)
    axis = (fig := Figure(layout="constrained", figsize=(8, 5))).subplots()
    kinds = list(dict.fromkeys(key[:2] for key in groups(results)))
    names = list(dict.fromkeys(r["strategy"] for r in results))
    for kind in kinds:
        for i, name in enumerate(names):
            points = []
            for key, arms in groups(results).items():
                if key[:2] == kind and name in arms:
                    table = judge.table_of(arms, yardsticks, tasks)
                    a = next(a for a in table if a.name == name)
                    if a.means:
                        row = judge.Row(name, [*arms[name].values()], key[2])
                        points.append((row.flops, float(np.mean(a.means)), statistics.half_width(table, name)))
            if not points or not all(math.isfinite(x) for x, _, _ in points):
                continue
            x, y, half = map(np.array, zip(*sorted(points), strict=True))
            style = curve_look(i) | dict(markersize=5, linewidth=1.8)
            style["markerfacecolor"] = style["color"] if kind == kinds[0] else "white"
            charged = x + teacher_flops if teacher_flops and judge.needs_teacher(name) else None
            label = name + (f", {setting(*kind)}" if len(kinds) > 1 else "")
            for at, alpha in ((x, 1.0),) if charged is None else ((charged, 1.0), (x, 0.35)):
                axis.plot(at, y, **style, alpha=alpha, label=label if alpha == 1 else None)
                if np.isfinite(half).all():
                    axis.fill_between(at, y - half, y + half, color=style["color"], alpha=0.13 * alpha, linewidth=0)
                    axis.vlines(at, y - half, y + half, color=style["color"], alpha=0.5 * alpha)
    heights = sorted((float(np.mean(values)), name) for budget, _, name, _, values, _ in score_rows(results, yardsticks)
                     if budget is None and len(values))
    axis.set_xscale("log")
    axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    low, high = axis.get_ylim()
    high, under = max([high, *(h + 0.5 for h, _ in heights)]), len(heights)
    while under and low - heights[under - 1][0] <= high - low:          # what lies far under all else is only named
        under, low = under - 1, min(low, heights[under - 1][0] - 0.5)
    axis.set_ylim(low, high)
    beside, at = dict(fontsize=9, color="0.25", annotation_clip=False), -math.inf
    axis.annotate("\n".join(f"{name} {h:.1f}, below" for h, name in heights[:under][::-1]), (1.01, 0),
                  xycoords="axes fraction", va="top", **beside)
    for height, name in heights[under:]:                                # no name over another, none over a line
        axis.axhline(height, color="0.55", linewidth=0.9, zorder=0)
        at = max(at + (high - low) / 28, height)
        axis.annotate(f"{name} {height:.1f}", (1.01, at), xycoords=("axes fraction", "data"), va="center", **beside)
    price = "charged (solid) or free (faint)" if teacher_flops else "not charged"
    axis.set(xlabel=f"total FLOPs of a student, its teacher's pretraining {price}", ylabel="score, %")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=4, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    fig.savefig(path, dpi=150, metadata=dict(Software="nanoKD"))
