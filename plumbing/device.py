"""Which device a process works on, and what it needs there: chosen, alone under hours, made ready."""
import contextlib
import ctypes
import dataclasses
import functools
import os
import re
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from plumbing.cli import UserError
from plumbing.files import lock


class Ranks:
    """The processes of a torchrun, or this one alone.  All decide on sums that all see alike."""

    def __init__(self):
        """From torchrun's environment: with a part of it, a run would write nothing or wait for ever."""
        given = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
        texts = [alone if text is None else text for text, alone in zip(given, "010", strict=False)]
        whole = all(re.fullmatch("[0-9]{1,9}", text) for text in texts)
        self.rank, self.size, self.local = map(int, texts) if whole else (1, 0, 1)
        if max(self.rank, self.local) >= self.size or (given[0] is None) != (given[1] is None) or (
                self.size > 1 and None in given[3:]):
            raise UserError("RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT in the environment are not what "
                            "torchrun puts there: start this with torchrun, or unset them")

    def join(self, device):
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    def leave(self):
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def sum(self, values):
        """The tensor's sum over ranks, as a list.  For a tensor on the device it waits for the device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values.tolist()


def choose_device(name=None):
    """The device of --device, made the current one; without a name CUDA where there is one, under torchrun one each."""
    gpus, ranks = torch.cuda.device_count(), Ranks()
    name = name or ("cuda" if gpus else "cpu")
    found = re.fullmatch(r"cpu|cuda(:[0-9]{1,4})?", name)
    if not found:
        raise UserError(f"--device {name}: must be cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device(name)
    if found[1] and ranks.size > 1:
        raise UserError(f"--device {name}: {ranks.size} processes would share one GPU: --device cuda gives each its "
                        f"own")
    index = int(found[1][1:]) if found[1] else ranks.local
    if index >= gpus:
        raise UserError(f"--device {name}: torch sees {gpus} CUDA device(s) here: give "
                        + (f"one below cuda:{gpus}, or fewer processes" if gpus else "--device cpu"))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def gpu_uuid(device):
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def hardware(device):
    """Whose seconds they are."""
    return (torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)")


@contextlib.contextmanager
def alone_on_device(device, unit):
    """Under an hour budget one run of a user is on a GPU, else each would get a part of its hours; a CPU has cores."""
    uuid = gpu_uuid(device) if unit == "hours" else None
    file = Path(tempfile.gettempdir(), f"nanokd-{getattr(os, 'getuid', int)()}-{uuid}.lock")
    with lock(file) if uuid else contextlib.nullcontext(True) as ours:
        if not ours:
            raise UserError(f"--budget-hours: another run under an hour budget is on {device} ({uuid}), and each would "
                            f"get a part of its hours: wait for it, or give another --device, or --budget-flops")
        yield


def halve_micro_batch_until_it_fits(main):
    """Decorator of a main(config, ...), which gets config.for_machine(), where --micro-batch is chosen if it is not
    given.  Too large a choice is halved, until a run begins; else no memory left is one line that names the device."""
    @functools.wraps(main)
    def told(config, *args, **named):
        free, config = config.micro_batch is None and Ranks().size == 1, config.for_machine()
        while True:
            try:
                return main(config, *args, **named)
            except torch.OutOfMemoryError as e:
                micro, (first, *_) = config.micro_batch, str(e).split("\n")
            if not free or micro % 2 or getattr(config, "has_begun", False):
                raise UserError(f"--micro-batch {micro} does not fit into the device's memory: give a smaller "
                                f"one{'' if free else ', or none: the largest that fits is found'} ({first})")
            config = dataclasses.replace(config, micro_batch=micro // 2)
            torch.cuda.empty_cache()
    return told


def fitting_micro_batch(device, batch_size):
    """--micro-batch where none is given: what memory holds (docs/gpu.md), a divisor of a process's share of a batch."""
    large = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= 80e9
    share = max(1, batch_size // Ranks().size)
    return next(m for m in range(min(1024 if large else 256, share), 0, -1) if share % m == 0)


def multiplies_in_bf16(device, asked=None):
    """What --bf16 asks for, else whether bf16 is faster here: an Intel CPU without AMX has it at half fp32's speed."""
    if asked is not None:
        return asked
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return able.get("amx_bf16", False) or (able.get("avx512_bf16", False) and "Intel" not in able.get("cpu_name", ""))


def ready_process(device):
    """What holds for the whole process, not for one arm."""
    torch._dynamo.config.recompile_limit = 64    # arms share a forward pass's code: 8 variants are too few
    if device.type == "cpu":        # glibc hands large freed tensors back and takes them again in every step
        with contextlib.suppress(OSError, AttributeError):              # another C library: as it likes
            mallopt, trim_threshold, mmap_max = ctypes.CDLL("libc.so.6").mallopt, -1, -4        # malloc.h
            mallopt(trim_threshold, -1)
            mallopt(mmap_max, 0)
