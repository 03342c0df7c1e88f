"""What a run may spend: the clock and what it counts, where its seconds go, and the signals that stop it."""
import contextlib
import signal
import threading
import time

import torch

from plumbing.cli import ENDING, UserError

UNITS = ("hours", "flops", "tokens", "steps")


def one_budget(config):
    """(unit, value) of the only --budget-UNIT that a configuration gives."""
    given = {unit: value for unit in UNITS if (value := getattr(config, f"budget_{unit}")) is not None}
    if len(given) != 1:
        raise UserError(f"give exactly one budget: {' or '.join(f'--budget-{unit}' for unit in UNITS)}"
                        + (f" (not {' and '.join(f'--budget-{unit}' for unit in given)})" if given else ""))
    return next(iter(given.items()))


def learns(steps, tokens, parameters):
    """Whether a student that starts from random weights learns something at all: under 200 steps, or a tenth of a token
    for each parameter, it does not."""
    return steps >= 200 and tokens >= 0.1 * parameters


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
    caught = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {s: signal.signal(s, lambda number, frame: caught.append(number))
              for s in (*ENDING, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
