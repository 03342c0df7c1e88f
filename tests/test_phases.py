"""Strategies one after another, the start as an axis, and the terms' weights."""
import contextlib
import json
import subprocess
import time
from pathlib import Path

import pytest
import torch
from test_reliability import command, final, interrupted

import train
from model import BertConfig
from plumbing import checkpoint
from plumbing.budget import Budget, flops_per_block
from plumbing.cli import UserError
from plumbing.student import initial_student
from plumbing.tokens import TokenDirectory
from step import Arm, make_arm
from strategies import phases_of

pytestmark = pytest.mark.usefixtures("often")
QUIET = dict(say=lambda line: None)


def shares(text, depth=2):
    return [(phase.name, phase.begin, phase.end) for phase in phases_of(text, depth)]


def test_an_expression_is_phases_one_after_another():
    assert shares("no_kd") == [("no_kd", 0, 1)]
    assert shares("tinybert:.3/minilm:0.5/no_kd") == [("tinybert", 0, 0.3), ("minilm", 0.3, 0.5), ("no_kd", 0.5, 1)]
    assert shares("mobilebert") == [("mobilebert layer 1", 0, 0.16), ("mobilebert layer 2", 0.16, 0.32),
                                    ("mobilebert tail", 0.32, 1)]
    assert shares("mobilebert:0.5/no_kd")[1:] == [
        ("mobilebert layer 2", 0.08, 0.16), ("mobilebert tail", 0.16, 0.5), ("no_kd", 0.5, 1)]
    assert [end for _, _, end in shares("mobilebert", 6)[:6]] == pytest.approx([0.32 * i / 6 for i in range(1, 7)])


@pytest.mark.parametrize("text, message", [
    ("magic", "--strategy magic: must be one of no_kd, "), ("tinybert:0.3/magic", "not 'magic', or several in turn"),
    ("", "--strategy is empty"), ("tinybert/no_kd", "phase tinybert: every phase but the last is NAME:END"),
    ("tinybert:1.3/no_kd", "phase tinybert:1.3: "), ("tinybert:0/no_kd", "phase tinybert:0: "),
    ("tinybert:nan/no_kd", "phase tinybert:nan: "), ("tinybert:x/no_kd", "phase tinybert:x: "),
    ("tinybert:0.3/minilm:0.2/no_kd", "phase minilm:0.2: "), ("no_kd:0.5", "phase no_kd:0.5: "),
    ("tinybert:0.3/no_kd:1", "phase no_kd:1: ")])
def test_an_expression_that_is_none_is_refused_with_its_phase(tiny, text, message):
    with pytest.raises(UserError) as e:
        tiny(strategy=text).check()
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("changes, message", [
    (dict(init_layers="0,1"), "--init-layers 0,1 belongs to --init teacher"),
    (dict(init="teacher", init_layers="0,0"), "none twice"), (dict(init="teacher", init_layers="x"), "whole numbers"),
    (dict(strategy="tinybert:0.3/no_kd", as_released=True), None),
    (dict(strategy="distilbert:0.3/no_kd", as_released=True), "no other code was released for distilbert:0.3/no_kd")])
def test_what_the_new_flags_allow(tiny, changes, message):
    with pytest.raises(UserError) if message else contextlib.nullcontext() as e:
        tiny(**changes).check()
    assert not message or message in str(e.value)


def test_a_phase_that_the_teacher_cannot_serve_is_named(tiny):
    with pytest.raises(UserError, match="^tinybert, a phase of no_kd:0.5/tinybert, compares attention head by head"):
        train.train(tiny(strategy="no_kd:0.5/tinybert", heads=4), **QUIET)
    with pytest.raises(UserError, match="mobilebert needs a student as wide.*embeddings it copies.*--init random"):
        train.train(tiny(strategy="mobilebert", teacher=tiny().teacher), **QUIET)


def test_one_phase_changes_no_bit_of_progress_learning_rate_and_spending():
    phase, = phases_of("no_kd", 2)
    budget = Budget(7e9, "flops", 123_456_789)
    for step in range(1, 60):
        p, budget.steps = step / 61, step
        assert phase.progress(p) == p and budget.progress == min(1, step * 123_456_789 / 7e9)
        expected = 3e-3 * p / 0.06 if p < 0.06 else 3e-3 * (1 - p) / (1 - 0.06)
        assert train.learning_rate(p, 3e-3) == expected


def test_each_phase_has_its_own_ramp_optimizer_trained_weights_and_projections(tiny, watched):
    seen = watched(tiny(strategy="tinybert:0.3/no_kd", warmup=0.25))
    lrs = [u.groups[0]["lr"] for u in seen.updates]
    assert lrs == pytest.approx([train.learning_rate(i / 6, 3e-3, 0.25) for i in range(6)]
                                + [train.learning_rate(i / 14, 3e-3, 0.25) for i in range(14)])
    names = {p: name for name, p in seen.student.named_parameters()}
    trained = [{names.get(p, "proj") for g in u.groups for p in g["params"]} for u in seen.updates]
    head = {name for name in names.values() if name.startswith("cls.")}
    assert all(t == {*names.values(), "proj"} - head for t in trained[:6])
    assert all(t == {*names.values()} for t in trained[6:])
    assert [f.step for f in seen.teachers[0]] == list(range(6))
    lines = [line for line in seen.log if "val" not in line]
    assert [line["phase"] for line in lines] == [1] * 6 + [2] * 14
    assert set(lines[5]) & set(lines[6]) & {"mlm", "attn"} == set() and "attn" in lines[5] and "mlm" in lines[6]
    first, second = seen.summary["phases"]
    assert (first["steps"], second["steps"]) == (6, 14) and first["name"] == "tinybert" and second["name"] == "no_kd"
    assert set(first["val"]) == {"embd", "attn", "hidn"}
    assert second["teacher_flops"] == 0 < first["teacher_flops"] == seen.summary["teacher_flops"]
    assert set(seen.summary["val"]) == {"mlm"}


def test_the_first_step_of_a_phase_starts_from_adams_zero(tiny, watched):
    """The same strategy twice: what the second phase's first update does depends on its gradient alone."""
    seen = watched(tiny(strategy="no_kd:0.5/no_kd", warmup=0.0, weight_decay=0.0))
    assert [u.groups[0]["lr"] for u in seen.updates] == pytest.approx([3e-3 * (1 - i / 10) for i in range(10)] * 2)
    assert len({id(p) for u in seen.updates for g in u.groups for p in g["params"]}) == len(seen.first)


RESUMED = {"tinybert:0.3/no_kd": (5, 6, 7), "minilmv2:0.25/tinybert": (4, 5, 6), "mobilebert": (3, 4, 8)}


@pytest.mark.parametrize("strategy", RESUMED)
def test_a_run_that_died_on_either_side_of_a_boundary_ends_bitwise_like_one_that_did_not(
        tiny, tmp_path, monkeypatch, strategy):
    common = dict(strategy=strategy, dropout=0.1, micro_batch=4, val_times=3)
    whole = train.train(tiny(**common, out=str(tmp_path / "whole")), **QUIET)
    config = tiny(**common, out=str(tmp_path / "died"))
    for at in RESUMED[strategy]:
        interrupted(monkeypatch, config, at)
    died = train.train(config, **QUIET)
    assert final(tmp_path / "died") == final(tmp_path / "whole")
    assert died["phases"] == whole["phases"] and died["val"] == whole["val"]


def test_a_run_of_a_version_with_fewer_flags_goes_on(tiny, tmp_path, monkeypatch):
    config = tiny()
    interrupted(monkeypatch, config, 9)
    file, new = tmp_path / "run/config.json", ("recipe", "init_layers")
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in new}))
    state = checkpoint.load_run(tmp_path / "run")
    state["config"] = {k: v for k, v in state["config"].items() if k not in new}
    checkpoint.save_run(tmp_path / "run", state)
    train.train(config, **QUIET)
    train.train(tiny(out=str(tmp_path / "whole")), **QUIET)
    assert final(tmp_path / "run") == final(tmp_path / "whole")
    with pytest.raises(UserError, match="recipe .paper there, short here."):
        train.train(tiny(recipe="short"), **QUIET)


@pytest.mark.slow
def test_kill_9_on_either_side_of_a_boundary(tiny, tmp_path):
    common = dict(strategy="tinybert:0.3/no_kd", budget_steps=60, dropout=0.1)
    train.train(tiny(**common, out=str(tmp_path / "whole")), **QUIET)
    config = tiny(**common, out=str(tmp_path / "died"))
    for step in (16, 18, 19, 40):
        process = subprocess.Popen(**command(config))
        log = Path(config.out) / "log.jsonl"
        while process.poll() is None and (not log.exists() or f'"step": {step},' not in log.read_text()):
            time.sleep(0.002)
        process.kill()
        process.wait()
    subprocess.run(**command(config), check=True)
    assert final(tmp_path / "died") == final(tmp_path / "whole")


@pytest.mark.parametrize("strategy, steps", [("tinybert:0.5/no_kd", 4), ("mobilebert", 10)])
def test_two_ranks_cross_a_boundary_as_one_does(tiny, watched, watched_ranks, tmp_path, strategy, steps):
    config = dict(strategy=strategy, batch_size=16, budget_steps=steps)
    (_, ours), (_, theirs) = watched_ranks(tiny(**config, out=str(tmp_path / "two")))
    alone = watched(tiny(**config, out=str(tmp_path / "one")))
    assert len(alone.updates) == len(ours) == steps
    for update, a, b in zip(alone.updates, ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(update.grads.values(), a, strict=True))


def test_a_phase_spends_its_share_of_a_flop_budget(tiny):
    summary = train.train(tiny(strategy="tinybert:0.3/no_kd", budget_steps=None, budget_flops=4e9), **QUIET)
    spent = [(p["student_flops"] + p["teacher_flops"], p["steps"]) for p in summary["phases"]]
    first, second = (flops / steps for flops, steps in spent)
    assert 0 <= spent[0][0] - 0.3 * 4e9 < first != second
    assert 0 <= spent[0][0] + spent[1][0] - 4e9 < second
    assert summary["student_flops"] + summary["teacher_flops"] == spent[0][0] + spent[1][0]


def test_a_phase_without_a_step_is_passed_over(tiny):
    """Budget by a clock that jumps: the phase in the middle gets nothing, and is in the summary as that."""
    at = [0.0]

    def now():
        at[0] += 1.0
        return at[0]
    summary = train.train(tiny(strategy="tinybert:0.5/minilm:0.51/no_kd", budget_steps=None, budget_hours=100 / 3600),
                          now=now, **QUIET)
    steps = [p["steps"] for p in summary["phases"]]
    assert steps[1] == 0 < min(steps[0], steps[2]) and sum(steps) == summary["steps"]
    assert summary["phases"][1]["val"] is None


SIZES = [BertConfig.of_size(size, vocab_size=30528) for size in ("6L768", "12L768")]


def prices(strategy, **other):
    """[(share, cost of a token over no_kd's)] of the phases, 6L768 from 12L768."""
    config = train.Config(strategy=strategy, size="6L768", batch_size=1024, **other)
    return [(phase.end - phase.begin, sum(flops_per_block(config, *SIZES, i)) / 128 / 283.5e6)
            for i, phase in enumerate(config.phases)]


@pytest.mark.parametrize("strategy, token_share", [
    ("tinybert:.1/no_kd", .96), ("tinybert:.3/no_kd", .89), ("tinybert:.5/no_kd", .82),
    ("tinybert:.3/vanilla_kd", None)])
def test_tokens_that_a_phased_arm_gets_are_those_of_the_formula(strategy, token_share):
    found = prices(strategy)
    expected = dict(tinybert=1.54, no_kd=1.0, vanilla_kd=1.64)
    by_hand = sum(share / expected[phase.name] for (share, _), phase in zip(found, phases_of(strategy, 6), strict=True))
    assert sum(share / price for share, price in found) == pytest.approx(token_share or by_hand, rel=0.02)


def test_what_mobilebert_costs():
    *stages, (share, tail) = prices("mobilebert")
    mean = sum(price for _, price in stages) / 6
    assert mean == pytest.approx(0.64, rel=0.02) and tail == pytest.approx(1.64, rel=0.02)
    assert 0.32 / mean + share / tail == pytest.approx(0.91, rel=0.02)


# ---------------------------------------------------------------------------------------------------- mobilebert

def test_mobilebert_trains_layer_by_layer_then_everything(tiny, monkeypatch, corpus, narrow_teacher):
    """After a stage every weight outside its layer is bitwise what it was."""
    kept, enter, said = [], Arm.enter, []

    def spy(self, phase):
        if next(self.student.parameters()).device.type != "meta":
            kept.append({name: p.clone() for name, p in self.student.state_dict().items()})
        return enter(self, phase)
    monkeypatch.setattr(Arm, "enter", spy)
    config = tiny(strategy="mobilebert", budget_steps=50, dropout=0.1, weight_decay=0.1, init=None)
    summary = train.train(config, say=said.append)
    teacher = checkpoint.load_mlm(narrow_teacher).model.state_dict()
    assert len(kept) == 3                                               # before either stage, before the tail
    for before, after, layer in zip(kept, kept[1:], (0, 1), strict=False):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if name.startswith(f"bert.encoder.layer.{layer}.")}
    untouched = initial_student(config, TokenDirectory(corpus)).state_dict()
    for name, weights in kept[0].items():
        copied = name.startswith("bert.embeddings.")
        assert torch.equal(weights, (teacher if copied else untouched)[name]), name
    one, two, tail = summary["phases"]
    assert [p["steps"] for p in (one, two, tail)] == [8, 8, 34] and summary["init"] == "embeddings"
    assert tail["weights"] == dict(mlm=0.5, soft_ce=0.5) and one["weights"] == dict(fmt=100, attn=1)
    assert set(one["val"]) == {"fmt", "attn"}
    assert any("mobilebert layer 1 ended after 8 steps: val_fmt " in line for line in said)
    assert any("from the teacher's embeddings and random layers" in line for line in said)
    assert summary["peak_lr"] == 3e-3


def test_the_ramp_of_a_stage_rises_over_a_tenth_and_falls_to_nine_tenths(tiny, watched):
    seen = watched(tiny(strategy="mobilebert", budget_steps=50))
    lrs = [u.groups[0]["lr"] / 3e-3 for u in seen.updates]
    for stage in (lrs[:8], lrs[8:16]):
        assert stage == pytest.approx([0] + [0.9 + 0.1 * (1 - i / 8) / 0.9 for i in range(1, 8)])
    assert lrs[16:] == pytest.approx([train.learning_rate(i / 34, 1.0) for i in range(34)])


# ------------------------------------------------------------------------------------------------ where it starts

def test_the_layers_to_start_from_can_be_named(tiny, narrow_teacher, corpus):
    teacher, said = checkpoint.load_mlm(narrow_teacher).model, []
    for given, layers in ((None, (0, 3)), ("3,1", (3, 1))):
        config = tiny(init="teacher", init_layers=given, budget_steps=1, out=f"{tiny().out}{given}")
        arm = make_arm(config, TokenDirectory(corpus))
        for ours, theirs in zip(arm.student.bert.encoder["layer"], layers, strict=True):
            theirs = teacher.bert.encoder["layer"][theirs].state_dict()
            assert all(torch.equal(p, theirs[name]) for name, p in ours.state_dict().items())
        train.train(config, say=said.append)
        assert any(f"from teacher weights (its layers {layers[0]}, {layers[1]}, from 0)" in line for line in said)
    for given in ("0", "0,1,2", "0,4"):
        with pytest.raises(UserError, match=f"--init-layers {given}: the student has 2 layers, the teacher 4: give"):
            train.train(tiny(init="teacher", init_layers=given), **QUIET)


def test_a_student_with_a_head_starts_from_a_teacher_without_one(tiny, narrow_teacher, corpus, tmp_path):
    encoder, said = tmp_path / "encoder", []
    teacher = checkpoint.load_mlm(narrow_teacher).model
    checkpoint.save_model(encoder, teacher, TokenDirectory(corpus).read_tokenizer(), head=False)
    for strategy in ("no_kd", "minilmv2_mlm"):
        config = tiny(strategy=strategy, init="teacher", teacher=str(encoder), budget_steps=2,
                      out=str(tmp_path / strategy))
        student, untouched = make_arm(config, TokenDirectory(corpus)).student, initial_student(
            config, TokenDirectory(corpus)).state_dict()
        for name, p in student.state_dict().items():
            source = untouched if name.startswith("cls.") else teacher.state_dict()
            assert torch.equal(p, source[name.replace("layer.1.", "layer.3.")]), name
        train.train(config, say=said.append)
        assert any("; the LM head starts random: the teacher has none" in line for line in said)
        assert not checkpoint.load_mlm(tmp_path / strategy / "model").missing


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    dict(strategy="vanilla_kd:0.5/minilmv2_mlm"), dict(strategy="clm:0.3/no_kd", seq_len="16:0.5,32")])
def test_a_phases_graphs_are_compiled_at_its_start_uncharged(tiny, tmp_path, monkeypatch, changes):
    """No frame is compiled while the clock runs; and the run is the eager one."""
    compiled, paused, pause = [], [], Budget.pause

    @contextlib.contextmanager
    def spy(self, cause):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with pause(self, cause):
            yield
        paused.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    monkeypatch.setattr(Budget, "pause", spy)
    start = Budget.start
    monkeypatch.setattr(Budget, "start", lambda self: (
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"]), paused.clear(), start(self)))
    common = dict(budget_steps=8, **changes)
    eager = train.train(tiny(**common, out=str(tmp_path / "eager")), **QUIET)
    summary = train.train(tiny(**common, compile=True, out=str(tmp_path / "compiled")), **QUIET)
    after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert sum(paused) == after - compiled[-1] > 0
    assert summary["val"] == pytest.approx(eager["val"], rel=1e-3)
