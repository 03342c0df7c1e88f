"""How long a comparison takes on this machine, and what that buys.  Read it when compare.py's times surprise you."""
import contextlib
import dataclasses
import itertools
import math
import textwrap
import time
from pathlib import Path

import numpy as np

import finetune_glue
from comparison import jobs, judge
from comparison.report import aligned
from data import Blocks, phase_blocks
from model import BertForMaskedLM, BertForSequenceClassification
from plumbing import settle
from plumbing.cli import UserError, one_line
from plumbing.device import choose_device, halve_micro_batch_until_it_fits, multiplies_in_bf16, ready_process
from plumbing.probe import EXAMPLES
from plumbing.rehearsal import step_seconds
from plumbing.student import student_shape
from step import Arm
from train import gradients

SHARES = (1.2 ** 2 + 1.0 ** 2) / 0.75 ** 2      # variance of a fine-tuning with its labels over that of a pretraining


def duration(seconds):
    return (f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200
            else f"{seconds / 3600:.1f} h")


@halve_micro_batch_until_it_fits
def block_seconds(config, directory, teacher, seconds=1.0):
    """[seconds of a block] of this run's last phase, of each step within so many seconds on this machine:
    with random weights, on a CPU with a smaller micro-batch.  `teacher`: its BertConfig."""
    device = choose_device(config.device)
    ready_process(device)
    micro = config.micro_batch if device.type == "cuda" else min(config.micro_batch, 16)
    arm = Arm(dataclasses.replace(config, batch_size=micro, micro_batch=micro),
              BertForMaskedLM(student_shape(config, directory)).to(device),
              BertForMaskedLM(teacher).to(device) if config.needs_teacher else None,
              phase=len(config.phases) - 1)
    arm.make_optimizer()
    batch = phase_blocks(arm.phase, directory, "train", 0).batch(0, arm.phase.blocks(micro))
    return [each / micro for each in step_seconds(arm, itertools.repeat(batch), gradients, seconds)]


def speeds(plan):
    """{arm, or "teacher": [seconds of a block]}, each timed in turn, smallest budget's settings."""
    runs = {plan.arms[each.out]: each for each in plan.runs[:len(plan.names)]}
    runs |= {"teacher": plan.teacher} if plan.teacher else {}
    return {arm: block_seconds(each, plan.directory, plan.teacher_shape) for arm, each in runs.items()}


def busy(speeds):
    """The slowest quarter of the timed steps over the fastest, median over the arms: 1 of a machine that is ours."""
    return float(np.median([np.quantile(took, 0.875) / min(took) for took in speeds.values()]))


def finetuning_seconds(plan):
    """Seconds of fine-tuning one student on every task with every trial, and of its probes, by trying a few batches of
    each task with random weights."""
    config, tokenizer, device = plan.config, plan.directory.read_tokenizer(), choose_device(plan.config.device)
    points = finetune_glue.grid(config.finetuning(), config.shape.hidden_size)
    batch, trials = points[0][0], (config.finetune_seeds and config.finetune_seeds + len(points) * (len(points) > 1))
    frozen = bool(config.probe or not trials)
    model, seconds = BertForSequenceClassification(student_shape(plan.runs[0], plan.directory), 2).to(device), 0.0
    for name, parts in plan.texts.items():
        (sentences, _), *dev = parts.values()
        examples = finetune_glue.encode(tokenizer, sentences[:4 * batch], config.max_len)
        pad_id, bf16 = plan.directory.special["[PAD]"], multiplies_in_bf16(device, config.bf16)
        args = (examples, np.zeros(len(examples), np.int64), batch, 1, 1e-5, 0, pad_id, "", bf16,
                bool(config.compile))
        finetune_glue.finetune(model, *args)                            # the first time warms up
        began = time.perf_counter()
        finetune_glue.finetune(model, *args)                       # reads its losses, so waits for the device
        trained = time.perf_counter()
        finetune_glue.predict(model, examples, pad_id)
        scored = time.perf_counter() - trained
        steps = config.finetune_epochs * min(config.labels or len(sentences), len(sentences))      # of one example
        similar = plan.tasks[name].labels == () and len(sentences[0]) == 2 and not config.probe     # of dev alone
        probed = frozen * ((not similar) * min(len(sentences), EXAMPLES) + len(dev[0][0])) * len(sentences[0])
        seconds += (trials * steps * (trained - began)
                    + (trials * sum(len(x) for x, _ in dev) + probed) * scored) / len(examples)
    return seconds


def estimate(plan, speeds):
    """{run directory: seconds until it is finished}; `speeds`: what speeds(plan) found."""
    return {each.out: 0.0 if Path(each.out, "summary.json").exists() else seconds_of(plan, each, speeds)
            for each in plan.all}


def seconds_of(plan, each, speeds):
    if plan.unit == "hours":
        return each.budget[1] * 3600
    arm = "teacher" if each is plan.teacher else plan.arms[each.out]
    return blocks_of(plan, each) * float(np.median(speeds[arm]))


def blocks_of(plan, each, speeds=None):
    """The blocks of the last length that a run's budget buys, of its phases together."""
    unit, total = each.budget
    if unit == "hours":
        return total * 3600 / float(np.median(speeds[plan.arms[each.out]]))
    shapes = student_shape(each, plan.directory), plan.teacher_shape if each.needs_teacher else None
    return sum((p.end - p.begin) * settle.bought(each, shapes, phase=i) for i, p in enumerate(each.phases))


def hours_each(plan, hours, finetune_seconds):
    """(the budget of a run, as text; fine-tunings a model) with which all of it takes so many hours, a tenth of them in
    reserve: as many fine-tunings as asked for, or fewer, so that they take half of it at most."""
    student, teacher = (c.num_hidden_layers * c.hidden_size ** 2
                        for c in (student_shape(plan.runs[0], plan.directory), plan.teacher_shape))
    models, machines = len(plan.runs) + len(plan.yardsticks), plan.config.jobs or 1
    points = len(finetune_glue.grid(plan.config.finetuning(), plan.config.shape.hidden_size))
    asked, many = plan.config.finetune_seeds, points * (points > 1)
    all_asked = (models - 1 + teacher / student) * finetune_seconds / 3600
    for m in range(asked, min(asked, 1) - 1, -1):
        tuned = all_asked * (m + many) / (asked + many) if asked else all_asked
        if tuned <= machines * hours / 2:
            break
    taught = plan.config.teacher_budget or 0
    left = 0.9 * machines * hours - (tuned + taught)
    if left <= 0:
        raise UserError(f"--total-hours {hours:g}: fine-tuning {models} models on {len(plan.texts)} tasks alone "
                        f"takes about {duration(3600 * tuned / machines)}: give more hours, "
                        f"{'' if plan.config.quick else '--quick, '}or fewer tasks, arms, seeds or --labels")
    left /= sum(each.budget_hours for each in plan.all) - taught
    scale = 10 ** (math.floor(math.log10(left)) - 1)
    return f"{math.floor(left / scale) * scale:.3g}", m                 # two digits, rounded down


def describe(plan, speeds, seconds, finetune_seconds):
    """The plan, before anything starts: what each arm gets, what other sizes would, how long it takes."""
    def say(text):
        print(textwrap.fill(text, 80))
    config, first, models = plan.config, plan.runs[0], len(plan.runs) + len(plan.yardsticks)
    shape, (unique, static) = student_shape(first, plan.directory), plan.settings[0]
    parameters = settle.parameters(shape)
    say(f"plan: student {config.size}, {shape.num_attention_heads} heads, {parameters / 1e6:.1f}M parameters; "
        f"{config.batch_size} x {config.seq_len} ids a step; {'; '.join(judge.setting(*s) for s in plan.settings)}; "
        f"{config.seeds} seeds")
    for arm, why in plan.left_out.items():
        say(f"left out: {why if why.startswith(arm) else f'{arm}: {why}'}")
    rows, count = [], Blocks(plan.directory, "train", first.seq_len, 0, unique, static).count
    for budget in plan.budgets:
        rows.append([f"{judge.amount(budget, plan.unit)} on {judge.setting(unique, static)}", *[""] * 5])
        for name in plan.names:
            each = plan.run(name, budget, unique, static)
            blocks = blocks_of(plan, each, speeds)
            tokens = blocks * each.seq_len
            rows.append([f"  {name}", f"{blocks / each.batch_size:,.0f}", f"{tokens / 1e6:,.3g}M",
                         f"{blocks / count:.3g}", f"{tokens / parameters:.2g}",
                         duration(seconds_of(plan, each, speeds))])
    print(aligned(["", "steps", "tokens", "epochs", "tokens/parameter", "time"], rows))
    say(f"The same budget for {plan.names[0]} at other sizes, scaled by FLOPs from {config.size}: " + "; ".join(
        f"{size} {tokens / 1e6:,.3g}M tokens, {each:.2g} a parameter"
        for size, tokens, each in settle.other_sizes(first, blocks_of(plan, first, speeds), shape)))
    runs, tuning, unrest = sum(seconds.values()), models * finetune_seconds, busy(speeds)
    whole = (runs + tuning) / (config.jobs or 1)
    say(f"{len(seconds)} pretraining runs, {[*seconds.values()].count(0)} of them finished"
        + f", {len(plan.tuning)} to choose among {len(plan.choices)} peak LRs" * bool(plan.tuning)
        + f": {duration(runs)}" + (f", {duration(seconds[plan.teacher.out])} of it the teacher "
                                   f"({plan.teacher.size})" if plan.teacher else "")
        + f"; scoring {models} models on {', '.join(plan.texts)}: {duration(tuning)}; in all {duration(whole)}"
        + (f" to {duration(unrest * whole)}: the machine is busy, the slowest quarter of equal steps took "
           f"{unrest:.1f} times the fastest" if unrest > 1.5 else "") + ".")
    if each := np.mean([seconds[run.out] for run in plan.runs]) / max(finetune_seconds, 1e-9) * config.finetune_seeds:
        say(f"At these costs {max(2, round(math.sqrt(SHARES * each)))} fine-tunings a model tell the most "
            f"(--finetune-seeds, now {config.finetune_seeds}).")
    if plan.selections:
        say(f"before them, once for all that use it: {', '.join(plan.selections)}")


class Progress:
    """The plan's time, and one line of progress over all runs: estimates, corrected by what the finished ones took."""

    def __init__(self, estimates, say=print):
        self.left, self.count = dict(estimates), len(estimates)         # {key: seconds}
        self.estimated = self.took = 0.0
        self.say_line, self.said, self.what = say, -math.inf, ""

    @contextlib.contextmanager
    def on(self, key, what):
        """While this run is under way (for no time if it was finished before: that says nothing of the estimate)."""
        self.what, self.began = what, time.monotonic()
        yield
        seconds, estimate = time.monotonic() - self.began, self.left.pop(key, 0.0)
        if seconds > 0.1 * estimate:
            self.estimated, self.took = self.estimated + estimate, self.took + seconds

    def step(self, record):
        """What train.py tells of a step, at most every 30 seconds."""
        if time.monotonic() - self.said >= 30:
            self.say(f"{record['progress']:.0%}, loss {record['loss']:.4f}")

    def say(self, line):
        self.said = time.monotonic()
        seconds = sum(self.left.values()) * (self.took / self.estimated if self.estimated else 1)
        seconds = max(0, seconds - (time.monotonic() - self.began))
        where = f"[{self.count - len(self.left) + 1}/{self.count}, {duration(seconds)} left] " * bool(self.count)
        self.say_line(one_line(f"{where}{self.what}: {line}", 80))


def over_all(plan, until):
    """One line over all processes: how many models have their scores, the time left of the plan's, and what the
    processes say, in turn.  `until`: when it should be over, in seconds of time.monotonic()."""
    scored = len([*plan.out.glob("*/*/glue/glue.json"), *plan.out.glob("teacher/glue/glue.json")])
    log = max((plan.out / "jobs").glob("*.log"), key=lambda log: log.stat().st_mtime,
              default=plan.out / "jobs/0.log")
    return one_line(f"[{scored} models scored, {duration(max(0, until - time.monotonic()))} left] "
                    f"{jobs.reason(0, log)}", 80)
