"""The first hour of this code on a GPU, unattended: what docs/gpu.md says has not run yet.

    python -m plumbing.gpu_first --data data/wiki --glue-dir glue --out gpu_first      # at most forty minutes
    python -m plumbing.gpu_first --parts env,micro,parity --out gpu_first                   # no data needed
    python -m plumbing.gpu_first --data data/wiki --tiny --out dry_run                    # a dry run on a CPU

Each part is a process of its own with a time limit, a log in OUT and the end of that log in OUT/report.md; a
part that fails stops no other.  It follows the names of step.py, train.py and bench_throughput.py:
tests/test_bench.py runs it.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import bench_throughput
import train
from data import Blocks
from model import BertForMaskedLM
from plumbing import checkpoint
from plumbing.cli import Checked, UserError, run, writable
from plumbing.device import ready_process
from step import Arm
from strategies import STRATEGIES

ROOT = Path(__file__).parent.parent
SMALL = ["--size", "2L32", "--heads", "2", "--seq-len", "32", "--batch-size", "8", "--val-blocks", "8"]


@dataclass
class Config(Checked):
    parts: str = "env,micro,parity,bench,profile,train,resume,glue,tests"       # in this order
    out: str = "runs/gpu_first"         # directory for logs, report.md and the runs
    data: str | None = None             # token directory, for train, resume and glue
    glue_dir: str | None = None         # folder of GLUE's official TSVs, for glue; default: from the Hub
    tasks: str = "rte"                  # for glue, as finetune_glue.py takes them
    tiny: bool = False                  # everything small, on a CPU: does it still run?
    here: bool = False   # the parts in this process, without limit or report

    @property
    def device(self):
        return torch.device("cpu" if self.tiny else "cuda")


# --------------------------------------------------------------------------------------- what it is that runs

def env(config):
    """Versions, the attention that torch chooses, whether anything compiles."""
    if shutil.which("nvidia-smi"):
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout[:1500])
    print("torch", torch.__version__, "CUDA", torch.version.cuda, "compiler",
          shutil.which("gcc") or shutil.which("cc"))
    if config.tiny:
        return
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
    q = torch.randn(8, 12, 128, 64, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(8, 1, 1, 128, device="cuda", dtype=torch.bool)
    for label, x, named in (("a student's", q, dict(dropout_p=.1)), ("a teacher's", q, {}),
                            ("under a mask", q, dict(attn_mask=mask, dropout_p=.1)),
                            ("predicting, fp32", q.float(), dict(attn_mask=mask))):
        choice = names.get(int(torch._fused_sdp_choice(x, x, x, **named)))
        print(f"torch's choice of attention, {label}:", choice)
    began, compiled = time.monotonic(), torch.compile(lambda x: F.dropout(F.gelu(x), .1).sum(), dynamic=False)
    print(f"compiled: {compiled(torch.randn(1000, 768, device='cuda')).item():.1f} in "
          f"{time.monotonic() - began:.1f} s")


def milliseconds(f, times=20):
    for _ in range(3):
        f()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(times):
        f()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / times


def micro(config):
    """Rates of a copy, of the products of a 6L768 step, of the LM head by V, of relations by precision."""
    if config.tiny:
        return
    def random(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device="cuda", dtype=dtype)

    def product(label, a, b):
        ms = milliseconds(lambda: a @ b)
        flops = 2 * a.shape[:-1].numel() * a.shape[-1] * b.shape[-1]
        print(f"{label:24} {tuple(a.shape)} x {tuple(b.shape)}: {ms:.3f} ms, {flops / ms / 1e9:.0f} TFLOP/s")
    a, b = torch.empty(2, 2 ** 30, device="cuda", dtype=torch.uint8)
    print(f"copy: {2 * 2 ** 30 / milliseconds(lambda: b.copy_(a)) / 1e9:.2f} TB/s")
    tokens, masked, D = 256 * 128, 256 * 19, 768
    for label, m, k, n in (("large", 8192, 8192, 8192), ("q alone", tokens, D, D),
                           ("q, k, v", tokens, D, 3 * D),
                           ("feed-forward, in", tokens, D, 4 * D), ("feed-forward, out", tokens, 4 * D, D)):
        product(label, random(m, k), random(n, k).t())
    for V in (30522, 30528):
        h, w, g = random(masked, D), random(V, D), random(masked, V)
        for label, x, y in (("logits", h, w.t()), ("their gradient to h", g, w),
                            ("to the weights", g.t(), h)):
            product(f"V {V}, {label}", x, y)
    for label, dtype, precision in (("fp32", torch.float32, "highest"), ("TF32", torch.float32, "high"),
                                    ("bf16", torch.bfloat16, "highest")):
        torch.set_float32_matmul_precision(precision)
        for heads, width in ((12, 64), (48, 16)):
            x = random(256 * heads, 128, width, dtype=dtype)
            product(f"relations, {label}", x, x.mT)


def make_arm(config, strategy, device, compiled, bf16, paper=False):
    """An arm with random weights: the paper's sizes, micro-batch 256, dropout 0.1; or small
    ones without dropout."""
    sizes = dict(dropout=0.1, micro_batch=256) if paper and not config.tiny else dict(
        size="2L128", teacher_size="4L128", vocab_size=999, seq_len=64, batch_size=16, micro_batch=4,
        dropout=0.0)
    bench = bench_throughput.Config(**sizes, device=str(device), compile=compiled, bf16=bf16).for_machine()
    ready_process(device)
    torch.manual_seed(0)
    of_arm = bench.of_arm(strategy)
    shapes = [bench.shape(bench.size), bench.shape(bench.teacher_size)][:1 + of_arm.needs_teacher]
    arm = Arm(of_arm, *(BertForMaskedLM(shape).to(device) for shape in shapes))
    arm.make_optimizer()
    return arm, Blocks(bench_throughput.RandomTokens(bench.vocab_size), "train", bench.seq_len, 0)


@contextlib.contextmanager
def no_wait(strict):
    """What waits for the GPU in here is an error."""
    if not strict:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def five_steps(arm, blocks):
    """(names, their values after each step, graphs compiled after the third step); the
    fourth waits for nothing."""
    from torch._dynamo.utils import counters
    rows, stages, graphs = [], train.Stages(arm.device), []
    for i in range(5):
        graphs.append(counters["stats"]["unique_graphs"])
        with no_wait(i == 3 and arm.device.type == "cuda"):
            names, values = train.gradients(arm, blocks.batch(i, 16), i, stages)
        rows.append(values.tolist())
        with no_wait(i == 3 and arm.device.type == "cuda"):
            arm.update(1e-3, rows[-1][-1])
    return names, torch.tensor(rows, dtype=torch.float64), counters["stats"]["unique_graphs"] - graphs[3]


def parity(config):
    """Five steps of every strategy: CPU = GPU = compiled, fp32 near bf16; a warm step waits for nothing
    and compiles nothing."""
    cpu, wrong = torch.device("cpu"), []
    for strategy in STRATEGIES:
        found = {}
        for label, device, compiled, bf16 in (
                ("CPU", cpu, False, False), ("eager", config.device, False, False),
                ("compiled", config.device, True, False), ("eager bf16", config.device, False, True),
                ("compiled bf16", config.device, True, True)):
            arm, blocks = make_arm(config, strategy, device, compiled and not config.tiny, bf16)
            names, found[label], graphs = five_steps(arm, blocks)
            if graphs:
                wrong.append(f"{strategy}, {label}: compiled again after its third step")
        for a, b, allowed in (("CPU", "eager", 1e-3), ("eager", "compiled", 1e-3),
                              ("eager", "eager bf16", 5e-2), ("eager bf16", "compiled bf16", 3e-2)):
            far = ((found[a] - found[b]).abs() / found[a].abs().clamp(min=1e-3)).amax(0)
            line = f"{strategy}, {a} and {b}: " + ", ".join(f"{n} {x:.1e}"
                                                            for n, x in zip(names, far, strict=True))
            print(line)
            wrong += [line] * bool(far.max() >= allowed)
    print("PARITY", "FAILED:\n" + "\n".join(wrong) if wrong else "holds")
    sys.exit(bool(wrong))


def bench(config):
    """Tokens/s of the arms, at both micro-batches and with inductor's tuning of kernels."""
    small = ["--size", "2L128", "--teacher-size", "4L128", "--vocab-size", "999", "--batch-size", "8",
             "--seconds", "0"]
    two, five = "no_kd,tinybert", "no_kd,vanilla_kd,tinybert,minilm,minilmv2"
    for name, flags, extra in (("micro-256", ["--micro-batch=256", "--strategies", five, "--seconds=60"], {}),
                               ("micro-1024", ["--micro-batch", "1024", "--strategies", two], {}),
                               ("tuned", ["--micro-batch", "256", "--strategies", two],
                                {"TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1"}))[:1 if config.tiny else 3]:
        flags = [*small, "--device", "cpu"] if config.tiny else ["--seconds", "20", *flags]
        script("bench_throughput.py", *flags, "--json", Path(config.out, f"bench-{name}.json"), extra=extra)


def profile(config):
    """Where a step's time goes, by kernel."""
    from torch.profiler import ProfilerActivity
    kinds = dict(products=r"gemm|cutlass|nvjet|sm90_xmma|cublas", attention=r"flash|fmha|sdpa|cudnn",
                 triton="triton", optimizer="multi_tensor|adam", copies="Memcpy|Memset")
    for strategy in ("no_kd", "tinybert", "minilmv2"):
        arm, blocks = make_arm(config, strategy, config.device, not config.tiny, True, paper=True)
        batches, stages = [blocks.batch(i, arm.config.batch_size) for i in range(4)], train.Stages(arm.device)

        def step(i, arm=arm, batches=batches, stages=stages):
            arm.update(1e-4, train.gradients(arm, batches[i], i, stages)[1].tolist()[-1])
        step(0)
        step(1)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not config.tiny)
        with torch.profiler.profile(activities=activities) as p:
            began = time.perf_counter()
            step(2)
            step(3)
            if not config.tiny:
                torch.cuda.synchronize()
            wall = 1e3 * (time.perf_counter() - began)
        rows = sorted(((e.self_device_time_total / 1e3, e.count, e.key) for e in p.key_averages()
                       if str(e.device_type).endswith("CUDA")), reverse=True)  # kernels, not what called them
        busy = sum(ms for ms, _, _ in rows)
        of_kind = {kind: sum(ms for ms, _, key in rows if re.search(words, key, re.I))
                   for kind, words in kinds.items()}
        print(f"{strategy}: two steps {wall:.1f} ms, device busy {busy / wall:.0%}, "
              f"{sum(n for _, n, _ in rows)} launches; "
              + ", ".join(f"{kind} {ms:.1f} ms" for kind, ms in of_kind.items()))
        for ms, count, key in rows[:20]:
            print(f"  {ms:8.2f} ms {count:5} x {key[:100]}")


# ---------------------------------------------------------------------------------------------- real commands

def started(*argv, extra=(), **named):
    """One of the project's commands."""
    print("$ python", *argv, flush=True)
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, env=os.environ | dict(extra),
                            **named)


def script(*argv, **named):
    """The same to its end; its failure is this part's."""
    if started(*argv, **named).wait():
        sys.exit(1)


def training(config, name, strategy, *flags):
    """The command line of a run in OUT/runs/NAME."""
    size = SMALL + ["--device", "cpu"] if config.tiny else ["--size", "12L768"] * (name == "teacher")
    return ["train.py", "--data", config.data, "--out", f"{config.out}/runs/{name}", "--strategy", strategy,
            "--teacher", f"{config.out}/runs/teacher/model", *size, *flags]


def train_runs(config):
    """A teacher, tinybert and no_kd under hour budgets: overshoot, shares of the clock."""
    for name, strategy, seconds in (("teacher", "no_kd", 60), ("tinybert", "tinybert", 40),
                                    ("no_kd", "no_kd", 20)):
        hours = (1 if config.tiny else seconds) / 3600
        script(*training(config, name, strategy, "--budget-hours", hours))
        summary = json.loads(Path(config.out, "runs", name, "summary.json").read_text(encoding="utf-8"))
        print({k: summary[k] for k in ("steps", "tokens_per_second", "teacher_share", "charged", "uncharged",
                                       "overshoot", "val", "device", "bf16")})


def resume(config):
    """The same 40 steps twice, and once stopped and resumed: how far apart are the weights?"""
    flags = "--budget-steps", "40", "--log-every", "1"
    for name in "ab":
        script(*training(config, name, "tinybert", *flags))
    third = training(config, "c", "tinybert", *flags)
    stopped = started(*third, stdout=subprocess.PIPE, text=True)
    for line in stopped.stdout:
        if line.startswith("step "):
            stopped.send_signal(signal.SIGTERM)
    print("stopped with status", stopped.wait())
    script(*third)
    a, b, c = (checkpoint.load_mlm(Path(config.out, "runs", name, "model")).model.state_dict()
               for name in "abc")
    for label, other in (("again", b), ("stopped and resumed", c)):
        far = {name: (a[name] - other[name]).abs().max().item() for name in a if name.startswith("bert.")}
        worst = max(far, key=far.get)
        print(f"{label}: {sum(x > 0 for x in far.values())} of {len(far)} tensors differ, by up to "
              f"{far[worst]:.1e} ({worst})")


def glue(config):
    """Four fine-tuning trials in one process, in four processes on one --out, and compiled."""
    small = ["--epochs", "1", "--max-len", "32", "--device", "cpu"] if config.tiny else []
    for name, processes, flags in (("one", 1, []), ("four", 4, []),
                                   ("compiled", 1, ["--compile"]))[:3 - config.tiny]:
        began, out = time.monotonic(), f"{config.out}/runs/glue-{name}"
        command = ["finetune_glue.py", "--model", f"{config.out}/runs/tinybert/model", "--quick",
                   "--seeds", "4", "--tasks", config.tasks, "--out", out,
                   *["--glue-dir", config.glue_dir] * bool(config.glue_dir)]
        shared = [started(*command, *flags, *small) for _ in range(processes)]
        if any([each.wait() for each in shared]):
            sys.exit(1)
        print(f"{name}: {time.monotonic() - began:.0f} s")


def tests(config):
    """The project's tests of the step, the loop and the losses, in a copy that takes the GPU, eager."""
    if config.tiny:
        return
    copy = Path(config.out, "runs/tests")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "data"), dirs_exist_ok=True)
    conftest = copy / "tests/conftest.py"
    conftest.write_text(conftest.read_text("utf-8").replace('device="cpu"', 'device="cuda", compile=False'), "utf-8")
    files = [f"tests/test_{name}.py" for name in ("train", "bench", "kd_losses")]
    subprocess.run([sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "not slow", *files],
                   cwd=copy, check=True)


# (what, seconds)
PARTS = dict(env=(env, 60), micro=(micro, 90), parity=(parity, 500), bench=(bench, 500),
             profile=(profile, 200),
             train=(train_runs, 300), resume=(resume, 200), glue=(glue, 300), tests=(tests, 200))


def ended(part, flags, log):
    """The exit status of a part in a process of its own, or that its time was up."""
    with open(log, "w", encoding="utf-8") as f:
        process = subprocess.Popen(
            [sys.executable, "-m", "plumbing.gpu_first", "--here", "--parts", part, *flags],
            cwd=ROOT, stdout=f, stderr=f, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "TORCH_LOGS": "recompiles"})
        try:
            return process.wait(PARTS[part][1])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)                      # and what it has started
            process.wait()
            return f"stopped after its {PARTS[part][1]} s"


def main(config):
    if unknown := set(config.parts.split(",")) - set(PARTS):
        raise UserError(f"--parts {config.parts}: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if not (config.tiny or torch.cuda.is_available()):
        raise UserError("torch sees no CUDA device here: give --tiny for a dry run on the CPU")
    if config.here:
        for part in config.parts.split(","):
            PARTS[part][0](config)
        return
    out, failed = writable(config.out).resolve(), []
    out.mkdir(parents=True, exist_ok=True)
    paths = dict(data=config.data, glue_dir=config.glue_dir)
    given = [f"--{name.replace('_', '-')}={Path(path).resolve()}" for name, path in paths.items() if path]
    given += [f"--tasks={config.tasks}"] + ["--tiny"] * config.tiny
    for part in config.parts.split(","):
        if part in ("train", "resume", "glue") and not config.data:
            print(f"{part}: left out: it needs --data")
            continue
        began, log = time.monotonic(), out / f"{part}.log"
        status = ended(part, [f"--out={out}", *given], log)
        failed += [part] * (status != 0)
        said = f"{part}: {status or 'good'}, {time.monotonic() - began:.0f} s"
        with open(out / "report.md", "a", encoding="utf-8") as report:
            report.write(f"\n## {said}\n\n```\n{log.read_text('utf-8', 'replace')[-6000:]}\n```\n")
        print(said)
    if failed:
        raise UserError(f"{', '.join(failed)} did not end well: see {out}/report.md")


if __name__ == "__main__":
    run(main, Config, __doc__)
