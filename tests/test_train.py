"""The budget, the schedule, and twenty steps of every strategy."""
import json
import math

import pytest
import torch
from conftest import TINY

import checkpoint
import train
from cli import UserError
from data import TokenDirectory
from kd_losses import STRATEGIES

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
    budget = train.Budget(hours=1 / 360, now=lambda: at[0])             # 10 seconds
    budget.start()
    at[0] = 4.0
    with budget.pause():
        at[0] = 1000.0
    assert budget.seconds == 4.0 and budget.progress == pytest.approx(0.4)
    at[0] = 1007.0
    assert budget.progress == 1.0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_twenty_steps_lower_the_loss_and_leave_a_whole_run_directory(tiny, tmp_path, strategy):
    config = tiny(strategy=strategy, budget_steps=20, micro_batch=4)
    before = train.Arm(config, TokenDirectory(config.data))
    frozen = {name for name, p in before.student.named_parameters() if not p.requires_grad}
    summary = train.train(config, **QUIET)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "val" not in line]
    assert [line["step"] for line in steps] == list(range(1, 21)) and set(STRATEGIES[strategy].terms) <= set(steps[0])
    assert sum(line["loss"] for line in steps[-4:]) < 0.97 * sum(line["loss"] for line in steps[:4])
    assert summary["tokens"] == 20 * 8 * 32 and summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert {"data", "student", "optimizer"} <= set(summary["stage_seconds"])

    # what the loss does not reach is frozen, and stays as it was initialised; all else has moved
    last = "bert.encoder.layer.1."
    expected = {"no_kd": (), "vanilla_kd": (), "tinybert": ("cls.",), "minilm": (
        "cls.", last + "attention.output", last + "intermediate", last + "output")}[strategy]
    assert frozen == {name for name, _ in before.student.named_parameters() if name.startswith(expected)}
    head = "logits" in STRATEGIES[strategy].student_needs
    after, has_head = checkpoint.load_mlm(tmp_path / "run/model")
    assert has_head == head
    moved = {name for (name, a), b in zip(before.student.named_parameters(), after.parameters(), strict=True)
             if not torch.equal(a, b)}
    # (keys' biases shift all scores of a query alike, so a softmax never feels them)
    still = {n for n in moved ^ set(dict(before.student.named_parameters())) if "key.bias" not in n}
    assert {n for n in still if not n.startswith("cls.")} == {n for n in frozen if not n.startswith("cls.")}


def test_every_arm_starts_from_the_same_weights_and_sees_the_same_batches(tiny, corpus):
    arms = [train.Arm(tiny(strategy=name), TokenDirectory(corpus)) for name in STRATEGIES]
    for arm in arms[1:]:
        for a, b in zip(arms[0].student.parameters(), arm.student.parameters(), strict=True):
            assert torch.equal(a, b)
    other = train.Arm(tiny(seed=1), TokenDirectory(corpus))
    assert not torch.equal(next(other.student.parameters()), next(arms[0].student.parameters()))


@pytest.mark.parametrize("strategy", [name for name, s in STRATEGIES.items() if s.teacher_needs])
def test_the_teacher_gets_no_gradient_and_has_no_dropout(tiny, corpus, strategy):
    arm = train.Arm(tiny(strategy=strategy, dropout=0.1), TokenDirectory(corpus))
    before = [p.clone() for p in arm.teacher.parameters()]
    ids, masked, labels = arm.to_device(train.Blocks(TokenDirectory(corpus), "train", 32, 0).batch(0, 8))
    total, _ = arm.forward(ids, masked, labels)
    total.backward()
    assert not arm.teacher.training and all(p.grad is None for p in arm.teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in arm.student.parameters())
    train.update(arm, 1e-3, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, arm.teacher.parameters(), strict=True))


def test_micro_batches_add_up_to_the_batch(tiny, corpus):
    gradients = []
    for micro in (8, 2):
        arm = train.Arm(tiny(micro_batch=micro), TokenDirectory(corpus))
        batch = train.Blocks(TokenDirectory(corpus), "train", 32, 0).batch(0, 8)
        for at in range(0, 8, micro):
            total, _ = arm.forward(*arm.to_device(type(batch)(*(a[at:at + micro] for a in batch))))
            (total * micro / 8).backward()
        gradients.append([p.grad for p in arm.student.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_weight_decay_spares_biases_and_layer_norms(tiny, corpus):
    arm = train.Arm(tiny(weight_decay=0.5), TokenDirectory(corpus))
    decayed, spared = arm.optimizer.param_groups
    assert decayed["weight_decay"] == 0.5 and spared["weight_decay"] == 0 and decayed["betas"] == (0.9, 0.98)
    spared_names = {n for n, p in arm.student.named_parameters() if any(p is q for q in spared["params"])}
    assert all("bias" in n or "LayerNorm" in n for n in spared_names) and spared_names


def test_a_finished_run_is_a_no_op_and_another_configuration_is_refused(tiny, tmp_path):
    first = train.train(tiny(budget_steps=2), **QUIET)
    stamp = (tmp_path / "run/model/config.json").stat().st_mtime_ns
    assert train.train(tiny(budget_steps=2), **QUIET) == first
    assert (tmp_path / "run/model/config.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="another configuration: seed"):
        train.train(tiny(budget_steps=2, seed=1), **QUIET)


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny, monkeypatch, tmp_path):
    whole = train.loss_terms

    def spoilt(*args):
        total, terms = whole(*args)
        spoilt.calls += 1
        bad = math.nan if spoilt.calls > 3 else 0.0
        return total + bad, {name: value + bad for name, value in terms.items()}
    spoilt.calls = 0
    monkeypatch.setattr(train, "loss_terms", spoilt)
    with pytest.raises(UserError, match=r"step \d+: mlm is not finite"):
        train.train(tiny(strategy="no_kd"), **QUIET)
    assert not (tmp_path / "run/model").exists()


def test_other_heads_other_vocabulary_other_budgets_are_refused(tiny, teacher, corpus, tmp_path):
    import shutil
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    raw = json.loads((other / "tokenizer.json").read_text())
    a, b = list(raw["model"]["vocab"])[10:12]
    raw["model"]["vocab"][a], raw["model"]["vocab"][b] = raw["model"]["vocab"][b], raw["model"]["vocab"][a]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    for changes, message in [
            (dict(strategy="magic"), "unknown; one of no_kd"),
            (dict(budget_steps=None), "exactly one budget"), (dict(budget_hours=1.0), "exactly one budget"),
            (dict(budget_steps=0), "positive"), (dict(budget_steps=-3), "positive"),
            (dict(budget_steps=None, budget_hours=math.nan), "positive"),
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
    with pytest.raises(UserError, match="no LM head.*tinybert, minilm"):
        train.train(tiny(strategy="vanilla_kd", **encoder), **QUIET)
    assert train.train(tiny(strategy="minilm", **encoder), **QUIET)["teacher_mlm"] is None


def test_bf16_and_compile_flags_reach_the_step(tiny, corpus):
    arm = train.Arm(tiny(strategy="vanilla_kd", bf16=True), TokenDirectory(corpus))
    assert next(arm.teacher.parameters()).dtype == torch.bfloat16
    assert next(arm.student.parameters()).dtype == torch.float32
    assert TINY["bf16"] is False
