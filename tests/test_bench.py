"""The bench measures train.py's step; the step has no mask, waits for nothing, does
not recompile, and draws the dropout it says."""
import dataclasses
import re
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import bench_throughput as bench
import model
import train
from data import Blocks, phase_blocks
from model import BertForMaskedLM
from plumbing.budget import flops_per_block
from plumbing.screen import peak_flops
from plumbing.tokens import TokenDirectory
from plumbing.validation import validate
from step import Arm, make_arm
from strategies import AS_RELEASED, STRATEGIES, loss_terms

TINY = bench.Config(size="2L32", teacher_size="3L48", vocab_size=300, seq_len=32, batch_size=8,
                    micro_batch=4, strategies="vanilla_kd,minilmv2", seconds=0.0, device="cpu", bf16=False)


def test_the_table_holds_every_arm_against_no_kd_and_its_flops(capsys, monkeypatch):
    kept = []
    monkeypatch.setattr(bench, "take_turns", lambda entries, config, do=bench.take_turns: kept.extend(entries) or do(
        entries, config))
    bench.main(TINY)
    out = capsys.readouterr().out
    head, *lines = [re.split("  +", line) for line in out.splitlines()[2:8]]
    rows = {line[0]: dict(zip(head, line, strict=False)) for line in lines}
    assert list(rows) == ["no_kd", "vanilla_kd", "vanilla_kd as released", "minilmv2", "minilmv2 as released"]
    assert rows["no_kd"]["cost"] == rows["no_kd"]["FLOPs"] == "1.00"
    assert [name for name in rows if "paper" in rows[name]] == ["vanilla_kd", "vanilla_kd as released"]
    assert len(kept) == 5 and all(len(e.seconds) == 3 and min(e.seconds) > 0 for e in kept)
    # minilmv2 stops early by itself, and not as released; the table says what flops_per_block says
    assert float(rows["minilmv2"]["FLOPs"]) < float(rows["minilmv2 as released"]["FLOPs"])
    config = TINY.for_machine()
    shapes = config.shape("2L32"), config.shape("3L48")
    ratio = sum(flops_per_block(config.of_arm("vanilla_kd"), *shapes)) / flops_per_block(
        config.of_arm("no_kd"), shapes[0])[0]
    assert float(rows["vanilla_kd"]["FLOPs"]) == pytest.approx(ratio, abs=0.005)
    assert max(map(len, out.splitlines())) <= 80
    method, graph = " ".join(out.split("\nThe method: ")[1].split()).split(" The released graph: ")
    costs = [float(rows[name]["cost"]) for name in ("vanilla_kd", "minilmv2")]
    assert f"a distilled token costs {min(costs):.2f} to {max(costs):.2f} times" in method
    assert "as released" not in method and "the paper's 1.8" in graph


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
    ("NVIDIA H100 NVL", 835), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA A10", 125), ("NVIDIA A10G", None),
    ("NVIDIA GeForce RTX 4090", None), ("Tesla V100-SXM2-16GB", None)])
def test_mfu_is_of_known_devices_only(name, peak):
    assert peak_flops(name) == (peak and peak * 1e12)


# ------------------------------------------------------------------------------------------------ the step itself

@pytest.mark.parametrize("strategy", [name for name, s in STRATEGIES.items() if not s.seq_len])
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
        names, values = train.gradients(arm, batch, 0, train.Stages(arm.device))
        assert names == ("loss", "embd", "attn", "hidn", "gradient_norm")
        norm = sum(p.grad.square().sum() for p in arm.trained).sqrt()
        assert values[-1].item() == pytest.approx(norm.item(), rel=1e-5)
        found.append(values.tolist())
    assert found[0] == pytest.approx(found[1], rel=1e-4)


EVERY = [(name, False) for name in STRATEGIES] + [(name, True) for name in AS_RELEASED]


@pytest.mark.parametrize("strategy, as_released", EVERY)
def test_nothing_in_a_step_waits_for_the_device(strategy, as_released, monkeypatch):
    """On the meta device: there is no value to wait for, so .item(), .tolist(), a copy to the host or a mask whose
    trues have to be counted is an error."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, adamw=torch.optim.AdamW, **named: adamw(
        *args, fused=None, **named))                                    # there is no fused one for meta
    config = dataclasses.replace(TINY, strategies="no_kd", teacher_size="3L32").for_machine()
    of_arm = dataclasses.replace(config.of_arm(strategy, as_released), clip=1.0)
    with torch.device("meta"):
        arm = Arm(of_arm, *(BertForMaskedLM(config.shape(size)) for size in ("2L32", "3L32")))
        monkeypatch.setattr(torch, "from_numpy", lambda a, on_cpu=torch.from_numpy: on_cpu(a).to("meta"))
        arm.make_optimizer()
        batch = Blocks(bench.random_tokens(300), "train", 32, 0).batch(0, 8)
        names, values = train.gradients(arm, batch, 0, train.Stages(arm.device))
        assert values.device.type == "meta" and len(names) == len(values) == len(arm.strategy.terms) + 2
        arm.update(1e-3, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy, as_released", EVERY)
def test_a_step_is_three_whole_graphs_and_none_is_new_after_the_start(strategy, as_released, tiny, corpus, monkeypatch):
    """The start compiles the student, the teacher and the loss; steps on other batches compile nothing, nor does
    validation, which runs eagerly; no graph breaks."""
    from torch._dynamo.utils import counters
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    arm = make_arm(tiny(strategy=strategy, as_released=as_released, compile=True, bf16=True, dropout=0.1,
                        micro_batch=4), TokenDirectory(corpus))
    assert counters["stats"]["unique_graphs"] == 2 + bool(arm.teacher)
    blocks = phase_blocks(arm.phase, TokenDirectory(corpus), "train", 0)
    compiled = counters["stats"]["unique_graphs"]
    validate(arm, blocks)
    for i in range(3):
        _, values = train.gradients(arm, blocks.batch(i, arm.phase.blocks(8)), i, train.Stages(arm.device))
        arm.update(1e-3 / (i + 1), values[-1].item())
        validate(arm, blocks)
    assert counters["stats"]["unique_graphs"] == compiled and not counters["graph_break"]


@pytest.mark.parametrize("strategy", ["minilmv2", pytest.param("tinybert", marks=pytest.mark.slow),
                                      pytest.param("minilm", marks=pytest.mark.slow)])
def test_the_compiled_losses_gradient_is_as_precise_as_the_eager_one(strategy, tiny, corpus):
    """Against float64, from the same bf16 states: traced under autocast, its backward pass would run in bf16."""
    arm = make_arm(tiny(strategy=strategy, bf16=True), TokenDirectory(corpus))
    batch = arm.to_device(Blocks(TokenDirectory(corpus), "train", 32, 0).batch(0, 8))
    arm.loss_terms = lambda strategy, *states: (0 * tree_leaves(states[0])[0].sum(), states)
    s, t, context = arm.forward(*batch)[1]
    arm.run_teacher = lambda *_, **__: t

    def gradients(loss, dtype):
        """Of the loss, for everything that the student's forward pass left behind."""
        found, arm.loss_terms = [], loss
        arm.run_student = lambda *_, **__: tree_map(lambda x: found.append(x.detach().to(dtype).requires_grad_())
                                                  or found[-1], s)
        arm.forward(*batch)[0].backward()
        return [x.grad for x in found]
    eager = gradients(loss_terms, None)
    compiled = gradients(torch.compile(loss_terms, fullgraph=True, dynamic=False, backend="aot_eager"), None)
    exact = gradients(lambda strategy, s, t, c: loss_terms(
        strategy, s, tree_map(torch.Tensor.double, t), c._replace(proj=arm.proj.double())), torch.float64)
    reached = [i for i, x in enumerate(exact) if x is not None]             # TinyBERT compares no values
    errors = [[((found[i] - exact[i]).norm() / exact[i].norm()).item() for i in reached] for found in (eager, compiled)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-2) and len(reached) >= 3 and max(errors[0]) < 3e-3


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
    assert capsys.readouterr().out.count(" as released ") >= 4


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
