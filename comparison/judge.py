"""Who is ahead of whom: from the results of many runs to rows, intervals and words.  Read it after statistics.py.

A result is a dict, one per pretrained model: what it was (`strategy`, `budget`, `unit`, `unique_tokens`,
`static_masks`, `seed`), what it cost (`flops`, ...) and what it scored (`tasks`: {task: {scores of each
fine-tuning, collapsed_trials, metric, n, majority}}, `scores`: {task: mean}).  `examples`, where predictions were
kept, are the scores of each dev example: {task: (fine-tunings, examples)}.  A yardstick (`name`, `runs`: as
results) is scored as the arms are and trained by nobody here.
"""
import io
import math
from typing import NamedTuple

import numpy as np

from comparison import statistics
from plumbing import glue

CUT, RANDOM, NGRAMS, CONSTANT, TEACHER = "cut", "random init", "n-grams", "constant answer", "teacher"
RIVAL = " (not ours)"       # how the name of a --rivals model ends
OLD_NAMES = {"the teacher's layers, untrained": CUT}    # in records made before 2026-11-28


class Row(NamedTuple):
    """What is ranked: an arm at a budget, or a yardstick."""
    name: str
    runs: list                  # results, one per seed
    budget: float | None = None

    @property
    def needs_teacher(self):
        return self.name == CUT or self.budget is not None and needs_teacher(self.name)

    @property
    def flops(self):
        """Of one model, what its teacher computed for it included: the mean over seeds; NaN where not known."""
        if self.budget is None:
            return 0.0
        known = [r.get("flops") or (r["budget"] if r["unit"] == "flops" else math.nan) for r in self.runs]
        return float(np.mean(known))


def groups(results):
    """{(unique_tokens, static_masks, budget): {strategy: {seed: result}}}: all data first, budgets rising."""
    found = {}
    for r in results:
        group = found.setdefault((r["unique_tokens"], r["static_masks"], r["budget"]), {})
        group.setdefault(r["strategy"], {})[r["seed"]] = r
    return dict(sorted(found.items(), key=lambda item: (-(item[0][0] or math.inf), *item[0][1:])))


def averaged(tasks):
    """The tasks that the average is over: the paper's seven if they are all there, else all there are."""
    return [t for t in glue.PAPER if t in tasks] if set(glue.PAPER) <= set(tasks) else list(tasks)


def constant_answer(results):
    """The yardstick of no model at all: the class that is most frequent in dev, or one score for all."""
    tasks = {name: dict(t, scores=[t["majority"]], mean=t["majority"], collapsed=0, collapsed_trials=[False], std=0.0)
             for name, t in results[0]["tasks"].items()}
    return dict(name=CONSTANT, runs=[dict(tasks=tasks, scores={t: of["majority"] for t, of in tasks.items()})])


def base_of(arms, yardsticks=()):
    """What the others are compared with: no_kd, else the untrained layers, else random weights, else the first arm."""
    there = {y["name"] for y in yardsticks}
    return next((name for name in ("no_kd", CUT, RANDOM) if name in arms or name in there), next(iter(arms)))


def collapsed_trials(task):
    """[whether a fine-tuning predicted one class]; of records that only count them, those nearest to the constant
    answer."""
    if "collapsed_trials" in task:
        return task["collapsed_trials"]
    nearest = np.argsort(np.abs(np.array(task["scores"]) - task["majority"]), kind="stable")
    return [i in nearest[:task["collapsed"]] for i in range(len(task["scores"]))]


def trials_of(run, tasks):
    """[(mean score over the tasks, whether it collapsed on one of them)] of each fine-tuning of a model."""
    scores = zip(*(run["tasks"][t]["scores"] for t in tasks), strict=True)
    bad = zip(*(collapsed_trials(run["tasks"][t]) for t in tasks), strict=True)
    return [(float(np.mean(s)), any(b)) for s, b in zip(scores, bad, strict=True)]


def arm(name, runs, tasks, given=False, fixed=False):
    """The statistics.Arm of a row.  `given`: nobody here trained the model, so each fine-tuning is a seed."""
    trials, kept = [trials_of(r, tasks) for r in runs], [[not bad for _, bad in trials_of(r, tasks)] for r in runs]
    examples = None
    if all(t in r.get("examples", ()) for r in runs for t in tasks):
        examples = [[r["examples"][t] for r in runs] for t in tasks]
    if given:                                           # one "seed" each
        trials = [[trial] for of in trials for trial in of]
        examples = examples and [[row[None] for of in per_run for row in of] for per_run in examples]
        kept = [[good] for of in kept for good in of]
    if examples:
        examples = [np.stack([of[good].mean(0) if any(good) else np.full(of.shape[1], np.nan)
                              for of, good in zip(per_run, kept, strict=True)]) for per_run in examples]
    return statistics.Arm(name, [[s for s, bad in of if not bad] for of in trials],
                          sum(bad for of in trials for _, bad in of), sum(map(len, trials)), examples, fixed)


def yardstick_arm(y, tasks):
    """The same of a yardstick."""
    one = len(y["runs"]) == 1 and len(trials_of(y["runs"][0], tasks)) == 1
    frozen = y["name"] == NGRAMS or y["runs"][0]["tasks"][tasks[0]].get("frozen", False)
    fixed = y["name"] == CONSTANT or one and frozen
    return arm(y["name"], y["runs"], tasks, given=y["name"] != RANDOM, fixed=fixed)


def table_of(arms, yardsticks, tasks):
    """[statistics.Arm] of one group's arms and the yardsticks."""
    found = [arm(name, [runs[s] for s in sorted(runs)], tasks) for name, runs in arms.items()]
    return found + [yardstick_arm(y, tasks) for y in yardsticks]


def differences(arms, yardsticks, tasks):
    """{name: statistics.Difference} of a group's arms and the yardsticks to its base."""
    base = base_of(arms, yardsticks)
    return {d.name: d for d in statistics.compare(table_of(arms, yardsticks, tasks), base)}


def measuring(results, yardsticks):
    """(tasks that measure, {task: what nothing is above} of those that do not): on these no arm and no teacher is
    ahead, outside the noise, of the best of n-grams, the constant answer and random weights.  None where no spread
    is known."""
    floors, measures, nothing = {CONSTANT, NGRAMS, RANDOM}, [], {}
    for task in results[0]["tasks"]:
        ys = [yardstick_arm(y, [task]) for y in yardsticks]
        floor = max((a for a in ys if a.name in floors and a.means), key=lambda a: np.mean(a.means), default=None)
        found = []
        for arms in groups(results).values():
            table = table_of(arms, (), [task])
            teacher = [a for a in ys if a.name == TEACHER]
            found += statistics.compare([*table, *teacher, floor], floor.name) if floor else []
        if not floor or all(math.isinf(d.half) for d in found):
            return None
        if any(d.word.startswith("ahead") for d in found):
            measures.append(task)
        else:
            nothing[task] = floor.name
    return measures, nothing


def tasks_of(results, yardsticks):
    """The tasks that scores are averaged over: those that measure, where some do and some do not."""
    tasks, told = averaged(results[0]["scores"]), measuring(results, yardsticks)
    return [t for t in tasks if told is None or not told[0] or t in told[0]]


def rows_of(results, yardsticks, tasks):
    """[(Row, statistics.Arm)] of everything that is no larger than the student, on all of the data."""
    found = []
    for (unique, _, budget), arms in groups(results).items():
        if unique is None:
            for name, runs in arms.items():
                of = [runs[s] for s in sorted(runs)]
                found.append((Row(name, of, budget), arm(f"{name} @ {budget:g}", of, tasks)))
    for y in yardsticks:
        if y["name"] != TEACHER and not y["runs"][0].get("larger"):
            found.append((Row(y["name"], y["runs"]), yardstick_arm(y, tasks)))
    return found


def needs_teacher(name):
    """Whether an arm reads a teacher: by its name, as records of older versions have it."""
    strategies = [part.split(":")[0] for part in name.split("+")[0].split("/")]
    return "+init" in name or any(s not in ("no_kd", "clm") for s in strategies)


def unbeaten(rows):
    """The rows that no other row is ahead of, outside the noise, with all the others as one family."""
    arms = [a for _, a in rows if a.means]
    return [(row, a) for row, a in rows if a.means and not any(
        d.word.startswith("ahead") for d in statistics.compare(arms, a.name))]


def cheapest(rows, price):
    """Of rows that tell apart nobody ahead: the one of least total FLOPs, the higher score of equals."""
    return min(rows, key=lambda r: (price(r[0]), -statistics.summary(r[1])[0]))


def instruction(results, yardsticks, teacher_flops=None, layers=""):
    """["what to do"]: the cheapest row that no other one is ahead of, with the teacher charged and with it free."""
    tasks = tasks_of(results, yardsticks)
    rows = rows_of(results, yardsticks, tasks)
    if all(len(a.means) < 2 for row, a in rows if row.budget is not None):
        best = max((r for r in rows if r[1].means), key=lambda r: statistics.summary(r[1])[0])
        return [f"One seed tells nothing apart. The highest score: {of_row(best, layers)}."]
    good = unbeaten(rows)
    free = cheapest(good, lambda row: row.flops)
    lines = [f"{what_to_do(free[0], layers)}: {score_in_words(free[1])}; "
             + ("nothing that was trained is ahead of it." if free[0].budget is None else
                "no other row is ahead of it, and each cheaper one is behind another.") + path_of(free[0])]
    if teacher_flops:
        charged = cheapest(good, lambda row: row.flops + teacher_flops * row.needs_teacher)
        if charged[0] != free[0]:
            lines.append(f"With the teacher's {teacher_flops:.2g} FLOPs charged to one student: "
                         f"{of_row(charged, layers)}.{path_of(charged[0])}")
    elif free[0].needs_teacher:
        lines[0] += " The teacher is taken as free: its price is not known (--teacher-flops)."
    return lines


def what_to_do(row, layers=""):
    if row.budget is not None:
        return f"Train {row.name} with {amount(row.budget, row.runs[0]['unit'])}"
    if row.name.endswith(RIVAL):
        return f"Take {row.name.removesuffix(RIVAL)} as it is; nobody here trained it"
    copied = f"layers {layers} of the teacher" if layers else "the teacher's layers"
    return {CUT: f"Copy {copied}, untrained", NGRAMS: "Take n-grams and a linear classifier",
            RANDOM: "Fine-tune random weights", CONSTANT: "Give the most frequent answer"}[row.name]


def of_row(pair, layers=""):
    text = what_to_do(pair[0], layers)
    return f"{text[0].lower()}{text[1:]}: {score_in_words(pair[1])}"


def score_in_words(a):
    mean, std, n = statistics.summary(a)
    return f"{mean:.1f}" + f" ± {std:.1f}" * (n > 1)


def path_of(row):
    best = row.runs[0] if row.budget is None else max(row.runs, key=lambda r: r.get("average", -math.inf))
    return f" Model: {best['model']}" if "model" in best else ""


def pays_from(results, yardsticks, teacher_flops):
    """[lines]: from how many students on a lead over no_kd pays for the teacher, by the FLOPs with which no_kd alone
    reaches the same score (on the line over log FLOPs between its budgets)."""
    rows = [(row, row.flops, statistics.summary(a)[0]) for row, a in rows_of(
        results, yardsticks, tasks_of(results, yardsticks)) if row.budget is not None and a.means]
    alone, lines = sorted((flops, score) for row, flops, score in rows if row.name == "no_kd"), []
    beside = {row.budget: score for row, _, score in rows if row.name == "no_kd"}
    if not teacher_flops or len(alone) < 2:
        return []
    for row, flops, score in rows:
        where = f"{row.name} at {amount(row.budget, row.runs[0]['unit'])}"
        if not row.needs_teacher or not score > beside.get(row.budget, math.inf):
            continue
        above = next((i for i, (_, s) in enumerate(alone) if s >= score), None)
        if above is None:
            lines.append(f"{where}: no_kd does not reach its score with {alone[-1][0]:.2g} FLOPs.")
        elif above:
            (f0, s0), (f1, s1) = alone[above - 1:above + 1]
            same = math.exp(np.interp(score, (s0, s1), np.log((f0, f1))))
            if same > flops:
                lines.append(f"{where}: no_kd reaches its score with about {same:.2g} FLOPs, so its teacher "
                             f"({teacher_flops:.2g}) is paid for from {math.ceil(teacher_flops / (same - flops)):,} "
                             f"students on.")
    return lines


def amount(budget, unit):
    if unit == "hours":
        return f"{budget:g} h" if budget >= 0.1 else f"{budget * 3600:.0f} s"
    return f"{budget:g} FLOPs".replace("e+", "e") if unit == "flops" else f"{budget:,.0f} {unit}"


def setting(unique_tokens, static_masks):
    return ("all of the data" if unique_tokens is None else f"{unique_tokens:,} unique tokens") + (
        ", static masks" if static_masks else "")


def keep_examples(found, predicted, labels):
    """Adds `examples` to a result from {task: (fine-tunings, examples)} predictions and {task: (examples,)} labels."""
    for task, rows in predicted.items():
        metric = glue.METRICS[found["tasks"][task]["metric"]]
        found.setdefault("examples", {})[task] = np.stack(
            [statistics.example_scores(metric, p.astype(float), labels[task].astype(float)) for p in rows])


def named(results, yardsticks):
    """{the name of its predictions in results.npz: result}, of the yardsticks too."""
    what = ("strategy", "budget", "unit", "unique_tokens", "static_masks", "seed")
    return {"|".join(str(r.get(k)) for k in what): r for r in results} | {
        f"{y['name']}|{i}": r for y in yardsticks for i, r in enumerate(y.get("runs", ()))}


def attach(results, yardsticks, arrays):
    """Adds the kept predictions of a results.npz to results and yardsticks; {task: labels}."""
    labels = {name.removeprefix("labels/"): a for name, a in arrays.items() if name.startswith("labels/")}
    for name, r in named(results, yardsticks).items():
        r["predicted"] = {t: arrays[f"{name}/{t}"] for t in labels if f"{name}/{t}" in arrays and t in r["tasks"]}
    return labels


def arrays_of(results, yardsticks, labels):
    """{name: array} for results.npz: the labels, and what each fine-tuning predicted."""
    arrays = {f"labels/{t}": y for t, y in labels.items()} | {
        f"{name}/{t}": p for name, r in named(results, yardsticks).items() for t, p in r.get("predicted", {}).items()}
    return {name: a.astype(np.float32 if a.dtype.kind == "f" else np.int16) for name, a in arrays.items()}


def compressed(arrays):
    """The bytes of a .npz of {name: array}."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()
