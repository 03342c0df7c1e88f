"""What a run may spend: the price of a step, the clock and what it counts, where seconds go, what stops it."""
import contextlib
import dataclasses
import itertools
import signal
import threading
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from model import BertForMaskedLM
from plumbing.cli import ENDING
from step import Arm

UNITS = ("hours", "flops", "tokens", "steps")


def learns(steps, tokens, parameters):
    """Whether a student that starts from random weights learns something at all: under 200 steps, or a tenth of a token
    for each parameter, it does not."""
    return steps >= 200 and tokens >= 0.1 * parameters


def price(arm, unit):
    """Of a step of the arm's phase, in a budget's unit."""
    c = arm.config
    return (c.batch_size * sum(flops_of(arm, arm.number)) if unit == "flops" else
            c.batch_size * c.seq_len if unit == "tokens" else 1)


def flops_of(arm, phase):
    """(of the student, of the teacher): flops_per_block of an arm's phase, counted once."""
    if phase not in arm.counted:
        arm.counted[phase] = flops_per_block(
            arm.config, arm.student.config, arm.teacher and arm.teacher.config, phase)
    return arm.counted[phase]


def flops_per_block(config, student, teacher=None, phase=0):
    """(of the student, of the teacher): the matmul FLOPs that one block of the last length, or as many
    shorter ones, cost in training, from two BertConfigs, in one phase.

    torch's own counter over the real step on the meta device (1 multiply-add = 2 FLOP), losses included.  It
    is what --budget-flops spends, the same on every machine."""
    some, teachers = next(n for n in itertools.count(1) if n * config.phases[phase].times % 1 == 0), []
    with torch.device("meta"):
        arm = Arm(dataclasses.replace(config, batch_size=some, micro_batch=some, bf16=False, compile=False),
                  BertForMaskedLM(student),
                  BertForMaskedLM(teacher) if teacher and config.needs_teacher else None, phase=phase)
        with FlopCounterMode(display=False) as counted:
            arm.forward(*arm.dummy(), mark=lambda stage: teachers.append(counted.get_total_flops()))[0].backward()
        found = (counted.get_total_flops() - sum(teachers)) // some, sum(teachers) // some
        if muon := arm.make_muon():
            with FlopCounterMode(display=False) as of_update:
                muon.step()
            found = found[0] + of_update.get_total_flops() / config.batch_size, found[1]
    return found


class Budget:
    """What a run may spend: hours on a clock that can be paused, or steps at a price each (in FLOPs, tokens,
    steps).  `now` is injected by tests."""
    def __init__(self, total, unit, price=1, now=time.monotonic):
        self.total, self.unit, self.price, self.now = total, unit, price, now
        self.steps = 0
        self.ended = []                 # (steps, price) of the phases that are over
        self.seconds = 0.0              # charged, as of the last reading that all ranks agreed on
        self.uncharged = {}             # cause -> seconds
        self.origin = None              # charged seconds = now() - origin

    @property
    def phase_steps(self):
        return self.steps - sum(steps for steps, _ in self.ended)

    def start(self):
        self.origin = self.now() - self.seconds

    def clock(self):
        """Charged seconds at this moment, on this rank."""
        return self.now() - self.origin

    @contextlib.contextmanager
    def pause(self, cause):
        """Not charged but reported: start-up, compile, validation, checkpoints."""
        began = self.now()
        try:
            yield
        finally:
            took = self.now() - began
            self.uncharged[cause] = self.uncharged.get(cause, 0.0) + took
            if self.origin is not None:
                self.origin += took

    @property
    def progress(self):
        """Spent / budget, from 0 to 1."""
        spent = self.seconds / 3600 if self.unit == "hours" else sum(
            steps * price for steps, price in (*self.ended, (self.phase_steps, self.price)))
        return min(1.0, spent / self.total)


class Stages:
    """Seconds per stage: data, teacher, student, communication, optimizer.  On CUDA by events, read once a step."""

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
        """Adds the finished stages up; call it where the device has nothing left to do."""
        if self.cuda and self.marks:
            self.marks[-1][1].synchronize()                       # its own event, which was recorded just now
        for (_, began), (stage, ended) in zip(self.marks, self.marks[1:], strict=False):
            if stage:
                took = began.elapsed_time(ended) / 1000 if self.cuda else ended - began
                self.seconds[stage] = self.seconds.get(stage, 0.0) + took
        self.marks = self.marks[-1:]


class Stopped(Exception):
    """SIGTERM, SIGHUP or SIGINT came: the run ends with a checkpoint of its last finished step."""


@contextlib.contextmanager
def stop_signals():
    """A list that receives the signals that ask for a stop; they are acted on between steps, never in an update."""
    caught, main = [], threading.current_thread() is threading.main_thread()    # no other one can ask for signals
    before = {s: signal.signal(s, lambda number, frame: caught.append(number))
              for s in (*ENDING, signal.SIGINT) if main}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
