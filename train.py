"""The budgeted loop: one strategy, one student, one budget.  Read it fourth.

    python train.py --strategy no_kd --budget-steps 1000 --data data/wiki --size 4L256 --out runs/teacher
    python train.py --strategy tinybert --budget-hours 4 --data data/wiki --teacher runs/teacher/model --size 2L256
    python train.py --strategy tinybert --budget-hours 4        # the paper's: data/wiki, bert-base-uncased, 6L768

Every arm has the same architecture, initial weights, data order, masks and recipe; what differs by method (the
losses, distilbert's initialisation, the paper's peak LR) is printed at the start.  Progress = spent / budget, read
once a step; the learning rate is a function of progress alone.  The clock counts fetching and masking the batch, the
teacher's forward pass, the student's forward and backward pass, communication and the optimizer; it does not count
start-up, warm-up of compilation, validation, saving, or the pretraining of the teacher.

A run directory (--out) gets config.json, log.jsonl, checkpoint.pt and the one before, summary.json and model/, a
Hugging Face BERT directory.  The same command goes on where a stopped run was; under torchrun it runs on many GPUs.

Source of the recipe: Bui 2024 (arXiv 2404.19319), section 3 and appendix.
"""
import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist

import checkpoint
from arm import Stopped, flops_per_block, make_arm, memory_told
from cli import Checked, Count, Length, NotNegative, Positive, Seed, Share, UserError, numbers, run, writable
from data import Blocks, TokenDirectory, prefetch
from kd_losses import AS_RELEASED, STRATEGIES

FEW_BLOCKS = 32             # under so many validation blocks, a warning


@dataclass
class Config(Checked):
    strategy: Annotated[str, STRATEGIES] = "no_kd"  # one of kd_losses.STRATEGIES
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
    out: str | None = None              # run directory; default: runs/STRATEGY
    init: Literal["random", "teacher"] | None = None    # teacher: layers 1, 3, ...; default: the strategy's
    seed: Seed = 0                      # initial weights, data order, masks, dropout
    seq_len: Length = 128               # S, positions in a block
    unique_tokens: Count | None = None  # train on the first so many ids of the data alone, again and again
    static_masks: bool = False          # the same masks in every epoch
    batch_size: Count = 1024            # blocks per optimizer step
    micro_batch: Count = 256            # blocks per forward pass
    peak_lr: Positive | None = None     # default: the paper's, 1e-3 for no_kd and 5e-4 for KD
    warmup: Share = 0.06                # part of the budget over which the learning rate rises
    weight_decay: NotNegative = 0.01    # not on biases and LayerNorm
    dropout: Share = 0.1                # hidden states and attention probabilities
    clip: NotNegative = 0.0             # gradient norm above which gradients are scaled down; 0: off, as the paper
    tau: Positive | None = None         # temperature of the soft targets; default: 1, distilbert: 2
    val_blocks: Count = 512             # validation blocks
    val_times: Count = 4                # validations over the budget, the last at its end
    log_every: Count = 10               # steps per line of log.jsonl
    checkpoint_minutes: Positive = 10.0  # between checkpoints; a fraction is allowed
    fractions: Annotated[str, float, "(0, 1)"] = ""     # parts of the budget, as 0.25,0.5, at which to save models too
    device: str | None = None           # cpu, cuda or cuda:N; default: cuda where there is one, else cpu
    compile: bool | None = None         # torch.compile; default: on CUDA only
    bf16: bool | None = None            # bf16 autocast; default: where the hardware multiplies in bf16

    def check(self):
        """What the fields ask of each other, and of the number of processes."""
        if self.as_released and self.strategy not in AS_RELEASED:
            raise UserError(f"--as-released: no other code was released for {self.strategy}; it was for "
                            f"{', '.join(AS_RELEASED)}")
        given = [unit for unit in Budget.UNITS if getattr(self, f"budget_{unit}") is not None]
        if len(given) != 1:
            raise UserError(f"give exactly one budget: {' or '.join(f'--budget-{unit}' for unit in Budget.UNITS)}"
                            + (f" (not {' and '.join(f'--budget-{unit}' for unit in given)})" if given else ""))
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        if self.batch_size % (self.micro_batch * ranks):
            raise UserError(f"--batch-size {self.batch_size} is not a multiple of --micro-batch {self.micro_batch}"
                            + (f" x {ranks} processes" if ranks > 1 else ""))

    @property
    def kind(self):
        """The Strategy, with the run's own temperature, initialisation and layer."""
        strategy = (AS_RELEASED if self.as_released else STRATEGIES)[self.strategy]
        return strategy._replace(tau=self.tau or strategy.tau, init=self.init or strategy.init)

    @property
    def reads_teacher(self):
        return bool(self.kind.needs("teacher") or self.kind.init == "teacher")

    @property
    def label(self):
        return self.strategy + (" AS RELEASED (for science only)" if self.as_released else "")


# ------------------------------------------------------------------------------------------- budget and schedule

class Budget:
    """What a run may spend: hours on a clock that can be paused, or steps at a price each (in FLOPs, tokens, steps).
    `now` is injected by tests; `seconds` and `uncharged` come from a checkpoint when a run goes on."""
    UNITS = ("hours", "flops", "tokens", "steps")

    def __init__(self, total, unit, price=1, now=time.monotonic):
        self.total, self.unit, self.price, self.now = total, unit, price, now
        self.steps = 0
        self.seconds = 0.0              # charged, as of the last reading that all ranks agreed on
        self.uncharged = {}             # cause -> seconds
        self.origin = None              # charged seconds = now() - origin

    def start(self):
        self.origin = self.now() - self.seconds

    def clock(self):
        """Charged seconds at this moment, on this rank."""
        return self.now() - self.origin

    @contextlib.contextmanager
    def pause(self, cause):
        """Not charged but reported: start-up, compile, validation, checkpoints."""
        began = self.now()
        try:
            yield
        finally:
            took = self.now() - began
            self.uncharged[cause] = self.uncharged.get(cause, 0.0) + took
            if self.origin is not None:
                self.origin += took

    @property
    def progress(self):
        """Spent / budget, from 0 to 1."""
        spent = self.seconds / 3600 if self.unit == "hours" else self.steps * self.price
        return min(1.0, spent / self.total)


def learning_rate(progress, peak, warmup=0.06):
    """Linear from 0 to `peak` over the first `warmup` of the budget, linear back to 0 at its end."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * (1 - progress) / (1 - warmup)


class Stages:
    """Seconds per stage: data, teacher, student, communication, optimizer.  On CUDA by events, read once a step."""

    def __init__(self, device):
        self.cuda, self.marks, self.seconds = device.type == "cuda", [], {}

    def mark(self, stage):
        """What ran since the last mark belongs to `stage`; None: to no stage."""
        at = time.perf_counter()
        if self.cuda:
            at = torch.cuda.Event(enable_timing=True)
            at.record()
        self.marks.append((stage, at))

    def read(self):
        """Adds the finished stages up; call it where the device has nothing left to do."""
        if self.cuda and self.marks:
            self.marks[-1][1].synchronize()                             # its own event, which was recorded just now
        for (_, began), (stage, ended) in zip(self.marks, self.marks[1:], strict=False):
            if stage:
                took = began.elapsed_time(ended) / 1000 if self.cuda else ended - began
                self.seconds[stage] = self.seconds.get(stage, 0.0) + took
        self.marks = self.marks[-1:]


# ------------------------------------------------------------------------------------------------------- signals

@contextlib.contextmanager
def stop_signals():
    """A list that receives the signals that ask for a stop; they are acted on between steps, never in an update."""
    caught = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {s: signal.signal(s, lambda number, frame: caught.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------- loop

@memory_told
def train(config, now=time.monotonic, say=print):
    """Runs one strategy to the end of its budget; returns the summary that is also written to the run directory.

    The same call goes on where a stopped run's checkpoint is; a finished run is not run again."""
    began = now()
    config.check()
    out, directory = Path(config.out or f"runs/{config.strategy}"), TokenDirectory(config.data)
    record = dataclasses.asdict(config) | contents(directory, config.teacher if config.reads_teacher else None)
    summary = same_configuration(record, out)
    if summary:
        say(f"{out} is finished: nothing to do")
        return summary
    writable(out)
    arm = make_arm(config, directory)
    directory.verify()
    ranks = arm.ranks
    say = say if ranks.rank == 0 else lambda line: None
    train_blocks = Blocks(directory, "train", config.seq_len, config.seed, config.unique_tokens, config.static_masks)
    val_blocks = validation_blocks(directory, config.seq_len, say)
    flops = [config.batch_size * f for f in flops_per_block(
        config, arm.student.config, arm.teacher.config if arm.teacher else None)]
    step_tokens = config.batch_size * config.seq_len
    unit = next(unit for unit in Budget.UNITS if getattr(config, f"budget_{unit}") is not None)
    budget = Budget(getattr(config, f"budget_{unit}"), unit,
                    dict(flops=sum(flops), tokens=step_tokens).get(unit, 1), now)
    run = Run(config, out, arm, budget, directory, val_blocks, Stages(arm.device), say)
    run.resume_or_start(record)
    for cause, seconds in (("compile", arm.warm_up_seconds), ("start-up", now() - began - arm.warm_up_seconds)):
        budget.uncharged[cause] = budget.uncharged.get(cause, 0.0) + seconds
    if ranks.rank == 0:
        run.describe()

    stages = run.stages
    batches = stream(train_blocks, budget.steps, config.batch_size, arm.device)
    budget.start()
    stages.mark(None)
    with stop_signals() as signals:
        try:
            while budget.progress < 1 or not budget.steps:
                batch = next(batches)
                names, values = arm.gradients(batch, budget.steps, stages)
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
                lr = learning_rate(progress, arm.peak_lr, config.warmup)
                arm.update(lr, values["gradient_norm"])
                stages.mark("optimizer")
                budget.steps += 1
                run.seconds = budget.clock()                    # what a checkpoint of this step has spent
                run.after_step(dict(step=budget.steps, progress=progress, seconds=run.seconds, lr=lr,
                                    epoch=train_blocks.epochs(budget.steps, config.batch_size), **values), signals)
                stages.mark(None)
            if arm.device.type == "cuda":
                torch.cuda.synchronize()
            charged = budget.clock()
            stages.read()
            val = run.validate(signals)
        except Stopped:
            run.checkpoint()
            number = signals[0] if signals else signal.SIGTERM
            say(f"stopped by signal {number:d} after step {budget.steps}: the same command goes on from there")
            raise SystemExit(128 + number) from None

    batches.close()
    tokens = budget.steps * step_tokens
    spent = dict(hours=charged / 3600, flops=budget.steps * sum(flops), tokens=tokens, steps=budget.steps)[unit]
    summary = dict(
        strategy=config.strategy, label=config.label, as_released=config.as_released, init=arm.strategy.init,
        size=config.size, peak_lr=arm.peak_lr, seed=config.seed, steps=budget.steps, tokens=tokens,
        student_flops=budget.steps * flops[0], teacher_flops=budget.steps * flops[1],
        epochs=train_blocks.epochs(budget.steps, config.batch_size),
        unique_tokens=min(train_blocks.count, budget.steps * config.batch_size) * config.seq_len,
        budget={unit: budget.total}, overshoot=spent / budget.total - 1, charged_seconds=charged,
        tokens_per_second=tokens / charged, charged=stages.seconds, uncharged=budget.uncharged,
        teacher_share=stages.seconds.get("teacher", 0.0) / charged, val=val, teacher_mlm=run.teacher_mlm,
        device=str(arm.device), ranks=ranks.size, bf16=arm.bf16, torch=torch.__version__)
    if ranks.rank == 0:
        run.finish(summary, model_card(config, summary))
    if ranks.size > 1:
        dist.barrier()
        dist.destroy_process_group()
    return summary


def main(config, **options):
    train(config, **options)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
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


def contents(directory, teacher=None):
    """What stands in the token files and in the teacher's weights, by sha256: under the same paths, something else may
    stand tomorrow."""
    found = {"contents of data": directory.manifest["sha256"]}
    if teacher:
        found["contents of teacher"] = [checkpoint.sha256(f) for f in
                                        checkpoint.weight_files(checkpoint.find_model(teacher))]
    return found


def same_configuration(record, out):
    """The summary if the run of this very record has finished in `out`, None if it has not; another one is refused."""
    if not (out / "summary.json").exists() and not list(out.glob("checkpoint*.pt")):
        return None
    before = read_json(out / "config.json")
    differ = [k if k.startswith("contents") else f"{k} ({before.get(k)} there, {v} here)" for k, v in record.items()
              if before.get(k, v if k.startswith("contents") else None) != v and k not in ("out", "checkpoint_minutes")]
    if differ:
        raise UserError(f"{out} holds a run of another configuration: {', '.join(differ)}: give another --out")
    return read_json(out / "summary.json") if (out / "summary.json").exists() else None


def read_json(file):
    """The dict in one of our own files."""
    try:
        return dict(json.loads(file.read_text()))
    except (FileNotFoundError, TypeError, ValueError):
        raise UserError(f"{file} is missing or damaged, so what {file.parent} holds cannot be told: give another "
                        f"--out, or remove that directory") from None


class Run:
    """The run directory: what is written beside the steps, none of it on the clock, and only by rank 0."""

    def __init__(self, config, out, arm, budget, directory, val_blocks, stages, say):
        self.config, self.out, self.arm, self.budget = config, out, arm, budget
        self.directory, self.val_blocks, self.stages, self.say = directory, val_blocks, stages, say
        self.validations, self.seconds, self.teacher_mlm = 0, 0.0, None
        self.said, self.saved = -math.inf, time.monotonic()
        self.writes = arm.ranks.rank == 0

    def resume_or_start(self, record):
        state = checkpoint.load_run(self.out, self.say)
        arm, budget = self.arm, self.budget
        if state:
            arm.student.load_state_dict(state["student"])
            arm.proj.load_state_dict(state["proj"])
            arm.optimizer.load_state_dict(state["optimizer"])
            budget.steps, budget.seconds, self.seconds = state["steps"], state["seconds"], state["seconds"]
            budget.uncharged, self.stages.seconds = state["uncharged"], state["charged"]
            self.validations, self.teacher_mlm = state["validations"], state["teacher_mlm"]
            self.say(f"{self.out}: going on after step {budget.steps}")
        if self.writes:
            self.out.mkdir(parents=True, exist_ok=True)
            checkpoint.write_whole(self.out / "config.json", (json.dumps(record, indent=1) + "\n").encode())
            checkpoint.cut_log(self.out / "log.jsonl", budget.steps)
            self.log = (self.out / "log.jsonl").open("a", buffering=1)

    def describe(self):
        with self.budget.pause("validation"):
            if self.arm.teacher and self.arm.teacher_has_head and self.teacher_mlm is None:
                self.teacher_mlm = self.arm.validate(self.val_blocks, model=self.arm.teacher)["mlm"]
            describe(self.arm, self.arm.validate(self.val_blocks), self.budget.steps, self.teacher_mlm, self.say)

    def after_step(self, record, signals):
        """Log, status line, validation, fractions, checkpoint: each where it is due."""
        with self.budget.pause("checkpoints"):
            if not self.writes:
                return
            if record["step"] % self.config.log_every == 0:
                self.write(record)
            if time.monotonic() - self.said > 2:
                self.said = time.monotonic()
                self.say(status(record, self.arm.strategy.terms, self.config, self.stages))
        due = self.config.val_times * self.budget.progress              # the last one is the summary's
        if self.validations + 1 <= min(due, self.config.val_times - 1):
            val = self.validate(signals)
            self.validations += 1
            with self.budget.pause("checkpoints"):
                self.write(dict(record, val=val))
        with self.budget.pause("checkpoints"):
            for fraction in numbers(self.config.fractions):
                if self.budget.progress >= fraction and not (self.out / f"model-{fraction:g}").exists():
                    self.save_model(f"model-{fraction:g}", f"{fraction:g} of the budget of `{self.config.label}`.\n")
            if time.monotonic() - self.saved >= 60 * self.config.checkpoint_minutes:
                self.checkpoint()

    def validate(self, signals):
        with self.budget.pause("validation"):
            return self.arm.validate(self.val_blocks, signals) if self.writes else None

    def write(self, record):
        self.log.write(json.dumps(record) + "\n")

    def checkpoint(self):
        if not self.writes:
            return
        arm = self.arm
        checkpoint.save_run(self.out, dict(
            config=dataclasses.asdict(self.config), steps=self.budget.steps, seconds=self.seconds,
            uncharged=self.budget.uncharged, charged=self.stages.seconds, validations=self.validations,
            teacher_mlm=self.teacher_mlm, student=arm.student.state_dict(), proj=arm.proj.state_dict(),
            optimizer=arm.optimizer.state_dict()))
        self.saved = time.monotonic()

    def save_model(self, name, card):
        checkpoint.save_model(self.out / name, self.arm.student, self.directory.read_tokenizer(),
                              self.arm.strategy.trains_lm_head, card)

    def finish(self, summary, card):
        self.checkpoint()
        self.write(dict(step=summary["steps"], progress=1.0, seconds=summary["charged_seconds"], val=summary["val"]))
        self.log.close()
        self.save_model("model", card)
        checkpoint.write_whole(self.out / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
        self.say(f"finished after {summary['steps']:,} steps, {summary['tokens']:,} tokens, "
                 f"{summary['charged_seconds']:.1f} s charged ({self.out})")
        for kind in ("charged", "uncharged"):
            self.say(f"{kind}: " + ", ".join(f"{cause} {s:.1f} s" for cause, s in summary[kind].items()))
        for name, value in summary["val"].items():
            self.say(f"val_{name}: {value:.4f}")


def model_card(config, summary):
    """The README.md of the model directory: what was trained, on what, for how long, by which command."""
    given = ""
    for f in dataclasses.fields(config):
        flag, value = f.name.replace("_", "-"), getattr(config, f.name)
        if value != f.default:
            given += {True: f" --{flag}", False: f" --no-{flag}"}.get(value if isinstance(value, bool) else None,
                                                                      f" --{flag} {value}")
    teacher = f" from the teacher `{config.teacher}`" if config.kind.needs("teacher") else ""
    val = ", ".join(f"{name} {value:.4f}" for name, value in summary["val"].items())
    return (f"---\nlibrary_name: transformers\ntags: [bert, nanokd]\n---\n\n"
            f"A BERT of {config.size} trained by nanoKD with the strategy `{summary['label']}`{teacher}: "
            f"{summary['tokens']:,} tokens of `{config.data}` in {summary['charged_seconds']:,.0f} charged seconds "
            f"({summary['student_flops'] + summary['teacher_flops']:.3g} FLOP) on {summary['device']}.\n\n"
            f"Validation: {val}.\n\n    python train.py{given}\n")


def describe(arm, val, step, teacher_mlm, say):
    config, c, strategy = arm.config, arm.student.config, arm.strategy
    trained = sum(p.numel() for p in arm.student.parameters() if p.requires_grad)
    say(f"{config.label}: student {c.size}, {c.num_attention_heads} heads, V {c.vocab_size:,}, "
        f"{trained / 1e6:.1f}M parameters trained, from {strategy.init} weights; "
        f"peak LR {arm.peak_lr:g}; {config.batch_size} x {config.seq_len} tokens a step; {arm.device}, "
        f"{'bf16' if arm.bf16 else 'fp32'}")
    if arm.teacher:
        quality = f"validation MLM loss {teacher_mlm:.4f}" if teacher_mlm is not None else "no LM head"
        layers = [need[1] % arm.teacher.config.num_hidden_layers + 1 for need in strategy.want("teacher")
                  if need[0] == "qkv"]
        say(f"teacher {config.teacher}: {arm.teacher.config.size}, {quality}"
            + (f"; q, k, v of its layer {' and '.join(map(str, layers))}" if layers else "")
            + (f"; {arm.relation_heads} relation heads" if "qq" in strategy.terms else "")
            + ("; its dropout is on" if arm.teacher.training else "")
            + (f"; tau {strategy.tau:g}" if strategy.needs_teachers_head else "")
            + (f"; ignored: {', '.join(arm.teacher_ignored)}" if arm.teacher_ignored else ""))
    for name, term in strategy.terms.items():
        say(f"  {term.weight:g} x {name:8} {val[name]:9.4f} at step {step}   {term.about}")


def status(record, terms, config, stages):
    rate = record["step"] * config.batch_size * config.seq_len / max(record["seconds"], 1e-9)
    left = f"{record['seconds'] * (1 / record['progress'] - 1):.0f} s left" if record["progress"] > 1e-3 else "started"
    whole = max(sum(stages.seconds.values()), 1e-9)
    shares = " ".join(f"{stage} {stages.seconds[stage] / whole:.0%}"
                      for stage in ("data", "teacher", "student") if stage in stages.seconds)
    return (f"step {record['step']:6} {record['progress']:6.1%} lr {record['lr']:.2e} "
            + " ".join(f"{name} {record[name]:.4f}" for name in terms)
            + f" {rate:,.0f} tok/s ({shares}) {left}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    run(main, Config, __doc__)
