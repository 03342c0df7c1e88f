"""How long a comparison takes on this machine: what is estimated before it starts, said while it runs, and
noted of a machine whose speed changes.  Read it when compare.py's times surprise you."""
import contextlib
import dataclasses
import math
import time
from pathlib import Path

import numpy as np

import finetune_glue
from data import blocks_of
from model import BertForMaskedLM, BertForSequenceClassification
from plumbing.budget import Stages
from plumbing.cli import UserError
from plumbing.device import choose_device, halve_micro_batch_until_it_fits, multiplies_in_bf16, ready_process
from plumbing.files import read_json, records, write_json
from plumbing.price import flops_per_block
from plumbing.student import student_shape
from step import Arm
from train import gradients


def duration(seconds):
    return (f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200
            else f"{seconds / 3600:.1f} h")


@halve_micro_batch_until_it_fits
def step_seconds(config, directory, teacher, tries=1):
    """Seconds of one optimizer step of this run on this machine, the median of so many tries: with random
    weights, on a CPU with a smaller micro-batch.  `teacher`: its BertConfig."""
    device = choose_device(config.device)
    ready_process(device)
    micro = config.micro_batch if device.type == "cuda" else min(config.micro_batch, 16)
    arm = Arm(dataclasses.replace(config, batch_size=micro, micro_batch=micro),
              BertForMaskedLM(student_shape(config, directory)).to(device),
              BertForMaskedLM(teacher).to(device) if config.needs_teacher else None,
              phase=len(config.phases) - 1)
    arm.make_optimizer()
    batch = blocks_of(arm.phase, directory, "train", 0).batch(0, arm.phase.blocks(micro))
    seconds = []
    for _ in range(1 + tries):                                          # the first warms up
        began = time.perf_counter()
        gradients(arm, batch, 0, Stages(arm.device))[1].tolist()        # waits for the device
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:])) * config.batch_size / micro


def finetuning_seconds(plan, directory, texts):
    """Seconds of fine-tuning one student on every task with every trial, by trying a few batches of each
    task with random weights."""
    config, tokenizer, device = plan.config, directory.read_tokenizer(), choose_device(plan.config.device)
    points = finetune_glue.grid(config.finetuning())
    batch, trials = points[0][0], config.finetune_seeds + (len(points) if len(points) > 1 else 0)
    model, seconds = BertForSequenceClassification(student_shape(plan.runs[0], directory), 2).to(device), 0.0
    for parts in texts.values():
        (sentences, _), *dev = parts.values()
        examples = finetune_glue.encode(tokenizer, sentences[:4 * batch], config.max_len)
        pad_id, bf16 = directory.special["[PAD]"], multiplies_in_bf16(device, config.bf16)
        args = (examples, np.zeros(len(examples), np.int64), batch, 1, 1e-5, 0, pad_id, "", bf16,
                bool(config.compile))
        finetune_glue.finetune(model, *args)                            # the first time warms up
        began = time.perf_counter()
        finetune_glue.finetune(model, *args)                       # reads its losses, so waits for the device
        trained = time.perf_counter()
        finetune_glue.predict(model, examples, pad_id)
        scored = time.perf_counter() - trained
        seconds += trials / len(examples) * (len(sentences) * config.finetune_epochs * (trained - began)
                                             + sum(len(x) for x, _ in dev) * scored)
    return seconds


def estimate(plan, directory, teacher):
    """{run directory: seconds until it is finished}; `teacher`: a BertConfig."""
    seconds, rates = {}, {}
    for each in plan.all:
        _, budget = each.budget
        kind = each.size, plan.unit != "flops" and plan.arms.get(each.out)     # a FLOP takes every arm about as long
        if (Path(each.out) / "summary.json").exists():
            seconds[each.out] = 0.0
        elif plan.unit == "hours":
            seconds[each.out] = budget * 3600
        else:
            if kind not in rates:       # at the last phase's FLOP/s
                shape, phases = student_shape(each, directory), range(len(each.phases))
                flops = [each.batch_size * sum(flops_per_block(each, shape, teacher, i)) for i in phases]
                price = dict(steps=1, tokens=each.batch_size * each.length).get(plan.unit)
                rates[kind] = step_seconds(each, directory, teacher) / flops[-1] * sum(
                    (p.end - p.begin) * (n / price if price else 1)
                    for p, n in zip(each.phases, flops, strict=True))
            seconds[each.out] = budget * rates[kind]
    return seconds


def hours_each(plan, hours, directory, texts):
    """The budget of a run, as text, with which all of it takes so many hours, a tenth of them in reserve."""
    student, teacher = (c.num_hidden_layers * c.hidden_size ** 2
                        for c in (student_shape(plan.runs[0], directory), plan.teacher_shape))
    models, machines = len(plan.runs) + len(plan.yardsticks), plan.config.jobs or 1
    tuned = (models - 1 + teacher / student) * finetuning_seconds(plan, directory, texts) / 3600
    taught = plan.config.teacher_budget or 0
    left = 0.9 * machines * hours - (tuned + taught)
    if left <= 0:
        raise UserError(f"--total-hours {hours:g}: fine-tuning {models} models on {len(texts)} tasks alone "
                        f"takes about {duration(3600 * tuned / machines)}: give more hours, --quick, or "
                        f"fewer tasks, arms or seeds")
    left /= sum(each.budget_hours for each in plan.all) - taught
    scale = 10 ** (math.floor(math.log10(left)) - 1)
    each = f"{math.floor(left / scale) * scale:.3g}"                    # two digits, rounded down
    print(f"{hours:g} hours buy {len(plan.runs)} runs of {duration(3600 * float(each))}, after about "
          f"{duration(3600 * tuned / machines)} of fine-tuning and with a tenth in reserve")
    return each


def timed(plan, directory, each, train):
    """(what train(each) returns, speed) of a run.  Under a budget in hours a fixed step is timed before and
    after it, uncharged: the machine's speed beside the first run's, since an hour of a busy machine buys
    less.  Else the speed is None."""
    note, first = Path(each.out, "speed.json"), plan.out / "speed.json"
    if plan.unit == "hours" and not Path(each.out, "summary.json").exists():
        reference = plan.run("no_kd", plan.budgets[0])
        before = step_seconds(reference, directory, None, tries=5)
        summary = train(each)
        seconds = (before + step_seconds(reference, directory, None, tries=5)) / 2
        write_json(note, dict(seconds=seconds))
        if not first.exists():
            write_json(first, dict(seconds=seconds))
    else:
        summary = train(each)
    return summary, read_json(first)["seconds"] / read_json(note)["seconds"] if note.exists() else None


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
        """What train.py tells of a step, at most every 10 seconds."""
        if time.monotonic() - self.said >= 10:
            self.say(f"{record['progress']:.0%}, loss {record['loss']:.4f}")

    def say(self, line):
        self.said = time.monotonic()
        seconds = sum(self.left.values()) * (self.took / self.estimated if self.estimated else 1)
        seconds = max(0, seconds - (time.monotonic() - self.began))
        where = f"[{self.count - len(self.left) + 1}/{self.count}, {duration(seconds)} left] " * bool(self.count)
        self.say_line(f"{where}{self.what}: {line}")


def over_all(plan, estimates, began):
    """One line over all processes: what is finished, what is under way, and the time left."""
    folders = {each.out: Path(each.out).name for each in plan.all}
    folders |= {str(path): f"{name} {seed}" for name, path, seed in plan.yardsticks}
    done, finished, under_way = 0.0, 0, []
    tuning = {each.out for each in plan.tuning.values()}
    for out, name in folders.items():
        at = out if out in tuning else max(at_every_choice(plan, out), key=progressed)
        name = name if at == out else Path(at).name
        log, share = Path(at, "log.jsonl"), 0.0
        if Path(at, "glue/glue.json").exists() or at in tuning and Path(at, "summary.json").exists():
            finished, share = finished + 1, 1.0
        elif log.exists():
            _, last = next(records(reversed(log.read_bytes().split(b"\n"))), (b"", {}))
            share = 0.8 * last.get("progress", 0.0)
            under_way.append(f"{name} {share / 0.8:.0%}" if share < 0.8 else f"{name} is scored")
        done += share * estimates.get(out, estimates.get(f"score {out}"))
    part = done / max(sum(estimates.values()), 1e-9)
    left = f", {duration((time.monotonic() - began) * (1 - part) / part)} left" if part > 0.02 else ""
    return f"[{finished}/{len(folders)}{left}] {', '.join(under_way)}"


def at_every_choice(plan, out):
    """The directories that this run has with each recipe and peak LR: which it takes is for its process to know."""
    run = next((each for each in plan.runs if each.out == out), None)
    if run is None:                     # a yardstick
        return [out]
    same = plan.arms[out], run.budget[1], run.unique_tokens, run.static_masks, run.seed
    return [plan.run(*same, choice).out for choice in plan.choices]


def progressed(out):
    return Path(out, "glue/glue.json").exists(), Path(out, "log.jsonl").exists()
