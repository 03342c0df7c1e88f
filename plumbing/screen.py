"""What a run says while it goes: one status line, rewritten in place on a terminal, once a minute elsewhere."""
import re
import sys
import time
from collections import deque

import torch
from tqdm import tqdm

from plumbing.budget import flops_of

RECENT = 30                 # charged seconds that a rate looks back
# Dense bf16 TFLOP/s in the vendors' data sheets, by words of the device's name; the first entry that fits counts
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "GH200": 989,
         "B200": 2250, "A100": 312, "A30": 165, "A10": 125, "L40S": 362, "L4": 121}


def peak_flops(device_name):
    """Dense bf16 FLOP/s of a device that PEAKS knows, else None."""
    words = set(re.findall(r"\w+", device_name))
    return next((peak * 1e12 for key, peak in PEAKS.items() if words.issuperset(key.split())), None)


class Screen:
    """The status line of a run, its recent speed, and the lines that stay."""

    def __init__(self, arm, budget, say=print, status=None):
        """`status` gets the record of the last step every two seconds, in place of the line."""
        self.arm, self.budget, self.print, self.status, self.bar = arm, budget, say, status, None
        self.recent, self.said = deque(), -float("inf")
        self.terminal = say is print and status is None and sys.stdout.isatty()
        self.every = 2 if status else 1 if self.terminal else 60
        self.cuda = arm.device.type == "cuda"
        self.peak = peak_flops(torch.cuda.get_device_name(arm.device)) if self.cuda and arm.bf16 else None

    def mark(self):
        """After every step, and before the first: remembers where the run is, as far back as a rate looks."""
        self.recent.append((self.budget.seconds, self.budget.steps, self.budget.progress))
        while len(self.recent) > 2 and self.recent[-1][0] - self.recent[1][0] >= RECENT:
            self.recent.popleft()

    def per_second(self):
        """(steps, progress) per charged second, over the last RECENT of them."""
        (began, *before), (now, *after) = self.recent[0], self.recent[-1]
        return [(b - a) / max(now - began, 1e-9) for a, b in zip(before, after, strict=True)]

    def speed(self):
        """What the log has of it: tokens per second, and on CUDA the most memory that was taken so far, and MFU."""
        config, arm, (steps, _) = self.arm.config, self.arm, self.per_second()
        found = {"tokens_per_second": round(steps * config.batch_size * config.seq_len, 1)}
        if self.cuda:
            found["memory"] = torch.cuda.max_memory_allocated(arm.device)
            if self.peak:
                flops = steps * config.batch_size * sum(flops_of(arm, arm.number)) / arm.ranks.size
                found["mfu"] = round(flops / self.peak, 4)
        return found

    def show(self, record):
        """The status line, where it is due."""
        if time.monotonic() - self.said < self.every:
            return
        self.said = time.monotonic()
        if self.status:
            return self.status(record)
        budget, speed, (_, rate) = self.budget, self.speed(), self.per_second()
        left = quantity((1 - budget.progress) / rate / 3600, "hours") if rate > 0 else "?"
        memory = f", {speed['memory'] / 1e9:.1f} GB" if "memory" in speed else ""
        mfu = f", MFU {speed['mfu']:.0%}" if "mfu" in speed else ""
        text = (f"{spent(budget.progress * budget.total, budget.total, budget.unit)}, {left} left, "
                f"loss {record['loss']:.4f}, {speed['tokens_per_second']:,.0f} tokens/s{memory}{mfu}, "
                f"gradient {record['gradient_norm']:.3g}")
        if not self.terminal:
            return self.print(f"step {record['step']:,}, {text}")
        if self.bar is None:
            self.bar = tqdm(desc=text, total=1.0, file=sys.stdout, leave=False, dynamic_ncols=True,
                            bar_format="|{bar:12}| {desc}")
        self.bar.n = budget.progress
        self.bar.set_description_str(text)

    def say(self, line):
        """A line that stays."""
        self.bar.write(line, file=sys.stdout) if self.bar else self.print(line)

    def close(self):
        if self.bar:
            self.bar.close()
            self.bar = None


def what_next(out, has_head):
    """The last lines of a run."""
    ask = f"ask the model:     python watch.py --model {out}/model --sentence \"the [MASK] sat\"\n" if has_head else ""
    return (f"look at the run:   python watch.py {out}\n{ask}"
            f"fine-tune it:      python finetune_glue.py --model {out}/model --glue-dir glue")


def quantity(value, unit):
    if unit == "hours":
        return f"{value * 3600:.0f} s" if value < 1 / 6 else f"{int(value)}:{int(value * 60) % 60:02} h"
    return f"{value:.3g} FLOPs" if unit == "flops" else f"{value:,.0f} {unit}"


def spent(value, total, unit):
    """60 of 360 s, 16.7%"""
    so_far, whole = quantity(value, unit), quantity(total, unit)
    if so_far.split()[1] == whole.split()[1]:
        so_far = so_far.split()[0]
    return f"{so_far} of {whole}, {value / total:.1%}"


def changes(val, before):
    """Each term's validation loss, with its change since the last validation."""
    return ", ".join(f"{term} {v:.5g}" + (f" ({v - before[term]:+.2g})" if term in before else "")
                     for term, v in val.items())
