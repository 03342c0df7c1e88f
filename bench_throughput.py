"""What a distilled token costs beside no_kd's: measured, by FLOPs, and as the paper's released code computes it.
Read it after compare.py.

    python bench_throughput.py                                  # this machine, CPU or GPU, under four minutes
    python bench_throughput.py --strategies all --json bench.json       # every arm
    python bench_throughput.py --size 12L1024 --teacher-size 24L1024                   # the paper's 12 layers
    python bench_throughput.py --baseline transformers              # beside that package's BertForMaskedLM
    python bench_throughput.py --loader                             # the data loader alone

An arm's step is train.py's: a batch and its masks, Arm.gradients (teacher, student, backward, gradient norm),
one wait for the device, Arm.update.  Weights and ids are random: neither data nor a teacher is needed.  A
shared machine's speed moves, so all arms live in one process and take turns, a step each in every round; a
cost is the median over rounds of the round's own ratio, with its quartiles.

The paper (arXiv 2404.19319) measured a cost of 1.8 for every distilled arm.  Its code computes everything for
every method; the rows "as released" do that too, with our attention and, on CUDA, torch.compile: not its
kernels, its graph.
"""
import dataclasses
import importlib.util
import itertools
import os
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("KINETO_LOG_LEVEL", "6")      # before torch is imported: its profiler talks to stderr
import numpy as np
import torch

import train
from comparison.report import aligned
from data import Blocks, blocks_of
from model import BertConfig, BertForMaskedLM
from plumbing.checks import check_teacher
from plumbing.cli import Checked, Count, Length, NotNegative, Share, UserError, run
from plumbing.device import (
    choose_device,
    fitting_micro_batch,
    halve_micro_batch_until_it_fits,
    multiplies_in_bf16,
    ready_process,
)
from plumbing.files import claim_file, write_json
from plumbing.price import flops_per_block
from plumbing.screen import peak_flops
from plumbing.tokenizer import SPECIAL
from step import Arm, autocast
from strategies import AS_RELEASED, PHASED, STRATEGIES

PAPERS_RATIO, RELEASED = 1.8, " as released"


@dataclass
class Config(Checked):
    size: str = "6L768"                 # student: layers L width
    teacher_size: str = "12L768"        # teacher: layers L width
    heads: Count | None = None          # attention heads of the student; default: width / 64
    vocab_size: Annotated[int, "[6, 1e6]"] = 30522      # V, ids in the vocabulary
    strategies: Annotated[str, str, (*STRATEGIES, *PHASED, "all")] = "vanilla_kd,tinybert,minilm"  # beside no_kd; all
    as_released: bool = True            # each also as the paper's released code computes it, where it was released
    baseline: Literal["transformers"] | None = None     # beside them that package's BertForMaskedLM
    loader: bool = False                # instead: the data loader alone, batches of 1024 blocks on one core
    seq_len: Length = 128               # S, positions in a block
    batch_size: Count | None = None     # blocks per optimizer step; default: 1024 on CUDA, else 16
    micro_batch: Count | None = None    # blocks per forward pass; default: as train.py's
    dropout: Share = 0.1                # as train.py's
    seconds: NotNegative = 90.0        # of measuring; 3 rounds at least
    device: str | None = None           # cpu, cuda or cuda:N; default: cuda where there is one, else cpu
    compile: bool | None = None         # torch.compile; default: on CUDA only
    bf16: bool | None = None            # bf16 autocast; default: where that is faster
    json: str | None = None             # file for everything that was measured

    def for_machine(self):
        """The same with every default filled in, or a UserError."""
        device = choose_device(self.device)
        batch = self.batch_size or (1024 if device.type == "cuda" else 16)
        names = [*STRATEGIES, *PHASED] if self.strategies == "all" else self.strategies.split(",")
        names = [name for name in names if name != "no_kd"]
        config = dataclasses.replace(
            self, device=str(device), batch_size=batch,
            micro_batch=self.micro_batch or fitting_micro_batch(device, batch),
            compile=device.type == "cuda" if self.compile is None else self.compile,
            bf16=multiplies_in_bf16(device, self.bf16), strategies=",".join(["no_kd", *names]))
        for name in config.strategies.split(","):
            config.of_arm(name).check()
        if config.baseline and not importlib.util.find_spec(config.baseline):
            raise UserError(f"--baseline needs {config.baseline}: pip install {config.baseline}")
        return config

    def of_arm(self, strategy, as_released=False):
        same = {name: getattr(self, name) for name in (
            "size", "heads", "seq_len", "batch_size", "micro_batch", "dropout", "compile", "bf16")}
        return train.Config(strategy=strategy, budget_steps=1, as_released=as_released, teacher=self.teacher_size,
                            **same)

    def shape(self, size, heads=None):
        try:
            return BertConfig.of_size(size, heads, vocab_size=self.vocab_size,
                                      hidden_dropout_prob=self.dropout,
                                      attention_probs_dropout_prob=self.dropout,
                                      max_position_embeddings=max(512, self.seq_len))
        except ValueError as e:
            raise UserError(f"--size, --teacher-size: {e}") from None


class RandomTokens:
    """What data.Blocks reads of a token directory: a memmapped file, of random ids here, gone
    when the process ends."""

    def __init__(self, vocab_size, count=2 ** 22):
        tokens = [*SPECIAL, ".", *(f"a{i}" for i in range(vocab_size))][:vocab_size]
        self.path, self.vocab = "random ids", {token: i for i, token in enumerate(tokens)}
        self.special = {token: self.vocab[token] for token in SPECIAL}
        self.file, self.dtype = tempfile.TemporaryFile(), np.uint16 if vocab_size <= 2 ** 16 else np.uint32
        np.random.default_rng(0).integers(len(SPECIAL), vocab_size, count, self.dtype).tofile(self.file)

    def split(self, name):
        return np.memmap(self.file, self.dtype, "r")


# ---------------------------------------------------------------------------------------- what takes its turn

@dataclass
class Entry:
    """One thing that is measured.  `flops` are those of a step; `peak` is in bytes."""
    name: str
    step: callable
    flops: float | None = None
    peak: float | None = None
    stages: train.Stages | None = None
    seconds: list = field(default_factory=list)     # of one step, round by round


def entry_of(name, arm, blocks, flops=None):
    """An arm that steps as train.py's loop does."""
    arm.make_optimizer()
    stages, steps = train.Stages(arm.device), itertools.count()
    batches = train.batches_of(blocks, 0, arm.phase.blocks(arm.config.batch_size), arm.device)

    def step():
        stages.mark(None)
        names, values = train.gradients(arm, next(batches), next(steps), stages)
        norm = values.tolist()[names.index("gradient_norm")]            # the step's one wait for the device
        stages.mark("optimizer")
        stages.read()
        arm.update(1e-4, norm)
        stages.mark("optimizer")
    step()                                                           # AdamW's state comes with the first step
    peak = peak_memory(arm, step)
    stages.seconds.clear()
    return Entry(name, step, flops, peak, stages)


def arms(config, tokens):
    """Every arm that was asked for, each with weights of its own."""
    student_c, teacher_c = shapes = config.shape(config.size, config.heads), config.shape(config.teacher_size)
    names = config.strategies.split(",")
    for name, as_released in [(n, r) for n in names for r in (False, True)
                              if not r or config.as_released and n in AS_RELEASED]:
        of_arm = config.of_arm(name, as_released)
        needed = shapes if of_arm.needs_teacher else shapes[:1]
        if len(needed) > 1:
            check_teacher(of_arm, student_c, teacher_c, head=True)
        for i, phase in enumerate(of_arm.phases):
            with torch.device(config.device):
                arm = Arm(of_arm, *map(BertForMaskedLM, needed), phase=i)
            flops = config.batch_size * sum(flops_per_block(of_arm, *needed, phase=i))
            yield entry_of(phase.name + RELEASED * as_released, arm, blocks_of(phase, tokens, "train", 0), flops)
    if config.baseline:
        import transformers as hf
        with torch.device(config.device):
            model = hf.BertForMaskedLM(hf.BertConfig(**dataclasses.asdict(student_c))).train()
            arm = TransformersArm(config.of_arm("no_kd"), model)
            yield entry_of("transformers MLM", arm, blocks_of(arm.phase, tokens, "train", 0))


class TransformersArm(Arm):
    """The same step on transformers' BertForMaskedLM, with labels of -100: so its LM head is at every position."""

    def student_forward(self, batch, strategy):
        labels = torch.full_like(batch.ids, -100).scatter(1, batch.masked, batch.labels.view_as(batch.masked))
        with autocast(self.device, self.bf16):
            return self.run_student(batch.ids, labels=labels)

    def loss(self, s, t, batch, strategy):
        return s.loss, {}


def peak_memory(arm, step):
    """Bytes at the highest point of a step: the arm's weights and optimizer state and what the step adds."""
    own = sum(t.nbytes for t in itertools.chain(
        arm.student.parameters(), arm.proj.parameters(), arm.teacher.parameters() if arm.teacher else (),
        *(state.values() for state in arm.optimizer.state.values())))
    if arm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return own + torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        step()
    changes = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events()
                     if e.name() == "[memory]")
    return own + int(np.cumsum([n for _, n in changes]).max())


def loader_rate(blocks, batch_size=1024, seconds=3.0, now=time.perf_counter):
    """Tokens per second of making batches, masks included, in this one thread."""
    blocks.batch(0, batch_size)                                         # the epoch's order, once in an epoch
    began, i = now(), 0
    while now() - began < seconds:
        i += 1
        blocks.batch(i, batch_size)
    return i * batch_size * blocks.seq_len / (now() - began)


# ------------------------------------------------------------------------------------------ rounds and tables

def take_turns(entries, config):
    """One step of each in every round."""
    def synchronize():
        if config.device.startswith("cuda"):
            torch.cuda.synchronize()
    began, rounds = time.monotonic(), 0
    while rounds < 3 or time.monotonic() - began < config.seconds:
        for entry in entries:
            synchronize()
            at = time.perf_counter()
            entry.step()
            synchronize()
            entry.seconds.append(time.perf_counter() - at)
        rounds += 1
        print(f"\rround {rounds}, {time.monotonic() - began:.0f} of {config.seconds:.0f} s", end="",
              file=sys.stderr)
    print(file=sys.stderr)


def row(entry, base, config, peak):
    """What was measured of one entry; `base` is the one that costs 1, `peak` the device's FLOP/s or None."""
    seconds, ratios = np.median(entry.seconds), np.divide(entry.seconds, base.seconds)
    ratio, low, high = np.quantile(ratios, (.5, .25, .75))
    found = {"arm": entry.name, "tokens/s": f"{config.batch_size * config.seq_len / seconds:,.0f}",
             "cost": f"{ratio:.2f}", "quartiles": f"{low:.2f}-{high:.2f}",
             "FLOPs": f"{entry.flops / base.flops:.2f}" if entry.flops else "",
             "paper": f"{PAPERS_RATIO}" if entry.name != base.name and entry.flops else ""}
    if entry.flops and peak:
        found["MFU"] = f"{entry.flops / seconds / peak:.0%}"
    whole = sum(entry.stages.seconds.values())
    return found | {"GB": f"{entry.peak / 1e9:.2f}", "teacher": f"{entry.stages.seconds.get('teacher', 0) / whole:.0%}"}


def in_words(rows):
    """How much of the paper's ratio is the method, how much the released graph; from these rows alone."""
    cost = {r["arm"]: (float(r["cost"]), float(r["FLOPs"] or "nan")) for r in rows}
    both = [name for name in cost if f"{name}{RELEASED}" in cost]
    if not both:
        return []
    def over(which):
        return ", ".join(f"{name} {cost[name + RELEASED][which] / cost[name][which]:.2f}" for name in both)
    least, most = (f(cost[name][0] for name in both) for f in (min, max))
    low, high = (f(cost[name + RELEASED][0] for name in both) for f in (min, max))
    return [f"The method: computing only what a loss needs, a distilled token costs {least:.2f} to {most:.2f} times "
            f"one of no_kd here.",
            f"The released graph: computing everything raises that to {low:.2f} to {high:.2f} (by {over(0)}; by FLOPs "
            f"{over(1)}); the paper's {PAPERS_RATIO}, on an A100, is {PAPERS_RATIO / high:.2f} to "
            f"{PAPERS_RATIO / low:.2f} times that, which is its kernels and its machine."]


@halve_micro_batch_until_it_fits
def main(config):
    if config.json:
        claim_file(config.json, "--json")
    tokens = RandomTokens(config.vocab_size)
    if config.loader:
        blocks = Blocks(tokens, "train", config.seq_len, seed=0)
        print(f"loader_tokens_per_second: {loader_rate(blocks):,.0f} (one thread, batches of 1024 x "
              f"{config.seq_len}, {blocks.k} masks each)")
        return
    cuda = config.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{config.size}, teacher {config.teacher_size}, V {config.vocab_size:,}; {config.batch_size} x "
          f"{config.seq_len} in micro-batches of {config.micro_batch}; {device}, "
          f"{'bf16' if config.bf16 else 'fp32'}, {'compiled' if config.compile else 'eager'}, dropout "
          f"{config.dropout:g}, torch {torch.__version__}")
    ready_process(torch.device(config.device))                          # as make_arm does
    entries = list(arms(config, tokens))
    take_turns(entries, config)
    rows = [row(e, entries[0], config, peak_flops(device) if config.bf16 else None) for e in entries]
    print(aligned([*rows[0]], [[r.get(name, "") for name in rows[0]] for r in rows]))
    said = in_words(rows)
    for line in (f"cost: median and quartiles of {len(entries[0].seconds)} rounds in turn, {entries[0].name} = 1; "
                 "FLOPs: the same ratio of matrix products; paper: on one A100; GB: at most in a step.", *said):
        print(textwrap.fill(line, 80))
    if config.json:
        write_json(Path(config.json), dict(
            by="nanoKD", config=dataclasses.asdict(config), device=device, torch=torch.__version__, rows=rows,
            said=said, seconds={e.name: e.seconds for e in entries}))


if __name__ == "__main__":
    run(main, Config, __doc__)
