"""The bench measures train.py's step; the step has no mask, does not recompile, and draws the dropout it says."""
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_throughput as bench
import cli
import model
import train
from arm import Arm, flops_per_block, make_arm
from data import Blocks, TokenDirectory
from kd_losses import STRATEGIES
from model import BertForMaskedLM

TINY = bench.Config(size="2L32", teacher_size="3L48", heads=None, vocab_size=300, seq_len=32, batch_size=8,
                    micro_batch=4, strategies="vanilla_kd,minilmv2", seconds=0.0, device="cpu", bf16=False)


def test_the_table_holds_every_arm_against_no_kd_and_its_flops(capsys, tmp_path):
    bench.main(dataclasses.replace(TINY, as_released=True, json=str(tmp_path / "bench.json")))
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = {r["arm"]: r for r in found["rows"]}
    assert list(rows) == ["no_kd", "vanilla_kd", "minilmv2", "vanilla_kd, as released", "minilmv2, as released"]
    assert rows["no_kd"]["cost"] == rows["no_kd"]["by FLOPs"] == "1.00" and "MFU" not in rows["no_kd"]
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in found["seconds"].values())
    # minilmv2 stops early by itself, and not as released; the table says what flops_per_block says
    assert float(rows["minilmv2"]["by FLOPs"]) < float(rows["minilmv2, as released"]["by FLOPs"])
    config = TINY.for_machine()
    shapes = config.shape("2L32"), config.shape("3L48")
    ratio = sum(flops_per_block(config.of_arm("vanilla_kd"), *shapes)) / flops_per_block(
        config.of_arm("no_kd"), shapes[0])[0]
    assert float(rows["vanilla_kd"]["by FLOPs"]) == pytest.approx(ratio, abs=0.005)
    assert "teacher" in rows["vanilla_kd"] and "teacher" not in rows["no_kd"]
    assert "| vanilla_kd |" in capsys.readouterr().out


def test_transformers_takes_its_turn(capsys):
    pytest.importorskip("transformers")
    bench.main(dataclasses.replace(TINY, strategies="no_kd", teacher_size="3L32", baseline="transformers"))
    out = capsys.readouterr().out
    assert "| transformers MLM |" in out and "| transformers TinyBERT |" in out


def test_the_baseline_masked_lm_is_the_same_loss():
    """transformers' own MLM loss on our labels, from our weights, is no_kd's."""
    hf = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, dropout=0.0).for_machine()
    shape = config.shape(config.size)
    ours = BertForMaskedLM(shape)
    theirs = hf.BertForMaskedLM(hf.BertConfig(**dataclasses.asdict(shape)))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.tie_weights()
    theirs.cls.predictions.bias.data = ours.cls.predictions.bias.data
    arms = Arm(config.of_arm("no_kd"), ours), bench.TransformersArm(config.of_arm("no_kd"), theirs.train())
    batch = Blocks(bench.RandomTokens(300), "train", 32, 0).batch(0, 8)
    losses = [arm.forward(*arm.to_device(batch))[0].item() for arm in arms]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_teacher_cost_has_a_row_for_each_saving(capsys):
    bench.main(dataclasses.replace(TINY, teacher_cost=True))
    out = capsys.readouterr().out
    assert all(f"| {name} |" in out for name in ("fp32 weights", "compiled", "stops at the last q, k, v"))


def test_the_loader_alone(capsys):
    bench.main(dataclasses.replace(TINY, loader=True))
    assert float(capsys.readouterr().out.split()[1].replace(",", "")) > 1e4


def test_peak_memory_counts_what_a_step_holds_at_once():
    config = TINY.for_machine()
    arm = Arm(config.of_arm("no_kd"), BertForMaskedLM(config.shape(config.size)))
    arm.make_optimizer()
    own = sum(p.nbytes for p in arm.student.parameters())

    def step():
        torch.zeros(250_000)
        kept = torch.zeros(500_000)
        return kept + 1
    assert bench.peak_memory(arm, step) == pytest.approx(own + 2 * 2_000_000, abs=100)


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
    ("NVIDIA H100 NVL", 835), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA A10", 125), ("NVIDIA A10G", None),
    ("NVIDIA GeForce RTX 4090", None), ("Tesla V100-SXM2-16GB", None)])
def test_mfu_is_of_known_devices_only(name, peak):
    assert bench.peak_flops(name) == (peak and peak * 1e12)


@pytest.mark.parametrize("argv, message", [
    (["--strategies", "magic"], "magic"), (["--baseline", "keras"], "keras"), (["--batch-size", "10"], "micro-batch"),
    (["--size", "6L"], "6L"), (["--strategies", "minilm", "--heads", "2"], "--heads 12")])
def test_a_users_mistake_is_one_line_and_status_2(argv, message):
    script = Path(cli.__file__).parent / "bench_throughput.py"
    done = subprocess.run([sys.executable, script, "--micro-batch", "4", "--size", "1L64", "--vocab-size", "99", *argv],
                          capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "error: " in line]      # a library may have warned before
    assert done.returncode == 2 and len(said) == 1 and message in said[0], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package, flag", [("transformers", "baseline"), ("matplotlib", "figure")])
def test_a_missing_package_is_named_before_anything_is_measured(package, flag, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(cli.UserError, match=f"pip install {package}"):
        bench.main(dataclasses.replace(TINY, **{flag: package}))


# ------------------------------------------------------------------------------------------------ the step itself

@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pretraining_has_no_attention_mask(tiny, corpus, strategy, monkeypatch):
    """A mask would take the fused kernels away."""
    masks, attention, fused = [], model.attention, torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, mask, p):
        masks.append(mask)
        return attention(q, k, v, mask, p)

    def spy_fused(*args, attn_mask=None, **named):
        masks.append(attn_mask)
        return fused(*args, attn_mask=attn_mask, **named)
    monkeypatch.setattr(model, "attention", spy)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy_fused)
    train.train(tiny(strategy=strategy, budget_steps=2), say=lambda line: None)
    assert len(masks) > 4 and all(mask is None for mask in masks)


def test_the_gradients_of_a_batch_do_not_depend_on_the_micro_batch(tiny, corpus):
    found = []
    for micro in (8, 2):
        arm = make_arm(tiny(strategy="tinybert", micro_batch=micro), TokenDirectory(corpus))
        batch = Blocks(TokenDirectory(corpus), "train", 32, 0).batch(0, 8)
        names, values = arm.gradients(batch, 0, train.Stages(arm.device))
        assert names == ("loss", "embd", "attn", "hidn", "gradient_norm")
        norm = sum(p.grad.square().sum() for p in arm.trained).sqrt()
        assert values[-1].item() == pytest.approx(norm.item(), rel=1e-5)
        found.append(values.tolist())
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.slow
def test_no_recompilation_after_the_warm_up(tiny, corpus):
    """The warm-up compiles the student, the teacher and the loss; five steps on other batches compile nothing."""
    from torch._dynamo.utils import counters
    arm = make_arm(tiny(strategy="minilm", compile=True, dropout=0.1, micro_batch=4), TokenDirectory(corpus))
    compiled = counters["stats"]["unique_graphs"]
    blocks = Blocks(TokenDirectory(corpus), "train", 32, 0)
    for i in range(5):
        _, values = arm.gradients(blocks.batch(i, 8), i, train.Stages(arm.device))
        arm.update(1e-3 / (i + 1), values[-1].item())
    assert compiled >= 3 and counters["stats"]["unique_graphs"] == compiled


@pytest.mark.slow
@pytest.mark.parametrize("strategy, as_released", [("minilm", True), ("tinybert", True), ("minilm", False)])
def test_compiled_arms_train_the_parameters_that_eager_ones_train(tiny, corpus, strategy, as_released):
    """Compiled, an output that no loss uses gives its weights a gradient of zeros instead of none."""
    eager, compiled = (make_arm(tiny(strategy=strategy, as_released=as_released, compile=c), TokenDirectory(corpus))
                       for c in (False, True))
    trained = [[name for name, p in arm.student.named_parameters() if p.requires_grad] for arm in (eager, compiled)]
    assert trained[0] == trained[1]


@pytest.mark.slow
def test_all_arms_compile_in_one_process(capsys):
    """Ten arms share the code of one forward pass, each with a variant of its own."""
    bench.main(dataclasses.replace(TINY, teacher_size="3L32", strategies=",".join(STRATEGIES), as_released=True,
                                   compile=True))
    assert capsys.readouterr().out.count("as released |") == 4


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_a_share_and_the_mean(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1001, 997, dtype=dtype, requires_grad=True)
    y = model.dropout(x, p)
    y.float().sum().backward()
    dropped = (y == 0).double()
    assert torch.equal(x.grad, y.detach()) and len(y.unique()) == 2     # the same elements backwards
    assert y.max().item() == pytest.approx(1 / (1 - p), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert dropped.mean() == pytest.approx(p, abs=5 * (p * (1 - p) / y.numel()) ** 0.5)
    for dim in (0, 1):                                                  # no row, no column, no neighbour stands out
        assert (dropped.mean(dim) - p).abs().max() < 6 * (p * (1 - p) / 997) ** 0.5
        neighbours = (dropped.roll(1, dim) * dropped).mean()
        assert neighbours == pytest.approx(p * p, abs=5 * (p * p / y.numel()) ** 0.5)
    torch.manual_seed(0)
    assert torch.equal(model.dropout(x, p), y) and torch.equal(model.dropout(x, 0.0), x)
