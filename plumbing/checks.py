"""What a run refuses before it begins: fields that do not go together, a teacher that a strategy cannot use."""
import math
from typing import Annotated

from plumbing.checkpoint import checkpoints
from plumbing.cli import UserError, checked, numbers
from plumbing.device import Ranks
from strategies import AS_RELEASED, STRATEGIES


def check_run(config):
    """What the fields of a train.Config ask of each other, and of the number of processes."""
    phases = config.phases
    if config.as_released and not any(phase.strategy.as_released for phase in phases):
        raise UserError(f"--as-released: no other code was released for {config.strategy}; it was for "
                        f"{', '.join(AS_RELEASED)}")
    layers_of(config.init_layers)
    if config.init_layers is not None and config.start != "teacher":
        raise UserError(f"--init-layers {config.init_layers} belongs to --init teacher")
    if (own := phases[0].strategy.seq_len) and (config.micro_batch or config.batch_size or 0) * config.length % own:
        raise UserError(f"--batch-size {config.batch_size}, --micro-batch {config.micro_batch}: their tokens must be a "
                        f"multiple of {own}, the length of {config.strategy}'s sentences: at --seq-len {config.length} "
                        f"give multiples of {own // math.gcd(own, config.length)}")
    if not own and any(config.length % phase.seq_len for phase in phases):
        raise UserError(f"--seq-len {config.seq_len}: each must divide the last one, so that all steps have as "
                        f"many tokens")
    config.budget  # noqa: B018
    ranks = Ranks().size
    if config.micro_batch and config.batch_size and config.batch_size % (config.micro_batch * ranks):
        raise UserError(f"--batch-size {config.batch_size} is not a multiple of "
                        f"--micro-batch {config.micro_batch}" + f" x {ranks} processes" * (ranks > 1))


def layers_of(text):
    """--init-layers as numbers, [] where it is not given."""
    if text is not None:
        checked("--init-layers", text, Annotated[str, int, "[0, 999]"])
    return numbers(text or "", int)


def check_teacher(config, student, teacher, head):
    """Refuses a teacher that one of the phases cannot use, saying which strategy can."""
    as_wide = f"give --size {student.num_hidden_layers}L{teacher.hidden_size}"
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
                            f"{teacher.hidden_size}; {as_wide}")
    if config.start != "random" and student.hidden_size != teacher.hidden_size:
        label = config.label + " --init teacher" * (config.start == "teacher")
        raise UserError(f"{label} needs a student as wide as its teacher, whose "
                        f"{'weights' if config.start == 'teacher' else config.start} it copies: "
                        f"{student.hidden_size} and {teacher.hidden_size}; {as_wide}"
                        + " or --init random" * (config.start == "embeddings"))
    same = ("intermediate_size", "num_attention_heads", "hidden_act")
    if config.start == "teacher" and (student.num_hidden_layers > teacher.num_hidden_layers
                                       or any(getattr(student, k) != getattr(teacher, k) for k in same)):
        raise UserError(f"--init teacher: the student ({student.size}) must be the teacher ({teacher.size}) "
                        f"with fewer layers: give --heads {teacher.num_attention_heads} and a depth of at "
                        f"most {teacher.num_hidden_layers}")
    layers, copied = teacher.num_hidden_layers, layers_of(config.init_layers)
    if copied and (len(copied) != student.num_hidden_layers or max(copied) >= layers):
        raise UserError(f"--init-layers {config.init_layers}: the student has {student.num_hidden_layers} "
                        f"layers, the teacher {layers}: give one of 0 to {layers - 1} for each of the "
                        f"student's")
    if teacher.max_position_embeddings < max(config.length, config.phases[0].seq_len):
        raise UserError(f"--seq-len {config.seq_len}: the teacher has {teacher.max_position_embeddings} positions only")


class NotFinite(UserError):
    """A loss or a gradient is infinite or not a number."""


def refuse_non_finite(run, values):
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        left = "the last checkpoint is good" if checkpoints(run.out) else "there is no checkpoint yet"
        advice = ["a smaller --peak-lr", *["--clip 1"] * (not run.config.of_recipe("clip")),
                  *["--no-bf16"] * run.arm.bf16]
        raise NotFinite(f"step {run.budget.steps}: {' and '.join(bad)} not finite: stopped before the update; "
                        f"{left}; try {' or '.join(advice)}")
