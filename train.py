"""The budgeted loop: one strategy, one student, one budget.  Read it fourth.

    python train.py --strategy no_kd --budget-steps 1000 --data data/wiki --size 4L256 --out runs/teacher
    python train.py --strategy tinybert --budget-hours 4 --data data/wiki --teacher runs/teacher/model --size 2L256
    python train.py --strategy tinybert --budget-hours 4        # the paper's: data/wiki, bert-base-uncased, 6L768

Every arm has the same architecture, initial weights, data order, masks and recipe; what differs by method (the
losses, the paper's peak LR) is printed at the start.  Progress = spent / budget, read once a step; the learning rate
is a function of progress alone.  The clock counts fetching and masking the batch, the teacher's forward pass, the
student's forward and backward pass and the optimizer; it does not count start-up, warm-up of compilation,
validation, saving, or the pretraining of the teacher.

A run directory (--out) gets config.json, log.jsonl, summary.json and model/, a Hugging Face BERT directory.

Source of the recipe: Bui 2024 (arXiv 2404.19319), section 3 and appendix.
"""
import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
from cli import UserError, run
from data import Blocks, TokenDirectory, hashed
from kd_losses import AS_RELEASED, STRATEGIES, Context, loss_terms, projections, relation_head_count
from model import BertConfig, BertForMaskedLM


@dataclass
class Config:
    strategy: str = "no_kd"             # one of kd_losses.STRATEGIES
    budget_hours: float | None = None   # the budget, in hours on the clock described above
    budget_flops: float | None = None   # or in matmul FLOPs of student and teacher, the same on every machine
    budget_tokens: int | None = None    # or in tokens
    budget_steps: int | None = None     # or in optimizer steps
    data: str = "data/wiki"             # token directory, made by prepare.py
    teacher: str = "bert-base-uncased"  # model directory or Hub id; not read by no_kd unless --init teacher
    teacher_layer: int | None = None    # whose q, k, v count, from 0 or -1; default: the last; minilmv2: 21st of 24
    relation_heads: int | None = None   # of minilmv2; default: as many as give the teacher's a size of 16
    as_released: bool = False           # FOR SCIENCE ONLY: what the paper's released code computes for this strategy
    size: str = "6L768"                 # student: layers L width
    heads: int | None = None            # attention heads; default: width / 64
    out: str | None = None              # run directory; default: runs/STRATEGY
    init: str | None = None             # random, or teacher (layers 1, 3, ...); default: random; distilbert: teacher
    seed: int = 0                       # initial weights, data order, masks, dropout
    seq_len: int = 128                  # S, positions in a block
    batch_size: int = 1024              # blocks per optimizer step
    micro_batch: int = 256              # blocks per forward pass
    peak_lr: float | None = None        # default: the paper's, 1e-3 for no_kd and 5e-4 for KD
    warmup: float = 0.06                # part of the budget over which the learning rate rises
    weight_decay: float = 0.01          # not on biases and LayerNorm
    dropout: float = 0.1                # hidden states and attention probabilities
    clip: float = 0.0                   # gradient norm above which gradients are scaled down; 0: off, as the paper
    tau: float | None = None            # temperature of the soft targets; default: 1, distilbert: 2
    val_blocks: int = 512               # validation blocks
    val_times: int = 4                  # validations over the budget, the last at its end
    log_every: int = 10                 # steps per line of log.jsonl
    device: str | None = None           # default: cuda where there is one, else cpu
    compile: bool | None = None         # torch.compile; default: on CUDA only
    bf16: bool | None = None            # bf16 autocast; default: where the hardware multiplies in bf16

    def check(self):
        if self.strategy not in STRATEGIES:
            raise UserError(f"--strategy {self.strategy}: unknown; one of {', '.join(STRATEGIES)}")
        if self.as_released and self.strategy not in AS_RELEASED:
            raise UserError(f"--as-released: no other code was released for {self.strategy}; it was for "
                            f"{', '.join(AS_RELEASED)}")
        budgets = [(f"--budget-{unit}", getattr(self, f"budget_{unit}")) for unit in Budget.UNITS]
        given = [(flag, value) for flag, value in budgets if value is not None]
        if len(given) != 1:
            raise UserError(f"give exactly one budget: {' or '.join(flag for flag, _ in budgets)}"
                            + (f" (not {' and '.join(flag for flag, _ in given)})" if given else ""))
        if not 0 < given[0][1] < math.inf:
            raise UserError(f"{given[0][0]} {given[0][1]}: a budget is a positive number")
        if self.init not in (None, "random", "teacher"):
            raise UserError(f"--init {self.init}: random or teacher")
        for name in ("seq_len", "batch_size", "micro_batch", "val_blocks", "val_times", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        if self.batch_size % self.micro_batch:
            raise UserError(f"--batch-size {self.batch_size} is not a multiple of --micro-batch {self.micro_batch}")

    @property
    def kind(self):
        """The Strategy, with the run's own temperature, initialisation and layer."""
        strategy = (AS_RELEASED if self.as_released else STRATEGIES)[self.strategy]
        return strategy._replace(tau=self.tau or strategy.tau, init=self.init or strategy.init)

    @property
    def label(self):
        return self.strategy + (" AS RELEASED (for science only)" if self.as_released else "")


# ------------------------------------------------------------------------------------------- budget and schedule

class Budget:
    """What a run may spend: hours on a clock that can be paused, or steps at a price each (in FLOPs, tokens, steps).
    `now` is injected by tests."""
    UNITS = ("hours", "flops", "tokens", "steps")

    def __init__(self, total, unit, price=1, now=time.monotonic):
        self.total, self.unit, self.price, self.now = total, unit, price, now
        self.steps, self.started, self.paused = 0, None, 0.0

    def start(self):
        self.started = self.now()

    @contextlib.contextmanager
    def pause(self):
        """Not charged: validation, saving."""
        began = self.now()
        yield
        self.paused += self.now() - began

    @property
    def seconds(self):
        """Charged seconds so far."""
        return self.now() - self.started - self.paused

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
    """Seconds per stage (data, teacher, student, optimizer).  On CUDA by events, which are read once a step."""

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
        """Adds the finished stages up; call it where the device has been synchronised."""
        for (_, began), (stage, ended) in zip(self.marks, self.marks[1:], strict=False):
            if stage:
                took = began.elapsed_time(ended) / 1000 if self.cuda else ended - began
                self.seconds[stage] = self.seconds.get(stage, 0.0) + took
        self.marks = self.marks[-1:]


# ----------------------------------------------------------------------------------------------------------- arm

class Arm:
    """One strategy's student, teacher, projections and optimizer, and one micro-batch of work on them."""

    def __init__(self, config, student, teacher=None):
        self.config, self.strategy, self.student, self.teacher = config, config.kind, student, teacher
        self.device = next(student.parameters()).device
        self.bf16 = multiplies_in_bf16(self.device) if config.bf16 is None else config.bf16
        self.peak_lr = config.peak_lr if config.peak_lr is not None else self.strategy.peak_lr
        student_c, teacher_c = student.config, teacher.config if teacher else student.config
        self.teacher_layers = self.strategy.layers
        self.relation_heads = config.relation_heads or relation_head_count(student_c.hidden_size, teacher_c.hidden_size)
        if self.strategy.as_released:
            self.relation_heads = student_c.num_attention_heads
        layer = config.teacher_layer
        if layer is None and config.strategy == "minilmv2" and teacher_c.num_hidden_layers == 24:
            layer = 20                                                  # the 21st (arXiv 2012.15828, section 4)
        if layer is not None:
            self.teacher_layers = (layer, *self.strategy.layers[1:])
        self.proj = projections(self.strategy, student_c.hidden_size, teacher_c.hidden_size).to(self.device)

        if teacher:
            # bf16 weights, not autocast: the teacher is never updated, so there is no need to cast at each step.
            # The released code leaves the teacher's dropout on.
            teacher.to(torch.bfloat16 if self.bf16 else None).train(self.strategy.as_released).requires_grad_(False)
        compiled = config.compile if config.compile is not None else self.device.type == "cuda"
        prepare = (lambda f: torch.compile(f, fullgraph=True, dynamic=False)) if compiled else (lambda f: f)
        self.run_student, self.run_teacher = prepare(student), prepare(teacher) if teacher else None
        self.loss_terms = prepare(loss_terms)

    def make_optimizer(self):
        self.freeze_unreached()
        trained = [p for m in (self.student, self.proj) for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [{"params": [p for p in trained if p.ndim > 1], "weight_decay": self.config.weight_decay},
             {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}],   # biases and LayerNorm
            lr=self.peak_lr, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def to_device(self, batch):
        def tensor(a):
            t = torch.from_numpy(a)
            return t.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else t
        return tensor(batch.ids), tensor(batch.masked), tensor(batch.labels).flatten()

    def forward(self, ids, masked, labels, stages=None):
        """(total, {term: value}) of one micro-batch: what the strategy asks of both sides, and no more."""
        t, strategy = {}, self.strategy
        if self.teacher and strategy.needs("teacher"):
            with torch.no_grad():
                t = self.run_teacher(ids, masked, want=strategy.needs("teacher"), qkv_layers=self.teacher_layers)
            if stages:
                stages.mark("teacher")
        with autocast(self.device, self.bf16):
            s = self.run_student(ids, masked, want=strategy.needs("student"), qkv_layers=strategy.layers)
            context = Context(labels, strategy.tau, self.relation_heads, self.proj)
            return self.loss_terms(strategy, s, t, context)

    def dummy(self):
        """(ids, masked, labels) of a micro-batch's shape."""
        B, S = self.config.micro_batch, self.config.seq_len
        k = round(0.15 * S)
        return (torch.zeros(B, S, dtype=torch.long, device=self.device),
                torch.arange(k, device=self.device).expand(B, k).contiguous(),
                torch.zeros(B * k, dtype=torch.long, device=self.device))

    def freeze_unreached(self):
        """One forward and backward pass on dummy data: compiles, and freezes what the loss does not reach (MiniLM
        leaves the last output projection and feed-forward without a gradient, TinyBERT the LM head)."""
        total, _ = self.forward(*self.dummy())
        total.backward()
        for p in self.student.parameters():
            p.requires_grad_(p.grad is not None)
            p.grad = None
        self.proj.zero_grad()

    @torch.no_grad()
    def validate(self, blocks, model=None):
        """Means over the validation blocks: the strategy's terms, or the MLM loss of another `model`."""
        size = min(self.config.micro_batch, blocks.count, self.config.val_blocks)
        means, teacher_was = {}, self.teacher and self.teacher.training
        self.student.eval()
        if self.teacher:
            self.teacher.eval()
        for i in range(min(self.config.val_blocks, blocks.count) // size):
            ids, masked, labels = self.to_device(blocks.batch(i, size))
            if model is None:
                _, terms = self.forward(ids, masked, labels)
            else:
                logits = model(ids, masked, want=("logits",))["logits"]
                terms = {"mlm": torch.nn.functional.cross_entropy(logits.float(), labels)}
            for name, value in terms.items():
                means.setdefault(name, []).append(value.item())
        self.student.train()
        if self.teacher:
            self.teacher.train(teacher_was)
        return {name: float(np.mean(values)) for name, values in means.items()}


def autocast(device, bf16):
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def student_shape(config, directory):
    try:
        return BertConfig.of_size(
            config.size, config.heads, vocab_size=len(directory.vocab), pad_token_id=directory.special["[PAD]"],
            hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout,
            max_position_embeddings=max(512, config.seq_len))
    except ValueError as e:
        raise UserError(f"--size: {e}") from None


def initial_student(config, directory):
    """The student before its first step: the same random weights in every arm of a seed, LM head included."""
    shape = student_shape(config, directory)
    torch.manual_seed(config.seed)
    return BertForMaskedLM(shape)


def make_arm(config, directory):
    """The arm on its device, from the configuration, the data's vocabulary and the teacher's files."""
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    student, strategy, teacher = initial_student(config, directory), config.kind, None
    if strategy.needs("teacher") or strategy.init == "teacher":
        path = checkpoint.find_model(config.teacher)
        checkpoint.same_vocabulary(directory.read_tokenizer(), path)
        teacher, missing, ignored = checkpoint.load_mlm(path, len(directory.vocab))
        check_teacher(config, student.config, teacher.config, head=not missing)
        if strategy.init == "teacher":
            start_from(student, teacher)
        teacher = teacher.to(device) if strategy.needs("teacher") else None
    arm = Arm(config, student.to(device), teacher)
    arm.teacher_has_head = teacher is not None and not missing
    arm.teacher_ignored = ignored if teacher is not None else []
    arm.make_optimizer()
    return arm


def check_teacher(config, student, teacher, head):
    """Refuses a teacher that the strategy cannot use, saying which strategy can."""
    strategy, name = config.kind, f"--teacher {config.teacher}"
    if not head and ("logits" in strategy.needs("teacher") or strategy.init == "teacher"):
        able = [n for n, s in STRATEGIES.items() if s.needs("teacher") and "logits" not in s.needs("teacher")]
        raise UserError(f"{name} has no LM head, which {config.label} needs; these do without: {', '.join(able)}")
    if strategy.same_heads and student.num_attention_heads != teacher.num_attention_heads:
        raise UserError(f"{config.label} compares attention head by head, but the student has "
                        f"{student.num_attention_heads} heads and the teacher {teacher.num_attention_heads}: give "
                        f"--heads {teacher.num_attention_heads}, or take --strategy minilmv2")
    if (strategy.same_width or strategy.init == "teacher") and student.hidden_size != teacher.hidden_size:
        raise UserError(f"{config.label}{' --init teacher' if not strategy.same_width else ''} needs a student as wide "
                        f"as its teacher: {student.hidden_size} and {teacher.hidden_size}; give --size "
                        f"{student.num_hidden_layers}L{teacher.hidden_size}")
    if strategy.init == "teacher" and (student.num_hidden_layers > teacher.num_hidden_layers
                                       or student.intermediate_size != teacher.intermediate_size
                                       or student.num_attention_heads != teacher.num_attention_heads
                                       or student.hidden_act != teacher.hidden_act):
        raise UserError(f"--init teacher: the student ({student.size}) must be the teacher ({teacher.size}) with fewer "
                        f"layers: give --heads {teacher.num_attention_heads} and a depth of at most "
                        f"{teacher.num_hidden_layers}")
    layers = teacher.num_hidden_layers
    if config.teacher_layer is not None and not -layers <= config.teacher_layer < layers:
        raise UserError(f"--teacher-layer {config.teacher_layer}: the teacher has {layers} layers")
    if config.relation_heads and (student.hidden_size % config.relation_heads
                                  or teacher.hidden_size % config.relation_heads):
        raise UserError(f"--relation-heads {config.relation_heads} does not divide the widths {student.hidden_size} "
                        f"and {teacher.hidden_size}")
    if teacher.max_position_embeddings < config.seq_len:
        raise UserError(f"--seq-len {config.seq_len}: the teacher has {teacher.max_position_embeddings} positions only")


def start_from(student, teacher):
    """Copies embeddings, LM head and every so-many-th layer of the teacher: 0, 2, 4, ... for half its depth."""
    every = teacher.config.num_hidden_layers / student.config.num_hidden_layers
    weights, prefix = teacher.state_dict(), "bert.encoder.layer."
    for name, p in student.state_dict().items():
        if name.startswith(prefix):
            layer, rest = name.removeprefix(prefix).split(".", 1)
            name = f"{prefix}{int(int(layer) * every)}.{rest}"
        rows = min(len(p), len(weights[name]))                          # position embeddings may differ in number
        p[:rows].copy_(weights[name][:rows])


def flops_per_block(config, student, teacher=None):
    """(of the student, of the teacher): the matmul FLOPs that one block costs in training, from two BertConfigs.

    torch's own counter over the real step on the meta device (1 multiply-add = 2 FLOP), losses included.  It is what
    --budget-flops spends, the same on every machine."""
    with torch.device("meta"):
        arm = Arm(dataclasses.replace(config, micro_batch=1, bf16=False, compile=False), BertForMaskedLM(student),
                  BertForMaskedLM(teacher) if teacher and config.kind.needs("teacher") else None)
        of_teacher, of_step = FlopCounterMode(display=False), FlopCounterMode(display=False)
        ids, masked, labels = arm.dummy()
        if arm.teacher:
            with of_teacher:
                arm.teacher(ids, masked, want=arm.strategy.needs("teacher"), qkv_layers=arm.teacher_layers)
        with of_step:
            total, _ = arm.forward(ids, masked, labels)
            total.backward()
    teacher_flops = of_teacher.get_total_flops()
    return of_step.get_total_flops() - teacher_flops, teacher_flops


def multiplies_in_bf16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)


# ---------------------------------------------------------------------------------------------------------- loop

def train(config, now=time.monotonic, say=print):
    """Runs one strategy to the end of its budget; returns the summary that is also written to the run directory."""
    config.check()
    out = Path(config.out or f"runs/{config.strategy}")
    finished = already(config, out)
    if finished:
        say(f"{out} is finished: nothing to do")
        return finished
    directory = TokenDirectory(config.data)
    arm = make_arm(config, directory)
    directory.verify()
    train_blocks = Blocks(directory, "train", config.seq_len, config.seed)
    val_blocks = Blocks(directory, "val", config.seq_len, seed=0)       # the same for every run
    flops = [config.batch_size * f for f in flops_per_block(
        config, arm.student.config, arm.teacher.config if arm.teacher else None)]
    step_tokens = config.batch_size * config.seq_len
    unit = next(unit for unit in Budget.UNITS if getattr(config, f"budget_{unit}") is not None)
    price = dict(flops=sum(flops), tokens=step_tokens).get(unit, 1)
    budget = Budget(getattr(config, f"budget_{unit}"), unit, price, now)
    stages = Stages(arm.device)
    validate_at = [(i + 1) / config.val_times for i in range(config.val_times)]

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    log = (out / "log.jsonl").open("w")
    teacher_mlm = None
    if arm.teacher and arm.teacher_has_head:
        teacher_mlm = arm.validate(val_blocks, arm.run_teacher)["mlm"]
    describe(arm, arm.validate(val_blocks), teacher_mlm, say)

    micro, accumulate = config.micro_batch, config.batch_size // config.micro_batch
    said = -math.inf
    budget.start()
    stages.mark(None)
    while budget.progress < 1 or not budget.steps:
        batch = train_blocks.batch(budget.steps, config.batch_size)
        sums = 0
        for j in range(accumulate):
            ids, masked, labels = arm.to_device(type(batch)(*(a[j * micro:(j + 1) * micro] for a in batch)))
            torch.manual_seed(int(hashed(config.seed, budget.steps, j) >> np.uint64(1)))    # dropout
            stages.mark("data")
            total, terms = arm.forward(ids, masked, labels, stages)
            (total / accumulate).backward()
            sums = sums + torch.stack([total.detach(), *(v.detach() for v in terms.values())])
            stages.mark("student")
        loss, *values = (sums / accumulate).tolist()        # the step's one wait for the device
        stages.read()
        progress = budget.progress
        if not math.isfinite(loss):
            bad = [name for name, value in zip(terms, values, strict=True) if not math.isfinite(value)] or ["total"]
            raise UserError(f"step {budget.steps}: {' and '.join(bad)} is not finite: stopped before the update; try "
                            f"a smaller --peak-lr, --clip 1 or --no-bf16")
        lr = learning_rate(progress, arm.peak_lr, config.warmup)
        update(arm, lr, config.clip)
        stages.mark("optimizer")
        budget.steps += 1

        with budget.pause():
            terms = dict(zip(terms, values, strict=True))
            record = dict(step=budget.steps, progress=progress, seconds=budget.seconds, lr=lr, loss=loss, **terms)
            if budget.steps % config.log_every == 0:
                log.write(json.dumps(record) + "\n")
            if time.monotonic() - said > 2:
                said = time.monotonic()
                say(status(record, terms, budget, config))
            if progress >= validate_at[0] and len(validate_at) > 1:
                validate_at.pop(0)
                log.write(json.dumps(dict(record, val=arm.validate(val_blocks))) + "\n")
        stages.mark(None)

    if arm.device.type == "cuda":
        torch.cuda.synchronize()
    charged = budget.seconds
    stages.read()
    val = arm.validate(val_blocks)
    log.write(json.dumps(dict(record, val=val)) + "\n")
    log.close()
    tokens = budget.steps * step_tokens
    summary = dict(
        strategy=config.strategy, label=config.label, as_released=config.as_released, init=arm.strategy.init,
        size=config.size, peak_lr=arm.peak_lr, seed=config.seed, steps=budget.steps, tokens=tokens,
        student_flops=budget.steps * flops[0], teacher_flops=budget.steps * flops[1],
        epochs=budget.steps * config.batch_size / train_blocks.count, charged_seconds=charged,
        tokens_per_second=tokens / charged,
        stage_seconds=stages.seconds, teacher_share=stages.seconds.get("teacher", 0.0) / charged,
        val=val, teacher_mlm=teacher_mlm, device=str(arm.device), bf16=arm.bf16, torch=torch.__version__)
    checkpoint.save_model(out / "model", arm.student, directory.read_tokenizer(), arm.strategy.trains_lm_head,
                          model_card(config, summary))
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    say(f"finished after {budget.steps:,} steps, {tokens:,} tokens, {charged:.1f} s charged ({out})")
    for name, value in val.items():
        say(f"val_{name}: {value:.4f}")
    return summary


def model_card(config, summary):
    """The README.md of the model directory: what was trained, on what, for how long, by which command."""
    given = " ".join(f"--{f.name.replace('_', '-')} {getattr(config, f.name)}" if f.type not in ("bool", bool) else
                     f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(config)
                     if getattr(config, f.name) != f.default)
    teacher = f" from the teacher `{config.teacher}`" if config.kind.needs("teacher") else ""
    val = ", ".join(f"{name} {value:.4f}" for name, value in summary["val"].items())
    return (f"---\nlibrary_name: transformers\ntags: [bert, nanokd]\n---\n\n"
            f"A BERT of {config.size} trained by nanoKD with the strategy `{summary['label']}`{teacher}: "
            f"{summary['tokens']:,} tokens of `{config.data}` in {summary['charged_seconds']:,.0f} charged seconds "
            f"({summary['student_flops'] + summary['teacher_flops']:.3g} FLOP) on {summary['device']}.\n\n"
            f"Validation: {val}.\n\n    python train.py {given}\n")


def update(arm, lr, clip):
    if clip:
        trained = [p for group in arm.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, clip)
    for group in arm.optimizer.param_groups:
        group["lr"] = lr
    arm.optimizer.step()
    arm.optimizer.zero_grad(set_to_none=True)


def already(config, out):
    """The summary of a finished run of this very configuration; another one in its place is refused."""
    if not (out / "summary.json").exists():
        return None
    before, now = json.loads((out / "config.json").read_text()), dataclasses.asdict(config)
    differ = [f"{k} ({before.get(k)} there, {v} here)" for k, v in now.items() if before.get(k) != v and k != "out"]
    if differ:
        raise UserError(f"{out} holds a finished run of another configuration: {', '.join(differ)}: give another --out")
    return json.loads((out / "summary.json").read_text())


def describe(arm, val, teacher_mlm, say):
    config, c, strategy = arm.config, arm.student.config, arm.strategy
    trained = sum(p.numel() for p in arm.student.parameters() if p.requires_grad)
    say(f"{config.label}: student {c.size}, {c.num_attention_heads} heads, V {c.vocab_size:,}, "
        f"{trained / 1e6:.1f}M parameters trained, from {strategy.init} weights; "
        f"peak LR {arm.peak_lr:g}; {config.batch_size} x {config.seq_len} tokens a step; {arm.device}, "
        f"{'bf16' if arm.bf16 else 'fp32'}")
    if arm.teacher:
        quality = f"validation MLM loss {teacher_mlm:.4f}" if teacher_mlm is not None else "no LM head"
        layers = [layer % arm.teacher.config.num_hidden_layers + 1 for layer in arm.teacher_layers]
        say(f"teacher {config.teacher}: {arm.teacher.config.size}, {quality}"
            + (f"; q, k, v of its layer {' and '.join(map(str, layers))}" if "qkv" in strategy.needs("teacher") else "")
            + (f"; {arm.relation_heads} relation heads" if "qq" in strategy.terms else "")
            + ("; its dropout is on" if arm.teacher.training else "")
            + (f"; tau {strategy.tau:g}" if "logits" in strategy.needs("teacher") else "")
            + (f"; ignored: {', '.join(arm.teacher_ignored)}" if arm.teacher_ignored else ""))
    for name, term in strategy.terms.items():
        say(f"  {term.weight:g} x {name:8} {val[name]:9.4f} at step 0   {term.about}")


def status(record, terms, budget, config):
    rate = record["step"] * config.batch_size * config.seq_len / max(record["seconds"], 1e-9)
    left = record["seconds"] * (1 / max(record["progress"], 1e-9) - 1)
    parts = " ".join(f"{name} {value:.4f}" for name, value in terms.items())
    return (f"step {record['step']:6} {record['progress']:6.1%} lr {record['lr']:.2e} {parts} "
            f"{rate:,.0f} tok/s {left:.0f} s left")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    run(lambda config: train(config), Config, __doc__)
