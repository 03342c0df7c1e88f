"""From the results of many runs to tables, a figure and a verdict: nothing is trained here.

Read it with compare.py; who is ahead of whom is judge.py's, and how sure that is statistics.py's.  The first line
says what to do.  A result is a dict, see judge.py.
"""
import csv
import io
import math

import numpy as np

from comparison import judge, statistics
from comparison.judge import amount, averaged, base_of, groups, setting
from plumbing.diagnose import D_ORDER_TURN
from plumbing.glue import PAPER as PAPER_TASKS

# arXiv 2404.19319, Table 2: GLUE dev, one seed, one A100; {(size, limited data): rows}: tokens, tasks, mean
PAPERS_HOURS = {("6L768", False): 4, ("12L1024", False): 11.3, ("6L768", True): 24}
PAPER = {
    ("6L768", False): {
        "no_kd": (4.6e9, 86.5, 89.8, 79.2, 87.3, 90.1, 60.7, 47.3, 77.3),
        "vanilla_kd": (2.6e9, 87.3, 89.2, 78.8, 87.1, 89.7, 61.7, 44.8, 76.9),
        "minilm": (2.6e9, 88.5, 90.6, 81.7, 90.0, 90.3, 64.3, 43.9, 78.5),
        "tinybert": (2.6e9, 89.5, 91.0, 82.2, 90.3, 90.4, 67.2, 40.8, 78.8)},
    ("12L1024", False): {
        "no_kd": (4.6e9, 87.8, 90.1, 80.6, 86.5, 90.3, 60.3, 51.1, 78.1),
        "vanilla_kd": (2.6e9, 86.3, 90.5, 79.8, 88.8, 89.9, 62.1, 48.6, 78.0),
        "minilm": (2.6e9, 90.0, 91.2, 83.3, 90.1, 90.9, 69.0, 49.1, 80.5),
        "tinybert": (2.6e9, 89.5, 91.4, 82.0, 90.8, 90.6, 65.5, 41.1, 78.7)},
    ("6L768", True): {
        "no_kd": (27.9e9, 88.8, 91.2, 81.3, 88.0, 90.4, 59.6, 50.5, 78.5),
        "vanilla_kd": (15.4e9, 86.9, 91.1, 81.1, 89.5, 90.3, 61.7, 58.3, 79.8),
        "minilm": (15.6e9, 90.0, 91.5, 83.0, 90.3, 90.6, 65.7, 50.7, 80.3),
        "tinybert": (15.6e9, 90.5, 92.3, 83.3, 90.2, 90.8, 67.5, 51.8, 80.9)},
}


def turned(r):
    """Tokens at which D_order first passed 0.3, where the model began to use the order of its context, on the
    line through the validations before and after; the first validation's where that is past it; inf where it
    did not; None where it was not logged."""
    points = [(p["tokens"], p["d_order"]) for p in r["curve"] if p.get("d_order") is not None]
    before = None
    for tokens, d_order in points:
        if d_order >= D_ORDER_TURN:
            if before is None:
                return tokens
            return before[0] + (tokens - before[0]) * (D_ORDER_TURN - before[1]) / (d_order - before[1])
        before = tokens, d_order
    return math.inf if points else None


def turn_of(runs):
    """The same of an arm's runs, for the table."""
    at = [turned(r) for r in runs]
    if None in at:
        return ""
    late = sum(map(math.isinf, at))
    if late == len(at):
        return f"> {min(r['tokens'] for r in runs) / 1e6:.2g}M"
    mean = np.mean([x for x in at if math.isfinite(x)])
    first = any(r["curve"][0].get("d_order", 0) >= D_ORDER_TURN for r in runs)
    return "< " * first + f"{mean / 1e6:.2g}M" + f" ({late} of {len(at)} later)" * (late > 0)


# ----------------------------------------------------------------------------------------------------- tables

def spread(values, digits=1):
    std = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{std}" if len(values) else "collapsed"


def signed(d, digits=1):
    """The difference with its plain 95% interval; "" where one side has no score left."""
    if math.isnan(d.d):
        return ""
    within = f" [{d.d - d.half:+.{digits}f}, {d.d + d.half:+.{digits}f}]" if math.isfinite(d.half) else ""
    return f"{d.d:+.{digits}f}" + within


def row_of(arm):
    """The arm's name as a row has it."""
    return arm + " (MobileBERT's transfer on a plain BERT)" * ("mobilebert" in arm)


def markdown(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def aligned(head, rows, width=80):
    """The same as text for a terminal: columns aligned, the last one cut to what is left of `width`."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(line if len(line) <= width else line[:width - 1] + "…" for line in lines)


def rate_of(runs):
    """Recipe and peak LR of an arm's runs."""
    recipe = runs[0].get("recipe", "paper")
    return f"{recipe} " * (recipe != "paper") + f"{runs[0]['peak_lr']:g}"


def score_rows(results, yardsticks):
    """[(budget, setting, name, runs, values, Difference or None)] of every row: values are the scores, averaged over
    the tasks that measure, of the pretraining seeds (of a single one, or of a yardstick: of its fine-tunings)."""
    tasks, found = judge.tasks_of(results, yardsticks), []
    for key, arms in groups(results).items():
        against = judge.differences(arms, yardsticks, tasks)
        for name, runs in arms.items():
            of = [runs[s] for s in sorted(runs)]
            found.append((key[2], key[:2], name, of, values_of(judge.arm(name, of, tasks)), against.get(name)))
    last = judge.differences(arms, yardsticks, tasks) if len(groups(results)) == 1 else {}
    for y in yardsticks:
        a = judge.yardstick_arm(y, tasks)
        values = values_of(a) if a else [float(np.mean(s)) for s in zip(*(y["scores"][t] for t in tasks), strict=True)]
        found.append((None, None, y["name"], y.get("runs", []), values, last.get(y["name"])))
    return found


def values_of(a):
    """The scores that a row shows: of each seed, or of a single seed's fine-tunings."""
    return a.means if len(a.means) > 1 else [x for of in a.scores for x in of]


def score_table(results, yardsticks=(), size=None):
    """Scores, mean ± standard deviation over pretraining seeds (of a single one over its fine-tuning runs), and the
    difference to the base row with its plain 95% interval and the word for it.  It holds nothing that depends on the
    machine's speed.  `yardsticks`: {name, runs: [as results], scores: {task: [percent]}}."""
    tasks, many = list(results[0]["scores"]), len(results[0]["scores"]) > 1
    used = judge.tasks_of(results, yardsticks)
    base, rows = base_of(next(iter(groups(results).values())), yardsticks), []
    for budget, kind, name, of, values, d in score_rows(results, yardsticks):
        arm = budget is not None
        val = [r["val"]["mlm"] for r in of if "mlm" in r.get("val", ())] if arm else []
        by_task = [spread(values_of(judge.arm(name, of, [t], given=not arm))) if of else
                   spread(next(y["scores"][t] for y in yardsticks if y["name"] == name)) for t in tasks]
        rows.append([amount(budget, of[0]["unit"]) if arm else "", setting(*kind) if arm else "", row_of(name),
                     rate_of(of) if arm else "", f"{np.mean([r['tokens'] for r in of]):,.0f}" if arm else "",
                     f"{np.mean([r['epochs'] for r in of]):.2g}" if arm else "", f"{np.mean(val):.2f}" if val else "",
                     turn_of(of) if arm else "", *by_task, *([spread(values)] if many else []),
                     signed(d) if d else "", d.says if d else ""])
    for limited in dict.fromkeys(unique is not None for unique, _, _ in groups(results)):
        paper = PAPER.get((size, limited), {}) if set(tasks) & set(PAPER_TASKS) else {}
        for name, (tokens, *values, average) in paper.items():
            of = dict(zip(PAPER_TASKS, values, strict=True))
            rows.append([f"the paper's: {PAPERS_HOURS[size, limited]} h, one A100, one seed",
                         "limited" if limited else "all", name, "", f"{tokens:.2g}", "", "", "",
                         *[of.get(task, "") for task in tasks], *([f"{average} (7 tasks)"] if many else []), "", ""])
    of = "the paper's 7" if set(PAPER_TASKS) <= set(tasks) and used == averaged(tasks) else "+".join(used)
    head = ["budget", "data", "arm", "peak LR", "tokens", "epochs", "val MLM", "turn", *tasks,
            *([f"average of {of}"] if many else []), f"Δ to {base} [95%]", "so"]
    unneeded = [1] * all(r["unique_tokens"] is None for r in results)   # one setting needs no column
    unneeded += [head.index("turn")] * all(turned(r) is None for r in results)
    head, *rows = ([cell for i, cell in enumerate(row) if i not in unneeded] for row in (head, *rows))
    return markdown(head, rows)


SHORT = {"ahead, outside the noise": "ahead", "behind, outside the noise": "behind", "a hint": "a hint",
         "level within 1 point": "level", "no interval": ""}


def screen_table(results, yardsticks=()):
    """The table as a terminal shows it: at most 80 columns."""
    base, blocks, rows = base_of(next(iter(groups(results).values())), yardsticks), [], []
    last = None
    for budget, kind, name, of, values, d in score_rows(results, yardsticks):
        where = f"{amount(budget, of[0]['unit'])} on {setting(*kind)}" if budget is not None else last
        if where != last:
            rows.append([where, "", "", ""])
        last = where
        word = SHORT.get(d.word, f"within {d.less:.1f}") if d else ""
        rows.append([f"  {name if len(name) < 28 else name[:26] + '…'}", spread(values), signed(d) if d else "", word])
    blocks.append(aligned(["", "score", f"Δ to {base} [95%]", ""], rows))
    return "\n\n".join(blocks)


def probes_of(r):
    """{name of a probe: value} of one pretrained model; {} of what has none."""
    if not r.get("probes"):
        return {}
    tasks = {f"{task} {kind}": found[kind] for task, found in r["probes"]["tasks"].items()
             for kind in ("linear", "similarity") if kind in found}
    names = dict(mlm="MLM", repeated="MLM, repeated", others="MLM, others", d_order="D_order")
    return tasks | {names[k]: v for k, v in r["probes"]["masked_lm"].items()}


def probe_table(results, yardsticks):
    """What the frozen encoders know: mean ± std over pretraining seeds; then each probe's best arm."""
    columns, rows, lines = list(dict.fromkeys(name for r in results for name in probes_of(r))), [], []

    def cells(runs):
        values = [[p[name] for p in map(probes_of, runs) if name in p] for name in columns]
        return [spread(v, digits_of(name)) if v else "" for name, v in zip(columns, values, strict=True)]
    for (*kind, budget), arms in groups(results).items():
        where = f"{amount(budget, results[0]['unit'])} on {setting(*kind)}"
        rows += [[where, name, *cells(runs.values())] for name, runs in arms.items()]
        lines += [line for column in columns for line in best_probe(arms, column, where)]
    rows += [["", y["name"], *cells(y["runs"])] for y in yardsticks if any(map(probes_of, y["runs"]))]
    return "\n\n".join([
        "Probes of the frozen encoders, no part of any average above. linear: a regression on the "
        "mean-pooled last hidden state, scored as the task is; similarity: Spearman of the cosine with the "
        "score, untrained; word order: have two neighbours in a block of 32 changed places; MLM: validation "
        "loss in nats, at masked tokens that also occur unmasked in their block (repeated) and at the others; "
        "D_order: what the order of the context is worth, in nats.",
        markdown(["budget", "arm", *columns], rows), *lines])


def digits_of(column):
    return 2 if column.startswith(("MLM", "D_order")) else 1            # nats, or percent


def best_probe(arms, column, where):
    """["Probe COLUMN at WHERE: the best arm and its lead over the base arm"], where there are two."""
    def value(r):
        return probes_of(r)[column] * (-1 if column.startswith("MLM") else 1)       # a loss: lowest is best
    of = {name: statistics.Arm(name, [[value(r)] for r in runs.values()])
          for name, runs in arms.items() if all(column in probes_of(r) for r in runs.values())}
    if len(of) < 2:
        return []
    best, second, *_ = sorted(of, key=lambda name: -np.mean(of[name].means))
    rival = base_of(of) if base_of(of) != best else second
    d = next(d for d in statistics.compare([*of.values()], rival) if d.name == best)
    return [f"Probe {column} at {where}: {best}; against {rival} {signed(d, digits_of(column))}, {d.says}."]


def cost_table(results, teacher_flops=None):
    """What the budget bought: means over seeds.  Seconds and rates are this machine's."""
    def mean(runs, key):
        return np.mean([r[key] for r in runs.values()])

    rows, timed = [], all(r.get("speed") for r in results)
    for (*kind, budget), arms in groups(results).items():
        for name, runs in arms.items():
            times = mean(runs, "tokens") / mean(arms[base_of(arms)], "tokens")
            rows.append([amount(budget, results[0]["unit"]), setting(*kind), row_of(name),
                         f"{mean(runs, 'tokens'):,.0f}", f"{times:.2f}",
                         f"{mean(runs, 'charged_seconds'):,.1f}", f"{mean(runs, 'tokens_per_second'):,.0f}",
                         f"{mean(runs, 'teacher_share'):.0%}", *prices(name, runs, budget, teacher_flops),
                         *[f"{mean(runs, 'speed'):.2f}" for _ in range(timed)]])
    return markdown(["budget", "data", "arm", "tokens", "x base", "charged s", "tokens/s", "in teacher",
                     "FLOPs", "with the teacher's",
                     *["machine's speed"] * timed], rows)


def prices(name, runs, budget, teacher_flops):
    """The FLOPs of one model, and with its teacher's pretraining; "" where that is not known."""
    row = judge.Row(name, [*runs.values()], budget, judge.needs_teacher(name))
    whole = row.flops + row.needs_teacher * (teacher_flops or 0)
    return f"{row.flops:.3g}", "" if row.needs_teacher and not teacher_flops else f"{whole:.3g}"


def comma_separated(results):
    """One line per pretrained model, as CSV."""
    fixed = ("strategy", "budget", "unit", "unique_tokens", "static_masks", "seed", "peak_lr", "steps",
             "tokens", "epochs", "charged_seconds", "tokens_per_second", "teacher_share")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*fixed, "val_mlm", *results[0]["scores"], "average"])
    for r in results:
        scores = [r["scores"][task] for task in results[0]["scores"]]
        writer.writerow([*(r[k] for k in fixed), r["val"].get("mlm"), *scores, r["average"]])
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------- verdict

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
        word = d.word.split(";")[0].replace("ahead, outside the noise", "ahead of it, outside the noise").replace(
            "behind, outside the noise", "behind it, outside the noise")
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


def resolution(results, seeds):
    """What so many seeds can tell apart at the spread of these results, in words; "" where none is known."""
    tasks = averaged(results[0]["scores"])
    known = [(d.wide, d.n) for arms in groups(results).values() for d in judge.differences(arms, (), tasks).values()
             if math.isfinite(d.wide)]
    if not known or seeds < 2:
        return ""
    able = sorted(wide * math.sqrt(n / seeds) for wide, n in known)
    return f"{seeds} seeds tell differences of about {able[len(able) // 2]:.1f} points from noise"


def remarks(results):
    """What the spreads and intervals mean here."""
    counts = sorted(len(runs) for arms in groups(results).values() for runs in arms.values())
    seeds, most = counts[0], counts[-1]
    if most > 1:
        of = f"{seeds} to {most}" if seeds < most else f"{seeds}"
        lines = [f"± is the standard deviation over {of} pretraining seeds. Δ has a plain 95% interval for other "
                 f"seeds and, where predictions were kept, other dev examples; its word is corrected for all rows of "
                 f"a budget (Dunnett). How it is judged: docs/judged.md."]
    else:
        lines = ["One pretraining seed per arm: ± is the standard deviation over the fine-tunings of one pretrained "
                 "model, and no difference here can be told from noise; give --seeds 3 or more."]
    devices = sorted({str(r["device"]) for r in results})
    if len(devices) > 1:
        lines.append(f"Beware: the runs were made on different devices ({', '.join(devices)}).")
    return lines


def spent_before(results):
    """What of the budget was spent before the first step, on the data that a run reads: a line for all arms alike."""
    lines, unit = {}, results[0]["unit"]
    for (*kind, budget), arms in groups(results).items():
        for name, of in arms.items():           # older records have it under "offline"
            spent = np.mean([r.get("spent_before") or r.get("offline", {}).get("charge", 0) for r in of.values()])
            if spent or name.startswith("miniplm"):
                line = (f"of {amount(budget, unit)} on {setting(*kind)}, {spent / budget:.0%} was spent before the "
                        "first step." + " This unit charges steps alone." * (unit not in ("flops", "hours")))
                lines.setdefault(line, []).append(row_of(name))
    return [f"{', '.join(names)}: {line}" for line, names in lines.items()]


def drift(results):
    """A warning where the arms ran at different speeds under a budget in hours."""
    timed = [r for r in results if r.get("speed")]
    means = {name: float(np.mean([r["speed"] for r in timed if r["strategy"] == name]))
             for name in dict.fromkeys(r["strategy"] for r in timed)}
    if not means or max(means.values()) <= 1.05 * min(means.values()):
        return []
    return ["Beware: these arms did not have the same budget. A fixed step, timed before and after each run, "
            "went at " + ", ".join(f"{value:.2f} ({name})" for name, value in means.items())
            + " times the first run's speed, so an hour was not the same for all: give --budget-flops."]


# ----------------------------------------------------------------------------------------------------- figure

# The colours of Okabe and Ito without the yellow, dashes, markers with their SVG paths: 7 x 4 x 5 curves differ
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
DASHES = ((), (6, 2), (2, 2), (8, 2, 2, 2))
MARKERS = {"o": "M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0", "s": "M-3,-3h6v6h-6z", "^": "M0,-4L4,3H-4z",
           "D": "M0,-4L4,0L0,4L-4,0z", "v": "M0,4L4,-3H-4z"}


def curve_look(i):
    """Colour, dash and marker of the i-th curve."""
    return dict(colour=COLOURS[i % len(COLOURS)], dash=DASHES[i % len(DASHES)],
                marker=[*MARKERS][i % len(MARKERS)])


def figure(results, yardsticks, path, teacher_flops=None):
    """Score against total FLOPs: a line per arm, the teacher charged (solid) and free (faint), its band the 95%
    interval of the arm's mean; yardsticks as horizontal lines, named at the right edge."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    tasks = judge.tasks_of(results, yardsticks)
    fig, axis = plt.subplots(layout="constrained", figsize=(8, 5))
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
                        row = judge.Row(name, [*arms[name].values()], key[2], judge.needs_teacher(name))
                        points.append((row.flops, float(np.mean(a.means)), statistics.half_width(table, name)))
            if not points or not all(math.isfinite(x) for x, _, _ in points):
                continue
            x, y, half = map(np.array, zip(*sorted(points), strict=True))
            look = curve_look(i)
            style = dict(color=look["colour"], marker=look["marker"], markersize=5, linewidth=1.8,
                         markerfacecolor=look["colour"] if kind == kinds[0] else "white")
            charged = x + teacher_flops if teacher_flops and judge.needs_teacher(name) else None
            label = name + (f", {setting(*kind)}" if len(kinds) > 1 else "")
            for at, alpha in ((x, 1.0),) if charged is None else ((charged, 1.0), (x, 0.35)):
                axis.plot(at, y, **style, alpha=alpha, label=label if alpha == 1 else None)
                if np.isfinite(half).all():
                    axis.fill_between(at, y - half, y + half, color=look["colour"], alpha=0.13 * alpha, linewidth=0)
                    axis.vlines(at, y - half, y + half, color=look["colour"], alpha=0.5 * alpha)
    heights = sorted((float(np.mean(values)), name) for budget, _, name, _, values, _ in score_rows(results, yardsticks)
                     if budget is None and len(values))
    axis.set_xscale("log")
    low, high = axis.get_ylim()
    low = min([low, *(h - 1 for h, _ in heights)])
    axis.set_ylim(low, max([high, *(h + 1 for h, _ in heights)]))
    gap, at = (axis.get_ylim()[1] - axis.get_ylim()[0]) / 28, -math.inf
    for height, name in heights:                                        # no name over another, none over a line
        axis.axhline(height, color="0.55", linewidth=0.9, zorder=0)
        at = max(at + gap, height)
        axis.annotate(f"{name} {height:.1f}", (1.01, at), xycoords=("axes fraction", "data"), fontsize=9, color="0.25",
                      va="center", annotation_clip=False)
    axis.set(xlabel="total FLOPs of a student" + (", its teacher's pretraining charged (solid) or free (faint)"
                                                  if teacher_flops else ", its teacher's pretraining not charged"),
             ylabel="score, %")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=4, frameon=False)
    saved(fig, [axis], path)
    plt.close(fig)


def saved(fig, panels, path):
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
    fig.savefig(path, dpi=150, metadata=dict(Software="nanoKD"))
