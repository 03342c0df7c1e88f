"""One step of an arm: its student, teacher, projections and optimizer, and what a micro-batch asks of them.

Read it with train.py, whose loop calls it.  `make_arm` builds an Arm from a configuration, the data's
vocabulary and the teacher's files; `Arm.forward` is what a step costs: the teacher and the student leave
behind what the strategy asks for, and no more; the loss compares that.
"""
import contextlib
import math
import time

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from data import Batch, hashed, masked_positions
from plumbing import checkpoint
from plumbing.checks import check_teacher, layers_of
from plumbing.device import Ranks, choose_device, multiplies_in_bf16, ready_process
from plumbing.student import initial_student, start_from
from strategies import Context, loss_terms, projections, relation_head_count


class WithProjections(torch.nn.ModuleDict):
    """Student and projections as one module, so that DistributedDataParallel sees all that is trained."""

    def forward(self, *args, **named):
        return self["student"](*args, **named)


class Arm:
    """One strategy's student, teacher, projections and optimizer, and one micro-batch of work on them; of
    several phases, one at a time: `enter`, then `make_optimizer`."""

    def __init__(self, config, student, teacher=None, has_head=True, ignored=(), start="random weights",
                 phase=0, form=None):
        """`teacher`: a BertForMaskedLM; `has_head`: whether its LM head was trained; `ignored`: its unused
        tensors; `start`: where the student's weights are from; `phase`: the one to enter; `form`: in
        which a teacher embeds sentences (checkpoint.Form)."""
        self.config, self.phases, self.student, self.teacher, self.start = (
            config, config.phases, student, teacher, start)
        self.teacher_has_head, self.teacher_ignored = teacher is not None and has_head, ignored
        self.form = form or checkpoint.Form()
        self.device, self.ranks = next(student.parameters()).device, Ranks()
        self.bf16 = multiplies_in_bf16(self.device, config.bf16)
        if teacher:
            # bf16 weights, not autocast: never updated, they need no cast at each step
            teacher.to(torch.bfloat16 if self.bf16 else None).requires_grad_(False)
        self.compiled = config.compile if config.compile is not None else self.device.type == "cuda"
        self.counted, self.warm_up_seconds, self.clip = {}, 0.0, config.of_recipe("clip")
        self.enter(phase)

    def enter(self, phase):
        """Takes up one of the phases: its strategy, its projections, what may train in it."""
        config, student, teacher = self.config, self.student, self.teacher
        if phase:                                       # its projections, whatever was drawn before them
            torch.manual_seed(int(hashed(config.seed, phase) >> np.uint64(1)))
        self.number, self.phase = phase, self.phases[phase]
        # blocks of a step and of a forward pass, and how many of these this rank makes in a step
        self.batch_size, self.micro = map(self.phase.blocks, (config.batch_size, config.micro_batch))
        # Of eager sentences on a CPU a few at a time: the short ones by themselves
        if self.phase.strategy.seq_len and self.device.type == "cpu" and not self.compiled:
            self.micro = math.gcd(self.micro, 16)
        self.accumulate = self.batch_size // (self.micro * self.ranks.size)
        c_s, c_t = student.config, (teacher or student).config
        self.strategy = self.phase.strategy.for_depths(c_s.num_hidden_layers, c_t.num_hidden_layers)
        self.want_s, self.want_t = map(self.strategy.want, ("student", "teacher"))
        self.peak_lr = config.peak_lr or (
            self.strategy.short_lr if config.recipe == "short" else self.strategy.peak_lr)
        self.relation_heads = (c_s.num_attention_heads if self.strategy.as_released else
                               relation_head_count(c_s.hidden_size, c_t.hidden_size))
        self.proj = projections(self.strategy, c_s.hidden_size, c_t.hidden_size).to(self.device)

        student.requires_grad_(not self.strategy.train_layers)
        for layer in self.strategy.train_layers:
            student.bert.encoder["layer"][layer].requires_grad_()
        self.drop_out()
        def prepare(f):
            return torch.compile(f, fullgraph=True, dynamic=False) if self.compiled and f else f
        self.run_student, self.run_teacher = prepare(student), prepare(teacher)
        self.loss_terms = prepare(loss_terms)

    def drop_out(self, on=True):
        """Dropout as the strategy has it; or off, to validate."""
        self.student.train(on and self.strategy.dropout)
        if self.teacher:
            self.teacher.train(on and self.strategy.as_released)        # the released code leaves it on there

    def make_optimizer(self):
        """Freezes what the loss does not reach; makes the optimizer and, under torchrun, the DDP wrapper."""
        began = time.monotonic()
        with self.tf32():
            self.freeze_unreached()
            trained = self.trained = [
                p for m in (self.student, self.proj) for p in m.parameters() if p.requires_grad]
            if self.ranks.size > 1:
                self.run_student = self.wrapper = DistributedDataParallel(
                    WithProjections(dict(student=self.student, proj=self.proj)))
                if self.compiled:
                    self.run_student = torch.compile(self.wrapper, dynamic=False)
            # First use compiles, connects the ranks, and tells a micro-batch too large for a GPU before the run begins
            if self.compiled or self.device.type == "cuda" or self.ranks.size > 1:
                self.forward(*self.dummy())[0].backward()
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
        if self.config.of_recipe("optimizer") != "muon":
            return None
        matrices = [p for name, p in self.student.named_parameters()
                    if p.requires_grad and p.ndim == 2 and "embeddings" not in name]
        return torch.optim.Muon(matrices, self.peak_lr, self.config.weight_decay,
                                adjust_lr_fn="match_rms_adamw")

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

    def micro_batches(self, batch, step):
        """(micro-batch on the device, whether it is this rank's last) of one optimizer step; dropout is
        reseeded for each, so that no generator's state has to survive a stop."""
        micro = self.micro
        if sentences := bool(self.strategy.seq_len):    # the short ones first, so that less of a micro-batch is padding
            lengths = (batch.ids != self.student.config.pad_token_id).sum(1)
            batch, lengths = Batch(*(a[np.argsort(lengths, kind="stable")] for a in batch)), np.sort(lengths)
        for j in range(self.accumulate):
            at = (self.ranks.rank * self.accumulate + j) * micro
            part = Batch(*(a[at:at + micro] for a in batch))
            if sentences and not self.compiled:
                part = part._replace(ids=part.ids[:, :lengths[at + micro - 1]])
            on_device = self.to_device(part)
            torch.manual_seed(int(hashed(self.config.seed, step, j, self.ranks.rank) >> np.uint64(1)))
            yield on_device, j == self.accumulate - 1

    def update(self, lr, norm):
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.clip, torch.tensor(norm))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def to_device(self, batch):
        ids, masked, labels = (to_device(torch.from_numpy(a), self.device) for a in batch)
        return Batch(ids, masked, labels.flatten())

    def forward(self, ids, masked, labels, mark=lambda stage: None):
        """(total, {term: value}) of one micro-batch: what the strategy asks of both sides, and no more.

        mark("teacher") is called after the teacher's pass, where there is one."""
        strategy, c, t = self.strategy, self.student.config, {}
        real = ids != c.pad_token_id if strategy.seq_len else None      # (B, S), None where blocks are full
        if self.teacher and self.want_t:
            with torch.no_grad():
                t = self.run_teacher(ids, masked, real, want=self.want_t)
            mark("teacher")
        with autocast(self.device, self.bf16):
            s = self.run_student(ids, masked, real, want=self.want_s, causal=strategy.causal)
        # Outside autocast: a compiled function's backward pass keeps the one that it was called under
        return self.loss_terms(strategy, s, t, Context(
            labels, strategy.tau, self.relation_heads, self.proj, c.vocab_size, real, self.form.pooling))

    def dummy(self, blocks=None):
        """A Batch of a micro-batch's shape, or of so many blocks."""
        B, S = blocks or self.phase.blocks(self.config.micro_batch), self.phase.seq_len
        k = 0 if self.strategy.seq_len else masked_positions(S)
        return Batch(torch.zeros(B, S, dtype=torch.long, device=self.device),
                     torch.arange(k, device=self.device).expand(B, k).contiguous(),
                     torch.zeros(B * k, dtype=torch.long, device=self.device))

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


def decay_groups(parameters, weight_decay):
    """AdamW's two groups: matrices decay, biases and LayerNorm do not."""
    parameters = list(parameters)
    return [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]


def to_device(t, device):
    """The tensor on the device; nobody waits for a copy to a GPU."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def autocast(device, bf16):
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def make_arm(config, directory):
    """The arm on its device, from the configuration, the data's vocabulary and the teacher's files; the
    process is made ready for its steps."""
    device = choose_device(config.device)
    Ranks().join(device)
    ready_process(device)
    student, start = initial_student(config, directory), "random weights"
    teacher, missing, ignored, form = None, [], [], None
    if config.reads_teacher:
        path = checkpoint.find_model(config.teacher)
        checkpoint.same_vocabulary(directory.read_tokenizer(), path)
        teacher, missing, ignored = checkpoint.load_mlm(path, len(directory.vocab))
        check_teacher(config, student.config, teacher.config, head=not missing)
        form = checkpoint.read_form(path) if config.phases[0].strategy.seq_len else None
        if config.start != "random":
            start = start_from(student, teacher, layers_of(config.init_layers), head=not missing,
                               whole=config.start == "teacher")
        teacher = teacher.to(device) if config.needs_teacher else None
    arm = Arm(config, student.to(device), teacher, has_head=not missing, ignored=ignored, start=start, form=form)
    arm.make_optimizer()
    return arm
