"""The budget, the schedule, and twenty steps of every strategy."""
import contextlib
import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model
import step as step_module
import train
from data import Blocks
from model import BertConfig, BertForMaskedLM
from plumbing import checkpoint
from plumbing.budget import flops_per_block
from plumbing.cli import UserError
from plumbing.device import fitting_micro_batch, multiplies_in_bf16
from plumbing.files import sha256
from plumbing.tokens import TokenDirectory
from plumbing.validation import FEW_BLOCKS, validate
from step import Arm, make_arm
from strategies import AS_RELEASED, STRATEGIES, mobilebert_stage

QUIET = dict(say=lambda line: None)


def test_learning_rate_at_the_corners_of_the_budget():
    assert train.learning_rate(0, 2.0) == 0 and train.learning_rate(1, 2.0) == 0
    assert train.learning_rate(0.06, 2.0) == pytest.approx(2.0)
    assert train.learning_rate(0.03, 2.0) == pytest.approx(1.0) and train.learning_rate(0.53, 2.0) == pytest.approx(1.0)
    assert train.learning_rate(0.5, 2.0, warmup=0.0) == pytest.approx(1.0)


class FakeClock:
    """Moves by `tick` seconds whenever it is read."""
    def __init__(self, tick):
        self.at, self.tick = 1e6, tick

    def __call__(self):
        self.at += self.tick
        return self.at


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_time_budget_stops_at_the_first_step_that_reaches_it(tiny, strategy):
    config = tiny(strategy=strategy, budget_steps=None, budget_hours=100 / 3600)
    summary = train.train(config, now=FakeClock(1.0), **QUIET)
    assert 100 <= summary["charged_seconds"] <= 100 + summary["charged_seconds"] / summary["steps"] + 1


def test_a_paused_clock_is_not_charged():
    at = [0.0]
    budget = train.Budget(1 / 360, "hours", now=lambda: at[0])          # 10 seconds
    budget.start()
    at[0] = 4.0
    with budget.pause("validation"):
        at[0] = 1000.0
    budget.seconds = budget.clock()
    assert budget.seconds == 4.0 and budget.progress == pytest.approx(0.4)
    assert budget.uncharged == {"validation": 996.0}
    at[0] = 1007.0
    budget.seconds = budget.clock()
    assert budget.progress == 1.0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_twenty_steps_lower_the_loss_and_leave_a_whole_run_directory(tiny, tmp_path, strategy):
    config = tiny(strategy=strategy, budget_steps=20, micro_batch=4, init="random")
    before = make_arm(config, TokenDirectory(config.data))
    frozen = {name for name, p in before.student.named_parameters() if not p.requires_grad}
    summary = train.train(config, **QUIET)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "val" not in line]
    assert [line["step"] for line in steps] == list(range(1, 21)) and set(STRATEGIES[strategy].terms) <= set(steps[0])
    assert sum(line["loss"] for line in steps[-4:]) < 0.97 * sum(line["loss"] for line in steps[:4])
    assert summary["tokens"] == 20 * 8 * 32 and summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert {"data", "student", "optimizer"} <= set(summary["charged"])

    # what the loss does not reach is frozen, and stays as it was initialised; all else has moved
    last = "bert.encoder.layer.1."
    expected = dict.fromkeys(("tinybert", "tinybert_layers", "sentence"), ("cls.",))
    expected |= dict.fromkeys(("minilm", "minilmv2"), (
        "cls.", last + "attention.output", last + "intermediate", last + "output"))
    assert frozen == {name for name, _ in before.student.named_parameters()
                      if name.startswith(expected.get(strategy, ()))}
    head = STRATEGIES[strategy].trains_lm_head
    after, missing, _ = checkpoint.load_mlm(tmp_path / "run/model")
    assert bool(missing) != head
    moved = {name for (name, a), b in zip(before.student.named_parameters(), after.parameters(), strict=True)
             if not torch.equal(a, b)}
    # (keys' biases shift all scores of a query alike, so a softmax never feels them)
    still = {n for n in moved ^ set(dict(before.student.named_parameters())) if "key.bias" not in n}
    assert {n for n in still if not n.startswith("cls.")} == {n for n in frozen if not n.startswith("cls.")}


@pytest.mark.parametrize("strategy, as_released", [(name, False) for name in STRATEGIES]
                         + [(name, True) for name in AS_RELEASED])
def test_the_layout_for_a_gpu_trains_the_same_student(tiny, corpus, monkeypatch, strategy, as_released):
    """A padded vocabulary and one product for q, k, v: the same losses over five steps, the same tensors to save."""
    losses, arms, blocks = [], [], Blocks(TokenDirectory(corpus), "train", 32, 0)
    for on_gpu in (False, True):
        monkeypatch.setattr(model, "on_gpu", lambda x, on=on_gpu: on)
        arm = make_arm(tiny(strategy=strategy, as_released=as_released), TokenDirectory(corpus))
        if as_released:
            arm.teacher.eval()                                          # its dropout depends on the layout
        for i in range(5):
            _, values = train.gradients(arm, blocks.batch(i, 8), i, train.Stages(arm.device))
            arm.update(1e-3, values[-1].item())
            losses.append(values.tolist())
        arms.append(arm)
    assert sum(losses[5:], []) == pytest.approx(sum(losses[:5], []), rel=2e-5, abs=1e-6)
    ours, theirs = (arm.student.state_dict() for arm in arms)
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}
    # AdamW's first steps are the gradient's sign: where that is nothing but rounding (keys' biases), they may differ
    far = [name for name in ours if "key.bias" not in name and (ours[name] - theirs[name]).abs().max() > 1e-3]
    assert not far


@pytest.mark.parametrize("able, expected", [
    (dict(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=True), True),
    (dict(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=False), False),        # half the speed of its fp32
    (dict(cpu_name="AMD EPYC", avx512_bf16=True), True),
    (dict(cpu_name="AMD EPYC"), False),
    (dict(), False)])
def test_a_cpu_computes_in_bf16_where_that_is_faster(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    cpu = torch.device("cpu")
    assert multiplies_in_bf16(cpu) is expected
    assert multiplies_in_bf16(cpu, True) is True and multiplies_in_bf16(cpu, False) is False


def test_of_what_bf16_leaves_in_fp32_on_a_gpu_forwards_and_backwards_run_in_tf32(tiny, corpus, monkeypatch):
    """And nothing after the step does: fine-tuning in the same process keeps its fp32."""
    arm, seen = make_arm(tiny(), TokenDirectory(corpus)), []
    loss, batch = arm.loss_terms, Blocks(TokenDirectory(corpus), "train", 32, 0).batch(0, 8)

    def spy(*args):
        total, terms = loss(*args)
        total.register_hook(lambda _: seen.append(torch.get_float32_matmul_precision()))
        seen.append(torch.get_float32_matmul_precision())
        return total, terms
    arm.loss_terms, tensors = spy, arm.to_device(batch)
    arm.to_device = lambda batch: tensors
    for device, bf16, expected in (("cpu", True, "highest"), ("cuda", False, "highest"), ("cuda", True, "high")):
        arm.device, arm.bf16 = torch.device(device), bf16
        monkeypatch.setattr(step_module, "autocast", lambda *_: contextlib.nullcontext())
        train.gradients(arm, batch, 0, train.Stages(torch.device("cpu")))
        assert seen == [expected] * 2 and torch.get_float32_matmul_precision() == "highest"
        seen.clear()


@pytest.mark.parametrize("compiled, passes", [(False, [8]), (True, [8, 16])])
def test_the_eager_pass_at_the_start_is_over_a_few_blocks(tiny, corpus, monkeypatch, compiled, passes):
    """A whole micro-batch takes more memory in it than in a compiled step."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    sizes, whole = [], Arm.forward

    def spy(arm, ids, *rest, **named):
        sizes.append(len(ids))
        return whole(arm, ids, *rest, **named)
    monkeypatch.setattr(Arm, "forward", spy)
    make_arm(tiny(compile=compiled, batch_size=16, micro_batch=16), TokenDirectory(corpus))
    assert sizes == passes


@pytest.mark.parametrize("method", ["make_optimizer", "forward", "update"])
def test_a_device_without_memory_is_one_line_that_names_the_micro_batch(tiny, monkeypatch, method):
    def spoilt(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")
    monkeypatch.setattr(Arm, method, spoilt)
    for given, said in ((4, "4 .*smaller one, or none: the largest that fits is found"), (None, "1 .*smaller one")):
        with pytest.raises(UserError, match=rf"--micro-batch {said} \(CUDA out of memory.*GiB\.\)$"):
            train.train(tiny(micro_batch=given), **QUIET)


def test_a_micro_batch_that_nobody_gave_is_halved_until_it_fits_and_then_kept(tiny, tmp_path, monkeypatch):
    """Only before the run begins: afterwards another one would change its dropout masks."""
    whole, room = Arm.forward, [2]

    def forward(arm, ids, *rest, **named):
        if len(ids) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(arm, ids, *rest, **named)
    monkeypatch.setattr(Arm, "forward", forward)
    config = tiny(micro_batch=None, budget_steps=3)
    train.train(config, **QUIET)
    kept = json.loads((tmp_path / "run/config.json").read_text())
    assert kept["micro_batch"] == 2 and json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 3
    (tmp_path / "run/summary.json").unlink()
    room[0] = 1
    with pytest.raises(UserError, match="--micro-batch 2 does not fit"):
        train.train(config, **QUIET)


@pytest.mark.parametrize("memory, batch, ranks, micro", [
    (None, 1024, 1, 256), (None, 10, 1, 10), (None, 1000, 1, 250), (15.8e9, 1024, 1, 256), (85.0e9, 1024, 1, 1024),
    (85.0e9, 2048, 1, 1024), (85.0e9, 64, 1, 64), (85.0e9, 1024, 8, 128), (15.8e9, 1024, 2, 256), (15.8e9, 3, 8, 1)])
def test_the_micro_batch_is_what_the_device_takes_and_divides_the_batch(memory, batch, ranks, micro, monkeypatch):
    for name, value in dict(RANK=0, WORLD_SIZE=ranks, MASTER_ADDR="localhost", MASTER_PORT=29500).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    device = torch.device("cuda", 0) if memory else torch.device("cpu")
    assert fitting_micro_batch(device, batch) == micro


def test_a_run_keeps_its_micro_batch_on_another_device(tiny, tmp_path, monkeypatch):
    """It seeds dropout: chosen anew, what follows would be another run's."""
    config, kill = tiny(micro_batch=None, budget_steps=2), lambda record: os.kill(os.getpid(), signal.SIGTERM)
    for chosen, status in ((4, kill), (2, None), (1, None)):            # stopped, finished, found finished
        monkeypatch.setattr(train, "fitting_micro_batch", lambda device, batch, chosen=chosen: chosen)
        with pytest.raises(SystemExit) if status else contextlib.nullcontext():
            summary = train.train(config, status=status, **QUIET)
    assert summary["steps"] == 2
    assert json.loads((tmp_path / "run/config.json").read_text())["micro_batch"] == 4
    assert "--micro-batch 4" in (tmp_path / "run/model/README.md").read_text()


def test_two_runs_under_an_hour_budget_do_not_share_a_gpu(tiny, tmp_path, monkeypatch):
    """Told by its uuid; the second is refused before it writes anything.  Other budgets may share."""
    monkeypatch.setattr("plumbing.device.gpu_uuid", lambda device: "GPU-of-a-test")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hours, refused = dict(budget_steps=None, budget_hours=1e-5, out=str(tmp_path / "hours")), []

    def second(record):
        with pytest.raises(UserError, match=r"on cpu \(GPU-of-a-test\).*another --device, or --budget-flops$") as e:
            train.train(tiny(**hours | dict(out=str(tmp_path / "second"))), **QUIET)
        refused.append(str(e.value))
        train.train(tiny(budget_steps=1, out=str(tmp_path / "steps")), **QUIET)
    train.train(tiny(**hours), status=second, **QUIET)
    assert len(refused) == 1 and "\n" not in refused[0] and not (tmp_path / "second").exists()
    train.train(tiny(**hours | dict(out=str(tmp_path / "second"))), **QUIET)


@pytest.mark.parametrize("strategy", [name for name, s in STRATEGIES.items() if s.needs("teacher")])
def test_the_teacher_gets_no_gradient_and_has_no_dropout(tiny, corpus, strategy):
    arm = make_arm(tiny(strategy=strategy, dropout=0.1), TokenDirectory(corpus))
    before = [p.clone() for p in arm.teacher.parameters()]
    ids, masked, labels = arm.to_device(Blocks(TokenDirectory(corpus), "train", 32, 0).batch(0, 8))
    total, _ = arm.forward(ids, masked, labels)
    total.backward()
    assert not arm.teacher.training and all(p.grad is None for p in arm.teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in arm.student.parameters())
    arm.update(1e-3, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, arm.teacher.parameters(), strict=True))


def test_validation_takes_every_block_whatever_the_micro_batch(tiny, corpus):
    blocks, found = Blocks(TokenDirectory(corpus), "val", 32, 0), []
    for micro in (1, 8, 11, 64):
        config = tiny(strategy="vanilla_kd", micro_batch=micro, batch_size=micro, val_blocks=29)
        arm = make_arm(config, TokenDirectory(corpus))
        found.append([*validate(arm, blocks).values(), *validate(arm, blocks, model=arm.teacher).values()])
    ids, masked, labels = arm.to_device(blocks.batch(0, 29))
    slowly = [torch.nn.functional.cross_entropy(m.eval()(ids, masked)["logits"], labels).item()
              for m in (arm.student, arm.teacher)]
    assert blocks.count > 29 and [found[0][0], found[0][2]] == pytest.approx(slowly, rel=1e-5)
    assert all(values == pytest.approx(found[0], rel=1e-5) for values in found)


@pytest.mark.parametrize("blocks", [0, 4, 40])
def test_too_few_validation_blocks_are_counted_and_too_few_for_one_refused(tiny, corpus, tmp_path, blocks):
    """The remedy is named; and nothing is said where there are enough."""
    data, said = tmp_path / "data", []
    shutil.copytree(corpus, data)
    ids = np.fromfile(data / "val.bin", np.uint16)[:30 * blocks + 29]
    ids.tofile(data / "val.bin")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["bytes"]["val.bin"], manifest["val_tokens"] = ids.nbytes, len(ids)
    manifest["sha256"]["val.bin"] = sha256(data / "val.bin")
    (data / "manifest.json").write_text(json.dumps(manifest))
    config = tiny(data=str(data), budget_steps=1)
    if not blocks:
        with pytest.raises(UserError, match="val.bin: 29 ids do not make one block of length 32.*--val-fraction"):
            train.train(config, **QUIET)
        return
    train.train(config, say=said.append)
    warnings = [line for line in said if line.startswith("warning") and "validation" in line]
    assert len(warnings) == (blocks < FEW_BLOCKS)
    assert all(f"only {blocks} validation block(s)" in w and "--val-fraction" in w for w in warnings)


def test_a_finished_run_is_a_no_op_and_another_configuration_is_refused(tiny, tmp_path):
    first = train.train(tiny(budget_steps=2), **QUIET)
    stamp = (tmp_path / "run/model/config.json").stat().st_mtime_ns
    assert train.train(tiny(budget_steps=2), **QUIET) == first
    assert (tmp_path / "run/model/config.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="another configuration: seed"):
        train.train(tiny(budget_steps=2, seed=1), **QUIET)


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny, monkeypatch, tmp_path):
    whole = step_module.loss_terms

    def spoilt(*args):
        total, terms = whole(*args)
        spoilt.calls += 1
        bad = math.nan if spoilt.calls > 3 else 0.0
        return total + bad, {name: value + bad for name, value in terms.items()}
    spoilt.calls = 0
    monkeypatch.setattr(step_module, "loss_terms", spoilt)
    with pytest.raises(UserError, match=r"step \d+: loss and mlm not finite"):
        train.train(tiny(strategy="no_kd"), **QUIET)
    assert not (tmp_path / "run/model").exists()


def test_other_heads_other_vocabulary_other_budgets_are_refused(tiny, teacher, corpus, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    raw = json.loads((other / "tokenizer.json").read_text())
    a, b = list(raw["model"]["vocab"])[10:12]
    raw["model"]["vocab"][a], raw["model"]["vocab"][b] = raw["model"]["vocab"][b], raw["model"]["vocab"][a]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    for changes, message in [
            (dict(strategy="magic"), "one of no_kd"),
            (dict(budget_steps=None), "exactly one budget"), (dict(budget_hours=1.0), "exactly one budget"),
            (dict(as_released=True), "no other code"), (dict(init="warm"), "one of random, teacher"),
            (dict(strategy="distilbert", teacher=str(teacher)), "as wide as its teacher: 32 and 48; give --size 2L48"),
            (dict(init="teacher", teacher=str(teacher)), "--init teacher needs"),
            (dict(init="teacher", size="5L32"), "fewer layers"), (dict(init="teacher", heads=4), "--heads 2"),
            (dict(budget_steps=0), "at least 1"), (dict(budget_steps=None, budget_hours=math.nan), "at least 1e-9"),
            (dict(batch_size=9, micro_batch=4), "multiple"), (dict(size="big"), "--size"),
            (dict(size="2L32", heads=5), "multiple of 5 heads"), (dict(data=str(tmp_path)), "prepare.py"),
            (dict(strategy="tinybert", heads=4), "--heads 2"), (dict(strategy="minilm", heads=4), "--heads 2"),
            (dict(strategy="minilm", teacher=str(other)), f"2 tokens differ.*{a!r}|{b!r}"),
            (dict(strategy="minilm", teacher=str(tmp_path / "no/where")), "model directory"),
            (dict(strategy="minilm", seq_len=600), "positions")]:
        with pytest.raises(UserError, match=message):
            train.train(tiny(**changes), **QUIET)
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_a_head_serves_who_needs_none(tiny, corpus, tmp_path):
    train.train(tiny(strategy="tinybert", budget_steps=2, out=str(tmp_path / "encoder")), **QUIET)
    encoder = dict(teacher=str(tmp_path / "encoder/model"), budget_steps=2)
    with pytest.raises(UserError, match="no LM head.*tinybert, minilm, minilmv2"):
        train.train(tiny(strategy="vanilla_kd", **encoder), **QUIET)
    with pytest.raises(UserError, match="no LM head, which vanilla_kd, a phase of tinybert:0.5/vanilla_kd, needs"):
        train.train(tiny(strategy="tinybert:0.5/vanilla_kd", **encoder), **QUIET)
    train.train(tiny(strategy="tinybert", init="teacher", out=str(tmp_path / "started"), **encoder), **QUIET)
    assert train.train(tiny(strategy="minilm", **encoder), **QUIET)["teacher_mlm"] is None


def test_a_student_from_the_teacher_has_its_first_and_its_last_layer(tiny, narrow_teacher, corpus):
    arm = make_arm(tiny(init="teacher"), TokenDirectory(corpus))
    teacher = checkpoint.load_mlm(narrow_teacher).model
    pairs = zip([*arm.student.bert.encoder["layer"]], [teacher.bert.encoder["layer"][i] for i in (0, 3)], strict=True)
    ends = (arm.student.cls, teacher.cls), (arm.student.bert.embeddings, teacher.bert.embeddings)
    for ours, theirs in [*pairs, *ends]:
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert arm.teacher is None                                          # no_kd reads it for its weights alone
    assert make_arm(tiny(strategy="distilbert"), TokenDirectory(corpus)).strategy.init == "teacher"


@pytest.mark.parametrize("strategy", AS_RELEASED)
def test_as_released_says_so_everywhere_computes_everything_and_keeps_the_teachers_dropout(tiny, tmp_path, strategy):
    said = []
    config = tiny(strategy=strategy, as_released=True, budget_steps=2)
    summary = train.train(config, say=said.append)
    assert summary["as_released"] and summary["label"] == f"{strategy} AS RELEASED (for science only)"
    assert any(summary["label"] in line for line in said) and any("dropout is on" in line for line in said)
    arm = make_arm(config, TokenDirectory(config.data))
    asked = []
    arm.run_student, student = lambda *a, **k: asked.append(k["want"]) or student(*a, **k), arm.run_student
    arm.run_teacher, teacher = lambda *a, **k: asked.append(k["want"]) or teacher(*a, **k), arm.run_teacher
    arm.forward(*arm.dummy())
    everything = {"embedding", ("hidden", -1), "logits", ("qkv", -1)}
    assert len(asked) == 2 and everything <= set(asked[0]) == set(asked[1]) and arm.teacher.training


def test_the_table_at_the_start_names_every_term_its_weight_and_its_value(tiny):
    said = []
    train.train(tiny(strategy="distilbert", budget_steps=1), say=said.append)
    table = [line for line in said if "at step 0" in line]
    assert len(table) == 3 and table[0].startswith("  5 x soft_kl") and "mean over masked positions" in table[0]
    assert any("from teacher weights" in line for line in said) and any("tau 2" in line for line in said)


def stage(monkeypatch, layer):
    """The strategy's name of one stage of MobileBERT's transfer."""
    monkeypatch.setitem(STRATEGIES, f"stage {layer}", mobilebert_stage(layer))
    return f"stage {layer}"


def test_in_a_stage_one_layer_trains_and_every_other_weight_stays_bitwise(tiny, corpus, monkeypatch):
    config = tiny(strategy=stage(monkeypatch, 1), size="3L32", dropout=0.1, weight_decay=0.1)
    arm = make_arm(config, TokenDirectory(corpus))
    before = {name: p.clone() for name, p in arm.student.named_parameters()}
    blocks, seen = Blocks(TokenDirectory(corpus), "train", 32, 0), []
    for step in range(30):
        found = train.gradients(arm, blocks.batch(step, 8), step, train.Stages(arm.device))
        seen.append(dict(zip(*found, strict=True)))
        arm.update(3e-3, 0)
    moved = {name for name, p in arm.student.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("bert.encoder.layer.1.")}       # key.bias decays too
    assert [p.shape for p in arm.proj.parameters()] == [(48, 32)] and list(arm.proj) == ["hidden1"]
    assert seen[29]["fmt"] < 0.9 * seen[0]["fmt"]
    assert seen[0]["loss"].item() == pytest.approx(100 * seen[0]["fmt"].item() + seen[0]["attn"].item())
    for _ in range(2):                                                  # no dropout, after a validation either
        first, again = (arm.forward(*arm.dummy())[0].item() for _ in range(2))
        assert first == again
        validate(arm, blocks)


def test_a_stage_has_nothing_to_do_for_copied_layers(tiny, narrow_teacher, corpus, monkeypatch):
    for layer in range(4):
        arm = make_arm(tiny(strategy=stage(monkeypatch, layer), size="4L32", init="teacher"), TokenDirectory(corpus))
        batch = arm.to_device(Blocks(TokenDirectory(corpus), "train", 32, 0).batch(0, 8))
        assert all(abs(value.item()) < 1e-9 for value in arm.forward(*batch)[1].values())
        for p in arm.student.bert.encoder["layer"][layer].parameters():
            torch.nn.init.normal_(p, std=0.3)
        assert all(value.item() > 1e-3 for value in arm.forward(*batch)[1].values())


@pytest.mark.parametrize("teacher_layers, expected", [(12, -1), (24, 20)])
def test_minilmv2_takes_the_21st_of_24_layers(teacher_layers, expected):
    config = train.Config(strategy="minilmv2", size="6L768", batch_size=1024, budget_steps=1, micro_batch=1)
    with torch.device("meta"):
        arm = Arm(config, BertForMaskedLM(BertConfig.of_size("2L64")),
                        BertForMaskedLM(BertConfig.of_size(f"{teacher_layers}L128")))
    assert arm.strategy.want("teacher") == (("qkv", expected),) and arm.relation_heads == 8


# MFLOP per token (24 D^2 + 4 S D per layer forward, D^2 + D V per masked position, 1 multiply-add = 2 FLOP) and
# the ratio to no_kd, by hand
PAPER = {("6L768", "12L768"): (283.5, 181.8, dict(vanilla_kd=1.64, distilbert=1.64, tinybert=1.54, minilm=1.39,
                                                  minilmv2=1.39, minilmv2_mlm=1.58, tinybert_layers=1.55)),
         ("12L1024", "24L1024"): (953.9, 626.3, dict(vanilla_kd=1.66, tinybert=1.62, minilm=1.54, minilmv2=1.46,
                                                    minilmv2_mlm=1.55, tinybert_layers=1.63))}


@pytest.mark.parametrize("sizes", [("6L768", "12L768"), pytest.param(("12L1024", "24L1024"), marks=pytest.mark.slow)])
def test_each_strategy_costs_no_more_flops_than_its_loss_needs(sizes):
    no_kd, teacher_forward, ratios = PAPER[sizes]
    student, teacher = (BertConfig.of_size(size, vocab_size=30528) for size in sizes)

    def cost(name):
        config = train.Config(strategy=name, size="6L768", batch_size=1024)
        return [f / 128 / 1e6 for f in flops_per_block(config, student, teacher)]
    assert cost("no_kd") == [pytest.approx(no_kd, rel=0.02), 0]
    assert cost("vanilla_kd")[1] == pytest.approx(teacher_forward, rel=0.02)
    for name, ratio in ratios.items():
        assert sum(cost(name)) / no_kd == pytest.approx(ratio, rel=0.02), name


def test_a_stage_costs_the_teacher_and_the_student_to_one_layer_and_that_layers_backward_pass(monkeypatch):
    """Per token, F = 24 D^2 + 4 S D a layer: 2 l F of a teacher twice as deep, l F of the student, 2 F backward less
    the 6 D^2 that would flow below q, k, v, and 8 S D for scores (the student's also backward)."""
    D, S = 768, 128
    F, sizes = 24 * D ** 2 + 4 * S * D, [BertConfig.of_size(size, vocab_size=30528) for size in ("6L768", "12L768")]
    found = [flops_per_block(train.Config(
        strategy=stage(monkeypatch, i), size="6L768", batch_size=1024), *sizes) for i in range(6)]
    for i, (of_student, of_teacher) in enumerate(found):
        assert of_teacher / S == pytest.approx(2 * (i + 1) * F, rel=1e-3)
        assert of_student / S == pytest.approx((i + 3) * F - 6 * D ** 2 + 8 * S * D, rel=1e-3)
    assert sum(map(sum, found)) / 6 / S / 283.5e6 == pytest.approx(0.64, rel=0.02)


@pytest.mark.slow
def test_a_flops_budget_buys_tokens_in_the_ratio_of_the_costs(tiny, tmp_path):
    steps = {}
    for name in STRATEGIES:
        config = tiny(strategy=name, budget_steps=None, budget_flops=8e10, out=str(tmp_path / name))
        summary = train.train(config, **QUIET)
        price = (summary["student_flops"] + summary["teacher_flops"]) / summary["steps"]
        assert 0 <= summary["student_flops"] + summary["teacher_flops"] - 8e10 < price
        steps[name] = summary["steps"], price
    for n, price in steps.values():
        assert steps["no_kd"][0] / n == pytest.approx(price / steps["no_kd"][1], rel=0.02)


def test_a_token_budget_counts_tokens(tiny):
    summary = train.train(tiny(budget_steps=None, budget_tokens=8 * 32 * 7 - 1), **QUIET)
    assert summary["steps"] == 7 and summary["tokens"] == 8 * 32 * 7


@pytest.mark.slow
@pytest.mark.parametrize("bf16, rel", [(False, 1e-5), (True, 1e-2)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_compiled_step_is_the_eager_step(tiny, corpus, strategy, bf16, rel):
    """fullgraph: not one graph break in the student, the teacher and the losses.  20 steps."""
    losses = []
    for compiled in (False, True):
        arm = make_arm(tiny(strategy=strategy, compile=compiled, bf16=bf16, init="random"), TokenDirectory(corpus))
        blocks = Blocks(TokenDirectory(corpus), "train", 32, 0)
        losses.append([])
        for i in range(20):
            total, _ = arm.forward(*arm.to_device(blocks.batch(i, 8)))
            total.backward()
            arm.update(1e-3, 0)
            losses[-1].append(total.item())
    # a KL of 1e-3 is a difference of logarithms near 5: fp32 leaves it an absolute error of some 1e-8
    assert losses[1] == pytest.approx(losses[0], rel=rel, abs=1e-7)
