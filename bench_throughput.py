"""Tokens per second of every strategy, beside no_kd's and beside what the FLOPs say.
Read it after compare.py.

    python bench_throughput.py                                  # this machine, CPU or GPU, under five minutes
    python bench_throughput.py --as-released --baseline transformers --json bench.json --figure bench.png
    python bench_throughput.py --size 12L1024 --teacher-size 24L1024                   # the paper's 12 layers
    python bench_throughput.py --teacher-cost                    # what makes the teacher's forward pass cheap
    python bench_throughput.py --loader                             # the data loader alone

An arm's step is train.py's: a batch and its masks, Arm.gradients (teacher, student, backward, gradient norm),
one wait for the device, Arm.update.  Weights and ids are random: neither data nor a teacher is needed.  A
shared machine's speed moves, so all arms live in one process and take turns, a step each in every round; a
ratio is the median over rounds of the round's own ratio, with its quartiles.

The paper (arXiv 2404.19319) measured a cost of 1.8 for every distilled arm.  By FLOPs, 6 layers of width 768,
it is 1.64 (vanilla_kd), 1.54 (tinybert) and 1.39 (minilm).  --as-released adds arms that compute everything
for every method, as its code does; with our attention and, on CUDA, torch.compile, which save for them too:
not its kernels, its graph.
"""
import dataclasses
import itertools
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("KINETO_LOG_LEVEL", "6")      # before torch is imported: its profiler talks to stderr
import numpy as np
import torch
from torch.nn.functional import mse_loss

import train
from comparison.report import markdown
from data import SPECIAL, Blocks
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
from plumbing.files import write_json
from plumbing.price import flops_per_block
from plumbing.screen import peak_flops
from step import Arm, autocast
from strategies import AS_RELEASED, PHASED, STRATEGIES

PAPERS_RATIO = 1.8


@dataclass
class Config(Checked):
    size: str = "6L768"                 # student: layers L width
    teacher_size: str = "12L768"        # teacher: layers L width
    heads: Count | None = None          # attention heads of the student; default: width / 64
    vocab_size: Annotated[int, "[6, 1e6]"] = 30522      # V, ids in the vocabulary
    strategies: Annotated[str, str, (*STRATEGIES, *PHASED)] = ",".join(STRATEGIES)  # arms, and no_kd
    as_released: bool = False          # beside them what the paper's released code computes under their names
    baseline: Literal["transformers"] | None = None     # beside them that package's BertForMaskedLM, and a TinyBERT
    teacher_cost: bool = False          # instead: the teacher's forward pass alone, one change at a time
    loader: bool = False                # instead: the data loader alone, batches of 1024 blocks on one core
    seq_len: Length = 128               # S, positions in a block
    batch_size: Count | None = None     # blocks per optimizer step; default: 1024 on CUDA, else 16
    micro_batch: Count | None = None    # blocks per forward pass; default: as train.py's
    dropout: Share = 0.1                # as train.py's
    seconds: NotNegative = 120.0        # of measuring; 3 rounds at least
    device: str | None = None           # cpu, cuda or cuda:N; default: cuda where there is one, else cpu
    compile: bool | None = None         # torch.compile; default: on CUDA only
    bf16: bool | None = None            # bf16 autocast; default: where that is faster
    json: str | None = None             # file for everything that was measured
    figure: str | None = None           # file for a figure; needs matplotlib

    def for_machine(self):
        """The same with every default filled in, or a UserError."""
        device = choose_device(self.device)
        batch = self.batch_size or (1024 if device.type == "cuda" else 16)
        names = [name for name in self.strategies.split(",") if name != "no_kd"]
        config = dataclasses.replace(
            self, device=str(device), batch_size=batch,
            micro_batch=self.micro_batch or fitting_micro_batch(device, batch),
            compile=device.type == "cuda" if self.compile is None else self.compile,
            bf16=multiplies_in_bf16(device, self.bf16), strategies=",".join(["no_kd", *names]))
        for name in config.strategies.split(","):
            config.of_arm(name).check()
        for package in (self.baseline, self.figure and "matplotlib"):
            try:
                package and __import__(package)
            except ImportError:
                raise UserError(f"this needs {package}: pip install {package}") from None
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
        self.path, self.vocab = "random ids", range(vocab_size)
        self.special = dict(zip(SPECIAL, range(len(SPECIAL)), strict=True))
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
    batches = train.batches_of(blocks, 0, arm.config.batch_size, arm.device)

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


def arms(config, blocks):
    """Every arm that was asked for, each with weights of its own."""
    student_c, teacher_c = shapes = config.shape(config.size, config.heads), config.shape(config.teacher_size)
    names = config.strategies.split(",")
    for name, as_released in [(n, False) for n in names] + [(n, True) for n in names if n in AS_RELEASED
                                                            and config.as_released]:
        of_arm = config.of_arm(name, as_released)
        needed = shapes if of_arm.needs_teacher else shapes[:1]
        if len(needed) > 1:
            check_teacher(of_arm, student_c, teacher_c, head=True)
        for i, phase in enumerate(of_arm.phases):
            with torch.device(config.device):
                arm = Arm(of_arm, *map(BertForMaskedLM, needed), phase=i)
            flops = config.batch_size * sum(flops_per_block(of_arm, *needed, phase=i))
            yield entry_of(phase.name + ", as released" * as_released, arm, blocks, flops)
    if config.baseline:
        import transformers as hf
        student_c, teacher_c = (hf.BertConfig(**dataclasses.asdict(shape)) for shape in shapes)
        with torch.device(config.device):
            arm = TransformersArm(config.of_arm("no_kd"), hf.BertForMaskedLM(student_c).train())
        yield entry_of("transformers MLM", arm, blocks)
        if student_c.hidden_size == teacher_c.hidden_size:
            with torch.device(config.device):
                student, teacher = (hf.BertModel._from_config(c, add_pooling_layer=False,
                                                              attn_implementation="eager")
                                    for c in (student_c, teacher_c))
                arm = TransformersArm(config.of_arm("tinybert"), student.train(), teacher)
            yield entry_of("transformers TinyBERT", arm, blocks)


class TransformersArm(Arm):
    """The same step on transformers' models.  Without a teacher: BertForMaskedLM and labels of -100, so the
    LM head at every position.  With one: a TinyBERT on BertModel, whose outputs are attentions and hidden
    states of all layers; attentions come out of its eager attention only."""

    def __init__(self, config, student, teacher=None):
        super().__init__(config, student, teacher)
        if self.compiled:                                               # graph breaks and all
            self.run_student, self.run_teacher = torch.compile(student), teacher and torch.compile(teacher)

    EVERYTHING = dict(output_hidden_states=True, output_attentions=True)

    def teacher_forward(self, batch, strategy):
        if not self.teacher:
            return {}
        with torch.no_grad():
            return self.run_teacher(batch.ids, **self.EVERYTHING)

    def student_forward(self, batch, strategy):
        labels = torch.full_like(batch.ids, -100).scatter(1, batch.masked, batch.labels.view_as(batch.masked))
        with autocast(self.device, self.bf16):
            return self.run_student(batch.ids, **self.EVERYTHING if self.teacher else dict(labels=labels))

    def loss(self, s, t, labels, strategy):
        if not self.teacher:
            return s.loss, {}
        pairs = [(s.attentions[-1], t.attentions[-1]), (s.hidden_states[0], t.hidden_states[0]),
                 (s.hidden_states[-1], t.hidden_states[-1])]
        return sum(mse_loss(a.float(), b.float()) for a, b in pairs), {}


def teacher_alone(config, blocks):
    """The teacher's forward pass as vanilla_kd has it, and what one change at a time costs or saves."""
    shape, device = config.shape(config.teacher_size), torch.device(config.device)
    with device:
        fp32, bf16 = (BertForMaskedLM(shape).to(dtype).eval() for dtype in (torch.float32, torch.bfloat16))
    ids, masked, _ = (torch.from_numpy(a).to(device) for a in blocks.batch(0, config.micro_batch))

    def forward(model, masked=masked, want="logits", casts=False):
        with torch.no_grad(), autocast(device, casts):
            model(ids, masked, want=(want,))
    compiled = torch.compile(bf16, fullgraph=True, dynamic=False)
    for name, model, changes in (
            ("bf16 weights, logits at the masked positions", bf16, {}), ("fp32 weights", fp32, {}),
            ("fp32 weights, bf16 autocast", fp32, dict(casts=True)), ("compiled", compiled, {}),
            ("logits at every position", bf16, dict(masked=None)), ("no LM head", bf16, dict(want="hidden")),
            ("stops at the last q, k, v", bf16, dict(want="qkv"))):
        entry = Entry(name, partial(forward, model, **changes))
        entry.step()
        yield entry


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
    tokens = (config.micro_batch if config.teacher_cost else config.batch_size) * config.seq_len
    found = {"arm": entry.name, "tokens/s": f"{tokens / seconds:,.0f}", "cost": f"{ratio:.2f}",
             "quartiles": f"{low:.2f} to {high:.2f}"}
    if entry.flops:
        ideal = entry.flops / base.flops
        found |= {"by FLOPs": f"{ideal:.2f}", "cost / FLOPs": f"{ratio / ideal:.2f}",
                  "TFLOP/s": f"{entry.flops / seconds / 1e12:.2f}"}
        found |= {"MFU": f"{entry.flops / seconds / peak:.0%}"} if peak else {}
    if entry.stages:
        whole = sum(entry.stages.seconds.values())
        found |= {"peak GB": f"{entry.peak / 1e9:.2f}"}
        found |= {name: f"{s / whole:.0%}" for name, s in entry.stages.seconds.items()}
    return found


def table(rows):
    columns = list(dict.fromkeys(name for r in rows for name in r))
    return markdown(columns, [[r.get(name, "") for name in columns] for r in rows])


def figure(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = rows[::-1]
    fig, ax = plt.subplots(figsize=(8, 1 + 0.35 * len(rows)), layout="constrained")
    ax.barh([r["arm"] for r in rows], [float(r["cost"]) for r in rows], color="0.7", edgecolor="k",
            label="measured")
    ax.plot([float(r.get("by FLOPs", "nan")) for r in rows], range(len(rows)), "k|", ms=15, mew=3,
            label="by FLOPs")
    ax.axvline(PAPERS_RATIO, color="0.4", linestyle=":", label=f"the paper's {PAPERS_RATIO}")
    ax.set(xlabel=f"cost of a token, {rows[-1]['arm']} = 1")
    ax.legend(fontsize=8, loc="lower right")
    fig.savefig(path, dpi=150)


@halve_micro_batch_until_it_fits
def main(config):
    blocks = Blocks(RandomTokens(config.vocab_size), "train", config.seq_len, seed=0)
    if config.loader:
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
    entries = list((teacher_alone if config.teacher_cost else arms)(config, blocks))
    take_turns(entries, config)
    rows = [row(e, entries[0], config, peak_flops(device) if config.bf16 else None) for e in entries]
    print(table(rows))
    print(f"cost: median and quartiles of {len(entries[0].seconds)} rounds, {entries[0].name} = 1"
          + ("" if config.teacher_cost else f"; the paper's: {PAPERS_RATIO} for every distilled arm")
          + "; FLOPs: of matrix products only")
    if config.json:
        write_json(Path(config.json), dict(
            config=dataclasses.asdict(config), device=device, torch=torch.__version__, rows=rows,
            seconds={e.name: e.seconds for e in entries}))
    if config.figure:
        figure(rows, config.figure)


if __name__ == "__main__":
    run(main, Config, __doc__)
