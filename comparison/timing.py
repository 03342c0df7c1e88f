"""How long a comparison takes on this machine: what is estimated before it starts, said while it runs, and
noted of a machine whose speed changes.  Read it when compare.py's times surprise you."""
import contextlib
import dataclasses
import math
import re
import time
from pathlib import Path

import numpy as np

import finetune_glue
from data import phase_blocks
from model import BertForMaskedLM, BertForSequenceClassification
from plumbing import settle
from plumbing.budget import Stages
from plumbing.cli import UserError, one_line
from plumbing.device import choose_device, halve_micro_batch_until_it_fits, multiplies_in_bf16, ready_process
from plumbing.files import log_records
from plumbing.student import student_shape
from step import Arm
from train import gradients


def duration(seconds):
    return (f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200
            else f"{seconds / 3600:.1f} h")


@halve_micro_batch_until_it_fits
def block_seconds(config, directory, teacher, seconds=1.0):
    """[seconds of a block] of this run's last phase, of each step within so many seconds on this machine, two at least:
    with random weights, on a CPU with a smaller micro-batch.  `teacher`: its BertConfig."""
    device = choose_device(config.device)
    ready_process(device)
    micro = config.micro_batch if device.type == "cuda" else min(config.micro_batch, 16)
    arm = Arm(dataclasses.replace(config, batch_size=micro, micro_batch=micro),
              BertForMaskedLM(student_shape(config, directory)).to(device),
              BertForMaskedLM(teacher).to(device) if config.needs_teacher else None,
              phase=len(config.phases) - 1)
    arm.make_optimizer()
    batch, took = phase_blocks(arm.phase, directory, "train", 0).batch(0, arm.phase.blocks(micro)), []
    while len(took) < 3 or sum(took) < seconds:                         # the first warms up
        began = time.perf_counter()
        names, values = gradients(arm, batch, 0, Stages(arm.device))
        arm.update(0.0, values.tolist()[names.index("gradient_norm")])  # waits for the device
        took.append(time.perf_counter() - began)
    return [each / micro for each in took[1:]]


def speeds(plan):
    """{arm, or "teacher": [seconds of a block]}, each timed in turn, smallest budget's settings."""
    runs = {plan.arms[each.out]: each for each in plan.runs[:len(plan.names)]}
    runs |= {"teacher": plan.teacher} if plan.teacher else {}
    return {arm: block_seconds(each, plan.directory, plan.teacher_shape) for arm, each in runs.items()}


def busy(speeds):
    """The slowest quarter of the timed steps over the fastest, median over the arms: 1 of a machine that is ours."""
    return float(np.median([np.quantile(took, 0.875) / min(took) for took in speeds.values()]))


def finetuning_seconds(plan):
    """Seconds of fine-tuning one student on every task with every trial, by trying a few batches of each
    task with random weights."""
    config, tokenizer, device = plan.config, plan.directory.read_tokenizer(), choose_device(plan.config.device)
    points = finetune_glue.grid(config.finetuning(), config.shape.hidden_size)
    batch, trials = points[0][0], config.finetune_seeds + (len(points) if len(points) > 1 else 0)
    model, seconds = BertForSequenceClassification(student_shape(plan.runs[0], plan.directory), 2).to(device), 0.0
    for parts in plan.texts.values():
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
        seconds += trials / len(examples) * (steps * (trained - began) + sum(len(x) for x, _ in dev) * scored)
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


def hours_each(plan, hours):
    """The budget of a run, as text, with which all of it takes so many hours, a tenth of them in reserve."""
    student, teacher = (c.num_hidden_layers * c.hidden_size ** 2
                        for c in (student_shape(plan.runs[0], plan.directory), plan.teacher_shape))
    models, machines = len(plan.runs) + len(plan.yardsticks), plan.config.jobs or 1
    tuned = (models - 1 + teacher / student) * finetuning_seconds(plan) / 3600
    taught = plan.config.teacher_budget or 0
    left = 0.9 * machines * hours - (tuned + taught)
    if left <= 0:
        raise UserError(f"--total-hours {hours:g}: fine-tuning {models} models on {len(plan.texts)} tasks alone "
                        f"takes about {duration(3600 * tuned / machines)}: give more hours, "
                        f"{'' if plan.config.quick else '--quick, '}or fewer tasks, arms or seeds")
    left /= sum(each.budget_hours for each in plan.all) - taught
    scale = 10 ** (math.floor(math.log10(left)) - 1)
    return f"{math.floor(left / scale) * scale:.3g}"                    # two digits, rounded down


class Progress:
    """The plan's time, and one line of progress over all runs: estimates, corrected by what
    the finished ones took."""

    def __init__(self, estimates, say=print):
        self.left, self.count = dict(estimates), len(estimates)         # {key: seconds}
        self.estimated = self.took = 0.0
        self.say_line, self.said, self.what = say, -math.inf, ""

    @contextlib.contextmanager
    def on(self, key, what):
        """While this run is under way (for no time if it was finished before: that says
        nothing of the estimate)."""
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


def over_all(plan, estimates, began):
    """One line over all processes: what is finished, what is under way, and the time left; `estimates`: {run
    directory, or "score DIRECTORY" of a yardstick: seconds}."""
    done, finished, under_way, tuning = 0.0, 0, [], {each.out for each in plan.tuning.values()}
    for key, seconds in estimates.items():
        at = Path(key.removeprefix("score "))
        if key not in tuning:           # which peak LR a run takes is for its process to know
            at = max(at.parent.glob(re.sub("-lr.*-seed", "-lr*-seed", at.name)), key=progressed, default=at)
        log, share = at / "log.jsonl", 0.0
        if (at / "glue/glue.json").exists() or key in tuning and (at / "summary.json").exists():
            finished, share = finished + 1, 1.0
        elif log.exists():
            _, last = next(log_records(reversed(log.read_bytes().split(b"\n"))), (b"", {}))
            share = 0.8 * last.get("progress", 0.0)
            under_way.append(f"{at.name} {share / 0.8:.0%}" if share < 0.8 else f"{at.name} is scored")
        done += share * seconds
    part = done / max(sum(estimates.values()), 1e-9)
    left = f", {duration((time.monotonic() - began) * (1 - part) / part)} left" if part > 0.02 else ""
    return one_line(f"[{finished}/{len(estimates)}{left}] {', '.join(under_way)}", 80)


def progressed(out):
    return (out / "glue/glue.json").exists(), (out / "log.jsonl").exists()
