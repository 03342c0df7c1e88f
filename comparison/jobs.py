"""Worker processes over one plan: each takes the runs that no other one works on (plumbing.files.claim_each).

The workers write to OUT/jobs/N.log; this process shows one line over all of them.  Ctrl-C reaches them all,
each leaves a checkpoint, and the same command goes on.  A worker that fails stops the others.
"""
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch

from plumbing.cli import ENDING, UserError


def worker(do, config, log, threads, gpu):
    """do(config) in a process of its own, what it prints in `log`; it exits with a status that reason() reads."""
    sys.stdout = sys.stderr = open(log, "w", 1, encoding="utf-8", errors="replace")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    for number in (signal.SIGINT, *ENDING):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    torch.set_num_threads(threads)
    try:
        do(config)
    except UserError as e:
        sys.exit(f"error: {e}")                         # multiprocessing writes it, as it does the traceback of others


def reason(code, log):
    """Why a worker stopped: the signal that ended it, or the last line of its log."""
    if number := -code if code < 0 else max(0, code - 128):
        return (f"signal {number}, {signal.strsignal(number)}"
                + ": perhaps there was no memory left" * (number == signal.SIGKILL))
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return (lines or ["no word"])[-1].removeprefix("error: ")


def run_jobs(jobs, do, config, out, status):
    """Runs do(config) in `jobs` processes to their end; `status()` is the line that is said now and then.

    On CUDA each process has a GPU of its own, on a CPU its share of the threads."""
    folder = Path(out) / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    processes = [multiprocessing.get_context("spawn").Process(target=worker, args=(
        do, config, folder / f"{i}.log", threads, gpus[i % len(gpus)])) for i in range(jobs)]
    said = time.monotonic()
    try:
        for p in processes:
            p.start()
        while None in (codes := [p.exitcode for p in processes]) or any(codes):
            for i, code in enumerate(codes):
                if code:
                    raise UserError(f"worker {i} of {jobs} stopped ({reason(code, folder / f'{i}.log')}): "
                                    f"{folder}/{i}.log; the same command goes on")
            time.sleep(0.2)
            if time.monotonic() - said >= 10:
                said = time.monotonic()
                print(status())
    finally:
        started = [p for p in processes if p.pid]
        for p in started:
            p.terminate()
        for p in started:
            p.join()
