"""A run directory: what is written beside the steps, and said about a run.  Nothing here is on the clock.

config.json (with the sha256 of what it was made from), log.jsonl, checkpoint.pt, model/,
and, at the end, summary.json.
"""
import contextlib
import dataclasses
import json
import re
import signal
import time

import torch

from plumbing import checkpoint
from plumbing.budget import Stopped, flops_of, learns, price
from plumbing.cli import UserError, flag_of, numbers
from plumbing.encoder import lost_and_won
from plumbing.files import MARK, claim, hold, read_json, sha256, write_json
from plumbing.screen import Screen, changes
from plumbing.validation import d_order, validate


def contents(directory, teacher=None):
    """What stands in the token files and in the teacher's weights, by sha256: the same paths may hold others
    tomorrow."""
    found = {"contents of data": directory.manifest["sha256"]}
    if teacher:
        found["contents of teacher"] = [sha256(f) for f in checkpoint.weight_files(checkpoint.find_model(teacher))]
    return found


# What may differ when a run goes on
NOT_THE_RUN = ("out", "dry_run")
CHECKPOINT_MINUTES = 10.0
VALIDATING = 0.05           # of a budget of hours is the most that validations take
LOG_EVERY = 10              # steps per line of log.jsonl
FILES = (MARK, "config.json", "log.jsonl", "summary.json", "checkpoint.pt")


@contextlib.contextmanager
def run_directory(config):
    """Holds the run directory as long as the run lives.  What is to be written in it at the end is tried now,
    and what a killed process was writing goes.  A dry run makes nothing, and refuses as much."""
    out, models = config.path, ["model", *(f"model-{f:g}" for f in numbers(config.fractions))]
    with contextlib.nullcontext(claim(out, "run", True)) if config.dry_run else hold(out, "run"):
        for name in models:
            checkpoint.room(out / name, config.dry_run)
        for file in out.glob("*.*.part"):
            if re.sub(r"\.\d+\.part$", "", file.name) in FILES and not config.dry_run:
                file.unlink()
        yield


def begun(out):
    """The config.json of the run that has begun in `out`; {} if none has."""
    there = (out / "summary.json").exists() or (out / "checkpoint.pt").exists()
    return read_json(out / "config.json") if there else {}


def finished(record, out, defaults):
    """The summary if the run of this very record has finished in `out`, None if it has not; another one is refused.
    `defaults`: of what a configuration of an older version does not name."""
    if not (before := begun(out)):
        return None
    refuse_another(defaults | before, record, out)
    return read_json(out / "summary.json") if (out / "summary.json").exists() else None


def refuse_another(before, record, out):
    """Of the data and of a teacher that is read counts what they hold, not where they lie, unless `before`, of an older
    version, does not say it."""
    moved = [k for k in ("data", "teacher") if f"contents of {k}" in before or f"contents of {k}" not in record]
    differ = [k if k.startswith("contents") else f"{k} ({before.get(k)} there, {v} here)"
              for k, v in record.items() if k not in (*NOT_THE_RUN, *moved)
              and before.get(k, v if k.startswith("contents") else None) != v]
    if differ:
        raise UserError(f"{out} holds a run of another configuration: " f"{', '.join(differ)}: give another --out")


class RunWriter:
    """The run directory: what is written beside the steps, none of it on the clock, and only by rank 0."""

    def __init__(self, arm, budget, stages, directory, val_blocks, say, status=None):
        self.config, self.out, self.arm, self.budget = arm.config, arm.config.path, arm, budget
        self.stages, self.directory, self.val_blocks = stages, directory, val_blocks
        self.screen, self.writes = Screen(arm, budget, say, status), arm.ranks.rank == 0
        self.validations, self.seconds, self.teacher_mlm = 0, 0.0, None
        self.val_times = self.config.val_times
        self.val, self.vals, self.say = {}, [], self.screen.say         # vals: at phases' end
        self.saved = time.monotonic()

    def resume_or_start(self, record):
        state = checkpoint.load_run(self.out)
        arm, budget, self.record = self.arm, self.budget, record
        if state:
            refuse_another(record | state.get("config", {}), record, self.out)
            budget.ended, self.vals = state.get("ended", []), state.get("vals", [])     # none in older ones
            if budget.ended:
                arm.enter(len(budget.ended))
                arm.make_optimizer()
            arm.student.load_state_dict(state["student"])
            arm.proj.load_state_dict(state["proj"])
            for name, optimizer in zip(("optimizer", "muon"), arm.optimizers, strict=False):
                optimizer.load_state_dict(state[name])
            budget.steps, budget.seconds, self.seconds = state["steps"], state["seconds"], state["seconds"]
            budget.uncharged, self.stages.seconds = state["uncharged"], state["charged"]
            self.validations, self.teacher_mlm = state["validations"], state["teacher_mlm"]
            self.say(f"{self.out}: going on after step {budget.steps}")
        self.passed = budget.progress                                   # beyond which --fractions are due
        if self.writes:
            write_json(self.out / "config.json", record)
            checkpoint.cut_log(self.out / "log.jsonl", budget.steps)
            self.log = (self.out / "log.jsonl").open("a", buffering=1, encoding="utf-8")

    def next_phase(self, signals):
        """Ends the phase and enters the next one that has a share left; nothing of it is on the clock."""
        arm, budget = self.arm, self.budget
        self.validate(signals)
        while arm.phases[len(budget.ended)].end <= budget.progress:
            self.vals.append(self.val if len(budget.ended) == arm.number else None)
            budget.ended.append((budget.phase_steps, budget.price))
        self.say(f"{arm.phase.name} ended after {budget.ended[arm.number][0]} steps: "
                 + ", ".join(f"val_{name} {value:.4f}" for name, value in self.val.items()))
        with budget.pause("compile"):
            arm.enter(len(budget.ended))
            arm.make_optimizer()
            budget.price = price(arm, budget.unit)
        self.describe()

    def describe(self):
        if not self.writes:
            return
        with self.budget.pause("validation"):
            if (self.arm.teacher and self.arm.teacher_has_head and self.teacher_mlm is None
                    and not self.arm.strategy.seq_len):
                self.teacher_mlm = validate(self.arm, self.val_blocks, model=self.arm.teacher)["mlm"]
            began = time.monotonic()
            self.val = validate(self.arm, self.val_blocks)
            if self.budget.unit == "hours":     # at most VALIDATING of the time
                most = VALIDATING * 3600 * self.budget.total / (time.monotonic() - began)
                self.val_times = max(1, min(self.val_times, int(most) - 1))
            announce(self.arm, self.val, self.budget.steps, self.teacher_mlm, self.say)
        self.screen.mark()

    def after_step(self, record, signals):
        """Log, status line, validation, fractions, checkpoint: each where it is due."""
        with self.budget.pause("checkpoints"):
            if not self.writes:
                return
            self.screen.mark()
            if record["step"] % LOG_EVERY == 0:
                self.write(record | self.screen.speed())
            self.screen.show(record)
        # One fewer: the last is the summary's
        due = min(int(self.val_times * self.budget.progress), self.val_times - 1)
        if self.validations < due:
            found = self.validate(signals)
            self.validations = due                                      # one, also where a stall skipped some
            with self.budget.pause("checkpoints"):
                self.write(record | found)
        with self.budget.pause("checkpoints"):
            for fraction in numbers(self.config.fractions):
                if self.passed < fraction <= self.budget.progress:
                    self.save_model(f"model-{fraction:g}", f"{fraction:g} of the budget of `{self.config.label}`.\n")
            self.passed = self.budget.progress
            if time.monotonic() - self.saved >= 60 * CHECKPOINT_MINUTES:
                self.checkpoint()

    def validate(self, signals=()):
        """What log and summary hold of it: val, {term: mean over the validation blocks}, and d_order, where there is an
        LM head to measure it with; said in a line."""
        if not self.writes:
            return {}
        with self.budget.pause("validation"):
            before, self.val = self.val, validate(self.arm, self.val_blocks, signals)
            found, order = dict(val=self.val), ""
            if self.arm.strategy.trains_lm_head and not self.arm.strategy.causal:
                found["d_order"] = d_order(
                    self.arm, self.val_blocks, self.directory.special, self.val.get("mlm"), signals)
                order = f", D_order {found['d_order']:z.2f}"
            self.say(f"at {self.budget.progress:.1%}, step {self.budget.steps:,}: {changes(self.val, before)}{order}")
        return found

    def write(self, record):
        if len(self.arm.phases) > 1:
            record = dict(record, phase=self.arm.number + 1)
        self.log.write(json.dumps(record) + "\n")

    def checkpoint(self):
        if not self.writes:
            return
        arm = self.arm
        checkpoint.save_run(self.out, dict(
            config=self.record, steps=self.budget.steps, seconds=self.seconds,
            uncharged=self.budget.uncharged, charged=self.stages.seconds, validations=self.validations,
            teacher_mlm=self.teacher_mlm, student=arm.student.state_dict(), proj=arm.proj.state_dict(),
            optimizer=arm.optimizer.state_dict(), muon=arm.muon and arm.muon.state_dict(),
            ended=self.budget.ended, vals=self.vals))
        self.saved = time.monotonic()

    def save_model(self, name, card):
        checkpoint.save_model(self.out / name, self.arm.student, self.directory.read_tokenizer(),
                              self.arm.strategy.trains_lm_head, card, self.arm.form.max_len, form=self.arm.form)

    @contextlib.contextmanager
    def stopped_by(self, signals):
        """Stopped inside becomes a checkpoint of the last finished step, and the signal's exit status."""
        try:
            yield
        except Stopped:
            self.checkpoint()
            number = signals[0] if signals else signal.SIGTERM
            self.say(f"stopped by signal {number:d} after step {self.budget.steps}: the same "
                     f"command goes on from there")
            raise SystemExit(128 + number) from None
        finally:
            self.screen.close()

    def finish(self, blocks, charged, found):
        """Writes and returns the summary: what was trained, what it cost, what came out."""
        config, arm, budget = self.config, self.arm, self.budget
        steps, tokens = budget.steps, budget.steps * config.batch_size * config.seq_len
        seen = steps * arm.batch_size
        phases = [self.phase_summary(i) for i in range(len(arm.phases))]
        student, teacher = (sum(p[f"{side}_flops"] for p in phases) for side in ("student", "teacher"))
        spent = dict(hours=charged / 3600, flops=student + teacher, tokens=tokens, steps=steps)[budget.unit]
        summary = dict(
            strategy=config.strategy, label=config.label, as_released=config.as_released, init=config.start,
            size=config.size, peak_lr=arm.peak_lr, seed=config.seed, steps=steps, tokens=tokens,
            student_flops=student, teacher_flops=teacher, epochs=seen / blocks.count,
            unique_tokens=min(blocks.count, seen) * blocks.seq_len,
            budget={budget.unit: budget.total}, overshoot=spent / budget.total - 1, charged_seconds=charged,
            tokens_per_second=tokens / charged, charged=self.stages.seconds, uncharged=budget.uncharged,
            teacher_share=self.stages.seconds.get("teacher", 0.0) / charged, **found,
            teacher_mlm=self.teacher_mlm, device=str(arm.device), ranks=arm.ranks.size,
            bf16=arm.bf16, torch=torch.__version__, phases=phases)
        if self.writes:
            self.checkpoint()
            self.write(dict(step=steps, progress=1.0, seconds=charged, **found))
            self.log.close()
            if arm.strategy.seq_len:
                with budget.pause("validation"):
                    summary["held_out"] = lost_and_won(self)
            self.save_model("model", model_card(config, summary))
            write_json(self.out / "summary.json", summary)
            self.tell(summary)
        return summary

    def phase_summary(self, i):
        """What a phase did; `val` at its end."""
        config, phase = self.config, self.arm.phases[i]
        steps = [*(n for n, _ in self.budget.ended), self.budget.phase_steps, *[0] * len(self.arm.phases)][i]
        student, teacher = (steps * config.batch_size * flops for flops in flops_of(self.arm, i)) if steps else (0, 0)
        found = dict(name=phase.name, begin=phase.begin, end=phase.end, steps=steps, student_flops=student,
                     teacher_flops=teacher, weights={k: term.weight for k, term in phase.strategy.terms.items()})
        return found | (dict(val=self.vals[i]) if i < self.arm.number else {})

    def tell(self, summary):
        self.say(f"finished after {summary['steps']:,} steps, {summary['tokens']:,} tokens, "
                 f"{summary['charged_seconds']:.1f} s charged ({self.out})")
        for kind in ("charged", "uncharged"):
            self.say(f"{kind}: " + ", ".join(f"{cause} {s:.1f} s" for cause, s in summary[kind].items()))
        for name, value in summary["val"].items():
            self.say(f"val_{name}: {value:.4f}")
        parameters = sum(p.numel() for p in self.arm.student.parameters())
        if self.config.start == "random" and not learns(summary["steps"], summary["tokens"], parameters):
            self.say(f"warning: {summary['steps']:,} steps and {summary['tokens'] / parameters:.2g} tokens for each "
                     f"parameter: too little to learn from random weights")


def model_card(config, summary):
    """The README.md of the model directory: what was trained, on what, for how long, by which command."""
    given = ""
    for f in dataclasses.fields(config):
        flag, value = flag_of(f.name), getattr(config, f.name)
        if value != f.default:
            given += {"True": f" {flag}", "False": f" --no{flag[1:]}"}.get(str(value), f" {flag} {value}")
    teacher = f" from the teacher `{config.teacher}`" if config.needs_teacher else ""
    val = ", ".join(f"{name} {value:.4f}" for name, value in summary["val"].items())
    return (f"---\nlibrary_name: transformers\ntags: [bert, nanokd]\n---\n\n"
            f"A BERT of {config.size} trained by nanoKD with the strategy `{summary['label']}`{teacher}: "
            f"{summary['tokens']:,} tokens of `{config.data}` in {summary['charged_seconds']:,.0f} charged seconds "
            f"({summary['student_flops'] + summary['teacher_flops']:.3g} FLOP) on {summary['device']}.\n\n"
            f"Validation: {val}.\n\n    python train.py{given}\n")


def announce(arm, val, step, teacher_mlm, say):
    config, c, strategy = arm.config, arm.student.config, arm.strategy
    trained = sum(p.numel() for p in arm.student.parameters() if p.requires_grad)
    several = f", {arm.phase.name} to {arm.phase.end:.0%}" * (len(arm.phases) > 1)
    say(f"{config.label}{several}: student {c.size}, {c.num_attention_heads} heads, V {c.vocab_size:,}, "
        f"{trained / 1e6:.1f}M parameters trained, from {arm.start}; "
        f"peak LR {arm.peak_lr:g}{' of AdamW and, times 0.2 sqrt(larger side), of Muon' * bool(arm.muon)}; "
        f"dropout {config.dropout * strategy.dropout:g}, clip {config.of_recipe('clip'):g}; "
        f"{arm.batch_size} x {arm.phase.seq_len} tokens a step; "
        f"{arm.device}, {'bf16' if arm.bf16 else 'fp32'}")
    if arm.teacher:
        quality = (str(arm.form) if strategy.seq_len else
                   f"validation MLM loss {teacher_mlm:.4f}" if teacher_mlm is not None else "no LM head")
        layers = [f"{need[1] % arm.teacher.config.num_hidden_layers + 1}" for need in strategy.want("teacher")
                  if need[0] == "qkv"]
        more = {f"q, k, v of its layer {' and '.join(layers)}": layers,
                f"{arm.relation_heads} relation heads": "qq" in strategy.terms,
                "its dropout is on": arm.teacher.training,
                f"tau {strategy.tau:g}": strategy.needs_teachers_head,
                f"ignored: {', '.join(arm.teacher_ignored)}": arm.teacher_ignored}
        say("; ".join([f"teacher {config.teacher}: {arm.teacher.config.size}, {quality}",
                       *(text for text, holds in more.items() if holds)]))
    for name, term in strategy.terms.items():
        say(f"  {term.weight:g} x {name:8} {val[name]:9.4f} at step {step}   {term.about}")
