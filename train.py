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

import checkpoint
from cli import UserError, run
from data import Blocks, TokenDirectory, hashed
from kd_losses import STRATEGIES, Context, loss_terms, projections
from model import BertConfig, BertForMaskedLM


@dataclass
class Config:
    strategy: str = "no_kd"             # one of kd_losses.STRATEGIES
    budget_hours: float | None = None   # the budget, in hours on the clock described above
    budget_steps: int | None = None     # or the budget in optimizer steps
    data: str = "data/wiki"             # token directory, made by prepare.py
    teacher: str = "bert-base-uncased"  # model directory or Hub id; not read by no_kd
    size: str = "6L768"                 # student: layers L width
    heads: int | None = None            # attention heads; default: width / 64
    out: str | None = None              # run directory; default: runs/STRATEGY
    seed: int = 0                       # initial weights, data order, masks, dropout
    seq_len: int = 128                  # S, positions in a block
    batch_size: int = 1024              # blocks per optimizer step
    micro_batch: int = 256              # blocks per forward pass
    peak_lr: float | None = None        # default: the paper's, 1e-3 for no_kd and 5e-4 for KD
    warmup: float = 0.06                # part of the budget over which the learning rate rises
    weight_decay: float = 0.01          # not on biases and LayerNorm
    dropout: float = 0.1                # hidden states and attention probabilities
    clip: float = 0.0                   # gradient norm above which gradients are scaled down; 0: off, as the paper
    tau: float = 1.0                    # temperature of the soft targets
    val_blocks: int = 512               # validation blocks
    val_times: int = 4                  # validations over the budget, the last at its end
    log_every: int = 10                 # steps per line of log.jsonl
    device: str | None = None           # default: cuda where there is one, else cpu
    compile: bool | None = None         # torch.compile; default: on CUDA only
    bf16: bool | None = None            # bf16 autocast; default: where the hardware multiplies in bf16

    def check(self):
        if self.strategy not in STRATEGIES:
            raise UserError(f"--strategy {self.strategy}: unknown; one of {', '.join(STRATEGIES)}")
        budgets = [(f"--budget-{unit}", getattr(self, f"budget_{unit}")) for unit in ("hours", "steps")]
        given = [(flag, value) for flag, value in budgets if value is not None]
        if len(given) != 1:
            raise UserError(f"give exactly one budget: {' or '.join(flag for flag, _ in budgets)}"
                            + (f" (not {' and '.join(flag for flag, _ in given)})" if given else ""))
        if not 0 < given[0][1] < math.inf:
            raise UserError(f"{given[0][0]} {given[0][1]}: a budget is a positive number")
        for name in ("seq_len", "batch_size", "micro_batch", "val_blocks", "val_times", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        if self.batch_size % self.micro_batch:
            raise UserError(f"--batch-size {self.batch_size} is not a multiple of --micro-batch {self.micro_batch}")


# ------------------------------------------------------------------------------------------- budget and schedule

class Budget:
    """What a run may spend, in seconds on a clock that can be paused, or in steps.  `now` is injected by tests."""

    def __init__(self, hours=None, steps=None, now=time.monotonic):
        self.total_seconds = None if hours is None else hours * 3600
        self.total_steps, self.now = steps, now
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
        spent = self.seconds / self.total_seconds if self.total_seconds else self.steps / self.total_steps
        return min(1.0, spent)


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

    def __init__(self, config, directory, teacher_path=None):
        self.config, self.strategy = config, STRATEGIES[config.strategy]
        self.device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.bf16 = multiplies_in_bf16(self.device) if config.bf16 is None else config.bf16
        self.student, self.teacher = initial_student(config, directory), None
        shape = self.student.config
        if self.strategy.teacher_needs:
            self.teacher = self.load_teacher(shape, directory, teacher_path)
        width_t = self.teacher.config.hidden_size if self.teacher else shape.hidden_size
        self.proj = projections(self.strategy, shape.hidden_size, width_t)

        self.student.to(self.device)
        self.proj.to(self.device)
        compiled = config.compile if config.compile is not None else self.device.type == "cuda"
        prepare = (lambda f: torch.compile(f, fullgraph=True, dynamic=False)) if compiled else (lambda f: f)
        self.run_student, self.run_teacher = prepare(self.student), prepare(self.teacher) if self.teacher else None
        self.loss_terms = prepare(loss_terms)

        self.peak_lr = config.peak_lr if config.peak_lr is not None else self.strategy.peak_lr
        self.freeze_unreached()
        trained = [p for m in (self.student, self.proj) for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [{"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
             {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}],   # biases and LayerNorm
            lr=self.peak_lr, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def load_teacher(self, shape, directory, path):
        config, needs = self.config, self.strategy.teacher_needs
        path = checkpoint.find_model(config.teacher) if path is None else path
        checkpoint.same_vocabulary(directory.read_tokenizer(), path)
        teacher, head = checkpoint.load_mlm(path)
        if "logits" in needs and not head:
            able = [name for name, s in STRATEGIES.items() if s.teacher_needs and "logits" not in s.teacher_needs]
            raise UserError(f"--teacher {config.teacher} has no LM head, which {config.strategy} needs; "
                            f"these do without: {', '.join(able)}")
        heads_s, heads_t = shape.num_attention_heads, teacher.config.num_attention_heads
        if self.strategy.same_heads and heads_s != heads_t:
            raise UserError(f"{config.strategy} compares attention head by head, but the student has {heads_s} heads "
                            f"and the teacher {heads_t}: give --heads {heads_t}")
        if teacher.config.max_position_embeddings < config.seq_len:
            raise UserError(f"--seq-len {config.seq_len}: the teacher has only "
                            f"{teacher.config.max_position_embeddings} positions")
        self.teacher_has_head = head
        # bf16 weights, not autocast: the teacher is never updated, so there is no need to cast at each step
        return teacher.to(self.device, torch.bfloat16 if self.bf16 else None).eval().requires_grad_(False)

    def to_device(self, batch):
        def tensor(a):
            t = torch.from_numpy(a)
            return t.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else t
        return tensor(batch.ids), tensor(batch.masked), tensor(batch.labels).flatten()

    def forward(self, ids, masked, labels, stages=None):
        """(total, {term: value}) of one micro-batch: what the strategy asks of both sides, and no more."""
        t = {}
        if self.teacher:
            with torch.no_grad():
                t = self.run_teacher(ids, masked, want=self.strategy.teacher_needs)
            if stages:
                stages.mark("teacher")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            s = self.run_student(ids, masked, want=self.strategy.student_needs)
            return self.loss_terms(self.strategy, s, t, Context(labels, self.config.tau, self.proj))

    def freeze_unreached(self):
        """One forward and backward pass on dummy data: compiles, and freezes what the loss does not reach (MiniLM
        leaves the last output projection and feed-forward, and every LM head but its own, without a gradient)."""
        shape = (self.config.micro_batch, self.config.seq_len)
        k = round(0.15 * self.config.seq_len)
        masked = torch.arange(k, device=self.device).expand(shape[0], k).contiguous()
        total, _ = self.forward(torch.zeros(shape, dtype=torch.long, device=self.device), masked,
                                torch.zeros(shape[0] * k, dtype=torch.long, device=self.device))
        total.backward()
        for p in self.student.parameters():
            p.requires_grad_(p.grad is not None)
            p.grad = None
        self.proj.zero_grad()

    @torch.no_grad()
    def validate(self, blocks, model=None):
        """Means over the validation blocks: the strategy's terms, or the MLM loss of another `model`."""
        size = min(self.config.micro_batch, blocks.count, self.config.val_blocks)
        means = {}
        self.student.eval()
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
        return {name: float(np.mean(values)) for name, values in means.items()}


def initial_student(config, directory):
    """The student before its first step: the same weights in every arm of a seed, LM head included."""
    try:
        shape = BertConfig.of_size(
            config.size, config.heads, vocab_size=len(directory.vocab), pad_token_id=directory.special["[PAD]"],
            hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout,
            max_position_embeddings=max(512, config.seq_len))
    except ValueError as e:
        raise UserError(f"--size: {e}") from None
    torch.manual_seed(config.seed)
    return BertForMaskedLM(shape)


def multiplies_in_bf16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)


# ---------------------------------------------------------------------------------------------------------- loop

def train(config, teacher_path=None, now=time.monotonic, say=print):
    """Runs one strategy to the end of its budget; returns the summary that is also written to the run directory."""
    config.check()
    out = Path(config.out or f"runs/{config.strategy}")
    finished = already(config, out)
    if finished:
        say(f"{out} is finished: nothing to do")
        return finished
    directory = TokenDirectory(config.data)
    directory.verify()
    arm = Arm(config, directory)
    train_blocks = Blocks(directory, "train", config.seq_len, config.seed)
    val_blocks = Blocks(directory, "val", config.seq_len, seed=0)       # the same for every run
    budget, stages = Budget(config.budget_hours, config.budget_steps, now), Stages(arm.device)
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
    while budget.progress < 1:
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
        progress = budget.progress
        if not math.isfinite(loss):
            bad = [name for name, value in zip(terms, values, strict=True) if not math.isfinite(value)] or ["total"]
            raise UserError(f"step {budget.steps}: {' and '.join(bad)} is not finite: stopped before the update; try "
                            f"a smaller --peak-lr, --clip 1 or --no-bf16")
        lr = learning_rate(progress, arm.peak_lr, config.warmup)
        update(arm, lr, config.clip)
        stages.mark("optimizer")
        stages.read()
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

    charged = budget.seconds
    val = arm.validate(val_blocks)
    log.write(json.dumps(dict(record, val=val)) + "\n")
    log.close()
    head = "logits" in arm.strategy.student_needs
    checkpoint.save_model(out / "model", arm.student, directory.read_tokenizer(), head)
    tokens = budget.steps * config.batch_size * config.seq_len
    summary = dict(
        strategy=config.strategy, size=config.size, peak_lr=arm.peak_lr, seed=config.seed, steps=budget.steps,
        tokens=tokens, epochs=budget.steps * config.batch_size / train_blocks.count, charged_seconds=charged,
        last_step_seconds=charged / budget.steps, tokens_per_second=tokens / charged,
        stage_seconds=stages.seconds, teacher_share=stages.seconds.get("teacher", 0.0) / charged,
        val=val, teacher_mlm=teacher_mlm, device=str(arm.device), bf16=arm.bf16, torch=torch.__version__)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    say(f"finished after {budget.steps:,} steps, {tokens:,} tokens, {charged:.1f} s charged ({out})")
    for name, value in val.items():
        say(f"val_{name}: {value:.4f}")
    return summary


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
    config, c = arm.config, arm.student.config
    trained = sum(p.numel() for p in arm.student.parameters() if p.requires_grad)
    say(f"{config.strategy}: student {c.size}, {c.num_attention_heads} heads, V {c.vocab_size:,}, "
        f"{trained / 1e6:.1f}M parameters trained; peak LR {arm.peak_lr:g}; {config.batch_size} x {config.seq_len} "
        f"tokens a step; {arm.device}, {'bf16' if arm.bf16 else 'fp32'}")
    if arm.teacher:
        quality = f"validation MLM loss {teacher_mlm:.4f}" if teacher_mlm is not None else "no LM head"
        say(f"teacher {config.teacher}: {arm.teacher.config.size}, {quality}")
    for name, term in arm.strategy.terms.items():
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
