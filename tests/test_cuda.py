"""What only a GPU can show: `python -m pytest -m cuda` is the first minutes on one (then: bench_throughput.py).

Without a GPU each is skipped, visibly; NANOKD_CUDA_ON_CPU=1 runs what a CPU can of them, to see that they still run."""
import contextlib
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import bench_throughput
import finetune_glue
import train
from data import phase_blocks
from model import BertForMaskedLM
from plumbing import checkpoint
from plumbing.device import ready_process
from step import Arm
from strategies import PHASED, STRATEGIES

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(
    not (GPU or os.environ.get("NANOKD_CUDA_ON_CPU")), reason="needs a GPU")]
SMALL = dict(size="2L128", teacher_size="4L128", vocab_size=999, seq_len=64, batch_size=16, micro_batch=4, dropout=0.0)


def random_arm(strategy, device, compiled=False, bf16=False, **sizes):
    """(an arm with random weights, blocks of random ids)"""
    bench = bench_throughput.Config(**SMALL | sizes, device=str(device), compile=compiled, bf16=bf16).for_machine()
    ready_process(device)
    torch.manual_seed(0)
    of_arm = bench.of_arm(strategy)
    shapes = [bench.shape(bench.size), bench.shape(bench.teacher_size)][:1 + of_arm.needs_teacher]
    arm = Arm(of_arm, *(BertForMaskedLM(shape).to(device) for shape in shapes))
    arm.make_optimizer()
    return arm, phase_blocks(arm.phase, bench_throughput.random_tokens(bench.vocab_size), "train", 0)


@contextlib.contextmanager
def no_wait():
    """What waits for the GPU in here is an error."""
    if GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")


def five_steps(arm, blocks):
    """Values (5, terms) of five steps; the fourth waits for nothing, and after the third nothing is compiled."""
    rows, stages = [], train.Stages(arm.device)
    for i in range(5):
        graphs = counters["stats"]["unique_graphs"]
        with no_wait() if i == 3 else contextlib.nullcontext():
            _, values = train.gradients(arm, blocks.batch(i, 16), i, stages)
        rows.append(values.tolist())                                    # the step's one wait
        with no_wait() if i == 3 else contextlib.nullcontext():
            arm.update(1e-3, rows[-1][-1])
        assert i < 3 or counters["stats"]["unique_graphs"] == graphs
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("strategy", [*STRATEGIES, *PHASED])
def test_five_steps_are_the_same_on_a_cpu_on_a_gpu_and_compiled(strategy):
    """1e-3 in fp32, 5e-2 between bf16 and fp32, relative; a warm step waits for nothing and compiles nothing."""
    def steps(device, **how):
        return five_steps(*random_arm(strategy, device, **how))
    cpu, eager, compiled = steps(torch.device("cpu")), steps(DEVICE), steps(DEVICE, compiled=GPU)
    eager_bf16, compiled_bf16 = steps(DEVICE, bf16=True), steps(DEVICE, compiled=GPU, bf16=True)
    for a, b, allowed in ((cpu, eager, 1e-3), (eager, compiled, 1e-3), (eager, eager_bf16, 5e-2),
                          (eager_bf16, compiled_bf16, 5e-2)):
        assert ((a - b).abs() / a.abs().clamp(min=1e-3)).max() < allowed


def test_a_run_that_was_stopped_goes_on_to_nearly_the_same_weights(tiny, tmp_path, often, capsys):
    """Two equal runs differ on CUDA (a sum by atomic additions); a stopped one differs by no more than tenfold that."""
    def final(name, stop_at=None):
        config = tiny(device=str(DEVICE), budget_steps=40, out=str(tmp_path / name), micro_batch=8)
        if stop_at:
            def status(record):
                if record["step"] >= stop_at:
                    raise KeyboardInterrupt
            with contextlib.suppress(KeyboardInterrupt):
                train.train(config, say=lambda line: None, status=status)
        train.train(config, say=lambda line: None)
        return checkpoint.load_mlm(tmp_path / name / "model").model.state_dict()
    a, b, c = final("a"), final("b"), final("c", stop_at=5)
    again, resumed = (max((a[name] - other[name]).abs().max().item() for name in a) for other in (b, c))
    with capsys.disabled():
        print(f"\nlargest difference of a weight: run again {again:.1e}, stopped and resumed {resumed:.1e}")
    assert resumed <= max(1e-5, 10 * again)


def test_an_hour_budget_is_overshot_by_less_than_a_step(tiny, tmp_path):
    config = tiny(device=str(DEVICE), budget_steps=None, budget_hours=5 / 3600)
    summary = train.train(config, say=lambda line: None)
    assert 0 <= summary["overshoot"] * 5 <= 3 * summary["charged_seconds"] / summary["steps"]
    assert sum(summary["charged"].values()) == pytest.approx(summary["charged_seconds"], rel=0.1)


def test_a_classifier_of_a_gpu_says_the_same_in_transformers_on_a_cpu(teacher, tmp_path):
    transformers = pytest.importorskip("transformers")
    task = tmp_path / "task"
    task.mkdir()
    rng = np.random.default_rng(0)
    rows = ["".join(rng.choice([*"abcdefgh "], rng.integers(10, 90))) for _ in range(80)]
    for name, part in (("train", rows[:48]), ("dev", rows[48:])):
        (task / f"{name}.tsv").write_text("text\tlabel\n" + "".join(f"{t}\t{i % 2}\n" for i, t in enumerate(part)))
    config = finetune_glue.Config(model=str(teacher), tasks=f"mine={task}", quick=True, seeds=1, epochs=2, save=True,
                                  max_len=32, out=str(tmp_path / "out"), device=str(DEVICE))
    finetune_glue.score_model(config, say=lambda line: None)
    logits, = (tmp_path / "out/trials").glob("*.npy")
    saved = logits.with_suffix("")
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(saved).eval()
    with torch.no_grad():
        theirs = torch.cat([model(**tokenizer(row, return_tensors="pt", truncation=True, max_length=32)).logits
                            for row in rows[48:]]).numpy()
    ours = np.load(logits)
    assert abs(theirs - ours).max() < 1e-2 and (theirs.argmax(1) == ours.argmax(1)).all()


def test_the_paper_s_sizes_fit_and_every_arm_runs_compiled():
    """6L768 from 12L768 at micro-batch 256 in bf16, one step of each of the paper's arms."""
    if not GPU:
        pytest.skip("a CPU takes minutes")
    for strategy in ("no_kd", "vanilla_kd", "tinybert", "minilm", "minilmv2"):
        paper = dict(size="6L768", teacher_size="12L768", vocab_size=30522, seq_len=128, batch_size=256,
                     micro_batch=256, dropout=0.1)
        arm, blocks = random_arm(strategy, DEVICE, compiled=True, bf16=True, **paper)
        names, values = train.gradients(arm, blocks.batch(0, 256), 0, train.Stages(DEVICE))
        assert all(np.isfinite(values.tolist())), json.dumps(dict(zip(names, values.tolist(), strict=True)))
        del arm
        torch.cuda.empty_cache()


def test_bench_on_this_device_names_it(capsys):
    bench_throughput.main(replace(bench_throughput.Config(**SMALL), strategies="tinybert", seconds=0,
                                  device=str(DEVICE)))
    assert torch.cuda.get_device_name() in capsys.readouterr().out if GPU else True
