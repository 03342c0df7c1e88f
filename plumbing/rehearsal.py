"""train.py --dry-run: a few steps of the real thing, and what the budget will buy at their speed.  Writes nothing."""
import math
import os
import sys
import time

import torch

from plumbing.budget import Stages, price
from plumbing.screen import quantity

SECONDS = 20                # of steps are measured


def step_seconds(arm, batches, gradients, most):
    """[seconds of a step], alike on all ranks, of two or more steps within `most` seconds, after one that allocates;
    where that one takes over SECONDS, of it alone.  `gradients`: train.py's."""
    took = []
    while not took or took[0] < SECONDS and (len(took) < 3 or sum(took) < most):
        began, size = time.perf_counter(), arm.ranks.size
        names, values = gradients(arm, next(batches), len(took), Stages(arm.device))
        arm.update(0.0, arm.ranks.sum(values / size)[names.index("gradient_norm")])         # waits for the device
        took.append(arm.ranks.sum(torch.tensor([time.perf_counter() - began], dtype=torch.float64))[0] / size)
    return took[1:] or took


def rehearse(run, gradients, blocks, batches):
    """`run`: a Run that was never started; `gradients`: train.py's, on the batches in their order."""
    arm, budget, config = run.arm, run.budget, run.config
    budget.price = price(arm, budget.unit)
    run.describe()
    if len(arm.phases) > 1:
        run.say(f"what follows is as if all of it were the first phase, {arm.phase.name}")
    began = time.monotonic()
    run.validate()
    validations = config.val_times * (time.monotonic() - began)
    took = step_seconds(arm, batches, gradients, SECONDS)
    seconds = sum(took) / len(took)
    steps = math.ceil(budget.total * 3600 / seconds if budget.unit == "hours" else budget.total / budget.price)
    tokens, charged, say = config.batch_size * config.seq_len, steps * seconds, run.say
    say(f"memory: {memory(arm.device)}")
    say(f"speed: {tokens / seconds:,.0f} tokens/s, {seconds:.3g} s a step, measured over {len(took)}")
    ends = min(time.time() + charged + validations, 253_370_764_800)    # the year 9999
    epochs = steps * arm.batch_size / blocks.count
    say(f"--budget-{budget.unit} {budget.total:g} buys {steps:,} steps, {steps * tokens:,} tokens, {epochs:.3g} epochs "
        f"in {quantity(charged / 3600, 'hours')}, and {quantity(validations / 3600, 'hours')} go to {config.val_times} "
        f"validations: begun now, it ends on {time.strftime('%Y-%m-%d at %H:%M', time.localtime(ends))}")


def memory(device):
    """The most that was taken, of what there is."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        whole = torch.cuda.get_device_properties(device).total_memory
    else:
        try:
            import resource  # not on Windows
        except ImportError:
            return "not known on this system, but it fits"
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = "it fits" if most < 0.9 * whole else "hardly anything is left: give a smaller --micro-batch"
    return f"{most / 1e9:.1f} of {whole / 1e9:.1f} GB on {device}: {fits}"
