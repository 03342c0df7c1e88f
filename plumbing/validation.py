"""Validation: what a run's loss is on blocks that it never trains on.  None of it is on the clock."""
import copy

import torch

from data import Batch, Blocks
from plumbing import diagnose
from plumbing.budget import Stopped
from step import autocast

FEW_BLOCKS = 32             # under so many validation blocks, a warning


def validation_blocks(directory, seq_len, say=lambda line: None, kind=Blocks):
    """The validation split in blocks, masked alike for every run; or in Sentences."""
    blocks = kind(directory, "val", seq_len, seed=0)
    if blocks.count < FEW_BLOCKS:
        say(f"warning: {directory.path}/val.bin makes only {blocks.count} validation block(s) of length {seq_len}, so "
            f"validation losses are mostly noise: prepare the data with a larger --val-fraction")
    return blocks


@torch.no_grad()
def validate(arm, blocks, signals=(), model=None):
    """{term: mean} over all the validation blocks asked for; or the MLM loss of another `model`."""
    blocks, config, means = copy.copy(blocks), arm.config, {}
    blocks.causal = model is None and arm.strategy.causal
    count, size = (max(1, n * config.seq_len // blocks.seq_len) for n in (config.val_blocks, config.micro_batch))
    count = min(count, blocks.count)
    size = min(size, count)
    arm.drop_out(False)
    for at in range(0, count, size):
        if signals:
            raise Stopped
        rows = min(size, count - at)                                    # the last ones may be fewer
        batch = arm.to_device(Batch(*(a[:rows] for a in blocks.batch(at // size, size))))
        # eager: compiled, evaluation would be a variant of its own, and the last rows one more
        with torch.compiler.set_stance("force_eager"), arm.tf32():
            if model is None:
                _, terms = arm.forward(*batch)
            else:
                logits = model(batch.ids, batch.masked, want=("logits",))["logits"]
                terms = {"mlm": torch.nn.functional.cross_entropy(logits.float(), batch.labels)}
        for name, value in terms.items():
            means[name] = means.get(name, 0.0) + value.item() * rows / count
    arm.drop_out()
    return means


def d_order(arm, blocks, special, plain=None, signals=()):
    """diagnose.order_gain of the arm's student, over the blocks of `validate`."""
    def forward(ids, masked):
        if signals:
            raise Stopped
        with autocast(arm.device, arm.bf16):
            return arm.student(ids.to(arm.device), masked.to(arm.device), want=("logits",))["logits"]
    arm.drop_out(False)
    found = diagnose.order_gain(forward, diagnose.validation(blocks, arm.config.val_blocks), special, plain)
    arm.drop_out()
    return found
