"""The budgeted loop: one strategy, one student, one budget.  Read it fourth.

    python train.py --strategy no_kd --budget-steps 1000 --data data/wiki --size 4L256 --out runs/teacher
    python train.py --strategy tinybert --budget-hours 4 --data data/wiki --teacher runs/teacher/model --size 2L256
    python train.py --strategy tinybert --budget-hours 4        # the paper's: data/wiki, bert-base-uncased, 6L768

Every arm has the same architecture, initial weights, data order, masks and recipe; what differs by method (the
losses, distilbert's initialisation, the paper's peak LR) is printed at the start.  Progress = spent / budget, read
once a step; the learning rate is a function of progress alone: of the phase's, where strategies come one after another
(tinybert:0.3/no_kd), each with an optimizer of its own and what it trains.  The clock counts fetching and masking the
batch, the teacher's forward pass, the student's forward and backward pass, communication and the optimizer; it does not
count start-up, warm-up of compilation, validation, saving, or the pretraining of the teacher.

A run directory (--out) gets config.json, log.jsonl, checkpoint.pt and the one before, summary.json and model/, a
Hugging Face BERT directory.  The same command goes on where a stopped run was; under torchrun it runs on many GPUs.

Source of the recipe: Bui 2024 (arXiv 2404.19319), section 3 and appendix.
"""
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
from kd_losses import AS_RELEASED, from_cache, phases_of
from plumbing.artefact import Offline
from plumbing.budget import Budget, Stages, Stopped, one_budget, stop_signals
from plumbing.cli import Checked, Count, Length, NotNegative, Positive, Seed, Share, UserError, run, writable
from plumbing.rehearsal import rehearse
from plumbing.rundir import Run, begun, contents, finished
from plumbing.screen import what_next
from step import Ranks, alone, choose_device, fitting_micro_batch, make_arm, memory_told

FEW_BLOCKS = 32             # under so many validation blocks, a warning


@dataclass
class Config(Checked):
    strategy: str = "no_kd"             # of kd_losses.STRATEGIES; or phases, each to a share: tinybert:0.3/no_kd
    budget_hours: Positive | None = None    # the budget, in hours on the clock described above
    budget_flops: Positive | None = None    # or in matmul FLOPs of student and teacher, the same on every machine
    budget_tokens: Count | None = None  # or in tokens
    budget_steps: Count | None = None   # or in optimizer steps
    data: str = "data/wiki"             # token directory, made by prepare.py
    teacher: str = "bert-base-uncased"  # model directory or Hub id; not read by no_kd unless --init teacher
    teacher_layer: int | None = None    # whose q, k, v count, from 0 or -1; default: the last; minilmv2: 21st of 24
    relation_heads: Count | None = None  # of minilmv2; default: as many as give the teacher's a size of 16
    as_released: bool = False           # FOR SCIENCE ONLY: what the paper's released code computes for this strategy
    size: str = "6L768"                 # student: layers L width
    heads: Count | None = None          # attention heads; default: width / 64
    teacher_cache: str | None = None    # of offline.py cache: targets from there in place of a teacher
    keep: str | None = None             # of offline.py score: train on the blocks in this file alone
    ledger: Literal["full", "amortised"] = "full"   # what the budget pays of these two: all, or a share
    out: str | None = None              # run directory; default: runs/STRATEGY
    init: Literal["random", "teacher"] | None = None    # teacher: its weights; default: the strategy's
    init_layers: Annotated[str, int, "[0, inf)"] | None = None  # of the teacher, from 0; default: every so-many-th
    seed: Seed = 0                      # initial weights, data order, masks, dropout
    seq_len: Length = 128               # S, positions in a block
    unique_tokens: Count | None = None  # train on the first so many ids of the data alone, again and again
    static_masks: bool = False          # the same masks in every epoch
    mask_seed: Seed | None = None       # of the masks alone, which seeds can share; default: the seed
    mask_variants: Count | None = None  # masks of a block, in turn, epoch by epoch; default: fresh ones
    batch_size: Count = 1024            # blocks per optimizer step
    micro_batch: Count | None = None    # blocks per forward pass; default: 256, with 80 GB of GPU memory 1024
    peak_lr: Positive | None = None     # default: the paper's, 1e-3 for no_kd and 5e-4 for KD
    warmup: Share = 0.06                # part of the budget over which the learning rate rises
    weight_decay: NotNegative = 0.01    # not on biases and LayerNorm
    dropout: Share = 0.1                # hidden states and attention probabilities
    clip: NotNegative = 0.0             # gradient norm above which gradients are scaled down; 0: off, as the paper
    tau: Positive | None = None         # temperature of the soft targets; default: 1, distilbert: 2
    weights: str = ""                   # of terms, such as mlm=1,soft_ce=2; default: the strategy's
    kd_every: Count = 1                 # the terms that need the teacher in every so-many-th step only
    val_blocks: Count = 512             # validation blocks
    val_times: Count = 20               # validations over the budget, the last at its end
    baselines: bool = False             # say where validation stands among what counting reaches (some seconds)
    log_every: Count = 10               # steps per line of log.jsonl
    checkpoint_minutes: Positive = 10.0  # between checkpoints; a fraction is allowed
    tensorboard: bool = False           # also writes the log as event files, where tensorboard is installed
    dry_run: bool = False               # only a few steps: memory, speed and what the budget will buy; writes nothing
    fractions: Annotated[str, float, "(0, 1)"] = ""     # parts of the budget, as 0.25,0.5, at which to save models too
    device: str | None = None           # cpu, cuda or cuda:N; default: cuda where there is one, else cpu
    compile: bool | None = None         # torch.compile; default: on CUDA only
    bf16: bool | None = None            # bf16 autocast; default: where the hardware multiplies in bf16

    def check(self):
        """What the fields ask of each other, and of the number of processes."""
        phases = self.phases
        if self.as_released and not any(phase.strategy.as_released for phase in phases):
            raise UserError(f"--as-released: no other code was released for {self.strategy}; it was for "
                            f"{', '.join(AS_RELEASED)}")
        for phase in phases:
            if self.kd_every > 1 and phase.strategy.needs("teacher") and not phase.strategy.without_teacher.terms:
                raise UserError(f"--kd-every {self.kd_every}: {phase.name} has no term that needs no teacher, so "
                                f"nothing is left for the steps between")
            if self.teacher_cache and (more := set(phase.strategy.needs("teacher")) - {"samples"}):
                raise UserError(f"--teacher-cache holds soft targets only; {phase.name} needs the teacher's "
                                f"{', '.join(sorted(more))}: leave it out, or take --strategy vanilla_kd")
        if self.teacher_cache and not any(phase.strategy.needs("teacher") for phase in phases):
            raise UserError(f"--teacher-cache: {self.strategy} needs no teacher: leave it out")
        if self.ledger != "full" and not (self.teacher_cache or self.keep):
            raise UserError(f"--ledger {self.ledger} belongs to --teacher-cache or --keep")
        if self.static_masks and self.mask_variants:
            raise UserError(f"--static-masks is --mask-variants 1: leave out one of it and --mask-variants "
                            f"{self.mask_variants}")
        if self.init_layers is not None and self.start != "teacher":
            raise UserError(f"--init-layers {self.init_layers} belongs to --init teacher")
        self.budget  # noqa: B018
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        if self.micro_batch and self.batch_size % (self.micro_batch * ranks):
            raise UserError(f"--batch-size {self.batch_size} is not a multiple of --micro-batch {self.micro_batch}"
                            + (f" x {ranks} processes" if ranks > 1 else ""))

    def for_machine(self):
        """The same with a micro-batch: that of the run which is there, else as many blocks as the device takes."""
        if self.micro_batch:
            return self
        micro = begun(self.path).get("micro_batch") or fitting_micro_batch(choose_device(self.device), self.batch_size)
        return dataclasses.replace(self, micro_batch=micro)

    @property
    def path(self):
        """The run directory."""
        return Path(self.out or f"runs/{file_name(self.strategy)}")

    @property
    def phases(self):
        """[kd_losses.Phase], with the run's own temperature and weights."""
        phases = phases_of(self.strategy, int(re.match(r"\d*", self.size)[0] or 1), self.as_released)
        weights = term_weights(self.weights, {name for phase in phases for name in phase.strategy.terms})

        def own(strategy):
            strategy = strategy._replace(tau=self.tau or strategy.tau, terms={
                name: term._replace(weight=weights.get(name, term.weight)) for name, term in strategy.terms.items()})
            return from_cache(strategy) if self.teacher_cache else strategy
        return [phase._replace(strategy=own(phase.strategy)) for phase in phases]

    @property
    def start(self):
        """Where the student's first weights come from: "random", "teacher" or "embeddings" (of the teacher)."""
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
        kept = Path(self.keep or "").stem
        name = "miniplm" + f"+{kept}" * (kept != "difference") if self.keep else self.strategy
        return (name + "+init" * (self.init == "teacher") + "+released" * self.as_released
                + "+cached" * bool(self.teacher_cache) + "+amortised" * (self.ledger == "amortised"))

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
            raise UserError(f"--weights {text}: {part}: must be TERM=WEIGHT, a term out of {', '.join(sorted(terms))} "
                            f"and a number above 0")
    return weights


def file_name(arm):
    return arm.replace(":", "-").replace("/", "-then-")


def learning_rate(progress, peak, warmup=0.06, left=0.0):
    """Linear from 0 to `peak` over the first `warmup` of the budget, or of a phase, then linear to the part of it that
    is `left` at the end."""
    if progress < warmup:
        return peak * progress / warmup
    return left * peak + (1 - left) * peak * (1 - progress) / (1 - warmup)


# ---------------------------------------------------------------------------------------------------------- loop

def gradients(arm, batch, step, stages):
    """Forward and backward over one optimizer step's batch, in micro-batches.  Nothing here waits for the device.

    (names, values on the device): the means of this rank's losses, and the gradient's norm."""
    sums = 0
    with arm.tf32():
        strategy = arm.strategy_of(step)
        for micro, last in arm.micro_batches(batch, step):
            stages.mark("data")
            if t := arm.teacher_forward(micro, strategy):               # what the strategy compares, and no more
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
    """Runs one strategy to the end of its budget; returns the summary that is also written to the run directory.

    The same call goes on where a stopped run's checkpoint is; a finished run is not run again.  `status` gets
    the record of the last step every two seconds, in place of the status line.  `keep`: ids of the blocks to
    train on, in place of --keep's."""
    began = now()
    config.check()
    out, directory = config.path, TokenDirectory(config.data)
    offline = Offline(config, directory, keep)                          # what was computed once for many runs
    record = dataclasses.asdict(config) | contents(directory, config.teacher if config.reads_teacher else None)
    record |= offline.record(begun(out), choose_device(config.device))
    if summary := finished(record, out, {f.name: f.default for f in dataclasses.fields(config)}):
        say(f"{out} is finished: nothing to do")
        return summary
    with alone(choose_device(config.device), config.budget[0]):         # refused now, not after minutes of compilation
        writable(out)
    arm, ranks = make_arm(config, directory), Ranks()
    directory.verify()
    offline.verify()
    say = say if ranks.rank == 0 else lambda line: None
    blocks, (unit, total) = offline.blocks, config.budget
    budget, stages = Budget(total - record.get("charge", 0), unit, now=now), Stages(arm.device)
    run = Run(config, out, arm, budget, stages, directory, validation_blocks(directory, config.seq_len, say), say,
              status, writes=ranks.rank == 0, offline=offline.told(record))
    if config.dry_run:
        return rehearse(run, gradients, stream(blocks, 0, config.batch_size, arm.device), blocks)
    run.resume_or_start(record)
    budget.price = arm.price(unit)
    for cause, seconds in (("compile", arm.warm_up_seconds), ("start-up", now() - began - arm.warm_up_seconds)):
        budget.uncharged[cause] = budget.uncharged.get(cause, 0.0) + seconds
    run.describe()

    batches = stream(blocks, budget.steps, config.batch_size, arm.device)
    budget.start()
    stages.mark(None)
    with alone(arm.device, unit), stop_signals() as signals, run.stopped_by(signals):
        while budget.progress < 1 or not budget.steps:
            if arm.phase.end <= budget.progress < 1:
                run.next_phase(signals)
                stages.mark(None)
            batch = next(batches)
            names, values = gradients(arm, batch, budget.steps, stages)
            # The step's one wait for the device; then, before the update, what all ranks decide together: whether
            # everything is finite, what the clock of rank 0 says, and whether a signal has come to any of them
            values = dict(zip(names, ranks.sum(values / ranks.size), strict=True))
            budget.seconds, stop = ranks.sum(torch.tensor(
                [budget.clock() * (ranks.rank == 0), len(signals)], dtype=torch.float64))
            stages.mark("communication" if ranks.size > 1 else "optimizer")
            stages.read()
            if stop:
                raise Stopped
            refuse_non_finite(budget.steps, values)
            progress = budget.progress
            lr = learning_rate(arm.phase.progress(progress), arm.peak_lr, *(arm.strategy.ramp or [config.warmup]))
            arm.update(lr, values["gradient_norm"])
            stages.mark("optimizer")
            budget.steps += 1
            run.seconds = budget.clock()                    # what a checkpoint of this step has spent
            run.after_step(dict(step=budget.steps, progress=progress, seconds=run.seconds, lr=lr,
                                epoch=blocks.epochs(budget.steps, config.batch_size), **values), signals)
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


def main(config, **options):
    summary = train(config, **options)
    if summary and Ranks().rank == 0:
        print(what_next(config.out or f"runs/{config.strategy}", "d_order" in summary))
    if Ranks().size > 1:
        # gloo's threads sometimes abort the process while Python shuts down, after all is written (torch 2.13)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def stream(blocks, start, batch_size, device):
    """Batches start, start + 1, ...: made ahead in a thread where the device is another one than the CPU."""
    if device.type == "cuda":
        return prefetch(blocks, start, batch_size)
    return (blocks.batch(i, batch_size) for i in itertools.count(start))


class NotFinite(UserError):
    """A loss or a gradient is infinite or not a number."""


def refuse_non_finite(step, values):
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise NotFinite(f"step {step}: {' and '.join(bad)} not finite: stopped before the update; the last checkpoint "
                        f"is good; try a smaller --peak-lr, --clip 1 or --no-bf16")


def validation_blocks(directory, seq_len, say=lambda line: None):
    """The validation split in blocks, masked alike for every run."""
    remedy = "prepare the data with a larger --val-fraction"
    if directory.manifest["val_tokens"] < seq_len - 2:
        raise UserError(f"{directory.path}/val.bin: {directory.manifest['val_tokens']} ids do not make one block of "
                        f"length {seq_len}: {remedy}, or give a smaller --seq-len")
    blocks = Blocks(directory, "val", seq_len, seed=0)
    if blocks.count < FEW_BLOCKS:
        say(f"warning: {directory.path}/val.bin makes only {blocks.count} validation block(s) of length {seq_len}, so "
            f"validation losses are mostly noise: {remedy}")
    return blocks


if __name__ == "__main__":
    run(main, Config, __doc__)
