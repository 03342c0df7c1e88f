"""What a run takes where nobody says it: text, teacher, size, heads, batch size.  Read it with train.py.

What is taken is printed, with the flag that changes it, and stands in config.json as if it had been given.
"""
import dataclasses
import functools
import itertools
import math
import statistics
from pathlib import Path

import torch

from data import phase_blocks
from model import BertConfig, BertForMaskedLM
from plumbing import checkpoint
from plumbing.budget import flops_per_block, learns
from plumbing.cli import UserError
from plumbing.device import Ranks, choose_device, halve_micro_batch_until_it_fits
from plumbing.encoder import HELD_OUT
from plumbing.files import claim_each, sha256
from plumbing.rehearsal import step_seconds
from plumbing.rundir import begun
from plumbing.student import student_shape
from plumbing.tokenizer import fingerprint
from plumbing.tokens import TokenDirectory
from step import make_arm

BOX = Path(__file__).parents[1] / "teacher"             # the box's teacher: its README.md says how it was made
VAL_FRACTION = 0.1                                      # of the docstrings
WIKI, HUB = "data/wiki", "bert-base-uncased"            # what the paper's runs read
SETTLED = ("data", "teacher", "size", "heads", "batch_size")
SIZES = ("6L768", "6L384", "4L256", "2L128")
PAPERS_BATCH, SMALLEST_BATCH, STEPS = 1024, 16, 2000    # the batch size is chosen such that a budget buys so many steps
SECONDS = 5                                             # of steps that are timed


def settled(config, say, gradients):
    """The train.Config with data, teacher, size, heads and batch size: those of the run that has begun in its
    directory, if one has.  `say` gets the lines that say what was taken; `gradients`: train.py's, to be timed."""
    if before := begun(config.path):
        return dataclasses.replace(config, **{name: before[name] for name in SETTLED if getattr(config, name) is None})
    sized, given = dataclasses.replace(config, size=config.size or SIZES[0]), config.teacher
    sized.check()                                                          # refused now, not after the docstrings
    config = with_texts(config, sized.reads_teacher, say)
    # of the teacher's width and half its depth, where the run reads one or one is at hand, else 6L768
    if (given or sized.reads_teacher or config.teacher == str(BOX)) and not (config.size and config.heads):
        config = half_of(config, checkpoint.read_config(checkpoint.find_model(config.teacher)))
    config = dataclasses.replace(config, size=config.size or SIZES[0])
    return config if config.batch_size else with_batch_size(config, say, gradients)


def with_texts(config, reads_teacher, say):
    """The same with data and teacher."""
    if config.data is None:
        data = WIKI if Path(WIKI, "manifest.json").exists() else docstrings(config.teacher or BOX)
        config = dataclasses.replace(config, data=data)
        say(f"--data is not given: taken is {data}" + ", the documentation on this disk" * (data != WIKI)
            + "; your own text: python prepare.py TEXT.txt --vocab TEACHER --out DIR")
    if config.teacher is None:
        fits = TokenDirectory(config.data).manifest.get("fingerprint") == vocabulary_of(BOX)
        config = dataclasses.replace(config, teacher=str(BOX) if fits else HUB)
        if reads_teacher:
            say(f"--teacher is not given: taken is {config.teacher}" + ", a small one for trying" * fits)
    return config


def half_of(config, teacher):
    """The same with size and heads, where they are not given: of the width of a BertConfig and half its depth."""
    config = dataclasses.replace(
        config, size=config.size or f"{math.ceil(teacher.num_hidden_layers / 2)}L{teacher.hidden_size}")
    alike = teacher.hidden_size == config.shape.hidden_size
    return dataclasses.replace(config, heads=config.heads or (teacher.num_attention_heads if alike else None))


@functools.cache
def vocabulary_of(model):
    """The fingerprint of a model's tokenizer."""
    return fingerprint(checkpoint.read_tokenizer(checkpoint.find_model(str(model))))


def docstrings(teacher):
    """The token directory of the documentation on this disk in a model's vocabulary."""
    return made_once(f"docstrings-{vocabulary_of(teacher)}", "docstrings", teacher, val_fraction=VAL_FRACTION)


def with_file(config):
    """The same with a token directory in place of a file of text, a document a line, in the teacher's vocabulary; as
    much is held out as HELD_OUT sentences are, of 300 bytes, which few have."""
    if not config.data or not (text := Path(config.data)).is_file():
        return config
    held_out = min(0.2, max(0.005, 300 * HELD_OUT / max(1, text.stat().st_size)))
    name = f"{text.name.partition('.')[0]}-{sha256(text)[:8]}-{vocabulary_of(config.teacher or BOX)[:8]}"
    return dataclasses.replace(config, data=made_once(
        name, config.data, config.teacher or BOX, val_fraction=held_out, document_per="line"))


def made_once(name, source, teacher, **how):
    """The token directory data/NAME: made by one process, the others wait."""
    import prepare

    path = Path("data", name)

    def make(_):
        if not (path / "manifest.json").exists():
            prepare.prepare(prepare.Config([source], str(path), str(checkpoint.find_model(str(teacher))), **how))
    claim_each([path.parent], make)
    return str(path)


def with_batch_size(config, say, gradients):
    """The same with a batch size: the paper's where the budget is in steps or buys STEPS of it, else the largest power
    of two that it buys STEPS of.  Refuses a budget under which a student from random weights would learn nothing."""
    unit, total = config.budget
    if unit == "steps":
        return dataclasses.replace(config, batch_size=PAPERS_BATCH)
    teacher = checkpoint.read_config(checkpoint.find_model(config.teacher)) if config.needs_teacher else None
    shapes, per_second = (student_shape(config, TokenDirectory(config.data)), teacher), None
    if unit == "hours":         # a few blocks at a time where a step of many takes minutes
        micro = config.micro_batch or (None if choose_device(config.device).type == "cuda" else SMALLEST_BATCH)
        per_second = blocks_per_second(
            dataclasses.replace(config, batch_size=PAPERS_BATCH, micro_batch=micro), gradients)
    size = PAPERS_BATCH
    for _ in range(2):              # an update has a price too, so that fewer blocks a step are dearer
        config = dataclasses.replace(config, batch_size=size)
        blocks = bought(config, shapes, per_second)
        size = min(size, batch_that_fits(config, blocks))
    config = dataclasses.replace(config, batch_size=size)
    said = f"--budget-{unit} {total:g} buys {gets(config, blocks, shapes[0])}"
    if config.start == "random" and not enough(config, blocks, shapes[0]):
        raise UserError(f"{said}: too little to learn from random weights: give "
                        + "".join(f"--size {fit}, " for fit in sizes_that_fit(config, blocks, shapes[0])[:1])
                        + f"a larger budget, or, to go on anyway, --batch-size {size}")
    say(said)
    return config


def batch_that_fits(config, blocks):
    """The largest power of two of which so many blocks make STEPS, from SMALLEST_BATCH to the paper's."""
    multiple = Ranks().size * (config.micro_batch or 1)
    power = max(SMALLEST_BATCH, 2 ** int(math.log2(max(1, blocks / STEPS))))
    return math.ceil(min(PAPERS_BATCH, power) / multiple) * multiple


def gets(config, blocks, shape):
    """What so many blocks are, in words; `shape`: the student's BertConfig."""
    tokens = blocks * config.seq_len
    return (f"{blocks / config.batch_size:,.0f} steps of {config.batch_size} x {config.seq_len}, {tokens:,.0f} tokens, "
            f"{tokens / parameters(shape):.2g} for each parameter of a {shape.size}")


def enough(config, blocks, shape):
    """Whether a student learns something from random weights in so many blocks."""
    return learns(blocks / config.batch_size, blocks * config.seq_len, parameters(shape))


def other_sizes(config, blocks, shape):
    """[(size, tokens, tokens for each parameter)] of SIZES: what so many blocks of this student cost buys of them, by
    the FLOPs of no_kd."""
    alone = dataclasses.replace(config, strategy="no_kd", as_released=False, init=None)
    flops, found = flops_of_block(alone, (shape, None)), []
    for size in SIZES:
        of = dataclasses.replace(BertConfig.of_size(size), vocab_size=shape.vocab_size)
        tokens = blocks * config.seq_len * flops / flops_of_block(dataclasses.replace(
            alone, size=size, heads=None), (of, None))
        found.append((size, tokens, tokens / parameters(of)))
    return found


def sizes_that_fit(config, blocks, shape):
    """Of SIZES, those for which it is enough."""
    return [size for size, tokens, each in other_sizes(config, blocks, shape) if learns(
        tokens / config.seq_len / config.batch_size, each, 1)]


def bought(config, shapes, per_second=None, phase=None):
    """The blocks that the budget buys, in one phase or counted as its dearest; `shapes`: (student's BertConfig,
    teacher's or None); `per_second`: blocks, under a budget in hours."""
    unit, total = config.budget
    if unit == "hours":
        return total * 3600 * per_second
    each = dict(tokens=config.seq_len, steps=1 / config.batch_size).get(unit)
    phases = range(len(config.phases)) if phase is None else [phase]
    return total / (each or max(flops_of_block(config, shapes, i) for i in phases))


def flops_of_block(config, shapes, phase=0):
    return sum(flops_per_block(config, *shapes, phase))


def parameters(shape):
    with torch.device("meta"):
        return sum(p.numel() for p in BertForMaskedLM(shape).parameters())


@halve_micro_batch_until_it_fits
def blocks_per_second(config, gradients):
    """Of the first phase, by some steps here; under torchrun of all ranks together, which see the same."""
    directory = TokenDirectory(config.data)
    config = dataclasses.replace(config, batch_size=config.micro_batch * Ranks().size)
    arm = make_arm(config, directory)
    blocks = phase_blocks(arm.phase, directory, "train", config.seed, config.unique_tokens)
    batch = blocks.batch(0, arm.batch_size)
    return config.batch_size / statistics.median(step_seconds(arm, itertools.repeat(batch), gradients, SECONDS))
