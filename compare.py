"""Every strategy at every budget, pretrained over several seeds, fine-tuned and scored alike: tables, figure,
verdict.  Read it seventh.

    python compare.py         # the demonstration: no data, no teacher, no GPU, no download; about ten minutes
    python compare.py --data data/wiki --teacher bert-base-uncased --glue-dir glue --budget-hours 1,4 --seeds 3 \\
                      --out runs/table2 --dry-run                             # the plan and its time, no more

Each (strategy, budget, data setting, seed) is a run of its own under OUT/runs, whose learning rate ends at
zero at its budget.  Of several --peak-lrs, each arm takes the one with which its own validation loss ends
lowest at that budget (seed 0).  What is finished is never run again: the same command goes on where
it was stopped, and several processes with the same --out share the runs, such as one per GPU, each started
with its own CUDA_VISIBLE_DEVICES.

The demonstration takes the English documentation that is already on this disk (see prepare.py) and the
teacher in teacher/, gives each strategy the same 2-layer student and the same number of FLOPs from three
seeds, one process per core, and fine-tunes every student on the built-in task: which package does a docstring
come from?  The task's docstrings are validation documents of that corpus, so neither a student nor the
teacher has been pretrained on them.
"""
import dataclasses
import hashlib
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

import finetune_glue
import offline
import train
from comparison import jobs, report, timing
from comparison.demonstration import demonstrated, look
from comparison.merge import merged
from comparison.timing import Progress, duration
from data import Blocks, TokenDirectory
from model import BertConfig
from plumbing import checkpoint, glue
from plumbing.artefact import register
from plumbing.budget import UNITS, one_budget
from plumbing.cli import (
    Checked,
    Count,
    Counts,
    Lengths,
    NotNegative,
    Positive,
    Positives,
    Seed,
    Share,
    UserError,
    checked,
    flag_of,
    in_turn,
    numbers,
    run,
)
from plumbing.device import choose_device
from plumbing.files import claim, read_json, share_runs, write_json, write_whole
from plumbing.rundir import contents
from step import check_teacher, fitting_micro_batch, initial_student, start_from, student_shape
from strategies import PHASED, STRATEGIES


@dataclass
class Config(Checked):
    data: str | None = None             # token directory; without it the demonstration runs
    teacher: str | None = None        # model directory, Hub id, or train: pretrain one on the same data first
    teacher_size: str | None = None     # of --teacher train; default: twice the student's layers
    teacher_budget: Positive | None = None  # of --teacher train, in the budget's unit; default: 4 x the largest budget
    glue_dir: str | None = None         # folder of GLUE's official TSVs
    tasks: str | None = None            # cola,name=PATH,...; default: all of GLUE with --glue-dir
    columns: str | None = None          # of your own tasks: text,label or text,text,label; default: guessed
    total_hours: Positive | None = None  # in place of a budget: all of it, fine-tuning included, within so many hours
    budget_hours: Positives | None = None   # budgets of each arm on train.py's clock, such as 1,2,4: a run each
    budget_flops: Positives | None = None   # or in matmul FLOPs of student and teacher
    budget_tokens: Counts | None = None  # or in tokens
    budget_steps: Counts | None = None  # or in optimizer steps
    strategies: Annotated[str, str, (*STRATEGIES, *PHASED)] = "no_kd,vanilla_kd,tinybert,minilm"    # the arms
    arms: str | None = None             # or STRATEGY, PHASE:END/../PHASE, miniplm; +init, +released, +cached
    teacher_cache: str | None = None    # of the arms +cached; default: one is made
    reference_epochs: Count = 1         # of miniplm: passes of its reference over what is held out for it
    score_draws: Count = 1              # of miniplm: masks of each block that are scored
    seeds: Count = 3                    # pretraining seeds 0, 1, ... of each arm; an interval needs two
    unique_tokens: str = "all"     # data settings such as all,2000000: the first so many ids, again and again
    static_masks: bool = False          # the limited settings with the same masks in every epoch as well
    mask_seed: Seed | None = None       # of every run's masks; default: the run's seed
    mask_variants: Count | None = None  # masks of a block, in turn, in every run; default: fresh ones
    peak_lrs: Positives | None = None   # of every arm; several: its best at each budget; default: the paper's
    out: str = "runs/compare"     # directory for the runs, table.md, results.json, results.csv and figure.png
    dry_run: bool = False               # print the plan and its time only
    merge: str | None = None         # instead: earlier comparisons (directories or results.json), one report of all
    size: str = "6L768"                 # student: layers L width
    heads: Count | None = None          # attention heads; default: width / 64
    seq_len: Lengths = 128              # positions in a block; or in turn, each to a share: 32:0.5,128
    mask_rate: str = "0.15"             # share of positions that is masked; or from one to another: 0.3:0.15
    init_std: Positive = 0.02           # standard deviation of random initial weights
    optimizer: Literal["adamw", "muon"] = "adamw"     # muon: for hidden matrices, at AdamW's scale
    clip: NotNegative = 0.0             # gradient norm above which it is scaled down; 0: off, as the paper
    batch_size: Count = 1024            # blocks per optimizer step
    micro_batch: Count | None = None    # blocks per forward pass, of every arm; default: as train.py's
    dropout: Share = 0.1                # of every arm
    weight_decay: NotNegative = 0.01    # of every arm; not on biases and LayerNorm
    val_blocks: Count = 512             # validation blocks
    val_times: Count = 4                # validations over the budget
    jobs: Count | None = None         # processes over the runs; default: 1, in the demonstration one per core
    finetune_seeds: Count = 3           # fine-tuning runs per pretrained model
    finetune_batch_sizes: Counts = "16,32"          # the grid of fine-tuning: examples per step ...
    finetune_lrs: Positives = "1e-5,3e-5,5e-5,8e-5"  # ... times peak learning rates
    quick: bool = False                 # one point of that grid in its place: batch 32, lr 5e-5
    finetune_epochs: Count = 5          # passes over the training examples
    max_len: Annotated[int, "[8, inf)"] = 128       # ids an example is cut to
    probe: bool = False                 # what each frozen encoder knows as well, in a table of its own
    device: str | None = None           # cpu, cuda or cuda:N; default: cuda where there is one, else cpu
    compile: bool | None = None         # torch.compile; default: pretraining on CUDA only
    bf16: bool | None = None            # bf16 autocast; default: where that is faster

    def for_machine(self):
        """The same with one micro-batch for all runs: that of the runs which are there,
        else train.py's default."""
        if self.micro_batch:
            return self
        file = Path(self.out, "inputs.json")
        before = read_json(file).get("--micro-batch") if file.exists() else None
        micro = before or fitting_micro_batch(choose_device(self.device), self.batch_size)
        return dataclasses.replace(self, micro_batch=micro)

    def finetuning(self, model, out, seed=0):
        """The finetune_glue.Config for one model: fresh fine-tuning seeds for each pretraining seed."""
        return finetune_glue.Config(
            model=str(model), glue_dir=self.glue_dir, tasks=self.tasks, columns=self.columns,
            batch_sizes=self.finetune_batch_sizes, peak_lrs=self.finetune_lrs, quick=self.quick,
            seeds=self.finetune_seeds, first_seed=1 + seed * self.finetune_seeds, epochs=self.finetune_epochs,
            max_len=self.max_len, out=str(out), device=self.device, compile=bool(self.compile),
            bf16=self.bf16)


# What every run of a comparison takes from its command line as it stands there
SHARED = ("data", "size", "heads", "seq_len", "mask_rate", "mask_seed", "mask_variants", "init_std", "optimizer",
          "clip", "batch_size", "micro_batch", "dropout", "weight_decay", "val_blocks", "val_times", "device",
          "compile", "bf16")
OFFLINE = {"miniplm": ("teacher", "reference", "random", "flipped", "all")}     # its controls, charged alike


# ------------------------------------------------------------------------------------------------------- plan

class Plan:
    """Every run of the comparison as a train.Config, made and checked before anything starts."""

    def __init__(self, config):
        self.config, self.out = config, Path(config.out)
        self.unit, budgets = one_budget(config)
        whole = int if self.unit in ("tokens", "steps") else float
        self.budgets = sorted(numbers(budgets, whole))
        if config.arms and config.strategies != Config.strategies:
            raise UserError("give --strategies or --arms, not both")
        self.names = (config.arms or config.strategies).split(",")
        if twice := [name for name in self.names if self.names.count(name) > 1]:
            raise UserError(f"--arms {config.arms}: {twice[0]} is given twice")
        if self.unit in ("flops", "hours"):                             # what was paid once: in both ledgers
            self.names = list(dict.fromkeys(part for name in self.names for part in (
                name, *[f"{name}+amortised"] * (name == "miniplm" or "+cached" in name))))
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
        try:
            self.shape = BertConfig.of_size(config.size, config.heads)
        except ValueError as e:
            raise UserError(f"--size: {e}") from None
        self.lrs, self.artefacts, self.teacher = numbers(config.peak_lrs or "") or [None], {}, None
        if config.teacher == "train":
            size = config.teacher_size or f"{2 * self.shape.num_hidden_layers}L{self.shape.hidden_size}"
            budget = config.teacher_budget or 4 * self.budgets[-1]
            self.teacher = self.run("no_kd", math.ceil(budget) if whole is int else budget, size=size,
                                    out=str(self.out / "teacher"),
                                    peak_lr=self.lrs[0] if len(self.lrs) == 1 else None)
        elif config.teacher_size or config.teacher_budget:
            raise UserError("--teacher-size and --teacher-budget belong to --teacher train")
        self.tuning = {(name, budget, lr): self.run(name, budget, *self.settings[0], lr=lr)
                       for budget in self.budgets for name in self.names for lr in self.lrs if len(self.lrs) > 1}
        self.runs = self.runs_at({(name, budget): self.lrs[0] for name in self.names for budget in self.budgets})
        if len({each.out for each in self.runs}) < len(self.runs):
            raise UserError(f"{flag_of(f'budget_{self.unit}')} {budgets}: two budgets are the same to six digits")
        untrained = [("random init", "random"), *[(report.LAYERS, "layers")] * any(
            each.start == "teacher" for each in self.runs)]
        self.yardsticks = [(name, self.out / f"{folder}/seed{seed}", seed)
                           for name, folder in untrained for seed in range(config.seeds)]
        self.yardsticks.append(("teacher", self.out / "teacher", 0))
        for each in self.all:
            each.check()

    def run(self, arm, budget, unique=None, static=False, seed=0, lr=None, **other):
        """The train.Config of one run; its directory's name says all that it differs in from the others."""
        strategy, *suffixes = arm.split("+")
        controls = OFFLINE.get(strategy, ())
        if len(set(suffixes)) < len(suffixes) or not {
                "init", "released", "cached", "amortised", *controls}.issuperset(suffixes):
            raise UserError(f"--arms {arm}: after the strategy may come +init (it starts from the teacher), "
                            f"+released (what the paper's code computes) and +cached (its teacher is asked "
                            f"once for all), each once; after miniplm one of "
                            f"+{', +'.join(OFFLINE['miniplm'])}")
        name = (f"{train.file_name(arm)}-{budget:g}{self.unit}" + f"-{unique}ids" * (unique is not None)
                + "-static" * static + (f"-lr{lr:g}" if lr else "") + f"-seed{seed}")
        if "cached" in suffixes:
            other["teacher_cache"] = self.config.teacher_cache or self.artefact("cache", unique)
        if controls:
            kept = [name for name in suffixes if name in controls]
            if len(kept) > 1:
                raise UserError(f"--arms {arm}: one control at a time")
            other["keep"] = f"{self.artefact('miniplm', unique)}/{(*kept, 'difference')[0]}.npy"
            strategy = "no_kd"
        return train.Config(**{k: getattr(self.config, k) for k in SHARED} | dict(
            strategy=strategy, init="teacher" if "init" in suffixes else None,
            ledger="amortised" if "amortised" in suffixes else "full", as_released="released" in suffixes,
            teacher=self.teacher_model, unique_tokens=unique, static_masks=static, seed=seed, peak_lr=lr,
            out=str(self.out / "runs" / name)) | {f"budget_{self.unit}": budget} | other)

    @property
    def teacher_model(self):
        return str(self.out / "teacher/model") if self.config.teacher == "train" else self.config.teacher

    def artefact(self, kind, unique):
        """The directory of what several runs share, noted as something to be made before them."""
        c, path = self.config, str(self.out / "offline" / (kind + f"-{unique}ids" * (unique is not None)))
        if kind == "cache" and None in (c.mask_seed, c.mask_variants):
            raise UserError("--arms: +cached needs the same masks in all runs: give --mask-seed 0 "
                            "--mask-variants 1 with it")
        same = dict(teacher=self.teacher_model, data=c.data, out=path, mask_seed=c.mask_seed or 0,
                    seq_len=in_turn(c.seq_len, int)[-1][1], unique_tokens=unique, device=c.device, bf16=c.bf16)
        if kind == "cache":
            self.artefacts[path] = partial(offline.cache, offline.Cache(**same, variants=c.mask_variants))
        else:               # the reference has a third of the student's width, in whole heads of 64
            self.artefacts[path] = partial(offline.score, offline.Score(
                **same, reference_size=f"2L{max(64, self.shape.hidden_size // 3 // 64 * 64)}",
                reference_epochs=c.reference_epochs, draws=c.score_draws, batch_size=c.batch_size))
        return path

    def runs_at(self, lrs):
        """The compared runs, seeds outermost: stopped early, what is there compares all, over fewer seeds."""
        return [self.run(name, budget, *setting, seed, lrs[name, budget]) for seed in range(self.config.seeds)
                for budget in self.budgets for setting in self.settings for name in self.names]

    @property
    def all(self):
        of_the_arms = {each.out: each for each in (*self.tuning.values(), *self.runs)}      # some are of both
        return [*([self.teacher] if self.teacher else []), *of_the_arms.values()]


def check_inputs(plan):
    """(token directory, {task: its examples}): everything that can be refused before hours of training is."""
    config, directory = plan.config, TokenDirectory(plan.config.data)
    texts = {name: glue.read_task(name, task, config.glue_dir)
             for name, task in glue.parse_tasks(config.tasks, config.columns).items()}
    plan.teacher_shape = teacher_shape(plan, directory)
    shapes = plan.teacher_shape, student_shape(plan.runs[0], directory)
    longest = min(c.max_position_embeddings for c in shapes)
    if config.max_len > longest:
        raise UserError(f"--max-len {config.max_len}: 8 to {longest} here")
    if config.probe and plan.runs[0].length > longest:
        raise UserError(f"--probe at --seq-len {config.seq_len}: the teacher ends at position {longest}")
    for unique, static in plan.settings:
        Blocks(directory, "train", plan.runs[0].length, 0, unique, static)       # refuses more than there are
    train.validation_blocks(directory, plan.runs[0].length)
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
          f"budgets {', '.join(report.amount(b, plan.unit) for b in plan.budgets)}; "
          f"{'; '.join(report.setting(*s) for s in plan.settings)}; seeds 0 to {config.seeds - 1}")
    print(f"  {len(seconds)} pretraining runs"
          + (f", {len(plan.tuning)} of them to choose the peak LR" if plan.tuning else "")
          + (f", the teacher ({plan.teacher.size}, --teacher-budget {plan.teacher.budget[1]:g}) with "
             f"{duration(seconds[plan.teacher.out])}" if plan.teacher else "")
          + f"; {[*seconds.values()].count(0)} are finished, the others take about "
            f"{duration(sum(seconds.values()))} in one process")
    if plan.artefacts:
        print(f"  before them, once for all that use it, and charged to each: {', '.join(plan.artefacts)}")
    models = len(plan.runs) + len(plan.yardsticks)
    print(f"  fine-tuning {models} models on {', '.join(texts)}: very roughly "
          f"{duration(models * finetune_seconds)}" + ", and their probes on top of it" * config.probe)
    record = plan.out / "results.json"
    if record.exists() and (able := report.resolution(read_json(record)["results"], config.seeds)):
        print(f"  by the spread in {record}, {able}")


def same_inputs(plan, directory, texts):
    """Notes in OUT/inputs.json what the runs are made from; refuses to mix them with others."""
    varies = ("strategy", "init", "as_released", "peak_lr", "seed", "unique_tokens", "static_masks", "out")
    now = {flag_of(k): v for k, v in dataclasses.asdict(plan.run("no_kd", plan.budgets[0])).items()
           if k not in varies and not k.startswith("budget")}
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
    remarks, costs, teachers_cost = [], [], None

    def trained(each):
        return train.train(each, say=progress.say, status=progress.step)

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
        teachers_cost = dict(flops=taught["student_flops"],
                             hours=taught["charged_seconds"] / 3600).get(plan.unit)
    for make in plan.artefacts.values():
        make(say=progress.say_line)
    register(plan.tuning.values(), directory)
    if plan.tuning:
        lrs, tried, cost = tuned(plan, progress, trained)
        before, plan.runs = plan.runs, plan.runs_at(lrs)
        renamed = {a.out: b.out for a, b in zip(before, plan.runs, strict=True)}
        progress.left = {renamed.get(out, out): seconds for out, seconds in progress.left.items()}
        remarks, costs = remarks + tried, costs + [cost]
    register(plan.runs, directory)
    todo = {each.out: partial(run_one, each) for each in plan.runs}
    todo |= {path: partial(score_yardstick, plan, directory, progress, name, path, seed)
             for name, path, seed in plan.yardsticks}
    done = share_runs([*todo], lambda i: [*todo.values()][i]())
    results, others = done[:len(plan.runs)], done[len(plan.runs):]
    costs.append(f"The compared runs were charged "
                 f"{duration(sum(r['charged_seconds'] for r in results))} in all.")
    yardsticks = [report.constant_answer(results)]
    for name in dict.fromkeys(m["name"] for m in others):
        of = [m for m in others if m["name"] == name]
        yardsticks.append(dict(name=name, averages=[m["average"] for m in of], runs=of,
                               scores={task: [m["scores"][task] for m in of] for task in of[0]["scores"]}))
    return results, yardsticks, remarks + report.ledgers(results, teachers_cost), costs


def tuned(plan, progress, trained):
    """({(strategy, budget): peak LR} of the lowest own validation loss with seed 0, what was tried, cost)"""
    def do(i):
        (name, budget, lr), each = list(plan.tuning.items())[i]
        with progress.on(each.out, f"{name}, peak LR {lr:g}"):
            try:
                summary = trained(each)
                terms = each.phases[-1].strategy.terms
                loss = sum(terms[k].weight * v for k, v in summary["val"].items())
            except train.NotFinite as e:
                progress.say(str(e))
                summary, loss = dict(charged_seconds=0.0), math.inf
        return (name, budget), lr, loss if math.isfinite(loss) else math.inf, summary["charged_seconds"]
    found = share_runs([each.out for each in plan.tuning.values()], do)
    best = {at: min((loss, lr) for a, lr, loss, _ in found if a == at)[1] for at, *_ in found}
    ends = {min(plan.lrs): "the lowest tried", max(plan.lrs): "the highest tried"}
    lines = [f"{at[0]} at {report.amount(at[1], plan.unit)}: peak LR " + ", ".join(
        f"{lr:g}: " + (f"{loss:.4f}" if loss < math.inf else "not finite")
        + (f" (taken, {ends[lr]})" if lr in ends else " (taken)") * (lr == best[at])
        for a, lr, loss, _ in found if a == at) for at in best]
    spent = sum(seconds for at, lr, _, seconds in found if lr != best[at])
    return best, lines, (f"Choosing the peak LR took {len(found)} runs; the {len(found) - len(best)} that "
                         f"are not part of the comparison were charged {duration(spent)}.")


# ------------------------------------------------------------------------------------------------------ score

def scored(plan, model, out, say, seed):
    """What finetune_glue finds of a model, now or in an earlier run: of each task and in short, and
    with --probe the probes."""
    config, tuning = plan.config, plan.config.finetuning(model, out, seed)
    tasks = finetune_glue.score(tuning, say)["tasks"]
    means = {name: r["mean"] for name, r in tasks.items()}
    probe = dataclasses.replace(tuning, data=config.data, probe=True, seq_len=plan.runs[0].length)
    return dict(tasks=tasks, scores=means, probes=finetune_glue.probes(probe, say) if config.probe else {},
                average=float(np.mean([means[name] for name in report.averaged(means)])))


def score_yardstick(plan, directory, progress, name, path, seed):
    """The untrained student of a seed, one of the teacher's layers, or the teacher, scored as an arm is."""
    model = path / "model"
    if name == "teacher":
        model = plan.teacher_model
    elif not model.exists():
        student = initial_student(dataclasses.replace(plan.runs[0], seed=seed), directory)
        if name == report.LAYERS:
            source = checkpoint.find_model(plan.teacher_model)
            teacher, missing, _ = checkpoint.load_mlm(source, len(directory.vocab))
            start_from(student, teacher, head=not missing)
        checkpoint.save_model(model, student, directory.read_tokenizer(), head=True)
    with progress.on(f"score {path}", f"{name} {seed}"):
        return dict(name=name, **scored(plan, model, path / "glue", progress.say, seed))


def result_of(plan, each, summary):
    """What a run was and cost, as report.py reads it."""
    kept = ("seed", "peak_lr", "steps", "tokens", "epochs", "charged_seconds", "tokens_per_second",
            "teacher_share", "val", "device")
    log = map(json.loads, Path(each.out, "log.jsonl").open())
    curve = [dict(seconds=r["seconds"], tokens=r["step"] * summary["tokens"] // summary["steps"],
                  mlm=r["val"]["mlm"], d_order=r.get("d_order")) for r in log if "mlm" in r.get("val", {})]
    return dict({k: summary[k] for k in kept}, strategy=each.arm, budget=each.budget[1], unit=plan.unit,
                unique_tokens=each.unique_tokens, static_masks=each.static_masks, model=f"{each.out}/model",
                curve=curve, offline=summary.get("offline", {}))        # of an older version's run: none


# ----------------------------------------------------------------------------------------------------- report

def recipe(config):
    """[a line on fine-tuning], where it is not the paper's grid or a part of it."""
    ours = finetune_glue.Config
    if (set(finetune_glue.grid(config.finetuning("", ""))) <= set(finetune_glue.grid(ours("")))
            and (config.finetune_epochs, config.max_len) == (ours.epochs, ours.max_len)):
        return []
    return [f"Fine-tuning is outside the paper's grid (batch {ours.batch_sizes}, lr {ours.peak_lrs}, "
            f"{ours.epochs} epochs, {ours.max_len} ids): here batch {config.finetune_batch_sizes}, lr "
            f"{config.finetune_lrs}, {config.finetune_epochs} epochs, {config.max_len} ids."]


def papers_setting(plan):
    """The size whose rows of the paper's Table 2 may stand beside these, or None."""
    config, teachers = plan.config, {"6L768": "12L768", "12L1024": "24L1024"}
    same = all(getattr(config, name) == getattr(Config, name) for name in (
        "seq_len", "batch_size", "mask_rate", "mask_variants", "init_std", "optimizer", "clip",
                "weight_decay"))
    return config.size if same and teachers.get(config.size) == plan.teacher_shape.size else None


def write_report(config, results, yardsticks, remarks=(), costs=(), size=None):
    """The tables, the verdict and the figure, under OUT and on the screen."""
    out = Path(config.out)
    said = [*report.verdict(results, yardsticks), *report.drift(results), *report.remarks(results), *remarks]
    text = "\n\n".join([*recipe(config), report.score_table(results, yardsticks, size), *said])
    if config.probe:
        text += "\n\n" + report.probe_table(results, yardsticks)
    costs = "\n\n".join([report.cost_table(results), *costs])
    everything = dict(config=dataclasses.asdict(config), results=results, yardsticks=yardsticks, verdict=said)
    if (inputs := out / "inputs.json").exists():
        everything["data"] = read_json(inputs).get("contents of data")

    def write(_):
        for name, content in (("table.md", text), ("costs.md", costs),
                              ("results.csv", report.comma_separated(results)),
                              ("results.json", json.dumps(everything, indent=1))):
            write_whole(out / name, f"{content.rstrip()}\n".encode())
        report.figure(results, yardsticks, out / "figure.png")
    share_runs([out], write)
    print(f"\n{text}\n\n{costs}\n\nalso in {out}/table.md, costs.md, results.json and results.csv")


def main(config):
    began = time.monotonic()
    if config.merge:
        config, *found = merged(config)
        claim(config.out, "compare")
        return write_report(config, *found)
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
    write_report(config, *found, papers_setting(plan))
    if demonstration:
        look(found[0], config)
    print(f"\n{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    run(main, Config, __doc__)
