"""What a run refuses before it begins: fields that do not go together, a teacher that a strategy cannot use."""
import math
from typing import Annotated

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
    if (own := phases[0].strategy.seq_len) and (config.micro_batch or config.batch_size or 0) * config.seq_len % own:
        raise UserError(f"--batch-size {config.batch_size}, --micro-batch {config.micro_batch}: their tokens must be "
                        f"a multiple of {own}, the length of {config.strategy}'s sentences: at --seq-len "
                        f"{config.seq_len} give multiples of {own // math.gcd(own, config.seq_len)}")
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
    wide = teacher.hidden_size
    widths = f"{student.hidden_size} and {wide}; give --size {student.num_hidden_layers}L{wide}"
    heads, theirs, deep = student.num_attention_heads, teacher.num_attention_heads, teacher.num_hidden_layers

    def refuse(wrong, text):
        if wrong:
            raise UserError(text)
    for phase in config.phases:
        strategy = phase.strategy
        label = config.label if len(config.phases) == 1 else f"{phase.name}, a phase of {config.label},"
        able = [n for n, s in STRATEGIES.items() if s.needs("teacher") and not s.needs_teachers_head]
        refuse(not head and strategy.needs_teachers_head, f"--teacher {config.teacher} has no LM head, which {label} "
               f"needs; these do without: {', '.join(able)}")
        refuse(strategy.same_heads and heads != theirs, f"{label} compares attention head by head, but the student has "
               f"{heads} heads and the teacher {theirs}: give --heads {theirs}, or take --strategy minilmv2")
        refuse(strategy.same_width and student.hidden_size != wide,
               f"{label} needs a student as wide as its teacher: {widths}")
    copies = config.start == "teacher"
    refuse(config.start != "random" and student.hidden_size != wide,
           f"{config.label}{' --init teacher' * copies} needs a student as wide as its teacher, whose "
           f"{'weights' if copies else config.start} it copies: {widths}{' or --init random' * (not copies)}")
    same = ("intermediate_size", "num_attention_heads", "hidden_act")
    unlike = student.num_hidden_layers > deep or any(getattr(student, k) != getattr(teacher, k) for k in same)
    refuse(copies and unlike, f"--init teacher: the student ({student.size}) must be the teacher ({teacher.size}) with "
           f"fewer layers: give --heads {theirs} and a depth of at most {deep}")
    copied = layers_of(config.init_layers)
    refuse(copied and (len(copied) != student.num_hidden_layers or max(copied) >= deep),
           f"--init-layers {config.init_layers}: the student has {student.num_hidden_layers} layers, the teacher "
           f"{deep}: give one of 0 to {deep - 1} for each of the student's")
    refuse(teacher.max_position_embeddings < max(config.seq_len, config.phases[0].seq_len),
           f"--seq-len {config.seq_len}: the teacher has {teacher.max_position_embeddings} positions only")


class NotFinite(UserError):
    """A loss or a gradient is infinite or not a number."""


def refuse_non_finite(run, values):
    bad = " and ".join(name for name, value in values.items() if not math.isfinite(value))
    left = "the last checkpoint is good" if (run.out / "checkpoint.pt").exists() else "there is no checkpoint yet"
    advice = ["a smaller --peak-lr", *["--clip 1"] * (not run.config.of_recipe("clip")), *["--no-bf16"] * run.arm.bf16]
    raise NotFinite(f"step {run.budget.steps}: {bad} not finite: stopped before the update; {left}; try "
                    f"{' or '.join(advice)}")
