"""Every strategy at every budget, pretrained over several seeds, fine-tuned and scored alike: tables, figure,
verdict.  Read it after finetune_glue.py.

    python compare.py         # the demonstration: no data, no teacher, no GPU, no download; about ten minutes
    python compare.py --data data/wiki --teacher bert-base-uncased --glue-dir glue --budget-hours 1,4 --seeds 3 \\
                      --out runs/table2 --dry-run                             # the plan and its time, no more

Each (strategy, budget, data setting, seed) is a run of its own under OUT/runs, whose learning rate ends at
zero at its budget.  Of several --peak-lrs, each arm takes the one with which its own validation loss ends
lowest at that budget, on a seed that is not reported.  What is finished is never run again: the same command
goes on where it was stopped, and several processes with the same --out share the runs, such as one per GPU,
each started with its own CUDA_VISIBLE_DEVICES.

The demonstration takes the English documentation that is already on this disk (see prepare.py) and the
teacher in teacher/, gives each strategy the same 2-layer student and the same number of FLOPs from three
seeds, one process per core, and fine-tunes every student on the built-in task: which package does a docstring
come from?  The task's docstrings are validation documents of that corpus, so neither a student nor the
teacher has been pretrained on them.
"""
import dataclasses
import hashlib
import io
import json
import math
import textwrap
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

import finetune_glue
import miniplm
import train
from comparison import jobs, judge, ngrams, report, statistics, timing
from comparison.demonstration import demonstrated, look
from comparison.merge import merged
from comparison.timing import Progress, duration
from data import Blocks
from plumbing import checkpoint, glue
from plumbing.budget import UNITS, one_budget
from plumbing.checks import NotFinite, check_teacher
from plumbing.cli import (
    Count,
    Counts,
    Positive,
    Positives,
    Seed,
    Times,
    UserError,
    checked,
    flag_of,
    numbers,
    run,
)
from plumbing.device import choose_device, fitting_micro_batch
from plumbing.files import claim, parsing, read_json, records, share_runs, write_json, write_whole
from plumbing.rundir import contents
from plumbing.student import initial_student, start_from, student_shape
from plumbing.tokens import TokenDirectory
from plumbing.validation import validation_blocks
from strategies import PHASED, RECIPES, STRATEGIES


@dataclass
class Config(train.Recipe):
    # budget
    total_hours: Positive | None = None  # in place of a budget: all of it, fine-tuning included, within so many hours
    budget_hours: Positives | None = None   # budgets of each arm on train.py's clock, such as 1,2,4: a run each
    budget_flops: Annotated[str, float, "[1e-9, 1e24]"] | None = None   # or in matmul FLOPs of student and teacher
    budget_tokens: Counts | None = None  # or in tokens
    budget_steps: Counts | None = None  # or in optimizer steps
    # arms
    strategies: Annotated[str, str, (*STRATEGIES, *PHASED)] = "no_kd,vanilla_kd,tinybert,minilm"    # the arms
    arms: str | None = None             # or STRATEGY, PHASE:END/../PHASE, miniplm; then +init, +released
    seeds: Times = 3                    # pretraining seeds of each arm; an interval needs two
    first_seed: Seed = 0                # the first of them; choices are made on one that is not among them
    recipes: Annotated[str, str, tuple(RECIPES)] | None = None  # several: each arm takes its best; default: --recipe
    peak_lrs: Positives | None = None   # of every arm; several: its best at each budget; default: the recipe's
    unique_tokens: str = "all"     # data settings such as all,2000000: the first so many ids, again and again
    static_masks: bool = False          # the limited settings with the same masks in every epoch as well
    reference_epochs: Times = 1         # of miniplm: passes of its reference over what is held out for it
    score_draws: Times = 1              # of miniplm: masks of each block that are scored
    # teacher
    teacher: str | None = None        # model directory, Hub id, or train: pretrain one on the same data first
    init_layers: Annotated[str, int, "[0, 999]"] | None = None  # of cut and +init; default: first, last, evenly
    teacher_size: str | None = None     # of --teacher train; default: twice the student's layers
    teacher_budget: Annotated[float, "[1e-9, 1e24]"] | None = None  # of --teacher train; default: 4 x the largest
    teacher_flops: Annotated[float, "[1e-9, 1e24]"] | None = None   # that a given teacher took; default: not known
    # data
    data: str | None = None             # token directory; without it the demonstration runs
    val_times: Count = 4                # validations over the budget
    # fine-tuning
    glue_dir: str | None = None         # folder of GLUE's official TSVs
    tasks: str | None = None            # cola,name=PATH,...; default: all of GLUE with --glue-dir
    columns: str | None = None          # of your own tasks: text,label or text,text,label; default: guessed
    finetune_seeds: Times = 4           # fine-tuning runs per pretrained model
    labels: Count | None = None         # training examples, drawn anew for each of them; default: all there are
    finetune_batch_sizes: Annotated[str, int, "[1, 4096]"] = "16,32"    # the grid of fine-tuning: examples per step ...
    finetune_lrs: Positives = "1e-5,3e-5,5e-5,8e-5"  # ... times peak learning rates
    quick: bool = False                 # one point of that grid in its place: batch 32, lr 5e-5
    finetune_epochs: Times = 5          # passes over the training examples
    max_len: Annotated[int, "[8, 65536]"] = 128     # ids an example is cut to
    probe: bool = False                 # what each frozen encoder knows as well, in a table of its own
    # run
    out: str = "runs/compare"     # directory for the runs, table.md, results.json, results.csv and figure.png
    jobs: Annotated[int, "[1, 128]"] | None = None  # processes over the runs; default: 1, the demonstration: one a core
    dry_run: bool = False               # print the plan and its time only
    merge: str | None = None         # instead: earlier comparisons (directories or results.json), one report of all

    def for_machine(self):
        """The same with one micro-batch for all runs: that of the runs which are there,
        else train.py's default."""
        if self.micro_batch:
            return self
        file = Path(self.out, "inputs.json")
        before = read_json(file).get("--micro-batch") if file.exists() else None
        micro = before or fitting_micro_batch(choose_device(self.device), self.batch_size)
        return dataclasses.replace(self, micro_batch=micro)

    def finetuning(self, model="a model", out="a directory", seed=0):
        """The finetune_glue.Config for one model: fresh fine-tuning seeds for each pretraining seed."""
        return finetune_glue.Config(
            model=str(model), glue_dir=self.glue_dir, tasks=self.tasks, columns=self.columns,
            batch_sizes=self.finetune_batch_sizes, peak_lrs=self.finetune_lrs, quick=self.quick,
            labels=self.labels, seeds=self.finetune_seeds, first_seed=1 + seed * self.finetune_seeds,
            epochs=self.finetune_epochs, max_len=self.max_len, out=str(out), device=self.device,
            compile=bool(self.compile), bf16=self.bf16)


# What every run of a comparison takes from its command line as it stands there
SHARED = ("data", *(f.name for f in dataclasses.fields(train.Recipe)))
MANY_RUNS = 5_000


# ------------------------------------------------------------------------------------------------------- plan

class Plan:
    """Every run of the comparison as a train.Config, made and checked before anything starts."""

    def __init__(self, config):
        self.config, self.out, self.teacher_flops = config, Path(config.out), config.teacher_flops
        self.unit, budgets = one_budget(config)
        whole = int if self.unit in ("tokens", "steps") else float
        self.budgets = sorted(numbers(budgets, whole))
        if config.arms and config.strategies != Config.strategies:
            raise UserError("give --strategies or --arms, not both")
        self.names = (config.arms or config.strategies).split(",")
        if not all(self.names) or len(set(self.names)) < len(self.names):
            raise UserError(f"--arms {config.arms}: must be arms, separated by commas, none twice")
        uniques = [None if part == "all" else checked("--unique-tokens", part, Count)
                   for part in config.unique_tokens.split(",")]
        limited = [n for n in uniques if n]
        if len(set(uniques)) < len(uniques):
            raise UserError(f"--unique-tokens {config.unique_tokens}: one is given twice")
        if config.static_masks and not limited:
            raise UserError("--static-masks compares masks where data repeat: give --unique-tokens all,N "
                            "with it")
        self.settings = [(None, False)] * (None in uniques) + [
            (n, static) for n in limited for static in (False, True)[:1 + config.static_masks]]
        if self.unit == "hours" and (config.jobs or 1) > max(1, torch.cuda.device_count()):
            raise UserError(f"--jobs {config.jobs} under --budget-hours: runs that share a device would take "
                            f"each other's time: give --budget-flops, or one job per GPU")
        lrs, recipes = numbers(config.peak_lrs or "") or [None], (config.recipes or config.recipe).split(",")
        self.choices, self.teacher = [(recipe, lr) for recipe in recipes for lr in lrs], None
        self.selections, self.arms = {}, {}     # {directory: miniplm.Config}, {run directory: its arm}
        if config.teacher == "train":
            size = config.teacher_size or f"{2 * config.shape.num_hidden_layers}L{config.shape.hidden_size}"
            budget = config.teacher_budget or 4 * self.budgets[-1]
            self.teacher = self.run("no_kd", math.ceil(budget) if whole is int else budget, size=size,
                                    out=str(self.out / "teacher"),
                                    choice=self.choices[0] if len(self.choices) == 1 else None)
        elif config.teacher_size or config.teacher_budget:
            raise UserError("--teacher-size and --teacher-budget belong to --teacher train")
        self.seeds = range(config.first_seed, config.first_seed + config.seeds)
        apart = self.seeds[0] - 1 if self.seeds[0] else 999             # what it chooses is reported on other seeds
        runs = len(self.names) * len(self.budgets) * (len(self.settings) * config.seeds + len(self.choices))
        if runs > MANY_RUNS:
            raise UserError(f"these are {runs:,} runs, and {MANY_RUNS:,} can be planned: give fewer arms, budgets, "
                            f"--seeds, --peak-lrs or --unique-tokens")
        self.tuning = {(name, budget, choice): self.run(name, budget, *self.settings[0], apart, choice)
                       for budget in self.budgets for name in self.names for choice in self.choices
                       if len(self.choices) > 1}
        self.runs = self.runs_at({(name, budget): self.choices[0] for name in self.names for budget in self.budgets})
        if len({each.out for each in self.runs}) < len(self.runs):
            raise UserError(f"{flag_of(f'budget_{self.unit}')} {budgets}: two budgets are the same to six digits")
        untrained = [(judge.RANDOM, "random"), *[(judge.CUT, "cut")] * any(
            each.start == "teacher" for each in self.runs)]
        self.yardsticks = [(name, self.out / f"{folder}/seed{seed}", seed)
                           for name, folder in untrained for seed in self.seeds]
        self.yardsticks.append((judge.TEACHER, self.out / "teacher", 0))
        for each in self.all:
            each.check()

    def run(self, arm, budget, unique=None, static=False, seed=0, choice=None, **other):
        """The train.Config of one run; its directory's name says all that it differs in from the others.
        `choice`: (recipe, peak LR or None)."""
        strategy, *suffixes = arm.split("+")
        controls = miniplm.CONTROLS if strategy == "miniplm" else ()
        if len(set(suffixes)) < len(suffixes) or not {"init", "released", *controls}.issuperset(suffixes):
            raise UserError(f"--arms {arm}: after the strategy may come +init (it starts from the teacher) and "
                            f"+released (what the paper's code computes), each once; after miniplm one of "
                            f"+{', +'.join(miniplm.CONTROLS)}")
        if strategy == "miniplm":
            rules = [rule for rule in suffixes if rule in controls] or ["kept"]
            if len(rules) > 1:
                raise UserError(f"--arms {arm}: one control at a time")
            other["data"], strategy = f"{self.chosen_from(unique)}/{rules[0]}", "no_kd"
        recipe, lr = choice or (self.config.recipe, None)
        name = (f"{train.file_name(arm)}-{budget:g}{self.unit}" + f"-{unique}ids" * (unique is not None)
                + "-static" * static + f"-{recipe}" * bool(choice and self.config.recipes)
                + (f"-lr{lr:g}" if lr else "") + f"-seed{seed}")
        each = train.Config(**{k: getattr(self.config, k) for k in SHARED} | dict(
            strategy=strategy, init="teacher" if "init" in suffixes else None,
            init_layers=self.config.init_layers
            if "init" in suffixes or strategy in ("distilbert", "sentence") else None,
            as_released="released" in suffixes,
            teacher=self.teacher_model, unique_tokens=unique, static_masks=static, seed=seed, recipe=recipe,
            peak_lr=lr, out=str(self.out / "runs" / name)) | {f"budget_{self.unit}": budget} | other)
        self.arms[each.out] = arm
        return each

    @property
    def teacher_model(self):
        return str(self.out / "teacher/model") if self.config.teacher == "train" else self.config.teacher

    def chosen_from(self, unique):
        """Where the data of the arms miniplm lie; at first they are noted as something to be made."""
        c, path = self.config, str(self.out / ("miniplm" + f"-{unique}ids" * (unique is not None)))
        rules = [rule for rule in miniplm.CONTROLS if any(
            name.startswith("miniplm+") and rule in name.split("+") for name in self.names)]
        # The reference has a third of the student's width, in whole heads of 64
        self.selections[path] = miniplm.Config(
            [c.data], self.teacher_model, path, ",".join(rules), draws=c.score_draws,
            reference_size=f"2L{max(64, c.shape.hidden_size // 3 // 64 * 64)}",
            reference_epochs=c.reference_epochs, batch_size=c.batch_size, seq_len=c.length,
            unique_tokens=unique, device=c.device, bf16=c.bf16)
        return path

    def paid(self, each):
        """The run with what its data have cost taken off its budget."""
        return each if each.data == self.config.data else miniplm.paid(each)

    def runs_at(self, chosen):
        """The compared runs, seeds outermost: stopped early, what is there compares all, over fewer seeds."""
        return [self.run(name, budget, *setting, seed, chosen[name, budget]) for seed in self.seeds
                for budget in self.budgets for setting in self.settings for name in self.names]

    @property
    def all(self):
        of_the_arms = {each.out: each for each in (*self.tuning.values(), *self.runs)}      # some are of both
        return [*([self.teacher] if self.teacher else []), *of_the_arms.values()]


def check_inputs(plan):
    """(token directory, {task: its examples}): everything that can be refused before hours of training is."""
    config, directory = plan.config, TokenDirectory(plan.config.data)
    plan.tasks = glue.parse_tasks(config.tasks, config.columns)
    plan.texts = texts = {name: glue.read_task(name, task, config.glue_dir) for name, task in plan.tasks.items()}
    plan.teacher_shape = teacher_shape(plan, directory)
    shapes = plan.teacher_shape, student_shape(plan.runs[0], directory)
    longest = min(c.max_position_embeddings for c in shapes)
    if config.max_len > longest:
        raise UserError(f"--max-len {config.max_len}: 8 to {longest} here")
    if config.probe and plan.runs[0].length > longest:
        raise UserError(f"--probe at --seq-len {config.seq_len}: the teacher ends at position {longest}")
    for unique, static in plan.settings:
        Blocks(directory, "train", plan.runs[0].length, 0, unique, static)       # refuses more than there are
    validation_blocks(directory, plan.runs[0].length)
    for each in plan.all:
        claim(each.out, "run", dry_run=True)
    return directory, texts


def teacher_shape(plan, directory):
    """The teacher's BertConfig.  Refuses a teacher that one of the arms cannot use."""
    if plan.teacher:
        teacher, head = student_shape(plan.teacher, directory), True
    else:
        path = checkpoint.find_model(plan.config.teacher)
        checkpoint.same_vocabulary(directory.read_tokenizer(), path)
        loaded, missing, _ = checkpoint.load_mlm(path, len(directory.vocab))
        teacher, head = loaded.config, not missing
    for each in plan.runs[:len(plan.names)]:
        if each.reads_teacher:
            check_teacher(each, student_shape(each, directory), teacher, head)
    return teacher


def within(config):
    """The same with the budget of each run that --total-hours leaves after fine-tuning and a tenth in reserve."""
    if given := [unit for unit in UNITS if getattr(config, f"budget_{unit}") is not None]:
        raise UserError(f"give --total-hours or --budget-{given[0]}, not both")
    file, hours = Path(config.out, "total.json"), config.total_hours
    before = read_json(file) if file.exists() else {}
    config = dataclasses.replace(config, total_hours=None, budget_hours="1")
    if before.get("total_hours") == hours:                              # the same command goes on
        return dataclasses.replace(config, budget_hours=before["budget_hours"])
    plan = Plan(config.for_machine())
    each = timing.hours_each(plan, hours, *check_inputs(plan))
    if not config.dry_run:
        claim(config.out, "compare")
        write_json(file, dict(total_hours=hours, budget_hours=each))
    return dataclasses.replace(config, budget_hours=each)


def describe(plan, seconds, finetune_seconds, texts):
    """The plan in a few lines, before anything starts."""
    config = plan.config
    print(f"plan: {', '.join(plan.names)}; student {config.size}; "
          f"budgets {', '.join(judge.amount(b, plan.unit) for b in plan.budgets)}; "
          f"{'; '.join(judge.setting(*s) for s in plan.settings)}; seeds 0 to {config.seeds - 1}")
    print(f"  {len(seconds)} pretraining runs"
          + (f", {len(plan.tuning)} of them to choose the peak LR" if plan.tuning else "")
          + (f", the teacher ({plan.teacher.size}, --teacher-budget {plan.teacher.budget[1]:g}) with "
             f"{duration(seconds[plan.teacher.out])}" if plan.teacher else "")
          + f"; {[*seconds.values()].count(0)} are finished, the others take about "
            f"{duration(sum(seconds.values()))} in one process")
    if plan.selections:
        charged = ", and charged to each" * (plan.unit in ("flops", "hours"))
        print(f"  before them, once for all that use it{charged}: {', '.join(plan.selections)}")
    models = len(plan.runs) + len(plan.yardsticks)
    print(f"  fine-tuning {models} models on {', '.join(texts)}: very roughly "
          f"{duration(models * finetune_seconds)}" + ", and their probes on top of it" * config.probe)
    pretraining = np.mean([seconds[each.out] for each in plan.runs])
    if pretraining and (m := statistics.fine_tunings(finetune_seconds / config.finetune_seeds / pretraining)
                        ) != config.finetune_seeds:
        print(f"  at these costs --finetune-seeds {m} tells most for its price (it is {config.finetune_seeds})")
    record = plan.out / "results.json"
    with parsing(record):
        able = record.exists() and report.resolution(read_json(record)["results"], config.seeds)
    if able:
        print(f"  by the spread in {record}, {able}")


def same_inputs(plan, directory, texts):
    """Notes in OUT/inputs.json what the runs are made from; refuses to mix them with others."""
    now = {flag_of(k): v for k, v in plan.run("no_kd", plan.budgets[0]).record.items()
           if k in (*SHARED, "teacher")}
    now |= contents(directory, None if plan.teacher else plan.config.teacher)
    now |= {f"task {name}": hashlib.sha256(json.dumps(
        [(part, x, np.asarray(y).tolist()) for part, (x, y) in parts.items()]).encode()).hexdigest()
        for name, parts in texts.items()}
    file = plan.out / "inputs.json"
    before = read_json(file) if file.exists() else {}
    moved = ("--data", *["--teacher"] * (plan.teacher is None))         # of these the contents count
    if differ := [k for k, v in now.items() if before.get(k, v) != v and k not in moved]:
        raise UserError(f"{plan.out} holds runs with another {', '.join(differ)}: give another --out")
    write_json(file, before | now)


# -------------------------------------------------------------------------------------------------------- run

def compare(plan):
    """(results, yardsticks, remarks, costs) of the whole plan; None for a dry run."""
    config, (directory, texts) = plan.config, check_inputs(plan)
    seconds = timing.estimate(plan, directory, plan.teacher_shape)
    finetune_seconds = timing.finetuning_seconds(plan, directory, texts)
    describe(plan, seconds, finetune_seconds, texts)
    if config.dry_run:
        return None
    claim(plan.out, "compare")
    share_runs([plan.out], lambda _: same_inputs(plan, directory, texts))
    compared = {each.out for each in plan.runs}
    progress = Progress({out: s + finetune_seconds * (out in compared) for out, s in seconds.items()}
                        | {f"score {path}": finetune_seconds for _, path, _ in plan.yardsticks})
    if (config.jobs or 1) > 1:
        status = partial(timing.over_all, plan, dict(progress.left), time.monotonic())
        jobs.run(config.jobs, work, config, plan.out, status)
        progress.say_line = lambda line: None                           # everything is finished
    return execute(plan, directory, progress)


def work(config):
    """What one of several processes does: its share of the runs."""
    plan = Plan(config)
    directory, _ = check_inputs(plan)
    execute(plan, directory, Progress({}))


def execute(plan, directory, progress):
    """Trains and scores every run and the yardsticks, and what is finished not again: (results,
    yardsticks, remarks, costs)."""
    remarks, costs = [], []

    def trained(each):
        return train.train(plan.paid(each), say=progress.say, status=progress.step)

    def teach(_):
        with progress.on(plan.teacher.out, f"teacher {plan.teacher.size}"):
            return trained(plan.teacher)

    def run_one(each):
        with progress.on(each.out, Path(each.out).name):
            summary, speed = timing.timed(plan, directory, each, trained)
            found = scored(plan, f"{each.out}/model", f"{each.out}/glue", progress.say, each.seed)
            for file in checkpoint.checkpoints(Path(each.out)):         # the model and the log stay
                file.unlink()
        return dict(result_of(plan, each, summary), **found, speed=speed)

    if plan.teacher:
        taught, = share_runs([plan.teacher.out], teach)
        remarks.append(f"The teacher ({plan.teacher.size}) has a validation MLM loss of "
                       f"{taught['val']['mlm']:.2f}; its own pretraining is charged to no arm"
                       + (", and it has seen all of the data." if plan.settings != [(None, False)] else "."))
        costs.append(f"The teacher's pretraining took {duration(taught['charged_seconds'])}.")
        plan.teacher_flops = taught["student_flops"]
    for selection in plan.selections.values():
        miniplm.miniplm(selection, say=progress.say_line)
    for each in plan.all:
        plan.paid(each)                                                 # refused now, not after other arms' hours
    if plan.tuning:
        chosen, tried, cost = tuned(plan, progress, trained)
        before, plan.runs = plan.runs, plan.runs_at(chosen)
        renamed = {a.out: b.out for a, b in zip(before, plan.runs, strict=True)}
        progress.left = {renamed.get(out, out): seconds for out, seconds in progress.left.items()}
        remarks, costs = remarks + tried, costs + [cost]
    todo = {each.out: partial(run_one, each) for each in plan.runs}
    todo |= {path: partial(score_yardstick, plan, directory, progress, name, path, seed)
             for name, path, seed in plan.yardsticks}
    done = share_runs([*todo], lambda i: [*todo.values()][i]())
    results, others = done[:len(plan.runs)], done[len(plan.runs):]
    costs.append(f"The compared runs were charged "
                 f"{duration(sum(r['charged_seconds'] for r in results))} in all.")
    yardsticks = [judge.constant_answer(results), dict(name=judge.NGRAMS, runs=[
        share_runs([plan.out / "ngrams"], lambda _: score_ngrams(plan, progress))[0]])]
    yardsticks += [dict(name=name, runs=[m for m in others if m["name"] == name])
                   for name in dict.fromkeys(m["name"] for m in others)]
    constant = yardsticks[0]["runs"][0]
    constant["predicted"] = {t: constant_of(plan.tasks[t], plan.texts[t], t_result) for t, t_result in
                             results[0]["tasks"].items() if t in plan.texts}
    return results, yardsticks, remarks + report.spent_before(results), costs


def tuned(plan, progress, trained):
    """({(arm, budget): (recipe, peak LR)} of the lowest own validation loss, what was tried, cost)"""
    def do(i):
        (name, budget, choice), each = list(plan.tuning.items())[i]
        with progress.on(each.out, f"{name}, {in_words(choice)}"):
            try:
                summary = trained(each)
                terms = each.phases[-1].strategy.terms
                loss = sum(terms[k].weight * v for k, v in summary["val"].items())
            except NotFinite as e:
                progress.say(str(e))
                summary, loss = dict(charged_seconds=0.0), math.inf
        return (name, budget), choice, loss if math.isfinite(loss) else math.inf, summary["charged_seconds"]

    def in_words(choice):
        recipe, lr = choice
        return f"{recipe} " * bool(plan.config.recipes) + (f"peak LR {lr:g}" if lr else "at its own peak LR")

    def taken(recipe, lr):
        lrs = [rate for of, rate in plan.choices if of == recipe]
        edge = {min(lrs): ", the lowest tried", max(lrs): ", the highest tried"} if len(lrs) > 1 else {}
        return f" (taken{edge.get(lr, '')})"
    found = share_runs([each.out for each in plan.tuning.values()], do)
    best = {at: min(((loss, *choice) for a, choice, loss, _ in found if a == at), key=lambda f: f[0])[1:]
            for at, *_ in found}
    lines = [f"{at[0]} at {judge.amount(at[1], plan.unit)}: " + ", ".join(
        f"{in_words(choice)}: " + (f"{loss:.4f}" if loss < math.inf else "not finite")
        + taken(*choice) * (choice == best[at]) for a, choice, loss, _ in found if a == at) for at in best]
    spent = sum(seconds for at, choice, _, seconds in found if choice != best[at])
    return best, lines, (f"Choosing took {len(found)} runs; the {len(found) - len(best)} that are not part of the "
                         f"comparison were charged {duration(spent)}.")


# ------------------------------------------------------------------------------------------------------ score

def scored(plan, model, out, say, seed):
    """What finetune_glue finds of a model, now or in an earlier run: of each task and in short, and
    with --probe the probes."""
    config, tuning = plan.config, plan.config.finetuning(model, out, seed)
    tasks = finetune_glue.score(tuning, say)["tasks"]
    means = {name: r["mean"] for name, r in tasks.items()}
    predicted = {name: finetune_glue.kept_predictions(name, plan.tasks.get(name), r, Path(out, "trials"))
                 for name, r in tasks.items()}
    probe = dataclasses.replace(tuning, data=config.data, probe=True, seq_len=plan.runs[0].length)
    return dict(tasks=tasks, scores=means, predicted=predicted, model=str(model),
                probes=finetune_glue.probes(probe, say) if config.probe else {},
                average=float(np.mean([means[name] for name in judge.averaged(means)])))


def score_ngrams(plan, progress):
    """What n-grams and a linear classifier find of the tasks, from the training examples that the fine-tunings have:
    a draw each with --labels, else all of them, once."""
    found, file = dict(tasks={}, predicted={}), plan.out / "ngrams/predicted.npz"
    before = dict(np.load(file)) if file.exists() else {}
    for name, task in plan.tasks.items():
        (_, y), (_, y_dev), *_ = plan.texts[name].values()
        if name not in before:
            progress.say_line(f"n-grams on {name}")
            draws = [finetune_glue.drawn(len(y), plan.config.labels, seed + 1) for seed in range(
                plan.config.finetune_seeds if plan.config.labels else 1)]
            _, before[name] = ngrams.score(task, plan.texts[name], draws)
        scores = [glue.evaluate(task, p, y_dev)[0][task.metrics[0]] for p in before[name]]
        found["tasks"][name] = dict(metric=task.metrics[0], n=len(y_dev), scores=scores, collapsed=0,
                                    collapsed_trials=[False] * len(scores))
        found["predicted"][name] = before[name]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **before)
    write_whole(file, buffer.getvalue())
    return found | dict(scores={t: float(np.mean(of["scores"])) for t, of in found["tasks"].items()})


def constant_of(task, parts, result):
    """(1, dev examples): the constant answer, as a prediction."""
    _, (_, y), *_ = parts.values()
    return np.full((1, result["n"]), 0 if task.labels == () else np.bincount(y).argmax())


def score_yardstick(plan, directory, progress, name, path, seed):
    """The untrained student of a seed, one of the teacher's layers, or the teacher, scored as an arm is."""
    model = path / "model"
    if name == judge.TEACHER:
        model = plan.teacher_model
    elif not model.exists():
        student = initial_student(dataclasses.replace(plan.runs[0], seed=seed), directory)
        if name == judge.CUT:
            source = checkpoint.find_model(plan.teacher_model)
            teacher, missing, _ = checkpoint.load_mlm(source, len(directory.vocab))
            start_from(student, teacher, numbers(plan.config.init_layers or "", int), head=not missing)
        checkpoint.save_model(model, student, directory.read_tokenizer(), head=True)
    with progress.on(f"score {path}", f"{name} {seed}"):
        return dict(name=name, **scored(plan, model, path / "glue", progress.say, seed))


def result_of(plan, each, summary):
    """What a run was and cost, as report.py reads it."""
    kept = ("seed", "peak_lr", "steps", "tokens", "epochs", "charged_seconds", "tokens_per_second",
            "teacher_share", "val", "device")
    log = (record for _, record in records(Path(each.out, "log.jsonl").read_bytes().split(b"\n")))
    curve = [dict(seconds=r["seconds"], tokens=r["step"] * summary["tokens"] // summary["steps"],
                  mlm=r["val"]["mlm"], d_order=r.get("d_order")) for r in log if "mlm" in r.get("val", {})]
    return dict({k: summary[k] for k in kept}, strategy=plan.arms[each.out], budget=each.budget[1], unit=plan.unit,
                unique_tokens=each.unique_tokens, static_masks=each.static_masks, recipe=each.recipe, curve=curve,
                flops=summary["student_flops"] + summary["teacher_flops"],
                spent_before=each.budget[1] - summary["budget"][plan.unit])


# ----------------------------------------------------------------------------------------------------- report

def recipe(config):
    """[a line on fine-tuning], where it is not the paper's grid or a part of it."""
    ours = finetune_glue.Config
    if (set(finetune_glue.grid(config.finetuning())) <= set(finetune_glue.grid(ours("a model")))
            and (config.finetune_epochs, config.max_len) == (ours.epochs, ours.max_len)):
        return []
    return [f"Fine-tuning is outside the paper's grid (batch {ours.batch_sizes}, lr {ours.peak_lrs}, "
            f"{ours.epochs} epochs, {ours.max_len} ids): here batch {config.finetune_batch_sizes}, lr "
            f"{config.finetune_lrs}, {config.finetune_epochs} epochs, {config.max_len} ids."]


def papers_setting(plan):
    """The size whose rows of the paper's Table 2 may stand beside these, or None."""
    config, teachers = plan.config, {"6L768": "12L768", "12L1024": "24L1024"}
    same = not config.recipes and all(getattr(config, name) == getattr(Config, name) for name in (
        "seq_len", "batch_size", "recipe", "init_std", "optimizer", "clip", "weight_decay"))
    return config.size if same and teachers.get(config.size) == plan.teacher_shape.size else None


def write_report(config, results, yardsticks, remarks=(), costs=(), size=None, labels=None, teacher_flops=None):
    """The tables, the verdict and the figure, under OUT and on the screen.  `labels`: {task: of its dev examples}."""
    out, layers = Path(config.out), ", ".join(map(str, numbers(config.init_layers or "", int)))
    for each in (*results, *(r for y in yardsticks for r in y["runs"])):
        judge.keep_examples(each, each.get("predicted", {}), labels or {})
    said = report.verdict(results, yardsticks, teacher_flops, layers)
    notes = [*report.drift(results), *report.remarks(results), *remarks, *recipe(config)]
    table = report.score_table(results, yardsticks, size)
    text = "\n\n".join([said[0], table, *said[1:], *notes])
    probes = report.probe_table(results, yardsticks) if config.probe else ""
    costs = "\n\n".join([report.cost_table(results, teacher_flops), *costs,
                         *judge.pays_from(results, yardsticks, teacher_flops)])
    left_out = ("predicted", "examples")
    everything = dict(config=dataclasses.asdict(config), verdict=said, teacher_flops=teacher_flops,
                      results=[{k: v for k, v in r.items() if k not in left_out} for r in results],
                      yardsticks=[dict(y, runs=[{k: v for k, v in r.items() if k not in left_out} for r in y["runs"]])
                                  for y in yardsticks])
    if (inputs := out / "inputs.json").exists():
        everything["data"] = read_json(inputs).get("contents of data")

    def write(_):
        for name, content in (("table.md", f"{text}\n\n{probes}"), ("costs.md", costs),
                              ("results.csv", report.comma_separated(results)),
                              ("results.json", json.dumps(everything, indent=1))):
            write_whole(out / name, f"{content.rstrip()}\n".encode())
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **judge.arrays_of(results, yardsticks, labels or {}))
        write_whole(out / "results.npz", buffer.getvalue())
        report.figure(results, yardsticks, out / "figure.png", teacher_flops)
    share_runs([out], write)
    print("\n" + "\n\n".join(filter(None, [
        textwrap.fill(said[0], 80), report.screen_table(results, yardsticks),
        *(textwrap.fill(line, 80) for line in (*said[1:], *notes)),
        "Probes of the frozen encoders: in table.md." * bool(probes),
        f"also in {out}/table.md, costs.md, results.json and results.csv"])))


def main(config):
    began = time.monotonic()
    if config.merge:
        with parsing(f"--merge {config.merge}"):
            config, found, labels, teacher_flops = merged(config)
            claim(config.out, "compare")
            return write_report(config, *found, labels=labels, teacher_flops=teacher_flops)
    claim(config.out, "compare", dry_run=True)
    demonstration = config.data is None
    if demonstration:
        config = demonstrated(config)
    elif config.teacher is None:
        raise UserError("--data needs --teacher with it: a model directory, a Hub id, or train")
    elif config.tasks is None and config.glue_dir is None:
        raise UserError("--data needs tasks to score on: --glue-dir (GLUE's TSVs), or --tasks (name=PATH: "
                        "your own labelled text; GLUE's names: from the Hub)")
    elif config.tasks is None:
        config = dataclasses.replace(config, tasks=finetune_glue.Config.tasks)
    if config.total_hours:
        config = within(config)
    config = config.for_machine()
    plan = Plan(config)
    if not (found := compare(plan)):
        return
    labels = {name: [*parts.values()][1][1] for name, parts in plan.texts.items()}
    write_report(config, *found, papers_setting(plan), labels, plan.teacher_flops)
    if demonstration:
        look(found[0], config)
    print(f"\n{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    run(main, Config, __doc__)
