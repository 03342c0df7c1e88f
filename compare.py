"""Every strategy at every budget, over several seeds, fine-tuned and scored alike.  Read it after finetune_glue.py.

    python compare.py         # the demonstration: no data, no teacher, no GPU, no download; four minutes
    python compare.py --data data/wiki --teacher bert-base-uncased --glue-dir glue --budget-hours 1,4 --seeds 3 \\
                      --out runs/table2 --dry-run                             # the plan and its time, no more

Each (strategy, budget, data setting, seed) is a run of its own under OUT/runs, whose learning rate ends at zero at its
budget.  What is finished is never run again: the same command goes on where it was stopped, and several processes with
the same --out share the runs, such as one per GPU, each with its own CUDA_VISIBLE_DEVICES.

The demonstration takes the English documentation that is already on this disk (see prepare.py), the teacher in
teacher/ and a 2-layer student, one process per core, and asks: which package does a docstring come from?  The
task has validation documents of that corpus alone, which neither a student nor the teacher was pretrained on.
"""
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

import finetune_glue
import miniplm
import train
from comparison import jobs, judge, ngrams, report, timing
from comparison.demonstration import demonstrated, look
from comparison.merge import merged
from comparison.timing import Progress
from data import Blocks
from plumbing import checkpoint, glue, settle
from plumbing.budget import UNITS
from plumbing.checks import NotFinite, check_teacher
from plumbing.cli import Count, Counts, Positive, Positives, Seed, Times, UserError, checked, flag_of, numbers, run
from plumbing.device import choose_device, fitting_micro_batch
from plumbing.files import claim, claim_each, parsing, read_json, write_json, write_whole
from plumbing.rundir import contents
from plumbing.student import initial_student, start_from, student_shape
from plumbing.tokens import TokenDirectory
from plumbing.validation import validation_blocks
from strategies import RECIPES


@dataclass
class Config(train.Recipe):
    # budget
    total_hours: Positive | None = None  # in place of a budget: all of it, fine-tuning included, within so many hours
    budget_hours: Positives | None = None   # budgets of each arm on train.py's clock, such as 1,2,4: a run each
    budget_flops: Annotated[str, float, "[1e-9, 1e24]"] | None = None   # or in matmul FLOPs of student and teacher
    budget_tokens: Counts | None = None  # or in tokens
    budget_steps: Counts | None = None  # or in optimizer steps
    # arms
    arms: str | None = None             # STRATEGY or PHASE:END/../PHASE or miniplm, +init, +released, @RECIPE:LR, ...
    seeds: Times = 3                    # pretraining seeds of each arm; an interval needs two
    first_seed: Seed = 0                # the first of them; choices are made on one that is not among them
    recipes: Annotated[str, str, tuple(RECIPES)] | None = None  # several: each arm takes its best; default: --recipe
    peak_lrs: Positives | None = None   # of every arm; several: its best at each budget; default: the recipe's
    unique_tokens: str = "all"     # data settings such as all,2000000: the first so many ids, again and again
    static_masks: bool = False          # the limited settings with the same masks in every epoch as well
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
    finetune_seeds: Annotated[int, "[0, 1000]"] = 4     # runs per pretrained model; 0: its probes are the score
    labels: Count | None = None         # training examples, drawn anew for each of them; default: all there are
    finetune_batch_sizes: Annotated[str, int, "[1, 4096]"] | None = None    # the grid's examples per step ...
    finetune_lrs: Positives | None = None   # ... times peak learning rates; default: by each model's width
    quick: bool = False                 # one point of that grid, by each model's width (finetune_glue.py --help)
    finetune_epochs: Times = 5          # passes over the training examples
    max_len: Annotated[int, "[8, 65536]"] = 128     # ids an example is cut to
    probe: bool = False                 # what each frozen encoder knows as well, in a table of its own
    rivals: str | None = None           # NAME=DIR,...: models that nobody here trained, scored as the teacher is
    # run
    out: str = "runs/compare"     # directory for the runs, table.md, costs.md, results.json and figure.png
    jobs: Annotated[int, "[1, 128]"] | None = None  # processes over the runs; default: 1, the demonstration: one a core
    dry_run: bool = False               # print the plan and its time only
    merge: str | None = None         # instead: earlier comparisons (directories or results.json), one report of all

    def finetuning(self, model="a model", out="a directory", seed=0):
        """The finetune_glue.Config for one model: fresh fine-tuning seeds for each pretraining seed."""
        return finetune_glue.Config(
            model=str(model), glue_dir=self.glue_dir, tasks=self.tasks, columns=self.columns,
            batch_sizes=self.finetune_batch_sizes, peak_lrs=self.finetune_lrs, quick=self.quick,
            labels=self.labels, seeds=max(1, self.finetune_seeds), first_seed=1 + seed * self.finetune_seeds,
            epochs=self.finetune_epochs, max_len=self.max_len, out=str(out), device=self.device,
            compile=bool(self.compile), bf16=self.bf16)


# What the arms are where none are given: of a teacher with an LM head, and of an encoder
ARMS = {True: "no_kd,no_kd+init,tinybert,vanilla_kd,minilm", False: "sentence,tinybert+init,no_kd,minilmv2"}
# What every run of a comparison takes from its command line as it stands there
SHARED = ("data", *(f.name for f in dataclasses.fields(train.Recipe)))
MANY_RUNS = 5_000
# What is settled where it is not given, and what that depends on
GIVEN = ("total_hours", "budget_hours", "budget_flops", "budget_tokens", "budget_steps", "arms", "size", "heads",
         "batch_size", "teacher", "teacher_size", "teacher_budget", "finetune_seeds")


class Plan:
    """Every run of the comparison as a train.Config, made and checked before anything starts."""

    def __init__(self, config, say=lambda line: None):
        self.config, self.out, self.teacher_flops = config, Path(config.out), config.teacher_flops
        self.unit, budgets = config.budget
        whole = int if self.unit in ("tokens", "steps") else float
        self.budgets = sorted(numbers(budgets, whole))
        self.directory = TokenDirectory(config.data)
        if config.teacher != "train":
            path = checkpoint.find_model(config.teacher)
            checkpoint.same_vocabulary(self.directory.read_tokenizer(), path)
            loaded, missing, _ = checkpoint.load_mlm(path, len(self.directory.vocab))
            self.teacher_shape, self.head = loaded.config, not missing
        self.names = (config.arms or ARMS[config.teacher == "train" or self.head]).split(",")
        if not all(self.names) or len(set(self.names)) < len(self.names):
            raise UserError(f"--arms {config.arms}: must be arms, separated by commas, none twice")
        self.own = {name: own_choice(name) for name in self.names if "@" in name}       # {arm: (recipe, peak LR)}
        if len(plain := {name.partition("@")[0]: name for name in self.names}) == len(self.names):
            self.names, self.own = [*plain], {arm: self.own[name] for arm, name in plain.items() if name in self.own}
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
        self.selections, self.arms, self.nominal = {}, {}, {}   # {directory: miniplm.Config}, {run: arm}, {run: budget}
        if config.teacher == "train":
            size = config.teacher_size or f"{2 * config.shape.num_hidden_layers}L{config.shape.hidden_size}"
            budget = config.teacher_budget or 4 * self.budgets[-1]
            self.teacher = self.run("no_kd", math.ceil(budget) if whole is int else budget, size=size,
                                    out=str(self.out / "teacher"),
                                    choice=self.choices[0] if len(self.choices) == 1 else None)
            self.teacher_shape, self.head = student_shape(self.teacher, self.directory), True
        elif config.teacher_size or config.teacher_budget:
            raise UserError("--teacher-size and --teacher-budget belong to --teacher train")
        self.seeds = range(config.first_seed, config.first_seed + config.seeds)
        apart = self.seeds[0] - 1 if self.seeds[0] else 999             # what it chooses is reported on other seeds
        runs = len(self.names) * len(self.budgets) * (len(self.settings) * config.seeds + len(self.choices))
        if runs > MANY_RUNS:
            raise UserError(f"these are {runs:,} runs, and {MANY_RUNS:,} can be planned: give fewer arms, budgets, "
                            f"--seeds, --peak-lrs or --unique-tokens")
        self.left_out = {name: why for name in self.names if (why := self.why_not(name))}
        if self.left_out and (config.arms or len(self.left_out) == len(self.names)):
            raise UserError(next(iter(self.left_out.values())))
        self.names = [name for name in self.names if name not in self.left_out]
        self.tuning = {(name, budget, choice): self.run(name, budget, *self.settings[0], apart, choice)
                       for budget in self.budgets for name in self.names for choice in self.choices
                       if len(self.choices) > 1 and name not in self.own}
        self.runs = self.runs_at({(name, budget): self.choices[0] for name in self.names for budget in self.budgets})
        if len({each.out for each in self.runs}) < len(self.runs):
            raise UserError(f"{flag_of(f'budget_{self.unit}')} {budgets}: two budgets are the same to six digits")
        self.yardsticks = [(judge.RANDOM, self.out / f"random/seed{seed}", seed) for seed in self.seeds]
        if self.why_not("no_kd+init") is None:                          # frozen, all seeds are one
            self.yardsticks += [(judge.CUT, self.out / f"cut/seed{seed}", seed)
                                for seed in self.seeds[:config.seeds if config.finetune_seeds else 1]]
        self.yardsticks.append((judge.TEACHER, self.out / "teacher", 0))
        self.rivals = {}                                                # {where its scores lie: the model directory}
        for i, part in enumerate(config.rivals.split(",") if config.rivals else ()):
            name, _, model = part.partition("=")
            if not name or not model:
                raise UserError(f"--rivals {part}: must be NAME=DIR, a model directory or Hub id")
            self.yardsticks.append((f"{name}{judge.RIVAL}", self.out / f"rivals/{i}", 0))
            self.rivals[self.yardsticks[-1][1]] = checkpoint.find_model(model)
        for each in self.all:
            each.check()
        self.read_inputs(say)

    def why_not(self, arm):
        """Why the teacher cannot serve an arm; None where it can."""
        each = self.run(arm, self.budgets[0])
        try:
            if each.reads_teacher:
                check_teacher(each, student_shape(each, self.directory), self.teacher_shape, self.head)
        except UserError as e:
            return str(e)

    def run(self, arm, budget, unique=None, static=False, seed=0, choice=None, **other):
        """The train.Config of one run; its directory's name says all that it differs in from the others.  `choice`:
        (recipe, peak LR or None)."""
        strategy, *suffixes = arm.partition("@")[0].split("+")
        rules = [s for s in suffixes if strategy == "miniplm" and s in miniplm.CONTROLS]
        known = {"init", "random", "released", "teacher_budget", *rules}
        starts = len({"init", "random"} & {*suffixes})
        if len(set(suffixes)) < len(suffixes) or len(rules) > 1 or starts > 1 or {*suffixes} - known:
            raise UserError(f"--arms {arm}: after the strategy may come +init or +random (it starts from the teacher, "
                            f"or not), +released (what the paper's code computes), +teacher_budget, each once, then "
                            f"@RECIPE:LR; after miniplm one of +{', +'.join(miniplm.CONTROLS)}")
        if strategy == "miniplm":
            other["data"], strategy = f"{self.chosen_from(unique)}/{(rules or ['kept'])[0]}", "no_kd"
        recipe, lr = self.own.get(arm) or choice or (self.config.recipe, None)
        name = (f"{train.file_name(arm)}-{budget:g}{self.unit}" + f"-{unique}ids" * (unique is not None)
                + "-static" * static + f"-{recipe}" * (bool(self.config.recipes) or recipe != self.config.recipe)
                + (f"-lr{lr:g}" if lr else "") + f"-seed{seed}")
        each = train.Config(**{k: getattr(self.config, k) for k in SHARED} | dict(
            strategy=strategy, init="teacher" if "init" in suffixes else "random" if "random" in suffixes else None,
            init_layers=self.config.init_layers
            if "init" in suffixes or strategy in ("distilbert", "sentence") and "random" not in suffixes else None,
            as_released="released" in suffixes,
            teacher=self.teacher_model, unique_tokens=unique, static_masks=static, seed=seed, recipe=recipe,
            peak_lr=lr, out=str(self.out / "runs" / name)) | {f"budget_{self.unit}": budget} | other)
        self.arms[each.out], self.nominal[each.out] = arm, budget
        if "teacher_budget" in suffixes:
            if self.teacher is None or each.reads_teacher:
                todo = "leave it out here" if each.reads_teacher else "give --teacher train"
                raise UserError(f"--arms {arm}: +teacher_budget adds the budget of --teacher train to an arm that "
                                f"reads no teacher: {todo}")
            each = dataclasses.replace(each, **{f"budget_{self.unit}": budget + self.teacher.budget[1]})
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
            [c.data], self.teacher_model, path, ",".join(rules), batch_size=c.batch_size,
            reference_size=f"2L{max(64, c.shape.hidden_size // 3 // 64 * 64)}", seq_len=c.seq_len,
            unique_tokens=unique, device=c.device, bf16=c.bf16)
        return path

    def paid(self, each):
        """The run with what its data have cost taken off its budget."""
        return each if each.data == self.config.data else miniplm.paid(each)

    def runs_at(self, chosen):
        """The compared runs, seeds outermost: stopped early, what is there compares all, over fewer seeds."""
        return [self.run(name, budget, *setting, seed, chosen.get((name, budget))) for seed in self.seeds
                for budget in self.budgets for setting in self.settings for name in self.names]

    @property
    def all(self):
        of_the_arms = {each.out: each for each in (*self.tuning.values(), *self.runs)}      # some are of both
        return [*([self.teacher] if self.teacher else []), *of_the_arms.values()]

    def read_inputs(self, say):
        """The tasks: everything that can be refused before hours of training is."""
        config, first = self.config, self.runs[0]
        self.tasks = glue.parse_tasks(config.tasks, config.columns, say)
        self.texts = {name: glue.read_task(name, task, config.glue_dir, say) for name, task in self.tasks.items()}
        self.labels = {name: [*parts.values()][1][1] for name, parts in self.texts.items()}     # of dev
        longest = min(self.teacher_shape.max_position_embeddings, max(512, first.seq_len))
        if config.max_len > longest:
            raise UserError(f"--max-len {config.max_len}: 8 to {longest} here")
        for model in self.rivals.values():
            checkpoint.read_tokenizer(model)
            if config.max_len > (end := checkpoint.read_config(model).max_position_embeddings):
                raise UserError(f"--max-len {config.max_len}: --rivals {model} ends at position {end}")
        for unique, static in self.settings:
            Blocks(self.directory, "train", first.seq_len, 0, unique, static)        # refuses more than there are
        validation_blocks(self.directory, first.seq_len)
        for each in self.all:
            claim(each.out, "run", dry_run=True)


def own_choice(name):
    """(recipe, peak LR) of ARM@RECIPE:LR."""
    recipe, _, lr = name.partition("@")[2].partition(":")
    return (checked(f"--arms {name}: recipe", recipe, Literal[tuple(RECIPES)]),
            checked(f"--arms {name}: peak LR", lr, Positive))


def settled(config):
    """(the same with size, heads, budget, batch size and arms where nobody said them, speeds or None): those of the
    comparison that is there, if one is; else such that each arm learns something."""
    inputs, before = (read_json(file) if file.exists() else {} for file in (
        Path(config.out, "inputs.json"), Path(config.out, "taken.json")))
    given, speeds = {name: getattr(config, name) for name in GIVEN}, None
    if before.get("given") == given:                                    # the same command goes on
        config = dataclasses.replace(config, **before["taken"])
    else:
        config = dataclasses.replace(config, **{name: inputs.get(flag_of(name)) for name in (
            "size", "heads", "batch_size") if given[name] is None})
        if config.teacher != "train":
            config = settle.half_of(config, checkpoint.read_config(checkpoint.find_model(config.teacher)))
        # Of a teacher that is trained: the largest size of which all arms get three times what they need
        sizes = [config.size] if config.size else [*reversed(settle.SIZES)]

        def attempt(size, room):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                return *fitted(dataclasses.replace(config, size=size), room), said.getvalue()
        found = attempt(sizes[0], 1)
        with contextlib.suppress(UserError):
            for size in sizes[1:]:
                found = attempt(size, 3)
        config, speeds, left_out = found
        print(left_out, end="")
        if not config.dry_run:
            taken = {name: getattr(config, name) for name in GIVEN}
            write_json(claim(config.out, "compare") / "taken.json", dict(given=given, taken=taken))
    micro = config.micro_batch or inputs.get("--micro-batch") or fitting_micro_batch(       # one for all runs
        choose_device(config.device), config.batch_size)
    return dataclasses.replace(config, micro_batch=micro), speeds


def small_plan(config):
    """The plan with the smallest batch, before one is chosen."""
    small = config.batch_size or settle.SMALLEST_BATCH
    return Plan(dataclasses.replace(config, batch_size=small, micro_batch=config.micro_batch or small))


def fitted(config, room=1):
    """(the same with a batch size and a budget, speeds or None), without the arms that would learn nothing from random
    weights, whose hours go to the others.  With `room` each needs so many times as much, and none is left out."""
    while True:
        now = within(config) if config.total_hours else config
        plan = small_plan(now)
        if config.batch_size or plan.unit == "steps":
            return dataclasses.replace(now, batch_size=config.batch_size or settle.PAPERS_BATCH), None
        speeds = timing.speeds(plan) if plan.unit == "hours" else None
        shape = student_shape(plan.runs[0], plan.directory)
        runs = [(each, timing.blocks_of(plan, each, speeds)) for each in plan.runs[:len(plan.names)]]
        size = min(settle.batch_that_fits(config, blocks) for _, blocks in runs)
        would = {plan.arms[each.out]: (dataclasses.replace(each, batch_size=size), blocks / room, shape)
                 for each, blocks in runs if each.start == "random"}
        poor = {arm: of for arm, of in would.items() if not settle.enough(*of)}
        if not poor:
            return dataclasses.replace(now, batch_size=size), speeds
        said = [f"{arm} would get {settle.gets(*of)}: too little to learn from random weights"
                for arm, of in poor.items()]
        if room > 1 or len(poor) == len(plan.names):
            fits = settle.sizes_that_fit(*min(poor.values(), key=lambda of: of[1]))
            raise UserError(f"{said[0]}: give " + "".join(f"--size {fit}, " for fit in fits[:1])
                            + f"a larger budget, or, to go on anyway, --batch-size {size}")
        print(*(textwrap.fill(f"left out: {line}", 80) for line in said), sep="\n")
        config = dataclasses.replace(config, arms=",".join(name for name in plan.names if name not in poor))


def within(config):
    """The same with the budget of each run that --total-hours leaves after fine-tuning and a tenth in reserve, without
    the last of the arms by default where that leaves nothing."""
    if given := [unit for unit in UNITS if getattr(config, f"budget_{unit}") is not None]:
        raise UserError(f"give --total-hours or --budget-{given[0]}, not both")
    asked, config = config, dataclasses.replace(config, total_hours=None, budget_hours="1")
    finetune_seconds = timing.finetuning_seconds(plan := small_plan(config))
    while True:
        try:
            each, tunings = timing.hours_each(plan, asked.total_hours, finetune_seconds)
            return dataclasses.replace(config, budget_hours=each, finetune_seeds=tunings)
        except UserError as e:
            *names, last = plan.names
            if asked.arms or not names:
                raise
            print(textwrap.fill(f"left out: {last}, since with it {str(e).partition(': ')[2].partition(':')[0]}", 80))
            plan = small_plan(config := dataclasses.replace(config, arms=",".join(names)))


def same_inputs(plan):
    """Notes in OUT/inputs.json what the runs are made from; refuses to mix them with others."""
    now = {flag_of(k): v for k, v in plan.run("no_kd", plan.budgets[0]).record.items()
           if k in (*SHARED, "teacher")}
    now |= contents(plan.directory, None if plan.teacher else plan.config.teacher)
    now |= {f"task {name}": hashlib.sha256(json.dumps(
        [(part, x, np.asarray(y).tolist()) for part, (x, y) in parts.items()]).encode()).hexdigest()
        for name, parts in plan.texts.items()}
    file = plan.out / "inputs.json"
    before = read_json(file) if file.exists() else {}
    moved = ("--data", *["--teacher"] * (plan.teacher is None))         # of these the contents count
    if differ := [k for k, v in now.items() if before.get(k, v) != v and k not in moved]:
        raise UserError(f"{plan.out} holds runs with another {', '.join(differ)}: give another --out")
    write_json(file, before | now)


def compare(plan, speeds=None):
    """(results, yardsticks, remarks) of the whole plan; None for a dry run."""
    config = plan.config
    if (config.jobs or 1) > 1:                                          # as each of them runs
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.jobs))
    speeds = speeds or timing.speeds(plan)
    seconds, finetune_seconds = timing.estimate(plan, speeds), timing.finetuning_seconds(plan)
    timing.describe(plan, speeds, seconds, finetune_seconds)
    if config.dry_run:
        return None
    claim(plan.out, "compare")
    claim_each([plan.out], lambda _: same_inputs(plan))
    compared = {each.out for each in plan.runs}
    progress = Progress({out: s + finetune_seconds * (out in compared) for out, s in seconds.items()}
                        | {f"score {path}": finetune_seconds for _, path, _ in plan.yardsticks})
    if (config.jobs or 1) > 1:
        until = time.monotonic() + sum(progress.left.values()) / config.jobs
        jobs.run_jobs(config.jobs, work, config, plan.out, lambda: timing.over_all(plan, until))
        progress.say_line = lambda line: None                           # everything is finished
    return execute(plan, progress)


def work(config):
    """What one of several processes does: its share of the runs."""
    execute(Plan(config), Progress({}))


def execute(plan, progress):
    """Trains and scores every run and the yardsticks, what is finished not again: (results, yardsticks, remarks)."""
    def trained(each):
        def say(line):
            if line.startswith("warning"):
                progress.say_line(textwrap.fill(line, 80))
            elif line.startswith(each.out):                             # that it goes on, or is finished
                progress.say(line.removeprefix(each.out).lstrip(": "))
        return train.train(plan.paid(each), say=say, status=progress.step)

    def teach(_):
        with progress.on(plan.teacher.out, f"teacher {plan.teacher.size}"):
            return trained(plan.teacher)

    def run_one(key, each):
        with progress.on(key, Path(each.out).name):
            summary = trained(each)
            found = scored(plan, f"{each.out}/model", f"{each.out}/glue", progress.say, each.seed)
            Path(each.out, "checkpoint.pt").unlink(missing_ok=True)     # the model and the log stay
        return result_of(plan, each, summary) | found

    remarks, keys = [], [each.out for each in plan.runs]                # of their estimates
    if plan.teacher:
        taught, = claim_each([plan.teacher.out], teach)
        remarks.append(f"The teacher ({plan.teacher.size}) has a validation MLM loss of "
                       f"{taught['val']['mlm']:.2f}; its own pretraining is charged to no arm"
                       + (", and it has seen all of the data." if plan.settings != [(None, False)] else "."))
        plan.teacher_flops = taught["student_flops"]
    for selection in plan.selections.values():
        miniplm.miniplm(selection, say=progress.say_line)
    for each in plan.all:
        plan.paid(each)                                                 # refused now, not after other arms' hours
    if plan.tuning:
        chosen, tried = tuned(plan, progress, trained)
        plan.runs, remarks = plan.runs_at(chosen), remarks + tried
    todo = {each.out: functools.partial(run_one, key, each) for key, each in zip(keys, plan.runs, strict=True)}
    todo |= {path: functools.partial(score_yardstick, plan, progress, name, path, seed)
             for name, path, seed in plan.yardsticks}
    done = claim_each([*todo], lambda i: [*todo.values()][i]())
    results, others = done[:len(plan.runs)], done[len(plan.runs):]
    grams, = claim_each([plan.out / "ngrams"], lambda _: score_ngrams(plan, progress))
    yardsticks = [judge.constant_answer(results), dict(name=judge.NGRAMS, runs=[grams])]
    yardsticks += [dict(name=name, runs=[m for m in others if m["name"] == name])
                   for name in dict.fromkeys(m["name"] for m in others)]
    yardsticks[0]["runs"][0]["predicted"] = {
        t: np.full((1, len(y)), 0 if plan.tasks[t].labels == () else np.bincount(y).argmax())
        for t, y in plan.labels.items()}
    return results, yardsticks, remarks + report.spent_before(results)


def tuned(plan, progress, trained):
    """({(arm, budget): (recipe, peak LR)} of the lowest own validation loss, what was tried)"""
    def do(i):
        (name, budget, choice), each = list(plan.tuning.items())[i]
        with progress.on(each.out, f"{name}, {in_words(choice)}"):
            try:
                summary = trained(each)
                terms = each.phases[-1].strategy.terms
                loss = sum(terms[k].weight * v for k, v in summary["val"].items())
            except NotFinite as e:
                progress.say(str(e))
                loss = math.inf
        return (name, budget), loss if math.isfinite(loss) else math.inf, choice

    def in_words(choice):
        recipe, lr = choice
        return f"{recipe} " * bool(plan.config.recipes) + (f"peak LR {lr:g}" if lr else "at its own peak LR")

    lrs = [lr for _, lr in plan.choices]
    edge = {min(lrs): ", the lowest tried", max(lrs): ", the highest tried"} if len(set(lrs)) > 1 else {}
    found = claim_each([each.out for each in plan.tuning.values()], do)
    best = {at: min(((loss, choice) for a, loss, choice in found if a == at), key=lambda f: f[0])[1]
            for at, *_ in found}
    return best, [f"{at[0]} at {judge.amount(at[1], plan.unit)}: " + ", ".join(
        f"{in_words(choice)}: " + (f"{loss:.4f}" if loss < math.inf else "not finite")
        + f" (taken{edge.get(choice[1], '')})" * (choice == best[at]) for a, loss, choice in found if a == at)
        for at in best]


def scored(plan, model, out, say, seed):
    """What finetune_glue finds of a model, now or in an earlier run: of each task and in short, and
    with --probe the probes."""
    config, tuning, probes = plan.config, plan.config.finetuning(model, out, seed), {}
    if config.probe or not config.finetune_seeds:
        same = checkpoint.read_tokenizer(checkpoint.find_model(str(model))).get_vocab() == plan.directory.vocab
        probes = finetune_glue.probes(dataclasses.replace(
            tuning, data=config.data if config.probe and same else None, probe=True), say, alone=not config.probe)
    of_dev = {name: np.array([p]) for name, p in probes.pop("predicted", {}).items()}
    if config.finetune_seeds:
        if not Path(out, "glue.json").exists():
            say(f"fine-tuning on {', '.join(plan.tasks)}")
        tasks = finetune_glue.score_model(tuning, lambda line: None)["tasks"]
        of_dev = {name: finetune_glue.kept_predictions(name, plan.tasks.get(name), r, Path(out, "trials"))
                  for name, r in tasks.items()}
    else:
        tasks = {name: finetune_glue.probed(plan.tasks[name], plan.labels[name], p) for name, (p,) in of_dev.items()}
    say(", ".join(f"{name} {r['mean']:.1f}" + f" ({r['collapsed']} of {len(r['scores'])} collapsed)" * (
        r["collapsed"] > 0) for name, r in tasks.items()))
    means = {name: r["mean"] for name, r in tasks.items()}
    return dict(tasks=tasks, scores=means, predicted=of_dev, model=str(model), probes=probes,
                average=float(np.mean([means[name] for name in judge.averaged(means)])))


def score_ngrams(plan, progress):
    """What n-grams and a linear classifier find of the tasks, from the training examples that the fine-tunings have:
    a draw each with --labels, else all of them, once."""
    found, file = dict(tasks={}, scores={}, predicted={}), plan.out / "ngrams/predicted.npz"
    before = dict(np.load(file)) if file.exists() else {}
    for name, task in plan.tasks.items():
        (_, y), *_ = plan.texts[name].values()
        if name not in before:
            progress.say_line(f"n-grams on {name}")
            runs = max(1, plan.config.finetune_seeds) * plan.config.seeds if plan.config.labels else 1
            draws = [finetune_glue.drawn(len(y), plan.config.labels, seed + 1) for seed in range(runs)]
            _, before[name] = ngrams.score(task, plan.texts[name], draws)
            write_whole(file, judge.compressed(before))
        scores = [glue.evaluate(task, p, plan.labels[name])[0][task.metrics[0]] for p in before[name]]
        found["tasks"][name] = dict(metric=task.metrics[0], n=len(plan.labels[name]), scores=scores, collapsed=0,
                                    collapsed_trials=[False] * len(scores))
        found["scores"][name], found["predicted"][name] = float(np.mean(scores)), before[name]
    return found


def score_yardstick(plan, progress, name, path, seed):
    """The untrained student of a seed, one of the teacher's layers, the teacher or a rival, scored as an arm is."""
    model = plan.rivals.get(path, path / "model")
    if name == judge.TEACHER:
        model = plan.teacher_model
    elif not model.exists():
        student, form = initial_student(dataclasses.replace(plan.runs[0], seed=seed), plan.directory), None
        if name == judge.CUT:
            source = checkpoint.find_model(plan.teacher_model)
            teacher, missing, _ = checkpoint.load_mlm(source, len(plan.directory.vocab))
            start_from(student, teacher, numbers(plan.config.init_layers or "", int), head=not missing)
            form = checkpoint.read_form(source)
        checkpoint.save_model(model, student, plan.directory.read_tokenizer(), head=True, form=form)
    with progress.on(f"score {path}", f"{name} {seed}"):
        its, ours = (c.num_hidden_layers * c.hidden_size ** 2
                     for c in (checkpoint.read_config(checkpoint.find_model(str(model))), plan.config.shape))
        return dict(name=name, larger=its > ours, **scored(plan, model, path / "glue", progress.say, seed))


def result_of(plan, each, summary):
    """What a run was and cost, as report.py reads it."""
    kept = ("seed", "peak_lr", "steps", "tokens", "epochs", "charged_seconds", "tokens_per_second",
            "teacher_share", "val", "device")
    return dict({k: summary[k] for k in kept}, strategy=plan.arms[each.out], budget=plan.nominal[each.out],
                unit=plan.unit, unique_tokens=each.unique_tokens, static_masks=each.static_masks, recipe=each.recipe,
                computed=f"{'bf16' if summary['bf16'] else 'fp32'} on {summary['device'].partition(':')[0]}",
                flops=summary["student_flops"] + summary["teacher_flops"],
                spent_before=each.budget[1] - summary["budget"][plan.unit])


def in_hand(plan, results):
    """What the best student is and how it is used, once a classifier of each task is kept of it."""
    best = max(results, key=lambda r: r["average"])
    if not plan.config.finetune_seeds:
        return (f"Use the best student, {best['strategy']} of seed {best['seed']}:\n\n    from sentence_transformers "
                f"import SentenceTransformer\n    student = SentenceTransformer(\"{best['model']}\")")
    lines = ["from transformers import AutoModel, pipeline", f'student = AutoModel.from_pretrained("{best["model"]}")']
    for name, r in best["tasks"].items():
        out, seed = Path(best["model"]).parent / "glue", r["first_seed"] + int(np.argmax(r["scores"]))
        task = [part for part in plan.config.tasks.split(",") if part.partition("=")[0] == name]
        finetune_glue.score_model(dataclasses.replace(
            plan.config.finetuning(best["model"], out / "kept", best["seed"]), tasks=",".join(task), save=True, seeds=1,
            batch_sizes=str(r["batch_size"]), peak_lrs=f"{r['peak_lr']:g}", first_seed=seed), lambda line: None)
        kept = out / f"kept/trials/{name}-b{r['batch_size']}-lr{r['peak_lr']:g}-seed{seed}"
        lines.append(f'{name} = pipeline("text-classification", "{kept}")')
    return "\n".join([f"Use the best student, {best['strategy']} of seed {best['seed']}, and its classifiers:", "",
                      *(f"    {line}" for line in lines), "",
                      f"or, without transformers: python finetune_glue.py --model {kept} --predict FILE"])


def main(config):
    began = time.monotonic()
    if config.merge:
        with parsing(f"--merge {config.merge}"):
            config, *found = merged(config)
            claim(config.out, "compare")
            return report.write_report(config, *found)
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
    config, speeds = settled(config)
    plan = Plan(config, print)
    if not (found := compare(plan, speeds)):
        return
    results, yardsticks, remarks = found
    report.write_report(config, results, yardsticks, plan.labels, plan.teacher_flops, remarks)
    print(f"\n{in_hand(plan, results)}")
    if demonstration:
        look(results)
    print(f"\n{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    run(main, Config, __doc__)
