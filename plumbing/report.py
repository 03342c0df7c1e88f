"""From the results of many runs to tables, a figure and a verdict: statistics only, nothing is trained here.

Read it with compare.py.  A result is a dict, one per pretrained model: what it was (`strategy`, `budget`, `unit`,
`unique_tokens`, `static_masks`, `seed`), what it cost (`tokens`, `epochs`, `charged_seconds`, `teacher_share`, ...) and
what it scored (`scores`: {task: percent}, `average` over them).

The arms share their seeds (initial weights, data order, masks), so an arm's difference to the base arm is taken seed by
seed, and its 95% interval is Student's t over those differences (n - 1 degrees of freedom).  It speaks of other seeds,
on these dev sets.  The verdict looks at the best of several arms, so it asks more: an interval at 1 - 0.05 / k for k
comparisons (Bonferroni).
"""
import csv
import functools
import io
import math
from collections import Counter

import numpy as np

# arXiv 2404.19319, Table 2: GLUE dev, one seed, one A100; tokens, then QNLI, SST-2, MNLI, MRPC, QQP, RTE, CoLA, average
PAPER_TASKS = ("qnli", "sst2", "mnli", "mrpc", "qqp", "rte", "cola")
PAPERS_HOURS = {("6L768", False): 4, ("12L1024", False): 11.3, ("6L768", True): 24}
PAPER = {                                                               # {(size, limited data): rows}
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


# ---------------------------------------------------------------------------------------------------- statistics

@functools.cache
def t_quantile(p, df):
    """x with P(t < x) = p of Student's t with `df` degrees of freedom, for 0.5 < p < 1."""
    # with t = sqrt(df) tan(a), the density is proportional to cos(a)^(df - 1) on (-pi/2, pi/2)
    a = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(a) ** (df - 1)
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(df) * math.tan(np.interp((p - 0.5) * 2 * area[-1], area, a))


def interval(differences, comparisons=1):
    """(mean, half width) of the 95% interval of the mean of paired differences, Bonferroni-corrected for so many
    comparisons; the half width is infinite for fewer than two."""
    n = len(differences)
    if n < 2:
        return float(np.mean(differences)), math.inf
    t = t_quantile(1 - 0.025 / comparisons, n - 1)
    return float(np.mean(differences)), float(t * np.std(differences, ddof=1) / math.sqrt(n))


def spread(values):
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def signed(mean, half):
    return f"{mean:+.1f}" + (f" [{mean - half:+.1f}, {mean + half:+.1f}]" if math.isfinite(half) else "")


# ------------------------------------------------------------------------------------------------------ grouping

def groups(results):
    """{(unique_tokens, static_masks, budget): {strategy: {seed: result}}}: all of the data first, budgets rising."""
    found = {}
    for r in sorted(results, key=lambda r: (-(r["unique_tokens"] or math.inf), r["static_masks"], r["budget"])):
        group = found.setdefault((r["unique_tokens"], r["static_masks"], r["budget"]), {})
        group.setdefault(r["strategy"], {})[r["seed"]] = r
    return found


def base_of(arms):
    """The arm that the others are compared with."""
    return "no_kd" if "no_kd" in arms else next(iter(arms))


def differences(arm, other, value=lambda r: r["average"]):
    """arm - other, seed by seed, over the seeds that both have."""
    return [value(arm[seed]) - value(other[seed]) for seed in arm if seed in other]


def row_of(arm):
    """The arm's name as a row has it."""
    return arm + " (MobileBERT's transfer on a plain BERT)" * ("mobilebert" in arm)


def setting(unique_tokens, static_masks):
    return ("all of the data" if unique_tokens is None else f"{unique_tokens:,} unique tokens") + (
        ", static masks" if static_masks else "")


def amount(budget, unit):
    if unit == "hours":
        return f"{budget:g} h" if budget >= 0.1 else f"{budget * 3600:.0f} s"
    return f"{budget:g} FLOPs".replace("e+", "e") if unit == "flops" else f"{budget:,.0f} {unit}"


# -------------------------------------------------------------------------------------------------------- tables

def markdown(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def score_table(results, yardsticks=(), size=None):
    """Scores, mean ± standard deviation over pretraining seeds, and the difference to the base arm.  It holds nothing
    that depends on the machine's speed.  `yardsticks`: {name, scores: {task: [percent]}, averages}."""
    tasks = list(results[0]["scores"])
    many = len(tasks) > 1
    rows = []
    for (unique, static, budget), arms in groups(results).items():
        base = base_of(arms)
        for name, runs in arms.items():
            first = next(iter(runs.values()))
            val = [r["val"]["mlm"] for r in runs.values() if "mlm" in r["val"]]
            delta = "" if name == base else signed(*interval(differences(runs, arms[base])))
            rows.append([amount(budget, first["unit"]), setting(unique, static), row_of(name), f"{first['peak_lr']:g}",
                         f"{np.mean([r['tokens'] for r in runs.values()]):,.0f}",
                         f"{np.mean([r['epochs'] for r in runs.values()]):.2g}", f"{np.mean(val):.2f}" if val else "",
                         *[spread([r["scores"][task] for r in runs.values()]) for task in tasks],
                         *([spread([r["average"] for r in runs.values()])] if many else []), delta])
    for limited in dict.fromkeys(unique is not None for unique, _, _ in groups(results)):
        paper = PAPER.get((size, limited), {}) if set(tasks) & set(PAPER_TASKS) else {}
        for name, (tokens, *values, average) in paper.items():
            of = dict(zip(PAPER_TASKS, values, strict=True))
            rows.append([f"the paper's: {PAPERS_HOURS[size, limited]} h, one A100, one seed",
                         "limited" if limited else "all", name, "", f"{tokens:.2g}", "", "",
                         *[of.get(task, "") for task in tasks], *([f"{average} (7 tasks)"] if many else []), ""])
    for y in yardsticks:
        rows.append(["", "", y["name"], "", "", "", "", *[spread(y["scores"][task]) for task in tasks],
                     *([spread(y["averages"])] if many else []), ""])
    head = ["budget", "data", "arm", "peak LR", "tokens", "epochs", "val MLM", *tasks,
            *(["average" + " of the paper's 7" * (set(PAPER_TASKS) <= set(tasks))] if many else []),
            f"Δ to {base_of(next(iter(groups(results).values())))} [95%]"]
    if all(r["unique_tokens"] is None for r in results):                # one setting needs no column
        head.pop(1)
        for row in rows:
            row.pop(1)
    return markdown(head, rows)


def cost_table(results):
    """What the budget bought: means over seeds.  Seconds and rates are this machine's."""
    rows = []
    for (unique, static, budget), arms in groups(results).items():
        tokens = np.mean([r["tokens"] for r in arms[base_of(arms)].values()])
        for name, runs in arms.items():
            def mean(key, runs=runs):
                return np.mean([r[key] for r in runs.values()])
            rows.append([amount(budget, next(iter(runs.values()))["unit"]), setting(unique, static), row_of(name),
                         f"{mean('tokens'):,.0f}", f"{mean('tokens') / tokens:.2f}", f"{mean('charged_seconds'):,.1f}",
                         f"{mean('tokens_per_second'):,.0f}", f"{mean('teacher_share'):.0%}",
                         *([f"{mean('speed'):.2f}"] if results[0].get("speed") else [])])
    return markdown(["budget", "data", "arm", "tokens", "x base", "charged s", "tokens/s", "in teacher",
                     *(["machine's speed"] if results[0].get("speed") else [])], rows)


def comma_separated(results):
    """One line per pretrained model, as CSV."""
    fixed = ("strategy", "budget", "unit", "unique_tokens", "static_masks", "seed", "peak_lr", "steps", "tokens",
             "epochs", "charged_seconds", "tokens_per_second", "teacher_share")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*fixed, "val_mlm", *results[0]["scores"], "average"])
    for r in results:
        writer.writerow([*(r[key] for key in fixed), r["val"].get("mlm"), *r["scores"].values(), r["average"]])
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------- verdict

def verdict(results, yardsticks=()):
    """The table in plain words: the best arm of each group and whether its lead is noise, also over the untrained
    student; then where curves cross; then what repeated data and static masks did."""
    lines, found = [], groups(results)
    untrained = {seed: dict(average=v) for y in yardsticks if y["name"] == "random init"
                 for seed, v in enumerate(y["averages"])}
    for (unique, static, budget), arms in found.items():
        ranked = sorted(arms, key=lambda name: -np.mean([r["average"] for r in arms[name].values()]))
        best, base = ranked[0], base_of(arms)
        rivals = {name: arms[name] for name in (base, *ranked[1:2]) if name != best}      # and the runner-up
        rivals |= {"random init": untrained} if untrained else {}
        leads = [lead_in_words(differences(arms[best], runs), name, len(rivals | arms) - 1)
                 for name, runs in rivals.items()]
        mean = spread([r["average"] for r in arms[best].values()])
        lines.append(f"At {amount(budget, results[0]['unit'])} on {setting(unique, static)}, {best} scores highest: "
                     f"{'; '.join([mean, *leads])}.")
    return lines + crossings(found, results[0]["unit"]) + repetition(found)


def lead_in_words(lead, rival, comparisons):
    """'against no_kd +1.2 [+0.3, +2.1], outside the noise': the interval is the plain one, the judgement corrected."""
    mean, half = interval(lead)
    text = f"against {rival} {signed(mean, half)}, "
    if not math.isfinite(half):
        return text + "of one seed"
    if abs(mean) > interval(lead, comparisons)[1]:
        return text + ("outside the noise" if mean > 0 else "behind it, outside the noise")
    if abs(mean) > half:
        return text + f"a hint (not outside the noise when corrected for {comparisons} comparisons)"
    return text + "inside the noise"


def crossings(found, unit):
    """Where an arm's mean overtakes the base arm's between two budgets, on the straight line over log budget."""
    lines = []
    budgets = {}
    for (unique, static, budget), arms in found.items():
        budgets.setdefault((unique, static), []).append((budget, arms))
    for (unique, static), points in budgets.items():
        for (low, before), (high, after) in zip(points, points[1:], strict=False):
            for name in before:
                base = base_of(before)
                if name == base or name not in after or base not in after:
                    continue
                leads = [interval(differences(arms[name], arms[base])) for arms in (before, after)]
                d0, d1 = (mean for mean, _ in leads)
                half = max(half for _, half in leads)
                noise = (" (of one seed)" if math.isinf(half) else " (inside the noise)" * any(
                    abs(mean) <= half for mean, half in leads))
                if d0 * d1 < 0:
                    at = float(f"{low * (high / low) ** (d0 / (d0 - d1)):.2g}")
                    lines.append(f"On {setting(unique, static)}, the mean of {name} "
                                 f"{'overtakes' if d1 > 0 else 'falls behind'} {base}'s at about {amount(at, unit)}, "
                                 f"between {amount(low, unit)} and {amount(high, unit)}{noise}.")
    return lines


def repetition(found):
    """What fewer unique tokens and static masks did to the base arm and to the others' leads over it, seed by seed."""
    lines = []
    for (unique, static, budget), arms in found.items():
        for other in ((None, False, budget), (unique, False, budget)):
            before = found.get(other, {})
            base = base_of(arms)
            if other == (unique, static, budget) or (other[0] is None) == static or base not in before:
                continue            # the limited data against all of it, its static masks against its fresh ones
            epochs = np.mean([r["epochs"] for r in arms[base].values()])
            parts = [f"{base} changes by {signed(*interval(differences(arms[base], before[base])))}"]
            for name in arms:
                if name != base and name in before:
                    seeds = [s for s in arms[name] if all(s in a for a in (arms[base], before[name], before[base]))]
                    change = [arms[name][s]["average"] - arms[base][s]["average"]
                              - before[name][s]["average"] + before[base][s]["average"] for s in seeds]
                    parts.append(f"the lead of {name} over it by {signed(*interval(change))}")
            lines.append(f"At {amount(budget, next(iter(arms[base].values()))['unit'])}, {setting(unique, static)} "
                         f"({epochs:.1f} epochs of {base}) against {setting(*other[:2])}: {', '.join(parts)}.")
    return lines


def remarks(results):
    """What the spreads and intervals mean here, and what went wrong in fine-tuning."""
    seeds, first = len({r["seed"] for r in results}), next(iter(results[0]["tasks"].values()))
    if seeds > 1:
        lines = [f"± is the standard deviation over {seeds} pretraining seeds, each fine-tuned with its own; Δ is "
                 f"the mean of the differences seed by seed, in brackets its 95% interval (Student's t, {seeds - 1} "
                 f"degree{'s' * (seeds > 2)} of freedom). Both speak of other seeds, on the same teacher and dev sets."]
    elif len(results[0]["tasks"]) == 1 and first["metric"] == "accuracy" and len(first["scores"]) > 1:
        runs, p = len(first["scores"]), np.mean([r["average"] for r in results]) / 100
        dev = 100 * math.sqrt(p * (1 - p) / first["n"])
        tuning = math.sqrt(np.mean([t["std"] ** 2 for r in results for t in r["tasks"].values()]) / runs)
        lines = [f"One pretraining seed per arm. A score's standard error is {tuning:.1f} points from its {runs} "
                 f"fine-tuning seeds and {dev:.1f} from the {first['n']:,} dev examples: a difference under "
                 f"{2 * math.sqrt(2 * (tuning ** 2 + dev ** 2)):.1f} points is noise, a larger one is a hint at most."]
    else:
        lines = ["One pretraining seed per arm: no difference here can be told from noise; give --seeds 3 or more."]
    collapsed = Counter(task for r in results for task, t in r["tasks"].items() for _ in range(t["collapsed"]))
    if collapsed:
        lines.append(f"Fine-tuning runs that predicted a single class, of {len(results) * len(first['scores'])} per "
                     f"task: {', '.join(f'{task} {n}' for task, n in collapsed.items())}.")
    devices = {f"{r['device']}" for r in results}
    if len(devices) > 1:
        lines.append(f"Beware: the runs were made on different devices ({', '.join(sorted(devices))}).")
    return lines


def drift(results):
    """A warning where the arms ran at different speeds under a budget in hours."""
    speeds = {}
    for r in results:
        if r.get("speed"):
            speeds.setdefault(r["strategy"], []).append(r["speed"])
    means = {name: float(np.mean(values)) for name, values in speeds.items()}
    if not means or max(means.values()) <= 1.05 * min(means.values()):
        return []
    return ["Beware: these arms did not have the same budget. A fixed step, timed before and after each run, went at "
            + ", ".join(f"{value:.2f} ({name})" for name, value in means.items())
            + " times the first run's speed, so an hour was not the same for all: give --budget-flops."]


# -------------------------------------------------------------------------------------------------------- figure

STYLES = [dict(color=color, linestyle=line, marker=marker, markerfacecolor=face) for color, line, marker, face in (
    ("black", "-", "o", "black"), ("0.45", "--", "s", "0.45"), ("black", ":", "^", "white"),
    ("0.45", "-.", "D", "white"), ("0.2", (0, (1, 4)), "v", "0.2"), ("0.6", "-", "x", "0.6"))]


def figure(results, yardsticks, path):
    """Left: score of each arm per budget and data setting, ± standard deviation over pretraining seeds.  Middle: score
    against the tokens that the budget bought, in the first data setting.  Right: validation MLM loss against charged
    seconds.  Black and white."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = groups(results)
    names = list(dict.fromkeys(r["strategy"] for r in results))
    style = {name: STYLES[i % len(STYLES)] for i, name in enumerate(names)}
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12 + 0.5 * len(found), 4), layout="constrained",
                                              width_ratios=(max(1.0, 0.45 * len(found)), 1, 1))
    keys, unit = list(found), results[0]["unit"]
    for i, name in enumerate(names):
        for kind in dict.fromkeys(key[:2] for key in keys):             # a curve per data setting
            at = [key for key in keys if key[:2] == kind and name in found[key]]
            values = [[r["average"] for r in found[key][name].values()] for key in at]
            mean, std = np.array([(np.mean(v), np.std(v, ddof=1) if len(v) > 1 else 0.0) for v in values]).T
            x = np.array([keys.index(key) for key in at]) + 0.1 * (i - (len(names) - 1) / 2)
            tokens = [np.mean([r["tokens"] for r in found[key][name].values()]) / 1e6 for key in at]
            for axis, across in ((left, x), (middle, tokens))[:1 if kind != keys[0][:2] else 2]:
                axis.plot(across, mean, label=name if kind == keys[0][:2] else None, **style[name])
                if len(at) > 1:
                    axis.fill_between(across, mean - std, mean + std, color="0.5", alpha=0.12, linewidth=0)
                else:
                    axis.errorbar(across, mean, yerr=std, capsize=3, color=style[name]["color"])
    left.set_xticks(range(len(keys)), [
        f"{amount(budget, unit)}\n" + ("all data" if unique is None else f"{unique / 1e6:g}M ids") + "\nstatic" * static
        for unique, static, budget in keys], fontsize=8)
    for y, line in zip(yardsticks, (":", "--"), strict=False):
        left.axhline(np.mean(y["averages"]), color="0.6", linestyle=line, linewidth=1)
        left.annotate(y["name"], (0.01, np.mean(y["averages"])), xycoords=("axes fraction", "data"), fontsize=8,
                      va="bottom", color="0.3")
    left.set(ylabel="score, %", xlabel="budget and data; bands and bars: ± std over pretraining seeds")
    left.legend(fontsize=8)
    middle.set(xlabel="million tokens", ylabel="score, %")
    budget = max(budget for _, _, budget in keys)
    for r in results:
        if (r["unique_tokens"], r["static_masks"], r["budget"]) == (*keys[0][:2], budget) and r["curve"]:
            seconds, loss = zip(*r["curve"], strict=True)
            right.plot(seconds, loss, linewidth=1, label=r["strategy"] if r["seed"] == results[0]["seed"] else None,
                       **style[r["strategy"]] | dict(markersize=3))
    right.set(xlabel=f"charged seconds of {amount(budget, unit)}", ylabel="validation MLM loss (arms with an LM head)")
    if right.has_data():
        right.legend(fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)
