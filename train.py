"""The budgeted loop: one strategy, one student, one budget.  Read it fourth.

    python train.py --strategy no_kd --budget-steps 1000 --data data/wiki --size 4L256 --out runs/teacher
    python train.py --strategy tinybert --budget-hours 4 --teacher runs/teacher/model --size 2L256
    python train.py --strategy tinybert --budget-hours 4    # the paper's: data/wiki, bert-base-uncased, 6L768

Every arm has the same architecture, initial weights, data order, masks and recipe; what differs by method
(the losses, distilbert's initialisation, the paper's peak LR) is printed at the start.  Progress = spent /
budget, read once a step; the learning rate is a function of progress alone: of the phase's, where strategies
come one after another (tinybert:0.3/no_kd), each with an optimizer of its own and what it trains.  The clock
counts fetching and masking the batch, the teacher's forward pass, the student's forward and backward pass,
communication and the optimizer; it does not count start-up, warm-up of compilation, validation, saving, or
the pretraining of the teacher.

A run directory (--out) gets config.json, log.jsonl, checkpoint.pt and the one before, summary.json and
model/, a Hugging Face BERT directory.  The same command goes on where a stopped run was; under torchrun it
runs on many GPUs.

Source of the recipe: Bui 2024 (arXiv 2404.19319), section 3 and appendix.
"""
import contextlib
import dataclasses
import itertools
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from data import Blocks, TokenDirectory, prefetch
from plumbing.artefact import Offline, arm_of, from_cache, refuse
from plumbing.budget import Budget, Stages, Stopped, one_budget, stop_signals
from plumbing.checkpoint import checkpoints
from plumbing.cli import (
    Checked,
    Count,
    Lengths,
    NotNegative,
    Positive,
    Seed,
    Share,
    UserError,
    in_turn,
    run,
)
from plumbing.device import alone, choose_device
from plumbing.rehearsal import rehearse
from plumbing.rundir import Run, begun, contents, finished, run_directory
from plumbing.screen import what_next
from step import Ranks, fitting_micro_batch, make_arm, memory_told
from strategies import AS_RELEASED, parts, phases_of

FEW_BLOCKS = 32             # under so many validation blocks, a warning
MASK_STAIRS = 6             # mask rates from the first to the last: few shapes, of which each is compiled


@dataclass
class Config(Checked):
    strategy: str = "no_kd"             # of strategies.STRATEGIES; or phases: tinybert:0.3/no_kd
    budget_hours: Positive | None = None    # the budget, in hours on the clock described above
    budget_flops: Positive | None = None    # or in matmul FLOPs of student and teacher
    budget_tokens: Count | None = None  # or in tokens
    budget_steps: Count | None = None   # or in optimizer steps
    data: str = "data/wiki"             # token directory, made by prepare.py
    teacher: str = "bert-base-uncased"  # model directory or Hub id; not read by no_kd unless --init teacher
    teacher_layer: int | None = None    # whose q, k, v count, from 0 or -1; default: last or 21st of 24
    relation_heads: Count | None = None  # of minilmv2; default: as many as give the teacher's a size of 16
    as_released: bool = False           # FOR SCIENCE ONLY: what the paper's released code computes
    size: str = "6L768"                 # student: layers L width
    heads: Count | None = None          # attention heads; default: width / 64
    teacher_cache: str | None = None    # of offline.py cache: targets from there in place of a teacher
    keep: str | None = None             # of offline.py score: train on the blocks in this file alone
    ledger: Literal["full", "amortised"] = "full"   # what the budget pays of these two: all, or a share
    out: str | None = None              # run directory; default: runs/STRATEGY
    init: Literal["random", "teacher"] | None = None    # teacher: its weights; default: the strategy's
    init_layers: Annotated[str, int, "[0, inf)"] | None = None  # of the teacher, from 0; default: first, last, evenly
    init_std: Positive = 0.02           # standard deviation of random initial weights
    seed: Seed = 0                      # initial weights, data order, masks, dropout
    seq_len: Lengths = 128              # S, positions in a block; or in turn, each to a share: 32:0.5,128
    mask_rate: str = "0.15"             # share of positions that is masked; or from one to another: 0.3:0.15
    unique_tokens: Count | None = None  # train on the first so many ids of the data alone, again and again
    static_masks: bool = False          # the same masks in every epoch
    mask_seed: Seed | None = None       # of the masks alone, which seeds can share; default: the seed
    mask_variants: Count | None = None  # masks of a block, in turn, epoch by epoch; default: fresh ones
    batch_size: Count = 1024            # blocks per optimizer step
    micro_batch: Count | None = None    # blocks per forward pass; default: 256 (80 GB: 1024), halved until it fits
    optimizer: Literal["adamw", "muon"] = "adamw"     # muon: for hidden matrices, at AdamW's scale
    peak_lr: Positive | None = None     # default: the paper's, 1e-3 for no_kd and 5e-4 for KD
    warmup: Share = 0.06                # part of the budget over which the learning rate rises
    weight_decay: NotNegative = 0.01    # not on biases and LayerNorm
    dropout: Share = 0.1                # hidden states and attention probabilities
    clip: NotNegative = 0.0             # gradient norm above which it is scaled down; 0: off, as the paper
    tau: Positive | None = None         # temperature of the soft targets; default: 1, distilbert: 2
    weights: str = ""                   # of terms, such as mlm=1,soft_ce=2; default: the strategy's
    kd_every: Count = 1                 # the terms that need the teacher in every so-many-th step only
    val_blocks: Count = 512             # validation blocks
    val_times: Count = 20               # validations over the budget, the last at its end
    baselines: bool = False             # say where validation stands among what counting reaches
    log_every: Count = 10               # steps per line of log.jsonl
    checkpoint_minutes: Positive = 10.0  # between checkpoints; a fraction is allowed
    tensorboard: bool = False           # also writes the log as event files, where tensorboard is installed
    dry_run: bool = False               # a few steps only: memory, speed, what the budget buys
    fractions: Annotated[str, float, "(0, 1)"] = ""     # of the budget, as 0.25,0.5: to save models there too
    device: str | None = None           # cpu, cuda or cuda:N; default: cuda where there is one, else cpu
    compile: bool | None = None         # torch.compile; default: on CUDA only
    bf16: bool | None = None            # bf16 autocast; default: where that is faster

    def check(self):
        """What the fields ask of each other, and of the number of processes."""
        phases = self.phases
        if self.as_released and not any(phase.strategy.as_released for phase in phases):
            raise UserError(f"--as-released: no other code was released for {self.strategy}; it was for "
                            f"{', '.join(AS_RELEASED)}")
        for phase in phases:
            strategy = phase.strategy
            if self.kd_every > 1 and strategy.needs("teacher") and not strategy.without_teacher.terms:
                raise UserError(f"--kd-every {self.kd_every}: {phase.name} has no term that needs no "
                                f"teacher, so nothing is left for the steps between")
        refuse(self, phases)
        if self.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
            raise UserError(f"--optimizer muon: torch {torch.__version__} has no torch.optim.Muon: install "
                            f"torch 2.13, or take adamw")
        if self.init_layers is not None and self.start != "teacher":
            raise UserError(f"--init-layers {self.init_layers} belongs to --init teacher")
        for phase in phases:
            if self.length % phase.seq_len:
                raise UserError(f"--seq-len {self.seq_len}: each must divide the last one, so that all steps "
                                f"have as many tokens")
            if not round(phase.mask_rate * phase.seq_len):
                raise UserError(f"--mask-rate {self.mask_rate} masks no position of a block of "
                                f"{phase.seq_len}: give more, or a larger --seq-len")
        self.budget  # noqa: B018
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        if self.micro_batch and self.batch_size % (self.micro_batch * ranks):
            raise UserError(f"--batch-size {self.batch_size} is not a multiple of "
                            f"--micro-batch {self.micro_batch}" + f" x {ranks} processes" * (ranks > 1))

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

    @property
    def phases(self):
        """[strategies.Phase], with the run's own temperature, weights, block lengths and mask rates."""
        phases = phases_of(self.strategy, int(re.match(r"\d*", self.size)[0] or 1), self.as_released)
        weights = term_weights(self.weights, {name for phase in phases for name in phase.strategy.terms})

        def own(strategy):
            terms = {name: term._replace(weight=weights.get(name, term.weight))
                     for name, term in strategy.terms.items()}
            strategy = strategy._replace(tau=self.tau or strategy.tau, terms=terms)
            return from_cache(strategy) if self.teacher_cache else strategy
        return parts([phase._replace(strategy=own(phase.strategy)) for phase in phases],
                     in_turn(self.seq_len, int), mask_rates(self.mask_rate))

    @property
    def length(self):
        """S of the run's end and of validation."""
        return in_turn(self.seq_len, int)[-1][1]

    @property
    def start(self):
        """Where the student's first weights are from: "random", "teacher" or its "embeddings"."""
        return self.init or self.phases[0].strategy.init

    @property
    def budget(self):
        """(unit, total) of the one budget that is given."""
        return one_budget(self)

    @property
    def needs_teacher(self):
        return not self.teacher_cache and any(phase.strategy.needs("teacher") for phase in self.phases)

    @property
    def reads_teacher(self):
        return self.needs_teacher or self.start != "random"

    @property
    def arm(self):
        """What compare.py calls it."""
        return arm_of(self)

    @property
    def label(self):
        return self.strategy + (" AS RELEASED (for science only)" if self.as_released else "")


def term_weights(text, terms):
    """{term: weight} of TERM=WEIGHT,..."""
    weights = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = math.nan
        if name not in terms or not 0 < weights[name] < math.inf:
            raise UserError(f"--weights {text}: {part}: must be TERM=WEIGHT, a term out of "
                            f"{', '.join(sorted(terms))} and a number above 0")
    return weights


def file_name(arm):
    return arm.replace(":", "-").replace("/", "-then-")


def mask_rates(text):
    """[(end, rate)] of RATE, or of FIRST:LAST: linear in progress, in MASK_STAIRS parts of the budget."""
    try:
        first, *last = map(float, str(text).split(":"))
    except ValueError:
        first, last = 0.0, []
    if len(last) > 1 or not all(0 < rate <= 0.5 for rate in (first, *last)):
        raise UserError(f"--mask-rate {text}: must be a number above 0 and at most 0.5, or two, at the begin "
                        f"and at the end, such as 0.3:0.15")
    stairs = MASK_STAIRS if last else 1
    return [((i + 1) / stairs, first + (last[0] - first) * i / (stairs - 1) if last else first)
            for i in range(stairs)]


def learning_rate(progress, peak, warmup=0.06, left=0.0):
    """Linear from 0 to `peak` over the first `warmup` of a phase, then linear to the part `left` of it."""
    if progress < warmup:
        return peak * progress / warmup
    return left * peak + (1 - left) * peak * (1 - progress) / (1 - warmup)


# ------------------------------------------------------------------------------------------------------- loop

def gradients(arm, batch, step, stages):
    """Forward and backward over one step's batch, in micro-batches; nothing here waits for the device.

    (names, values on the device): the means of this rank's losses, and the gradient's norm."""
    sums = 0
    with arm.tf32():
        strategy = arm.strategy_of(step)
        for micro, last in arm.micro_batches(batch, step):
            stages.mark("data")
            if t := arm.teacher_forward(micro, strategy):       # what the strategy compares, and no more
                stages.mark("teacher")
            with arm.synchronised(last):
                s = arm.student_forward(micro, strategy)
                loss, terms = arm.loss(s, t, micro.labels, strategy)
                (loss / arm.accumulate).backward()
            sums = sums + torch.stack([loss.detach(), *(v.detach() for v in terms.values())])
            stages.mark("student")
        norm = torch.nn.utils.get_total_norm([p.grad for p in arm.trained if p.grad is not None])
    return ("loss", *terms, "gradient_norm"), torch.cat([sums / arm.accumulate, norm.reshape(1)])


@memory_told
def train(config, now=time.monotonic, say=print, status=None, keep=None):
    """Runs one strategy to the end of its budget; returns the summary, as written to the run directory.

    The same call goes on where a stopped run's checkpoint is; a finished run is not run again.  `status` gets
    the record of the last step every two seconds, in place of the status line.  `keep`: ids of the blocks to
    train on, in place of --keep's."""
    with contextlib.ExitStack() as held:                        # the run directory
        run, summary = begin(config, now, say, status, keep, held)
        return trained(run) if run else summary


def trained(run):
    """The loop, from the run's step to the end of its budget; returns the summary."""
    config, arm, budget, stages, ranks = run.config, run.arm, run.budget, run.stages, run.arm.ranks
    blocks, batches = stream(run, arm.phase)
    budget.start()
    stages.mark(None)
    with alone(arm.device, budget.unit), stop_signals() as signals, run.stopped_by(signals):
        while budget.progress < 1 or not budget.steps:
            if arm.phase.end <= budget.progress < 1:
                run.next_phase(signals)
                batches.close()
                blocks, batches = stream(run, arm.phase)
                stages.mark(None)
            batch = next(batches)
            # teacher forward, student forward, loss, backward
            names, values = gradients(arm, batch, budget.steps, stages)
            # the step's one wait for the device, before the update
            values, stop = agreed(ranks, names, values, budget, signals)
            stages.mark("communication" if ranks.size > 1 else "optimizer")
            stages.read()
            if stop:
                raise Stopped
            refuse_non_finite(run, values)
            # budget, learning rate, update
            progress = budget.progress
            ramp = arm.strategy.ramp or [config.warmup]
            lr = learning_rate(arm.phase.progress(progress), arm.peak_lr, *ramp)
            arm.update(lr, values["gradient_norm"])
            stages.mark("optimizer")
            budget.steps += 1
            run.seconds = budget.clock()                        # what a checkpoint of this step has spent
            epoch = blocks.epochs(budget.steps, config.batch_size * arm.phase.times)
            run.after_step(dict(step=budget.steps, progress=progress, seconds=run.seconds, lr=lr, epoch=epoch,
                                **values), signals)
            stages.mark(None)
        if arm.device.type == "cuda":
            torch.cuda.synchronize()
        charged = budget.clock()
        stages.read()
        val = run.validate(signals)
    batches.close()
    summary = run.finish(blocks, charged, val, ranks.size)
    ranks.leave()
    return summary


def agreed(ranks, names, values, budget, signals):
    """What all ranks decide on: ({name: mean}, whether a signal has come to any), and rank 0's clock."""
    values = dict(zip(names, ranks.sum(values / ranks.size), strict=True))
    budget.seconds, stop = ranks.sum(torch.tensor(
        [budget.clock() * (ranks.rank == 0), len(signals)], dtype=torch.float64))
    return values, stop


def begin(config, now, say, status, keep, held):
    """(the Run at the step where it stopped, None); with nothing to run (None, what train returns).  `held`: the
    stack on which rank 0 holds the run directory."""
    began = now()
    config.check()
    out, directory = config.path, TokenDirectory(config.data)
    offline = Offline(config, directory, keep)      # what was computed once for many runs, none for most
    record = dataclasses.asdict(config)
    record |= contents(directory, config.teacher if config.reads_teacher else None)
    record |= offline.record(begun(out), choose_device(config.device))
    if summary := finished(record, out, {f.name: f.default for f in dataclasses.fields(config)}):
        say(f"{out} is finished: nothing to do")
        return None, summary
    unit, total = config.budget
    with alone(choose_device(config.device), unit):      # refused now, not after minutes of compilation
        if Ranks().rank == 0:
            held.enter_context(run_directory(config))
    arm = make_arm(config, directory)
    directory.verify()
    offline.verify()
    main_rank = arm.ranks.rank == 0
    say = say if main_rank else lambda line: None
    run = Run(config, out, arm, Budget(total - offline.charge, unit, now=now), Stages(arm.device), directory,
              offline, validation_blocks(directory, config.length, say), say, status, writes=main_rank)
    if config.dry_run:
        return None, rehearse(run, gradients, *stream(run, arm.phase))
    run.resume_or_start(record)
    run.budget.price = arm.price(unit)
    compiling = arm.warm_up_seconds
    for cause, seconds in (("compile", compiling), ("start-up", now() - began - compiling)):
        run.budget.uncharged[cause] = run.budget.uncharged.get(cause, 0.0) + seconds
    run.describe()
    return run, None


def main(config, **options):
    summary = train(config, **options)
    if summary and Ranks().rank == 0:
        print(what_next(config.path, "d_order" in summary))
    if Ranks().size > 1:
        # torch 2.13: gloo's threads sometimes abort a process while Python shuts down, after all is written
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def stream(run, phase):
    """(Blocks of a phase, their batches from the run's step on)."""
    blocks = run.offline.blocks(phase)
    return blocks, batches_of(blocks, run.budget.steps, run.config.batch_size * phase.times, run.arm.device)


def batches_of(blocks, start, batch_size, device):
    """Every batch from `start` on; made ahead in a thread if the device is no CPU."""
    if device.type == "cuda":
        return prefetch(blocks, start, batch_size)
    return (blocks.batch(i, batch_size) for i in itertools.count(start))


class NotFinite(UserError):
    """A loss or a gradient is infinite or not a number."""


def refuse_non_finite(run, values):
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        left = "the last checkpoint is good" if checkpoints(run.out) else "there is no checkpoint yet"
        raise NotFinite(f"step {run.budget.steps}: {' and '.join(bad)} not finite: stopped before the update; "
                        f"{left}; try a smaller --peak-lr, --clip 1 or --no-bf16")


def validation_blocks(directory, seq_len, say=lambda line: None):
    """The validation split in blocks, masked alike for every run."""
    remedy = "prepare the data with a larger --val-fraction"
    if directory.manifest["val_tokens"] < seq_len - 2:
        raise UserError(f"{directory.path}/val.bin: {directory.manifest['val_tokens']} ids do not make one "
                        f"block of length {seq_len}: {remedy}, or give a smaller --seq-len")
    blocks = Blocks(directory, "val", seq_len, seed=0)
    if blocks.count < FEW_BLOCKS:
        say(f"warning: {directory.path}/val.bin makes only {blocks.count} validation block(s) of length "
            f"{seq_len}, so validation losses are mostly noise: {remedy}")
    return blocks


if __name__ == "__main__":
    run(main, Config, __doc__)
