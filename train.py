"""The budgeted loop: one strategy, one student, one budget.  Read it after the losses, with step.py.

    python train.py --strategy no_kd --budget-steps 1000 --data data/wiki --size 4L256 --out runs/teacher
    python train.py --strategy tinybert --budget-hours 4 --teacher runs/teacher/model --size 2L256
    python train.py --strategy tinybert --budget-hours 4    # data/wiki, or this disk's documentation: it says which
    python train.py --strategy sentence --teacher DIR --data sentences.txt --budget-hours 0.2   # half of an encoder
    python train.py --strategy cut --teacher DIR --size 3L384 --out runs/cut    # its layers, untrained; or the best:
    python train.py --strategy cut --teacher DIR --size 3L384 --init-layers best --data data/mine --out runs/cut

Every arm has the same architecture, initial weights, data order and masks; what differs by method (the losses,
distilbert's initialisation; `sentence` alone has other blocks, whole sentences, as many tokens a step, neither masks
nor dropout) or by choice (recipe, peak LR, start) is printed at the start.  Progress = spent / budget, read once a
step; the learning rate is a function of progress alone: of the phase's, where strategies come one after another
(tinybert:0.3/no_kd), each with an optimizer of its own and what it trains.  The clock counts fetching and masking the
batch, the teacher's forward pass, the student's forward and backward pass, communication and the optimizer; it does
not count start-up, warm-up of compilation, validation, saving, or the pretraining of the teacher.

A run directory (--out) gets config.json, log.jsonl, checkpoint.pt, summary.json and model/, a Hugging Face BERT
directory.  The same command goes on where a stopped run was; under torchrun it runs on many GPUs.

Source of the recipe: Bui 2024 (arXiv 2404.19319), section 3 and appendix.
"""
import contextlib
import dataclasses
import functools
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from data import Sentences, batches_of, phase_blocks
from model import BertConfig
from plumbing import encoder
from plumbing.budget import UNITS, Budget, Stages, Stopped, price, stop_signals
from plumbing.checks import check_run, refuse_non_finite
from plumbing.cli import Checked, Count, Length, NotNegative, Positive, Seed, Share, UserError, run
from plumbing.device import Ranks, alone_on_device, choose_device, fitting_micro_batch, halve_micro_batch_until_it_fits
from plumbing.rehearsal import rehearse
from plumbing.rundir import RunWriter, begun, contents, finished, run_directory
from plumbing.screen import what_next
from plumbing.settle import settled, with_file
from plumbing.tokens import TokenDirectory
from plumbing.validation import validation_blocks
from step import make_arm
from strategies import RECIPES, STRATEGIES, phases_of


@dataclass
class Recipe(Checked):
    """What all arms of a comparison share, and train.py and compare.py have in common."""
    # model
    size: str | None = None             # student: layers L width; default: half of the teacher's layers, else 6L768
    heads: Count | None = None          # attention heads; default: the teacher's at its width, else width / 64
    # data
    seq_len: Length = 128               # S, positions in a block
    batch_size: Count | None = None     # blocks per optimizer step; default: 1024, or what buys 2,000 steps
    micro_batch: Count | None = None    # blocks per forward pass; default: 256 (80 GB: 1024), halved until it fits
    val_blocks: Count = 512             # validation blocks
    val_times: Count = 20               # validations over the budget, the last at its end
    # recipe
    recipe: Literal["paper", "short"] = "paper"     # paper: AdamW, no clip, std 0.02; short: what suits small budgets
    optimizer: Literal["adamw", "muon"] | None = None   # muon: for hidden matrices; default: the recipe's
    clip: NotNegative | None = None     # gradient norm above which it is scaled down, 0: off; default: the recipe's
    init_std: Positive | None = None    # standard deviation of random initial weights; default: the recipe's
    weight_decay: NotNegative = 0.01    # not on biases and LayerNorm
    dropout: Share = 0.1                # hidden states and attention probabilities
    # run
    device: str | None = None           # cpu, cuda or cuda:N; default: cuda where there is one, else cpu
    compile: bool | None = None         # torch.compile of pretraining; default: on CUDA only
    bf16: bool | None = None            # bf16 autocast; default: where that is faster

    def of_recipe(self, name):
        """optimizer, clip or init_std: as given, else the recipe's."""
        given = getattr(self, name)
        return RECIPES[self.recipe][name] if given is None else given

    @functools.cached_property
    def shape(self):
        """The BertConfig that --size and --heads say."""
        try:
            return BertConfig.of_size(self.size, self.heads)
        except ValueError as e:
            raise UserError(f"--size: {e}") from None

    @functools.cached_property
    def budget(self):
        """(unit, total) of the one budget that is given."""
        given = {unit: value for unit in UNITS if (value := getattr(self, f"budget_{unit}")) is not None}
        if len(given) != 1:
            raise UserError(f"give exactly one budget: {' or '.join(f'--budget-{unit}' for unit in UNITS)}"
                            + (f" (not {' and '.join(f'--budget-{unit}' for unit in given)})" if given else ""))
        return next(iter(given.items()))


@dataclass
class Config(Recipe):
    # budget
    strategy: str = "no_kd"             # of strategies.STRATEGIES; phases: tinybert:0.3/no_kd; cut: nothing is trained
    budget_hours: Positive | None = None    # the budget, in hours on the clock described above
    budget_flops: Annotated[float, "[1e-9, 1e24]"] | None = None    # or in matmul FLOPs of student and teacher
    budget_tokens: Count | None = None  # or in tokens
    budget_steps: Count | None = None   # or in optimizer steps
    fractions: Annotated[str, float, "(0, 1)"] = ""     # of the budget, as 0.25,0.5: to save models there too
    # teacher
    teacher: str | None = None          # model directory or Hub id; default: teacher/ where the data fit it, else BERT
    init: Literal["random", "teacher"] | None = None    # teacher: its weights; default: the strategy's
    init_layers: str | None = None      # of the teacher, from 0; default: first, last, evenly; cut: or best, by --data
    tau: Positive | None = None         # temperature of the soft targets; default: 1, distilbert: 2
    as_released: bool = False           # FOR SCIENCE ONLY: what the paper's released code computes
    # data
    data: str | None = None             # token directory, or a file of text; default: data/wiki, else docstrings
    unique_tokens: Count | None = None  # train on the first so many ids of the data alone, again and again
    static_masks: bool = False          # the same masks in every epoch
    # recipe
    peak_lr: Positive | None = None     # default: the recipe's, of the strategy
    warmup: Share = 0.06                # part of the budget over which the learning rate rises
    # run
    seed: Seed = 0                      # initial weights, data order, masks, dropout
    out: str | None = None              # run directory; default: runs/STRATEGY
    dry_run: bool = False               # a few steps only: memory, speed, what the budget buys

    check = check_run                   # what the fields ask of each other, and of the number of processes

    def of_recipe(self, name):
        """As given, else the strategy's own clip, else the recipe's."""
        own = name == "clip" and self.clip is None and self.strategy in STRATEGIES and STRATEGIES[self.strategy].clip
        return own or super().of_recipe(name)

    @property
    def record(self):
        """What config.json holds of it: what the recipe decides as if it were given."""
        return dataclasses.asdict(self) | {n: self.of_recipe(n) for n in RECIPES[self.recipe]}

    @property
    def has_begun(self):
        return bool(begun(self.path))

    def for_machine(self):
        """The same with a micro-batch: that of the run which is there, else what fits into the device."""
        if self.micro_batch:
            return self
        micro = begun(self.path).get("micro_batch")
        return dataclasses.replace(
            self, micro_batch=micro or fitting_micro_batch(choose_device(self.device), self.batch_size))

    @property
    def path(self):
        """The run directory."""
        return Path(f"runs/{file_name(self.strategy)}" if self.out is None else self.out or " ")   # claim refuses that

    @functools.cached_property
    def phases(self):
        """[strategies.Phase], with the run's own temperature and block length."""
        def ours(phase):
            strategy, S = phase.strategy, phase.strategy.seq_len or self.seq_len
            return phase._replace(strategy=strategy._replace(tau=self.tau or strategy.tau), seq_len=S,
                                  times=self.seq_len / S)
        return [ours(phase) for phase in phases_of(self.strategy, self.shape.num_hidden_layers, self.as_released)]

    @property
    def start(self):
        """Where the student's first weights are from: "random", "teacher" or its "embeddings"."""
        return self.init or self.phases[0].strategy.init

    @property
    def needs_teacher(self):
        return any(phase.strategy.needs("teacher") for phase in self.phases)

    @property
    def reads_teacher(self):
        return self.needs_teacher or self.start != "random"

    @property
    def label(self):
        return self.strategy + (" AS RELEASED (for science only)" if self.as_released else "")


def file_name(arm):
    return arm.replace(":", "-").replace("/", "-then-")


def learning_rate(progress, peak, warmup=0.06, left=0.0):
    """Linear from 0 to `peak` over the first `warmup` of a phase, then linear to the part `left` of it."""
    if progress < warmup:
        return peak * progress / warmup
    return left * peak + (1 - left) * peak * (1 - progress) / (1 - warmup)


def gradients(arm, batch, step, stages):
    """Forward and backward over one step's batch, in micro-batches; nothing here waits for the device.

    (names, values on the device): the means of this rank's losses, and the gradient's norm."""
    sums = 0
    with arm.tf32():
        for micro, last in arm.micro_batches(batch, step):
            stages.mark("data")
            # Gradients travel between ranks in the last micro-batch of a step only
            with contextlib.nullcontext() if last or arm.ranks.size == 1 else arm.wrapper.no_sync():
                loss, terms = arm.forward(*micro, mark=stages.mark)
                (loss / arm.accumulate).backward()
            sums = sums + torch.stack([loss.detach(), *(v.detach() for v in terms.values())])
            stages.mark("student")
        norm = torch.nn.utils.get_total_norm([p.grad for p in arm.trained if p.grad is not None])
    return ("loss", *terms, "gradient_norm"), torch.cat([sums / arm.accumulate, norm.reshape(1)])


@halve_micro_batch_until_it_fits
def train(config, now=time.monotonic, say=print, status=None):
    """Runs one strategy to the end of its budget; returns the summary, as written to the run directory.

    The same call goes on where a stopped run's checkpoint is; a finished run is not run again.  `status` gets
    the record of the last step every two seconds, in place of the status line."""
    with contextlib.ExitStack() as held:                        # the run directory
        run, summary = begin(config, now, say, status, held)
        return trained(run) if run else summary


def trained(run):
    """The loop, from the run's step to the end of its budget; returns the summary."""
    config, arm, budget, stages, ranks = run.config, run.arm, run.budget, run.stages, run.arm.ranks
    blocks, batches = stream(run)
    budget.start()
    stages.mark(None)
    with alone_on_device(arm.device, budget.unit), stop_signals() as signals, run.stopped_by(signals):
        while budget.progress < 1 or not budget.steps:
            if arm.phase.end <= budget.progress < 1:
                run.next_phase(signals)
                batches.close()
                blocks, batches = stream(run)
                stages.mark(None)
            batch = next(batches)
            # teacher forward, student forward, loss, backward
            names, values = gradients(arm, batch, budget.steps, stages)
            # the step's one wait for the device, before the update; all ranks decide on the same: the mean of each
            # value, rank 0's clock, whether a signal has come to any
            values = dict(zip(names, ranks.sum(values / ranks.size), strict=True))
            budget.seconds, stop = ranks.sum(torch.tensor(
                [budget.clock() * (ranks.rank == 0), len(signals)], dtype=torch.float64))
            stages.mark("communication" if ranks.size > 1 else "optimizer")
            stages.read()
            if stop:
                raise Stopped
            if not all(map(math.isfinite, values.values())):
                refuse_non_finite(run, values)
            # budget, learning rate, update
            progress = budget.progress
            ramp = arm.strategy.ramp or [config.warmup]
            lr = learning_rate(arm.phase.progress(progress), arm.peak_lr, *ramp)
            arm.update(lr, values["gradient_norm"])
            stages.mark("optimizer")
            budget.steps += 1
            run.seconds = budget.clock()                        # what a checkpoint of this step has spent
            epoch = budget.steps * arm.batch_size / blocks.count
            run.after_step(dict(step=budget.steps, progress=progress, seconds=run.seconds, lr=lr, epoch=epoch,
                                **values), signals)
            stages.mark(None)
        if arm.device.type == "cuda":
            torch.cuda.synchronize()
        charged = budget.clock()
        stages.read()
        found = run.validate(signals)
    batches.close()
    summary = run.finish(blocks, charged, found)
    ranks.leave()
    return summary


def begin(config, now, say, status, held):
    """(RunWriter at the step where it stopped, None); with nothing to run (None, what train returns).  `held`: the
    stack on which rank 0 holds the run directory."""
    began = now()
    config.check()
    out, directory = config.path, TokenDirectory(config.data)
    last = config.phases[-1]
    blocks = phase_blocks(last, directory, "train", config.seed, config.unique_tokens)     # refuses more than there are
    record = config.record | contents(directory, config.teacher if config.reads_teacher else None)
    if summary := finished(record, out, Config().record):
        say(f"{out} is finished: nothing to do")
        return None, summary
    unit, total = config.budget
    with alone_on_device(choose_device(config.device), unit):      # refused now, not after minutes of compilation
        if Ranks().rank == 0:
            held.enter_context(run_directory(config))
    arm = make_arm(config, directory)
    directory.verify()
    say = say if arm.ranks.rank == 0 else lambda line: None
    run = RunWriter(arm, Budget(total, unit, now=now), Stages(arm.device), directory,
                    validation_blocks(directory, last.seq_len, say, type(blocks)), say, status)
    if isinstance(blocks, Sentences):
        say(f"{directory.path}: {blocks.count:,} sentences of {blocks.size.mean():.0f} ids in the mean; {blocks.cut:,} "
            f"were cut to {blocks.body}, {blocks.joined:,} under {blocks.SHORTEST} joined to the next")
    if config.dry_run:
        return None, rehearse(run, gradients, *stream(run))
    run.resume_or_start(record)
    run.budget.price = price(arm, unit)
    compiling = arm.warm_up_seconds
    for cause, seconds in (("compile", compiling), ("start-up", now() - began - compiling)):
        run.budget.uncharged[cause] = run.budget.uncharged.get(cause, 0.0) + seconds
    run.describe()
    return run, None


def main(config, say=print, **options):
    config = with_file(config)
    if config.strategy == "cut":
        return encoder.cut(config) if Ranks().rank == 0 else None
    config = settled(config, say if Ranks().rank == 0 else lambda line: None, gradients)
    summary = train(config, say=say, **options)
    if summary and Ranks().rank == 0:
        print(what_next(config.path, "d_order" in summary))
    if Ranks().size > 1:
        # torch 2.13: gloo's threads sometimes abort a process while Python shuts down, after all is written
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def stream(run):
    """(Blocks of the arm's phase, their batches from the run's step on)."""
    c = run.config
    blocks = phase_blocks(run.arm.phase, run.directory, "train", c.seed, c.unique_tokens, c.static_masks)
    return blocks, batches_of(blocks, run.budget.steps, run.arm.batch_size, run.arm.device)


if __name__ == "__main__":
    run(main, Config, __doc__)
