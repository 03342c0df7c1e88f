"""What a distilled token costs beside no_kd's: measured, by FLOPs, and as the paper's released code computes it.

    python bench_throughput.py                                  # this machine, CPU or GPU, under four minutes
    python bench_throughput.py --strategies all                 # every arm
    python bench_throughput.py --size 12L1024 --teacher-size 24L1024                   # the paper's 12 layers

An arm's step is train.py's: a batch and its masks, gradients (teacher, student, backward, gradient norm), one wait for
the device, Arm.update.  Weights and ids are random.  A shared machine's speed moves, so all arms take turns, a step
each in every round; a cost is the median over rounds of the round's own ratio, with its quartiles.

The paper (arXiv 2404.19319) measured a cost of 1.8 for every distilled arm.  Its code computes everything for every
method; so do the rows "as released", with our attention and, on CUDA, torch.compile: its graph, not its kernels.
"""
import dataclasses
import itertools
import sys
import textwrap
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import torch

import train
from comparison.report import aligned
from data import phase_blocks
from model import BertConfig, BertForMaskedLM
from plumbing.budget import flops_per_block
from plumbing.checks import check_teacher
from plumbing.cli import Checked, Count, Length, NotNegative, Share, UserError, run
from plumbing.device import (
    choose_device,
    fitting_micro_batch,
    halve_micro_batch_until_it_fits,
    multiplies_in_bf16,
    ready_process,
)
from plumbing.tokenizer import SPECIAL
from step import Arm
from strategies import AS_RELEASED, PHASED, STRATEGIES

PAPERS_RATIO, PAPERS_ARMS, RELEASED = 1.8, ("vanilla_kd", "tinybert", "minilm"), " as released"


@dataclass
class Config(Checked):
    size: str = "6L768"                 # student: layers L width
    teacher_size: str = "12L768"        # teacher: layers L width
    heads: Count | None = None          # attention heads of the student; default: width / 64
    vocab_size: Annotated[int, "[6, 1e6]"] = 30522      # V, ids in the vocabulary
    strategies: Annotated[str, str, (*STRATEGIES, *PHASED, "all")] = "vanilla_kd,tinybert,minilm"  # beside no_kd; all
    as_released: bool = True            # each also as the paper's released code computes it, where it was released
    seq_len: Length = 128               # S, positions in a block
    batch_size: Count | None = None     # blocks per optimizer step; default: 1024 on CUDA, else 16
    micro_batch: Count | None = None    # blocks per forward pass; default: as train.py's
    dropout: Share = 0.1                # as train.py's
    seconds: NotNegative = 90.0        # of measuring; 3 rounds at least
    device: str | None = None           # cpu, cuda or cuda:N; default: cuda where there is one, else cpu
    compile: bool | None = None         # torch.compile; default: on CUDA only
    bf16: bool | None = None            # bf16 autocast; default: where that is faster

    def for_machine(self):
        """The same with every default filled in, or a UserError."""
        device = choose_device(self.device)
        cuda = device.type == "cuda"
        names = [*STRATEGIES, *PHASED] if self.strategies == "all" else self.strategies.split(",")
        batch = self.batch_size or (1024 if cuda else 16)
        config = dataclasses.replace(
            self, device=str(device), batch_size=batch,
            micro_batch=self.micro_batch or fitting_micro_batch(device, batch),
            compile=cuda if self.compile is None else self.compile, bf16=multiplies_in_bf16(device, self.bf16),
            strategies=",".join(dict.fromkeys(["no_kd", *names])))
        for name in config.strategies.split(","):
            config.of_arm(name).check()
        return config

    def of_arm(self, strategy, as_released=False):
        same = {name: getattr(self, name) for name in (
            "size", "heads", "seq_len", "batch_size", "micro_batch", "dropout", "compile", "bf16")}
        return train.Config(
            strategy=strategy, budget_steps=1, as_released=as_released, teacher=self.teacher_size, **same)

    def shape(self, size, heads=None):
        try:
            return BertConfig.of_size(
                size, heads, vocab_size=self.vocab_size, hidden_dropout_prob=self.dropout,
                attention_probs_dropout_prob=self.dropout, max_position_embeddings=max(512, self.seq_len))
        except ValueError as e:
            raise UserError(f"--size, --teacher-size: {e}") from None


def random_tokens(vocab_size):
    """What data.Blocks reads of a token directory, with random ids."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, ".", *(f"a{i}" for i in range(vocab_size))][:vocab_size])}
    ids = np.random.default_rng(0).integers(len(SPECIAL), vocab_size, 2 ** 22, np.uint32)
    return SimpleNamespace(path="random ids", vocab=vocab, special={token: vocab[token] for token in SPECIAL},
                           split=lambda name: ids)


class Entry:
    """One arm that is measured, by steps as train.py's loop does them.  `flops` are those of a step."""

    def __init__(self, name, flops, arm, blocks):
        self.name, self.flops, self.arm, self.steps = name, flops, arm, itertools.count()
        self.seconds = []                                               # of one step, round by round
        arm.make_optimizer()
        self.batches = train.batches_of(blocks, 0, arm.batch_size, arm.device)
        self.step()                                                     # AdamW's state comes with the first step

    def step(self):
        names, values = train.gradients(self.arm, next(self.batches), next(self.steps), train.Stages(self.arm.device))
        self.arm.update(1e-4, values.tolist()[names.index("gradient_norm")])    # the step's one wait for the device


def entries_of(config, tokens):
    """Every arm that was asked for, each with weights of its own."""
    shapes = config.shape(config.size, config.heads), config.shape(config.teacher_size)
    for name, as_released in itertools.product(config.strategies.split(","), (False, True)):
        if as_released and not (config.as_released and name in AS_RELEASED):
            continue
        of_arm = config.of_arm(name, as_released)
        needed = shapes if of_arm.needs_teacher else shapes[:1]
        if of_arm.needs_teacher:
            check_teacher(of_arm, *shapes, head=True)
        for i, phase in enumerate(of_arm.phases):
            with torch.device(config.device):
                arm = Arm(of_arm, *map(BertForMaskedLM, needed), phase=i)
            flops = config.batch_size * sum(flops_per_block(of_arm, *needed, phase=i))
            yield Entry(phase.name + RELEASED * as_released, flops, arm, phase_blocks(phase, tokens, "train", 0))


def take_turns(entries, config):
    """One step of each in every round."""
    synchronize = torch.cuda.synchronize if config.device.startswith("cuda") else lambda: None
    began, rounds = time.monotonic(), 0
    while rounds < 3 or time.monotonic() - began < config.seconds:
        for entry in entries:
            synchronize()
            at = time.perf_counter()
            entry.step()
            synchronize()
            entry.seconds.append(time.perf_counter() - at)
        rounds += 1
        print(f"\rround {rounds}, {time.monotonic() - began:.0f} of {config.seconds:.0f} s", end="", file=sys.stderr)
    print(file=sys.stderr)


def row(entry, base, config):
    """What was measured of one entry; `base` is the one that costs 1."""
    ratio, low, high = np.quantile(np.divide(entry.seconds, base.seconds), (.5, .25, .75))
    return {"arm": entry.name,
            "tokens/s": f"{config.batch_size * config.seq_len / np.median(entry.seconds):,.0f}",
            "cost": f"{ratio:.2f}", "quartiles": f"{low:.2f}-{high:.2f}", "FLOPs": f"{entry.flops / base.flops:.2f}",
            "paper": f"{PAPERS_RATIO}" if entry.name.removesuffix(RELEASED) in PAPERS_ARMS else ""}


def method_and_graph(rows):
    """How much of the paper's ratio is the method, how much the released graph; from these rows alone."""
    cost = {r["arm"]: float(r["cost"]) for r in rows}
    both = [name for name in cost if name + RELEASED in cost]
    if not both:
        return []
    (least, most), (low, high) = ((min(of), max(of)) for of in (
        [cost[name] for name in both], [cost[name + RELEASED] for name in both]))
    return [f"The method: computing only what a loss needs, a distilled token costs {least:.2f} to {most:.2f} times "
            f"one of no_kd here.",
            f"The released graph: computing everything raises that to {low:.2f} to {high:.2f}; the paper's "
            f"{PAPERS_RATIO}, on an A100, is {PAPERS_RATIO / high:.2f} to {PAPERS_RATIO / low:.2f} times that, which "
            f"is its kernels and its machine."]


@halve_micro_batch_until_it_fits
def main(config):
    device = (torch.cuda.get_device_name() if config.device.startswith("cuda") else
              f"CPU, {torch.get_num_threads()} thread(s)")
    print(textwrap.fill(
        f"{config.size}, teacher {config.teacher_size}, V {config.vocab_size:,}; {config.batch_size} x "
        f"{config.seq_len} in micro-batches of {config.micro_batch}; {device}, {'bf16' if config.bf16 else 'fp32'}, "
        f"{'compiled' if config.compile else 'eager'}, dropout {config.dropout:g}, torch {torch.__version__}", 80))
    ready_process(torch.device(config.device))                          # as make_arm does
    entries = list(entries_of(config, random_tokens(config.vocab_size)))
    take_turns(entries, config)
    rows = [row(e, entries[0], config) for e in entries]
    print(aligned([*rows[0]], [[*r.values()] for r in rows]))
    for line in (f"cost: median and quartiles of {len(entries[0].seconds)} rounds in turn, {entries[0].name} = 1; "
                 "FLOPs: the same ratio of matrix products; paper: on one A100.", *method_and_graph(rows)):
        print(textwrap.fill(line, 80))


if __name__ == "__main__":
    run(main, Config, __doc__)
