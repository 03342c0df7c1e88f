"""One step of an arm: its student, teacher, projections and optimizer, and what a micro-batch asks of them.

Read it with train.py, whose loop calls it.  `make_arm` builds an Arm from a configuration, the data's
vocabulary and the teacher's files; `Arm.forward` is what a step costs: the teacher and the student leave
behind what the strategy asks for, and no more.  `flops_per_block` counts it.
"""
import contextlib
import copy
import dataclasses
import functools
import os
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from data import Batch, hashed
from model import BertConfig, BertForMaskedLM
from plumbing import checkpoint
from plumbing.artefact import CachedBatch, like_cached
from plumbing.budget import Stopped
from plumbing.cli import UserError, numbers
from plumbing.device import choose_device, multiplies_in_bf16, ready_process
from plumbing.diagnose import d_order, validation
from strategies import STRATEGIES, Context, loss_terms, projections, relation_head_count


class Ranks:
    """The processes of a torchrun, or this one alone.  All decide on sums that all see alike."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def join(self, device):
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    def leave(self):
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def sum(self, values):
        """The tensor's sum over ranks, as a list.  For a tensor on the device it waits for the device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values.tolist()


class WithProjections(torch.nn.Module):
    """Student and projections as one module, so that DistributedDataParallel sees all that is trained."""

    def __init__(self, student, proj):
        super().__init__()
        self.student, self.proj = student, proj

    def forward(self, *args, **named):
        return self.student(*args, **named)


def memory_told(main):
    """Decorator of a main(config, ...), which gets config.for_machine(), where --micro-batch is chosen if it
    is not given.  Too large a choice is halved, until a run begins; else a device without memory left is one
    line that names it."""
    @functools.wraps(main)
    def told(config, *args, **named):
        free, config = config.micro_batch is None and Ranks().size == 1, config.for_machine()
        while True:
            try:
                return main(config, *args, **named)
            except torch.OutOfMemoryError as e:
                micro, (first, *_) = config.micro_batch, str(e).split("\n")
            if not free or micro % 2 or getattr(config, "has_begun", False):
                raise UserError(f"--micro-batch {micro} does not fit into the device's memory: give a smaller "
                                f"one{'' if free else ', or none: the largest that fits is found'} ({first})")
            config = dataclasses.replace(config, micro_batch=micro // 2)
            torch.cuda.empty_cache()
    return told


def fitting_micro_batch(device, batch_size):
    """--micro-batch where none is given, the same for every arm: what the device's memory holds
    (docs/gpu.md), and a divisor of what each process does of a batch."""
    large = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= 80e9
    share = max(1, batch_size // Ranks().size)
    return next(m for m in range(min(1024 if large else 256, share), 0, -1) if share % m == 0)


class Arm:
    """One strategy's student, teacher, projections and optimizer, and one micro-batch of work on them; of
    several phases, one at a time: `enter`, then `make_optimizer`."""

    def __init__(self, config, student, teacher=None, has_head=True, ignored=(), start="random weights",
                 phase=0):
        """`teacher`: a BertForMaskedLM; `has_head`: whether its LM head was trained; `ignored`: its unused
        tensors; `start`: where the student's weights are from; `phase`: the one to enter."""
        self.config, self.phases, self.student, self.teacher, self.start = (
            config, config.phases, student, teacher, start)
        self.teacher_has_head, self.teacher_ignored = teacher is not None and has_head, ignored
        self.device, self.ranks = next(student.parameters()).device, Ranks()
        self.accumulate = config.batch_size // (config.micro_batch * self.ranks.size)   # micro-batches
        self.bf16 = multiplies_in_bf16(self.device, config.bf16)
        if teacher:
            # bf16 weights, not autocast: never updated, they need no cast at each step
            teacher.to(torch.bfloat16 if self.bf16 else None).requires_grad_(False)
        self.compiled = config.compile if config.compile is not None else self.device.type == "cuda"
        self.counted, self.warm_up_seconds = {}, 0.0
        self.enter(phase)

    def enter(self, phase):
        """Takes up one of the phases: its strategy, its projections, what may train in it."""
        config, student, teacher = self.config, self.student, self.teacher
        if phase:                                       # its projections, whatever was drawn before them
            torch.manual_seed(int(hashed(config.seed, phase) >> np.uint64(1)))
        self.number, self.phase = phase, self.phases[phase]
        student_c, teacher_c = student.config, teacher.config if teacher else student.config
        self.strategy = self.between(self.phase.strategy)
        self.strategies = [self.strategy]
        if config.kd_every > 1 and self.strategy.needs("teacher"):
            self.strategies.append(self.strategy.without_teacher)
        self.peak_lr = config.peak_lr if config.peak_lr is not None else self.strategy.peak_lr
        self.relation_heads = (config.relation_heads
                               or relation_head_count(student_c.hidden_size, teacher_c.hidden_size))
        if self.strategy.as_released:
            self.relation_heads = student_c.num_attention_heads
        self.proj = self.projections(self.strategy).to(self.device)

        student.train(self.strategy.dropout).requires_grad_(not self.strategy.train_layers)
        for layer in self.strategy.train_layers:
            student.bert.encoder["layer"][layer].requires_grad_()
        if teacher:
            teacher.train(self.strategy.as_released)    # the released code leaves the teacher's dropout on
        def prepare(f):
            return torch.compile(f, fullgraph=True, dynamic=False) if self.compiled and f else f
        self.run_student, self.run_teacher = prepare(student), prepare(teacher)
        self.loss_terms = prepare(loss_terms)

    def pass_on(self, phase):
        """Enters a later phase; whether with a new optimizer: not where S or the masks alone change."""
        if new := self.phases[phase].span != self.phase.span:
            self.enter(phase)
            self.make_optimizer()
        else:
            self.number, self.phase = phase, self.phases[phase]
            self.compile()
        return new

    def between(self, strategy):
        teacher = self.teacher or self.student
        return strategy.between(self.student.config.num_hidden_layers, teacher.config.num_hidden_layers,
                                self.config.teacher_layer)

    def projections(self, strategy):
        sides = self.student, self.teacher or self.student
        return projections(strategy, *(side.config.hidden_size for side in sides))

    def make_optimizer(self):
        """Freezes what the loss does not reach; makes the optimizer and, under torchrun, the DDP wrapper."""
        began = time.monotonic()
        with self.tf32():
            self.freeze_unreached()
        trained = self.trained = [
            p for m in (self.student, self.proj) for p in m.parameters() if p.requires_grad]
        if self.ranks.size > 1:
            self.run_student = self.wrapper = DistributedDataParallel(
                WithProjections(self.student, self.proj),
                find_unused_parameters=self.config.kd_every > 1 and len(self.proj) > 0)
            if self.compiled:
                self.run_student = torch.compile(self.wrapper, dynamic=False)
            with self.tf32():
                self.forward(*self.dummy())[0].backward()               # first use connects the ranks
            for p in trained:
                p.grad = None
        self.warm_up_seconds += time.monotonic() - began
        self.muon = self.make_muon()
        matrices = {p for group in (self.muon.param_groups if self.muon else ()) for p in group["params"]}
        others = [p for p in trained if p not in matrices]
        self.optimizer = torch.optim.AdamW(decay_groups(others, self.config.weight_decay), lr=self.peak_lr,
                                           betas=(0.9, 0.98), eps=1e-6, fused=True)
        self.optimizers = [self.optimizer, self.muon] if self.muon else [self.optimizer]

    def make_muon(self):
        """With --optimizer muon, Muon for all matrices but embeddings and projections; else None.  It takes
        AdamW's learning rate and decay: its updates are scaled to AdamW's RMS, by 0.2 sqrt(larger side) (Liu
        2025, arXiv 2502.16982, section 2.2)."""
        if self.config.optimizer != "muon":
            return None
        matrices = [p for name, p in self.student.named_parameters()
                    if p.requires_grad and p.ndim == 2 and "embeddings" not in name]
        return torch.optim.Muon(matrices, self.peak_lr, self.config.weight_decay,
                                adjust_lr_fn="match_rms_adamw")

    def synchronised(self, last):
        """Gradients travel between ranks in the last micro-batch of a step only."""
        return contextlib.nullcontext() if last or self.ranks.size == 1 else self.wrapper.no_sync()

    @contextlib.contextmanager
    def tf32(self):
        """Beside bf16 autocast on CUDA the losses' own products, in fp32, run in TF32.  For bf16 queries,
        keys and values that is exact forwards; it has to hold backwards too."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.bf16 and self.device.type == "cuda" else before)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def strategy_of(self, step):
        """The phase's strategy, without what needs the teacher in the steps between --kd-every."""
        return self.strategies[-1 if step % self.config.kd_every else 0]

    def flops(self, phase):
        """(of the student, of the teacher): what one block of the last length, or as many tokens, cost."""
        if phase not in self.counted:
            self.counted[phase] = flops_per_block(self.config, self.student.config,
                                                  self.teacher and self.teacher.config, phase)
        return self.counted[phase]

    def price(self, unit):
        """Of a step of this phase, in a budget's unit."""
        return (self.config.batch_size * sum(self.flops(self.number)) if unit == "flops" else
                self.config.batch_size * self.config.length if unit == "tokens" else 1)

    def micro_batches(self, batch, step):
        """(micro-batch on the device, whether it is this rank's last) of one optimizer step; dropout is
        reseeded for each, so that no generator's state has to survive a stop."""
        micro = self.config.micro_batch * self.phase.times
        for j in range(self.accumulate):
            at = (self.ranks.rank * self.accumulate + j) * micro
            on_device = self.to_device(type(batch)(*(a[at:at + micro] for a in batch)))
            torch.manual_seed(int(hashed(self.config.seed, step, j, self.ranks.rank) >> np.uint64(1)))
            yield on_device, j == self.accumulate - 1

    def update(self, lr, norm):
        if self.config.clip:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.config.clip, torch.tensor(norm))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def to_device(self, batch):
        ids, masked, *of_positions = (moved(torch.from_numpy(a), self.device) for a in batch)
        return type(batch)(ids, masked, *(a.flatten(0, 1) for a in of_positions))

    def teacher_forward(self, batch, strategy):
        """What the strategy compares of the teacher; {} where it has no need of one."""
        if isinstance(batch, CachedBatch):
            return {"samples": (batch.drawn, batch.shares)}
        if not (self.teacher and strategy.needs("teacher")):
            return {}
        with torch.no_grad():
            return self.run_teacher(batch.ids, batch.masked, want=strategy.want("teacher"))

    def student_forward(self, batch, strategy):
        with autocast(self.device, self.bf16):
            return self.run_student(batch.ids, batch.masked, want=strategy.want("student"),
                                    causal=strategy.causal)

    def loss(self, s, t, labels, strategy):
        """(total, {term: value}) of what the two sides left behind.  Outside autocast: a compiled function's
        backward pass keeps the autocast that it was called under."""
        return self.loss_terms(strategy, s, t, Context(
            labels, strategy.tau, self.relation_heads, self.proj, self.student.config.vocab_size))

    def forward(self, ids, masked, labels, *samples, strategy=None):
        """(total, {term: value}) of one micro-batch: what the strategy asks of both sides, and no more."""
        batch = (CachedBatch if samples else Batch)(ids, masked, labels, *samples)
        strategy = strategy or self.strategy
        t = self.teacher_forward(batch, strategy)
        return self.loss(self.student_forward(batch, strategy), t, labels, strategy)

    def dummy(self, blocks=None):
        """(ids, masked, labels) of a micro-batch's shape, or of so many blocks."""
        B, S = blocks or self.config.micro_batch * self.phase.times, self.phase.seq_len
        k = round(self.phase.mask_rate * S)
        return like_cached(self.config.teacher_cache, Batch(
            torch.zeros(B, S, dtype=torch.long, device=self.device),
            torch.arange(k, device=self.device).expand(B, k).contiguous(),
            torch.zeros(B * k, dtype=torch.long, device=self.device)))

    def freeze_unreached(self):
        """A forward and backward pass on dummy data: freezes what the loss does not reach (MiniLM leaves the
        last output projection and feed-forward without a gradient, TinyBERT the LM head)."""
        with torch.compiler.set_stance("force_eager"):  # compiled, all get a gradient, of zeros
            # a few blocks: an eager pass over a micro-batch takes more memory than the compiled step
            self.forward(*self.dummy(min(8, self.config.micro_batch)))[0].backward()
        for p in self.student.parameters():
            p.requires_grad_(p.grad is not None)
            p.grad = None
        self.proj.zero_grad()
        self.compile()

    def compile(self):
        """A forward and backward pass of each kind on dummy data: what is compiled is compiled, and a
        micro-batch too large for a GPU is known before the run begins."""
        if self.compiled or self.device.type == "cuda":
            for strategy in self.strategies:
                self.forward(*self.dummy(), strategy=strategy)[0].backward()
            for p in (*self.student.parameters(), *self.proj.parameters()):
                p.grad = None

    @torch.no_grad()
    def validate(self, blocks, signals=(), model=None, strategy=None):
        """Means over all the validation blocks asked for: the terms of the strategy, or of another one, or
        the MLM loss of another `model`."""
        blocks, count = copy.copy(blocks), min(self.config.val_blocks, blocks.count)
        blocks.causal = model is None and (strategy or self.strategy).causal
        size = min(self.config.micro_batch, count)
        means, teacher_was = {}, self.teacher and self.teacher.training
        if self.config.teacher_cache:                                   # which holds no validation blocks
            strategy = (strategy or self.strategy).without_teacher
        self.student.eval()
        if self.teacher:
            self.teacher.eval()
        for at in range(0, count, size):
            if signals:
                raise Stopped
            rows = min(size, count - at)                                # the last ones may be fewer
            ids, masked, labels = self.to_device(Batch(*(a[:rows] for a in blocks.batch(at // size, size))))
            # eager: compiled, evaluation would be a variant of its own, and the last rows one more
            with torch.compiler.set_stance("force_eager"), self.tf32():
                if model is None:
                    _, terms = self.forward(ids, masked, labels, strategy=strategy)
                else:
                    logits = model(ids, masked, want=("logits",))["logits"]
                    terms = {"mlm": torch.nn.functional.cross_entropy(logits.float(), labels)}
            for name, value in terms.items():
                means[name] = means.get(name, 0.0) + value.item() * rows / count
        self.student.train(self.strategy.dropout)
        if self.teacher:
            self.teacher.train(teacher_was)
        return means

    def d_order(self, blocks, special, plain=None, signals=()):
        """diagnose.d_order of the student, over the blocks of `validate`."""
        def forward(ids, masked):
            if signals:
                raise Stopped
            with autocast(self.device, self.bf16):
                return self.student(ids.to(self.device), masked.to(self.device), want=("logits",))["logits"]
        self.student.eval()
        found = d_order(forward, validation(blocks, self.config.val_blocks), special, plain)
        self.student.train(self.strategy.dropout)
        return found


def decay_groups(parameters, weight_decay):
    """AdamW's two groups: matrices decay, biases and LayerNorm do not."""
    parameters = list(parameters)
    return [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]


def moved(t, device):
    """The tensor on the device; nobody waits for a copy to a GPU."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def autocast(device, bf16):
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def student_shape(config, directory):
    try:
        return BertConfig.of_size(
            config.size, config.heads, vocab_size=len(directory.vocab),
            pad_token_id=directory.special["[PAD]"], hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            max_position_embeddings=max(512, config.length), initializer_range=config.init_std)
    except ValueError as e:
        raise UserError(f"--size: {e}") from None


def initial_student(config, directory):
    """The student before its first step: the same random weights in every arm of a seed, LM head included."""
    shape = student_shape(config, directory)
    torch.manual_seed(config.seed)
    return BertForMaskedLM(shape)


def make_arm(config, directory):
    """The arm on its device, from the configuration, the data's vocabulary and the teacher's files; the
    process is made ready for its steps."""
    device = choose_device(config.device)
    Ranks().join(device)
    ready_process(device)
    student, start = initial_student(config, directory), "random weights"
    teacher, missing, ignored = None, [], []
    if config.reads_teacher:
        path = checkpoint.find_model(config.teacher)
        checkpoint.same_vocabulary(directory.read_tokenizer(), path)
        teacher, missing, ignored = checkpoint.load_mlm(path, len(directory.vocab))
        check_teacher(config, student.config, teacher.config, head=not missing)
        if config.start != "random":
            start = start_from(student, teacher, numbers(config.init_layers or "", int), head=not missing,
                               whole=config.start == "teacher")
        teacher = teacher.to(device) if config.needs_teacher else None
    arm = Arm(config, student.to(device), teacher, has_head=not missing, ignored=ignored, start=start)
    arm.make_optimizer()
    return arm


def check_teacher(config, student, teacher, head):
    """Refuses a teacher that one of the phases cannot use, saying which strategy can."""
    for phase in config.phases:
        strategy = phase.strategy
        label = config.label if len(config.phases) == 1 else f"{phase.name}, a phase of {config.label},"
        if not head and strategy.needs_teachers_head:
            able = [n for n, s in STRATEGIES.items() if s.needs("teacher") and not s.needs_teachers_head]
            raise UserError(f"--teacher {config.teacher} has no LM head, which {label} needs; these do "
                            f"without: {', '.join(able)}")
        if strategy.same_heads and student.num_attention_heads != teacher.num_attention_heads:
            raise UserError(f"{label} compares attention head by head, but the student has "
                            f"{student.num_attention_heads} heads and the teacher "
                            f"{teacher.num_attention_heads}: give --heads {teacher.num_attention_heads}, or "
                            f"take --strategy minilmv2")
        if strategy.same_width and student.hidden_size != teacher.hidden_size:
            raise UserError(f"{label} needs a student as wide as its teacher: {student.hidden_size} and "
                            f"{teacher.hidden_size}; give --size "
                            f"{student.num_hidden_layers}L{teacher.hidden_size}")
    if config.start != "random" and student.hidden_size != teacher.hidden_size:
        label = config.label + " --init teacher" * (config.start == "teacher")
        copied = "weights" if config.start == "teacher" else config.start
        raise UserError(f"{label} needs a student as wide as its teacher, whose {copied} it copies: "
                        f"{student.hidden_size} and {teacher.hidden_size}; give --size "
                        f"{student.num_hidden_layers}L{teacher.hidden_size}"
                        + " or --init random" * (config.start == "embeddings"))
    if config.start == "teacher" and (student.num_hidden_layers > teacher.num_hidden_layers
                                       or student.intermediate_size != teacher.intermediate_size
                                       or student.num_attention_heads != teacher.num_attention_heads
                                       or student.hidden_act != teacher.hidden_act):
        raise UserError(f"--init teacher: the student ({student.size}) must be the teacher ({teacher.size}) "
                        f"with fewer layers: give --heads {teacher.num_attention_heads} and a depth of at "
                        f"most {teacher.num_hidden_layers}")
    layers, copied = teacher.num_hidden_layers, numbers(config.init_layers or "", int)
    if copied and (len(copied) != student.num_hidden_layers or max(copied) >= layers):
        raise UserError(f"--init-layers {config.init_layers}: the student has {student.num_hidden_layers} "
                        f"layers, the teacher {layers}: give one of 0 to {layers - 1} for each of the "
                        f"student's")
    if config.teacher_layer is not None and not -layers <= config.teacher_layer < layers:
        raise UserError(f"--teacher-layer {config.teacher_layer}: the teacher has {layers} layers")
    if config.relation_heads and (student.hidden_size % config.relation_heads
                                  or teacher.hidden_size % config.relation_heads):
        raise UserError(f"--relation-heads {config.relation_heads} does not divide the widths "
                        f"{student.hidden_size} and {teacher.hidden_size}")
    if teacher.max_position_embeddings < config.length:
        raise UserError(f"--seq-len {config.seq_len}: the teacher has {teacher.max_position_embeddings} "
                        f"positions only")


def evenly(deep, depth):
    """So many of `deep` layers: the first, the last and evenly between, halves rounded up; the first of one."""
    return [(2 * i * (deep - 1) + depth - 1) // max(1, 2 * (depth - 1)) for i in range(depth)]


def start_from(student, teacher, layers=(), head=True, whole=True):
    """Copies embeddings, LM head and these layers of the teacher, or its first, its last and between them evenly
    (12 to 6: 0, 2, 4, 7, 9, 11, as DistilBERT's released script); the embeddings alone if not `whole`.  Says what was
    copied.  `head`: whether the teacher has an LM head."""
    weights, prefix = teacher.state_dict(), "bert.encoder.layer."
    layers = layers or evenly(teacher.config.num_hidden_layers, student.config.num_hidden_layers)
    for name, p in student.state_dict().items():
        if not (name.startswith("bert.embeddings.") or whole and (head or name.startswith(prefix))):
            continue
        if name.startswith(prefix):
            layer, rest = name.removeprefix(prefix).split(".", 1)
            name = f"{prefix}{layers[int(layer)]}.{rest}"
        rows = min(len(p), len(weights[name]))                  # position embeddings may differ in number
        p[:rows].copy_(weights[name][:rows])
    if not whole:
        return "the teacher's embeddings and random layers"
    return (f"teacher weights (its layers {', '.join(map(str, layers))}, from 0)"
            + ("" if head else "; the LM head starts random: the teacher has none"))


def flops_per_block(config, student, teacher=None, phase=0):
    """(of the student, of the teacher): the matmul FLOPs that one block of the last length, or as many
    shorter ones, cost in training, from two BertConfigs, in one phase; under --kd-every the mean over steps.

    torch's own counter over the real step on the meta device (1 multiply-add = 2 FLOP), losses included.  It
    is what --budget-flops spends, the same on every machine."""
    of_steps = []
    with torch.device("meta"):
        arm = Arm(dataclasses.replace(config, micro_batch=1, bf16=False, compile=False),
                  BertForMaskedLM(student),
                  BertForMaskedLM(teacher) if teacher and config.needs_teacher else None, phase=phase)
        batch = arm.dummy()
        for strategy in arm.strategies:
            of_teacher, of_step = FlopCounterMode(display=False), FlopCounterMode(display=False)
            with of_teacher:
                arm.teacher_forward(batch, strategy)
            with of_step:
                arm.forward(*batch, strategy=strategy)[0].backward()
            teacher_flops = of_teacher.get_total_flops()
            of_steps.append((of_step.get_total_flops() - teacher_flops, teacher_flops))
        if muon := arm.make_muon():
            with FlopCounterMode(display=False) as of_update:
                muon.step()
            share = of_update.get_total_flops() / config.batch_size
            of_steps = [(student_flops + share, teacher_flops) for student_flops, teacher_flops in of_steps]
    if len(of_steps) == 1:
        return of_steps[0]
    (student_kd, teacher_kd), (student_between, _) = of_steps
    r = config.kd_every
    return (student_kd + (r - 1) * student_between) / r, teacher_kd / r
