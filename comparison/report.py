"""From the results of many runs to tables, a figure and a verdict: statistics only, nothing is trained here.

Read it with compare.py.  A result is a dict, one per pretrained model: what it was (`strategy`, `budget`,
`unit`, `unique_tokens`, `static_masks`, `seed`), what it cost (`tokens`, `epochs`, `charged_seconds`,
`teacher_share`, ...) and what it scored (`scores`: {task: percent}, `average` over them; `tasks`: {task:
{scores of each fine-tuning run, metric, n, majority: the constant answer's score, ...}}).

The arms share their seeds (initial weights, data order, masks), so an arm's difference to the base arm is
taken seed by seed, and its 95% interval is Student's t over those differences (n - 1 degrees of freedom).  It
speaks of other seeds, on these dev sets.  The verdict looks at the best of several arms, so it asks more: an
interval at 1 - 0.05 / k for k comparisons (Bonferroni).

An average is worth what its tasks measure: one on which neither the teacher nor any arm is above the constant
answer and the untrained student outside the noise only adds noise, so it is named, and a
second average leaves it out.
"""
import csv
import functools
import io
import math
from collections import Counter

import numpy as np

from plumbing.diagnose import D_ORDER_TURN
from plumbing.glue import PAPER as PAPER_TASKS

LAYERS = "the teacher's layers, untrained"          # the yardstick of every arm that starts from them
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


# ------------------------------------------------------------------------------------------------- statistics

@functools.cache
def t_quantile(p, df):
    """x with P(t < x) = p of Student's t with `df` degrees of freedom, for 0.5 < p < 1."""
    # with t = sqrt(df) tan(a), the density is proportional to cos(a)^(df - 1) on (-pi/2, pi/2)
    a = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(a) ** (df - 1)
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(df) * math.tan(np.interp((p - 0.5) * 2 * area[-1], area, a))


def interval(differences, comparisons=1):
    """(mean, half width) of the 95% interval of the mean of paired differences, Bonferroni-corrected for so
    many comparisons; the half width is infinite for fewer than two."""
    n = len(differences)
    half = half_width(np.std(differences, ddof=1), n, comparisons) if n > 1 else math.inf
    return float(np.mean(differences)), float(half)


def half_width(std, n, comparisons=1):
    return t_quantile(1 - 0.025 / comparisons, n - 1) * std / math.sqrt(n)


def seeds_for(differences, points=1.0):
    """The number of seeds from which on a mean difference of so many points is outside its 95% interval."""
    std = np.std(differences, ddof=1)
    n = max(2, math.ceil((1.96 * std / points) ** 2))
    while half_width(std, n) >= points:
        n += 1
    return n


def spread(values, digits=1):
    std = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{std}"


def signed(mean, half, digits=1):
    within = f" [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]" if math.isfinite(half) else ""
    return f"{mean:+.{digits}f}" + within


# --------------------------------------------------------------------------------------------------- grouping

def groups(results):
    """{(unique_tokens, static_masks, budget): {strategy: {seed: result}}}: all data first, budgets rising."""
    found = {}
    for r in results:
        group = found.setdefault((r["unique_tokens"], r["static_masks"], r["budget"]), {})
        group.setdefault(r["strategy"], {})[r["seed"]] = r
    return dict(sorted(found.items(), key=lambda item: (-(item[0][0] or math.inf), *item[0][1:])))


def base_of(arms):
    """The arm that the others are compared with."""
    return "no_kd" if "no_kd" in arms else next(iter(arms))


def averaged(tasks):
    """The tasks that the average is over: the paper's seven if they are all there, else all there are."""
    return [t for t in PAPER_TASKS if t in tasks] if set(PAPER_TASKS) <= set(tasks) else list(tasks)


def over(tasks):
    """The mean of a result's scores on these tasks, as a function of the result."""
    return lambda r: float(np.mean([r["scores"][task] for task in tasks]))


def values_of(runs, tasks):
    """[mean over the tasks] per pretraining seed; of a single one, per fine-tuning run."""
    if len(runs) > 1:
        return [over(tasks)(r) for r in runs]
    return list(np.mean([runs[0]["tasks"][task]["scores"] for task in tasks], 0))


def differences(arm, other, value=lambda r: r["average"]):
    """arm - other, seed by seed, over the seeds that both have."""
    return [value(arm[seed]) - value(other[seed]) for seed in arm if seed in other]


def leads_of(found):
    """(group, arm, base arm, their differences) of each arm but the base."""
    return [(key, name, base_of(arms), differences(runs, arms[base_of(arms)])) for key, arms in found.items()
            for name, runs in arms.items() if name != base_of(arms)]


def row_of(arm):
    """The arm's name as a row has it, with the ledger of what was paid before it began."""
    if arm.endswith("+amortised"):
        return arm.removesuffix("+amortised") + " (AMORTISED)"
    if arm.startswith("miniplm") or arm.endswith("+cached"):
        return arm + " (FULL)"
    return arm + " (MobileBERT's transfer on a plain BERT)" * ("mobilebert" in arm)


# ----------------------------------------------------------------------------------------------------- floors

def constant_answer(results):
    """The yardstick of no model at all: the class that is most frequent in dev, or one score for all."""
    scores = {task: t["majority"] for task, t in results[0]["tasks"].items()}
    return dict(name="constant answer", scores={task: [score] for task, score in scores.items()},
                averages=[over(averaged(scores))(dict(scores=scores))])


def above(leads, error):
    """The names whose mean lead is above 0 outside the noise, of {name: leads}; None: no spread is known.

    The spread is pooled over the names (few seeds know their own badly), corrected for as many comparisons;
    to it comes `error`, the standard error from the size of the dev set."""
    df = sum(len(values) - 1 for values in leads.values())
    if not df:
        return None
    std = math.sqrt(sum(len(values) * np.var(values) for values in leads.values()) / df)
    t = t_quantile(1 - 0.025 / len(leads), df)
    return {name for name, values in leads.items()
            if np.mean(values) > math.hypot(t * std / math.sqrt(len(values)), 2 * error)}


def measuring(results, yardsticks):
    """(tasks that measure, tasks that do not): on these neither the teacher nor any arm is above the constant
    answer and the untrained student outside the noise.  None where one run of each cannot tell."""
    runs_of = {y["name"]: y["runs"] for y in yardsticks if "runs" in y}
    if len(runs_of) < 2:
        return None
    candidates = {(key, name): [runs[seed] for seed in sorted(runs)] for key, arms in groups(results).items()
                  for name, runs in arms.items()} | dict(teacher=runs_of["teacher"])
    measures, nothing = [], []
    for task, t in results[0]["tasks"].items():
        over_constant, over_untrained = {}, {}
        for name, runs in candidates.items():
            values = values_of(runs, [task])
            untrained = values_of(runs_of["random init"][:len(runs)], [task])   # of the same seeds
            over_constant[name] = [v - t["majority"] for v in values]
            over_untrained[name] = [v - u for v, u in zip(values, untrained, strict=False)]
        floor = max(t["majority"], np.mean(values_of(runs_of["random init"], [task]))) / 100
        share = t["metric"] in ("accuracy", "f1")     # the others are correlations, whose error at 0 is this:
        error = 100 * math.sqrt((floor * (1 - floor) if share else 1) / t["n"])
        both = above(over_constant, error), above(over_untrained, error)
        if None in both:
            return None
        (measures if both[0] & both[1] else nothing).append(task)
    return measures, nothing


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


def setting(unique_tokens, static_masks):
    return ("all of the data" if unique_tokens is None else f"{unique_tokens:,} unique tokens") + (
        ", static masks" if static_masks else "")


def amount(budget, unit):
    if unit == "hours":
        return f"{budget:g} h" if budget >= 0.1 else f"{budget * 3600:.0f} s"
    return f"{budget:g} FLOPs".replace("e+", "e") if unit == "flops" else f"{budget:,.0f} {unit}"


# ----------------------------------------------------------------------------------------------------- tables

def markdown(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def score_table(results, yardsticks=(), size=None):
    """Scores, mean ± standard deviation over pretraining seeds (of a single one over its fine-tuning runs),
    and the difference to the base arm, with the seeds that 1 point would need.  It holds nothing that depends
    on the machine's speed.  `yardsticks`: {name, scores: {task: [percent]}, averages, runs:
    [as results, per seed]}."""
    tasks = list(results[0]["scores"])
    sets, many = [averaged(tasks), *second_average(results, yardsticks)], len(tasks) > 1
    rows = []
    for (unique, static, budget), arms in groups(results).items():
        base = base_of(arms)
        for name, runs in arms.items():
            of = list(runs.values())
            val = [r["val"]["mlm"] for r in of if "mlm" in r["val"]]
            rows.append([amount(budget, of[0]["unit"]), setting(unique, static), row_of(name),
                         f"{of[0]['peak_lr']:g}", f"{np.mean([r['tokens'] for r in of]):,.0f}",
                         f"{np.mean([r['epochs'] for r in of]):.2g}", f"{np.mean(val):.2f}" if val else "",
                         turn_of(of), *[spread(values_of(of, [task])) for task in tasks]])
            for names in sets:
                lead = differences(runs, arms[base], over(names))
                rows[-1] += [spread(values_of(of, names))] * many + (
                    ["", ""] if name == base else
                    [signed(*interval(lead)), seeds_for(lead) if len(lead) > 1 else ""])
    for limited in dict.fromkeys(unique is not None for unique, _, _ in groups(results)):
        paper = PAPER.get((size, limited), {}) if set(tasks) & set(PAPER_TASKS) else {}
        for name, (tokens, *values, average) in paper.items():
            of = dict(zip(PAPER_TASKS, values, strict=True))
            rows.append([f"the paper's: {PAPERS_HOURS[size, limited]} h, one A100, one seed",
                         "limited" if limited else "all", name, "", f"{tokens:.2g}", "", "", "",
                         *[of.get(task, "") for task in tasks], *([f"{average} (7 tasks)"] if many else []),
                         "", "", *["", "", ""] * (len(sets) - 1)])
    single = len({r["seed"] for r in results}) == 1
    for y in yardsticks:
        runs = y.get("runs", []) if single else []      # as the arms: fine-tuning runs of one model
        rows.append(["", "", y["name"], "", "", "", "", "",
                     *[spread(values_of(runs, [task]) if runs else y["scores"][task]) for task in tasks]])
        for names in sets:
            values = values_of(runs, names) if runs else np.mean([y["scores"][task] for task in names], 0)
            rows[-1] += [spread(values)] * many + ["", ""]
    base = base_of(next(iter(groups(results).values())))
    head = ["budget", "data", "arm", "peak LR", "tokens", "epochs", "val MLM", "turn", *tasks]
    for i, names in enumerate(sets):
        of = "+".join(names) if i else "the paper's 7" * (set(PAPER_TASKS) <= set(tasks))
        head += ["average" + f" of {of}" * bool(of)] * many + [f"Δ to {base} [95%]", "n for 1 point"]
    unneeded = [1] * all(r["unique_tokens"] is None for r in results)   # one setting needs no column
    unneeded += [head.index("turn")] * all(turned(r) is None for r in results)
    head, *rows = ([cell for i, cell in enumerate(row) if i not in unneeded] for row in (head, *rows))
    return markdown(head, rows)


def second_average(results, yardsticks):
    """[the averaged tasks that measure], where that is some of them but not all; else []."""
    found = measuring(results, yardsticks)
    names = [task for task in averaged(results[0]["scores"]) if found and task in found[0]]
    return [names] if 0 < len(names) < len(averaged(results[0]["scores"])) else []


def probes_of(r):
    """{name of a probe: value} of one pretrained model."""
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
    rows += [["", y["name"], *cells(y["runs"])] for y in yardsticks if "runs" in y]
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
    of = {name: runs for name, runs in arms.items() if all(column in probes_of(r) for r in runs.values())}
    if len(of) < 2:
        return []
    best, second, *_ = sorted(of, key=lambda name: -np.mean([value(r) for r in of[name].values()]))
    rival = base_of(of) if base_of(of) != best else second
    lead = lead_in_words(differences(of[best], of[rival], value), rival, len(of) - 1, digits_of(column))
    return [f"Probe {column} at {where}: {best}; {lead}."]


def cost_table(results):
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
                         f"{mean(runs, 'teacher_share'):.0%}",
                         *[f"{mean(runs, 'speed'):.2f}" for _ in range(timed)]])
    return markdown(["budget", "data", "arm", "tokens", "x base", "charged s", "tokens/s", "in teacher",
                     *["machine's speed"] * timed], rows)


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

def verdict(results, yardsticks=()):
    """The table in plain words: the tasks that measure nothing; the best arm of each group and whether its
    lead is noise, also over the untrained student, and the same over the tasks that measure; then where
    curves cross; then what repeated data and static masks did."""
    found, lines = groups(results), []
    told = measuring(results, yardsticks)
    if told and told[1]:
        lines.append(f"Measures nothing here: {', '.join(told[1])}: neither the teacher nor any arm is above "
                     f"the constant answer and the random init outside the noise."
                     + " That is every task: the averages below rank noise." * (not told[0]))
    lines += best_arms(found, yardsticks, averaged(results[0]["scores"]), "At")
    for names in second_average(results, yardsticks):
        lines += best_arms(found, yardsticks, names, f"Over {'+'.join(told[0])}, which measure, at")
    return lines + crossings(found, results[0]["unit"]) + repetition(found)


def best_arms(found, yardsticks, tasks, where):
    """One line per group: its best arm by the mean over these tasks, and its leads."""
    untrained = {y["name"]: {seed: dict(scores={task: y["scores"][task][seed] for task in tasks})
                             for seed in range(len(y["averages"]))}
                 for y in yardsticks if y["name"] in ("random init", LAYERS)}
    value, lines = over(tasks), []
    for (*kind, budget), arms in found.items():
        best, *others = sorted(arms, key=lambda name: -np.mean([value(r) for r in arms[name].values()]))
        rivals = {name: arms[name] for name in (base_of(arms), *others[:1]) if name != best} | untrained
        leads = [lead_in_words(differences(arms[best], runs, value), name, len(rivals | arms) - 1)
                 for name, runs in rivals.items()]
        runs = list(arms[best].values())
        lines.append(f"{where} {amount(budget, runs[0]['unit'])} on {setting(*kind)}, {best} scores highest: "
                     f"{'; '.join([spread(values_of(runs, tasks)), *leads])}.")
    return lines


def resolution(results, seeds):
    """What so many seeds can tell apart at the spread of these results, in words; "" where none is known."""
    if not (leads := [lead for *_, lead in leads_of(groups(results)) if len(lead) > 1]):
        return ""
    stds, need = sorted(np.std(lead, ddof=1) for lead in leads), [seeds_for(lead) for lead in leads]
    if seeds == 1:
        able = "1 seed tells no difference from noise"
    else:
        low, mid, high = (half_width(std, seeds) for std in (stds[0], stds[len(stds) // 2], stds[-1]))
        able = (f"{seeds} seeds tell differences from {low:.1f} to {high:.1f} points from noise "
                f"(median {mid:.1f})")
    return f"{able}; a difference of 1 point needs {min(need)} to {max(need)}"


def lead_in_words(lead, rival, comparisons, digits=1):
    """'against no_kd +1.2 [+0.3, +2.1], outside the noise': the interval plain, the judgement corrected."""
    mean, half = interval(lead)
    text = f"against {rival} {signed(mean, half, digits)}, "
    if not math.isfinite(half):
        return text + "of one seed"
    if abs(mean) > interval(lead, comparisons)[1]:
        return text + ("outside the noise" if mean > 0 else "behind it, outside the noise")
    if abs(mean) > half:
        return text + f"a hint (not outside the noise when corrected for {comparisons} comparisons)"
    return text + "inside the noise"


def crossings(found, unit, resamples=2000):
    """Where an arm's mean overtakes the base arm's, or falls behind it, on the straight line between two budgets
    over log budget; with the 95% interval of resampled seeds (bootstrap, each budget's leads on their own, their
    deviations scaled by sqrt(n / (n - 1)); still too narrow for fewer than five seeds, which is said)."""
    rng, lines, kinds = np.random.default_rng(0), [], {}
    for (*kind, budget), name, base, leads in leads_of(found):
        kinds.setdefault((*kind, name, base), []).append((budget, leads))
    for (unique, static, name, base), points in kinds.items():
        budgets, means = [b for b, _ in points], np.array([[np.mean(leads) for _, leads in points]])
        drawn = np.array([rng.choice(leads, (resamples, len(leads))).mean(1) for _, leads in points]).T
        seeds = np.array([len(leads) for _, leads in points])
        drawn = means + (drawn - means) * np.sqrt(seeds / np.maximum(seeds - 1, 1))
        for i, at in enumerate(crossed(budgets, means)[0]):
            if math.isnan(at):
                continue
            up = means[0, i] < 0
            again = crossed(budgets, drawn, up)
            again = again[np.isfinite(again).any(1)]
            nearest = np.nanargmin(np.abs(np.log(again / at)), 1)
            low, high = np.exp(np.quantile(np.log(again[np.arange(len(again)), nearest]), (0.025, 0.975)))
            at, low, high = (amount(float(f"{x:.2g}"), unit) for x in (at, low, high))
            both = [interval(leads) for _, leads in points[i:i + 2]]
            least = min(seeds[i:i + 2])
            few = f", roughly: {least} seeds" if least < 5 else ""
            noise = (f" [{low}, {high}], in {len(again) / resamples:.0%} of resampled seeds{few}"
                     if all(math.isfinite(half) for _, half in both) else " (of one seed)")
            noise += " (inside the noise)" * any(abs(mean) <= half < math.inf for mean, half in both)
            lines.append(f"On {setting(unique, static)}, the mean of {name} "
                         f"{'overtakes' if up else 'falls behind'} {base}'s at about {at}{noise}, between "
                         f"{amount(budgets[i], unit)} and {amount(budgets[i + 1], unit)}.")
    return lines


def crossed(budgets, leads, up=None):
    """Where rows of leads (n, budgets) change their sign (to above 0 alone, or below, by `up`): (n, budgets - 1),
    NaN where they do not."""
    before, after, log = leads[:, :-1], leads[:, 1:], np.log(budgets)
    changes = before * after < 0
    if up is not None:
        changes &= (before < 0) == up
    part = before / np.where(changes, before - after, 1)
    return np.where(changes, np.exp(log[:-1] + np.diff(log) * part), np.nan)


def repetition(found):
    """What fewer unique tokens and static masks did to the base arm and the others' leads, seed by seed."""
    lines = []
    for (unique, static, budget), arms in found.items():
        # the limited data against all of it, its static masks against its fresh ones
        other, base = (unique if static else None, False, budget), base_of(arms)
        before = found.get(other, {})
        if other == (unique, static, budget) or base not in before:
            continue
        runs = list(arms[base].values())
        parts = [f"{base} changes by {signed(*interval(differences(arms[base], before[base])))}"]
        for name in (name for name in arms if name != base and name in before):
            seeds = [seed for seed in arms[name]
                     if all(seed in of for of in (arms[base], before[name], before[base]))]
            change = [arms[name][s]["average"] - arms[base][s]["average"]
                      - before[name][s]["average"] + before[base][s]["average"] for s in seeds]
            parts.append(f"the lead of {name} over it by {signed(*interval(change))}")
        lines.append(f"At {amount(budget, runs[0]['unit'])}, {setting(unique, static)} "
                     f"({np.mean([r['epochs'] for r in runs]):.1f} epochs of {base}) against "
                     f"{setting(*other[:2])}: {', '.join(parts)}.")
    return lines


def remarks(results):
    """What the spreads and intervals mean here, and what went wrong in fine-tuning."""
    first, counts = next(iter(results[0]["tasks"].values())), sorted(
        len(runs) for arms in groups(results).values() for runs in arms.values())
    seeds, most = counts[0], counts[-1]
    if most > 1:
        of = f"{seeds} to {most}" if seeds < most else f"{seeds}"
        freedom = "as many degrees of freedom less one" if seeds < most else \
            f"{seeds - 1} degree{'s' * (seeds > 2)} of freedom"
        lines = [f"± is the standard deviation over {of} pretraining seeds, each fine-tuned with its own; "
                 f"Δ is the mean of the differences seed by seed, in brackets its 95% interval (Student's t, "
                 f"{freedom}). Both speak of other seeds, on the same "
                 f"teacher and dev sets. \"n for 1 point\": with so many pretraining seeds a difference of 1 "
                 f"point would be outside that interval at this spread, of which {of} seeds give a rough "
                 f"idea."]
    elif len(results[0]["tasks"]) == 1 and first["metric"] == "accuracy" and len(first["scores"]) > 1:
        runs, p = len(first["scores"]), np.mean([r["average"] for r in results]) / 100
        dev = 100 * math.sqrt(p * (1 - p) / first["n"])
        tuning = math.sqrt(np.mean([t["std"] ** 2 for r in results for t in r["tasks"].values()]) / runs)
        lines = [f"One pretraining seed per arm: ± is the standard deviation over {runs} fine-tuning seeds "
                 f"of one pretrained model, so pretraining's own spread is not in it. A score's standard "
                 f"error is {tuning:.1f} points from its {runs} fine-tuning seeds and {dev:.1f} from the "
                 f"{first['n']:,} dev examples: a difference under "
                 f"{2 * math.sqrt(2 * (tuning ** 2 + dev ** 2)):.1f} points is noise, a larger "
                 f"one is a hint at most."]
    else:
        lines = ["One pretraining seed per arm" + (": ± is the standard deviation over fine-tuning seeds of one "
                 "pretrained model" if len(first["scores"]) > 1 else "") + ": no difference here can be told "
                 "from noise; give --seeds 3 or more."]
    collapsed = Counter(t for r in results for t, of in r["tasks"].items() for _ in range(of["collapsed"]))
    if collapsed:
        lines.append(f"Fine-tuning runs that predicted a single class, of "
                     f"{len(results) * len(first['scores'])} per task: "
                     f"{', '.join(f'{task} {n}' for task, n in collapsed.items())}.")
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


def figure(results, yardsticks, path):
    """Left: the score of each arm, against the budget where there are several, ± standard deviation over
    pretraining seeds.  Beside it, where they were logged: validation MLM loss and D_order against tokens, at the
    largest budget of those under which most arms ran."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = groups(results)
    kinds = list(dict.fromkeys(key[:2] for key in found))               # data settings
    names = list(dict.fromkeys(r["strategy"] for r in results))
    styles = {kind: {name: dict(color=of["colour"], marker=of["marker"], markersize=5, linewidth=1.5,
                                linestyle=(0, of["dash"]) if of["dash"] else "-",
                                markerfacecolor=of["colour"] if kind == kinds[0] else "white")
                     for name, of in zip(names, map(curve_look, range(len(names))), strict=True)}
              for kind in kinds}
    largest = max((key for key in found if key[:2] == kinds[0]), key=lambda key: (len(found[key]), key[2]))
    curves = [r for r in results if len(r["curve"]) > 1
              and (r["unique_tokens"], r["static_masks"], r["budget"]) == largest]
    logged = [(key, label) for key, label in (("mlm", "validation MLM loss, nats"), ("d_order", "D_order, nats"))
              if any(p.get(key) is not None for r in curves for p in r["curve"])]
    single = len(found) == 1
    height = max(3.6, 0.28 * len(names) + 1.2 if single else 0)
    fig, panels = plt.subplots(1, 1 + len(logged), layout="constrained", squeeze=False,
                               figsize=((6.5, 9, 12)[len(logged)], height))
    (one_budget if single else many_budgets)(panels[0, 0], found, kinds, names, styles, results[0]["unit"])
    for y in yardsticks:
        mean, at = np.mean(y["averages"]), 0.02
        (panels[0, 0].axvline if single else panels[0, 0].axhline)(mean, color="0.4", linewidth=0.8, zorder=0)
        panels[0, 0].annotate(y["name"], (mean, at) if single else (at, mean), fontsize=8, color="0.3",
                              xycoords=("data", "axes fraction") if single else ("axes fraction", "data"),
                              rotation=90 if single else 0, ha="right" if single else "left", va="bottom")
    for panel, (key, label) in zip(panels[0, 1:], logged, strict=True):
        for r in curves:
            points = [(p["tokens"] / 1e6, p[key]) for p in r["curve"] if p.get(key) is not None]
            panel.plot(*zip(*points, strict=True), **styles[kinds[0]][r["strategy"]] | dict(markersize=3),
                       label=r["strategy"] if r["seed"] == results[0]["seed"] else None)
        panel.set(xlabel=f"million tokens, {amount(largest[2], results[0]['unit'])}; a line per seed", ylabel=label)
    if logged:
        panels[0, 1].legend(fontsize=8)
        if logged[-1][0] == "d_order":
            panels[0, -1].axhline(D_ORDER_TURN, color="0.4", linewidth=0.8, zorder=0)
            panels[0, -1].annotate("turn", (0.01, D_ORDER_TURN), xycoords=("axes fraction", "data"), fontsize=8,
                                   color="0.3", va="bottom")
    saved(fig, panels[0], path)
    plt.close(fig)


def saved(fig, panels, path):
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
    fig.savefig(path, dpi=150)


def one_budget(axis, found, kinds, names, styles, unit):
    """A row per arm: a tick per seed, the mean and its standard deviation."""
    ((*_, budget), arms), = found.items()
    for i, name in enumerate(names):
        values, style = [r["average"] for r in arms[name].values()], styles[kinds[0]][name]
        axis.plot(values, [i] * len(values), linestyle="", marker="|", markersize=11, color=style["color"])
        axis.errorbar(np.mean(values), i, xerr=np.std(values, ddof=1) if len(values) > 1 else None, capsize=3,
                      **style | dict(linestyle=""))
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel=f"score, %, at {amount(budget, unit)}; ticks: seeds")


def many_budgets(axis, found, kinds, names, styles, unit):
    """A curve per arm and data setting; lines beside each other, so that none hides another one's bars."""
    for kind in kinds:
        for i, name in enumerate(names):
            at = [key for key in found if key[:2] == kind and name in found[key]]
            of = [[r["average"] for r in found[key][name].values()] for key in at]
            x = np.array([budget for *_, budget in at]) * 1.02 ** (i - (len(names) - 1) / 2)
            spreads = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in of]
            axis.errorbar(x, list(map(np.mean, of)), spreads, capsize=2, elinewidth=0.8, **styles[kind][name],
                          label=name + (f", {setting(*kind)}" if len(kinds) > 1 else ""))
    axis.set_xscale("log")
    budgets = sorted({budget for *_, budget in found})
    axis.set_xticks(budgets, [amount(budget, unit) for budget in budgets], fontsize=8)
    axis.minorticks_off()
    axis.set(xlabel="budget of a run; bars: ± std over pretraining seeds", ylabel="score, %")
    axis.legend(fontsize=8, ncols=1 + (len(names) * len(kinds) > 8))
