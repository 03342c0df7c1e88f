"""The whole way at the smallest size, stopped and shared; the plan; what is refused before anything runs."""
import dataclasses
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_report import made_up

import compare
import finetune_glue
import prepare
import train
from comparison import demonstration, jobs, judge, timing
from conftest import TINY, text
from plumbing import checkpoint, rundir, settle
from plumbing.checks import NotFinite
from plumbing.cli import UserError
from plumbing.student import initial_student
from plumbing.tokens import TokenDirectory


@pytest.fixture
def task(tmp_path):
    task = tmp_path / "task"
    task.mkdir()
    for name, seed in (("train", 5), ("dev", 6)):
        (task / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(
            f"{d.splitlines()[0]}\t{i % 2}\n" for i, d in enumerate(text(40, seed))))
    return task


@pytest.fixture
def small(corpus, teacher, task, tmp_path):
    """Makes a compare.Config of the smallest size; keyword arguments override."""
    recipe = {k: v for k, v in TINY.items() if k in {f.name for f in dataclasses.fields(compare.Config)}}

    def make(**other):
        return compare.Config(**recipe | dict(
            data=str(corpus), teacher=str(teacher), tasks=f"mine={task}", budget_steps="3", seeds=1,
            out=str(tmp_path / "out"),
            finetune_batch_sizes="32", finetune_lrs="5e-5", finetune_epochs=1, finetune_seeds=1) | other)
    return make


def test_the_whole_way_ends_with_the_table_and_a_second_call_repeats_nothing(small, task, tmp_path, capsys):
    config = small(finetune_seeds=2, probe=True)
    compare.main(config)
    first, out = (tmp_path / "out/table.md").read_text(), tmp_path / "out"
    kept = json.loads((out / "results.json").read_text())
    assert [r["strategy"] for r in kept["results"]] == ["no_kd", "tinybert", "vanilla_kd", "minilm"]
    assert [y["name"] for y in kept["yardsticks"]] == ["constant answer", "n-grams", "random init", "teacher"]
    said = capsys.readouterr().out
    assert first.startswith("One seed tells nothing apart. The highest score: ") and first.count("\n| ") == 10 + 8
    assert " ".join(first.splitlines()[0].split()) in " ".join(said.split()) and "  n-grams" in said
    arrays, dev = np.load(out / "results.npz"), len((task / "dev.tsv").read_text().splitlines()) - 1
    assert arrays["labels/mine"].shape == (dev,) and arrays["no_kd|3|steps|None|False|0/mine"].shape == (2, dev)
    probed = first.partition("Probes of the frozen encoders")[2]
    assert "| budget | arm | mine linear | word order linear |" in probed
    assert [row.split(" | ")[1] for row in probed.splitlines() if row.startswith("| ")][2:] == [
        "no_kd", "tinybert", "vanilla_kd", "minilm", "random init", "teacher"]
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*")
              if p.name == "probes.json" or p.suffix in (".bin", ".safetensors", ".jsonl", ".npy")}
    compare.main(config)
    assert (out / "table.md").read_text() == first
    assert stamps and all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


def test_budgets_seeds_data_settings_and_a_trained_teacher_are_runs_of_their_own(small, tmp_path, capsys):
    config = small(teacher="train", teacher_budget=2.0, budget_steps="2,4", seeds=2, unique_tokens="all,600",
                   static_masks=True, arms="no_kd,minilm", peak_lrs="1e-3,3e-3", size="1L32")
    compare.main(config)
    plan, kept = compare.Plan(config), json.loads((tmp_path / "out/results.json").read_text())
    assert plan.teacher.size == "2L32" and plan.teacher.budget_steps == 2
    assert len(kept["results"]) == 2 * 2 * 3 * 2 and len(list((tmp_path / "out/runs").iterdir())) == 24 + 8
    models = {Path(r["model"]).parent.name for r in kept["results"]}
    assert len(models) == 24 and any("-600ids-static-" in name and name.endswith("-seed1") for name in models)
    seeds = {name[-1]: {f.stem[-1] for f in (tmp_path / f"out/runs/{name}/glue/trials").glob("*.json")}
             for name in models}
    assert seeds == {"0": {"1"}, "1": {"2"}}            # each pretraining seed has fine-tuning seeds of its own
    table = (tmp_path / "out/table.md").read_text()
    assert "600 unique tokens, static masks" in table
    for steps in (2, 4):
        assert re.search(rf"^no_kd at {steps} steps: peak LR 0.001: .*\(taken, the (low|high)est tried\)", table, re.M)
    capsys.readouterr()


def test_all_arms_differ_in_their_strategy_alone(small):
    plan = compare.Plan(small(seeds=2, budget_steps="3,5"))
    base = {(run.seed, run.budget_steps): run for run in plan.runs if run.strategy == "no_kd"}
    for run in plan.runs:
        twin = base[run.seed, run.budget_steps]
        differ = {f.name for f in dataclasses.fields(run) if getattr(run, f.name) != getattr(twin, f.name)}
        assert differ <= {"strategy", "out"}
    assert len({run.out for run in plan.runs}) == len(plan.runs) == 16


def test_arms_are_strategies_phases_and_starts_and_stand_in_the_results_as_they_were_typed(
        small, tmp_path, narrow_teacher, capsys):
    arms = "no_kd,no_kd+init,tinybert:0.5/no_kd,minilmv2+released,mobilebert"
    config = small(arms=arms, teacher=str(narrow_teacher), budget_steps="4")
    compare.main(config)
    kept, table = json.loads((tmp_path / "out/results.json").read_text()), (tmp_path / "out/table.md").read_text()
    assert [r["strategy"] for r in kept["results"]] == arms.split(",")
    assert {p.name for p in (tmp_path / "out/runs").iterdir()} == {f"{name}-4steps-seed0" for name in (
        "no_kd", "no_kd+init", "tinybert-0.5-then-no_kd", "minilmv2+released", "mobilebert")}
    plan = compare.Plan(config)
    runs = {plan.arms[run.out]: run for run in plan.runs}
    assert runs["no_kd+init"].init == "teacher" and runs["minilmv2+released"].as_released
    assert [phase.name for phase in runs["tinybert:0.5/no_kd"].phases] == ["tinybert", "no_kd"]
    assert "| no_kd+init |" in table and "| tinybert:0.5/no_kd |" in table and "Δ to no_kd" in table
    assert "| mobilebert |" in table
    summary = json.loads((tmp_path / "out/runs/no_kd+init-4steps-seed0/summary.json").read_text())
    untrained, teacher = (checkpoint.load_mlm(path, 64)[0].state_dict() for path in (
        tmp_path / "out/cut/seed0/model", narrow_teacher))
    assert [y["name"] for y in kept["yardsticks"]] == ["constant answer", "n-grams", "random init", "cut", "teacher"]
    assert all(torch.equal(untrained[name], teacher[name]) for name in untrained if ".layer." not in name)
    assert "|  | cut |" in table and (tmp_path / "out/cut/seed0/glue/glue.json").exists()
    assert summary["init"] == "teacher" and compare.Plan(small()).names == [
        name for name in compare.ARMS[True].split(",") if name != "no_kd+init"]        # 48 wide
    capsys.readouterr()


def test_an_arm_may_say_its_own_recipe_and_rate(small):
    plan = compare.Plan(small(arms="no_kd@short:8e-3,tinybert@paper:2e-3,minilm", peak_lrs="1e-3,4e-3"))
    assert plan.names == ["no_kd", "tinybert", "minilm"] and {name for name, *_ in plan.tuning} == {"minilm"}
    assert [(each.recipe, each.peak_lr) for each in plan.runs] == [("short", 8e-3), ("paper", 2e-3), ("paper", 1e-3)]
    both = compare.Plan(small(arms="no_kd@short:8e-3,no_kd@paper:1e-3"))
    assert both.names == ["no_kd@short:8e-3", "no_kd@paper:1e-3"] and len({each.out for each in both.runs}) == 2
    for wrong in ("no_kd@fast:1e-3", "no_kd@short", "no_kd@short:0", "no_kd@short:x"):
        with pytest.raises(UserError, match="--arms no_kd@"):
            compare.Plan(small(arms=wrong))


def test_the_plan_prices_every_phase(small, teacher):
    """Of steps at equal FLOP/s, half of them with a teacher: between the two strategies alone."""
    def seconds(unit, **budget):
        plan = compare.Plan(small(arms="tinybert,no_kd,tinybert:0.5/no_kd", budget_steps=None, **budget))
        return list(timing.estimate(plan, {name: [1.0] for name in plan.names}).values())

    tinybert, no_kd, both = seconds("tokens", budget_tokens="1e6")
    assert tinybert == no_kd == both == pytest.approx(1e6 / 32)
    tinybert, no_kd, both = seconds("flops", budget_flops="1e9")
    assert both == pytest.approx((tinybert + no_kd) / 2) and tinybert < 0.9 * no_kd


def test_a_chosen_peak_lr_is_the_one_with_the_lowest_own_validation_loss(small, tmp_path):
    config = small(peak_lrs="1e-6,1e-2", arms="no_kd,tinybert", budget_steps="20")
    compare.main(config)
    kept = json.loads((tmp_path / "out/results.json").read_text())
    assert [r["peak_lr"] for r in kept["results"]] == [1e-2, 1e-2]
    seeds = sorted(path.name.rpartition("seed")[2] for path in (tmp_path / "out/runs").iterdir())
    assert seeds == ["0"] * 2 + ["999"] * 4     # what it was chosen on is not reported


def test_the_default_grid_is_the_papers(small):
    recipe = {f.name: f.default for f in dataclasses.fields(compare.Config) if "finetune_" in f.name}
    own, recipe = finetune_glue.Config("m"), recipe | dict(size="2L512", heads=8)
    assert finetune_glue.grid(compare.Config.finetuning(small(**recipe)), 512) == finetune_glue.grid(own, 512)
    assert recipe["finetune_epochs"] == own.epochs and len(finetune_glue.grid(own, 512)) == 8
    assert finetune_glue.grid(compare.Config.finetuning(small(**recipe, quick=True)), 512) == [(32, 5e-5)]


def test_the_dry_run_prints_the_plan_and_writes_nothing(small, tmp_path, capsys):
    compare.main(small(dry_run=True, seeds=3))
    said = capsys.readouterr().out
    said = " ".join(said.split())
    assert "12 pretraining runs, 0 of them finished" in said and "scoring 16 models on mine" in said
    assert all(word in said for word in ("steps", "epochs", "tokens/parameter", "6L768", "in all", "--finetune-seeds"))
    assert not (tmp_path / "out").exists()


def test_the_plan_measures_fine_tuning_on_the_tasks_own_examples(small, monkeypatch):
    """At a second per trained example and half of one per scored one, the plan says what that makes."""
    clock = [0.0]

    def spend(per_example):
        def of(model, examples, *_, **__):
            clock[0] += per_example * len(examples)
        return of
    monkeypatch.setattr(finetune_glue, "finetune", spend(1.0))
    monkeypatch.setattr(finetune_glue, "predict", spend(0.5))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    for changes, trials in ((dict(finetune_seeds=2), 2), (dict(finetune_seeds=2, finetune_lrs="1e-5,2e-5"), 4)):
        config = small(finetune_epochs=3, finetune_batch_sizes="8", **changes)
        seconds = timing.finetuning_seconds(compare.Plan(config))
        assert seconds == pytest.approx(trials * (3 * 40 * 1.0 + 40 * 0.5))


def test_runs_from_other_data_tasks_or_teachers_are_not_mixed(small, task, tmp_path, narrow_teacher):
    compare.main(small(arms="no_kd"))
    with pytest.raises(UserError, match="holds runs with another --size: "):
        compare.main(small(arms="no_kd", size="1L32", budget_steps="5"))
    with pytest.raises(UserError, match="holds runs with another contents of teacher: "):
        compare.main(small(arms="no_kd", teacher=str(narrow_teacher), budget_steps="5"))
    (task / "dev.tsv").write_text((task / "dev.tsv").read_text().replace("\t1\n", "\t0\n", 3))
    with pytest.raises(UserError, match="holds runs with another task mine: "):
        compare.main(small(arms="no_kd"))


def test_the_line_over_all_processes_counts_models_and_says_what_one_of_them_does(small, tmp_path):
    plan = compare.Plan(small(arms="no_kd"))
    for file in ("runs/no_kd-3steps-seed0/glue/glue.json", "cut/seed0/glue/glue.json", "teacher/glue/glue.json",
                 "runs/no_kd-3steps-seed0/glue/kept/glue.json"):        # the last one is no model of the plan
        (tmp_path / "out" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / file).write_text("{}")
    assert timing.over_all(plan, time.monotonic() + 300.3) == "[3 models scored, 5 min left] no word"
    (tmp_path / "out/jobs").mkdir()
    (tmp_path / "out/jobs/1.log").write_text("first\nminilm, seed 0: 6%, loss 4.2 " + "x" * 80 + "\n")
    line = timing.over_all(plan, 0.0)
    assert line.startswith("[3 models scored, 0 s left] minilm, seed 0: 6%, loss 4.2 xxx") and len(line) == 80


def test_one_process_of_several_does_not_know_how_far_all_of_them_are():
    lines = []
    progress = timing.Progress({}, lines.append)
    with progress.on("runs/a", "tinybert, seed 0"):
        progress.say("6%, loss 4.2")
    assert lines == ["tinybert, seed 0: 6%, loss 4.2"]


def test_a_peak_lr_that_diverges_is_not_taken(small, tmp_path, monkeypatch, capsys):
    real = train.train

    def diverges(config, **other):
        if config.peak_lr == 1:
            raise NotFinite("step 2: mlm not finite")
        return real(config, **other)
    monkeypatch.setattr(train, "train", diverges)
    compare.main(small(arms="no_kd", peak_lrs="1,1e-3", budget_steps="2"))
    assert "no_kd at 2 steps: peak LR 1: not finite, peak LR 0.001: " in (tmp_path / "out/table.md").read_text()
    assert "step 2: mlm not finite" in capsys.readouterr().out


@pytest.mark.slow
def test_stopped_three_times_the_table_is_the_same(small, tmp_path, monkeypatch, capsys):
    config = small(seeds=2, arms="no_kd,minilm", budget_steps="4,8")
    compare.main(config)
    steps, rng, real = [0], random.Random(0), rundir.RunWriter.after_step

    def after_step(self, *args):
        real(self, *args)
        steps[0] -= 1
        if steps[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)         # Ctrl-C: the run saves a checkpoint first

    monkeypatch.setattr(rundir.RunWriter, "after_step", after_step)
    again = dataclasses.replace(config, out=str(tmp_path / "again"))
    for _ in range(3):
        steps[0] = rng.randint(1, 12)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            compare.main(again)
    steps[0] = -1
    compare.main(again)
    assert capsys.readouterr().out.count("going on after step") == 3
    assert (tmp_path / "again/table.md").read_text() == (tmp_path / "out/table.md").read_text()


def record(folder, averages, budget, teacher=70.0, **config):
    """A finished comparison's directory, of made-up scores."""
    of = dict(dataclasses.asdict(compare.Config()), seeds=max(map(len, averages.values())), **config)
    yardsticks = [dict(name=name, runs=[dict(scores=dict(sst2=v), tasks=dict(sst2=dict(
        metric="accuracy", n=872, scores=[v], collapsed=0, majority=50.0))) for v in values]) for name, values in (
        ("constant answer", [50.0]), ("random init", [55.0, 56.0, 57.0][:of["seeds"]]), ("teacher", [teacher]))]
    results = [dict(r, scores=dict(sst2=r["average"]), tasks=dict(sst2=r["tasks"]["sst2"]))
               for r in made_up(averages, budget=budget)]
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(dict(config=of, results=results, yardsticks=yardsticks)))
    return str(folder)


def test_earlier_comparisons_of_one_plan_are_merged_into_one_report(tmp_path, capsys):
    low = record(tmp_path / "low", {"no_kd": [60, 61, 62], "minilm": [63, 64, 66]}, 1e12)
    more = record(tmp_path / "more", {"no_kd": [60, 61], "tinybert": [65, 66]}, 1e12)       # the same no_kd again
    high = record(tmp_path / "high", {"no_kd": [66, 67], "minilm": [65, 65]}, 4e12)
    compare.main(compare.Config(merge=f"{low},{more},{high}/results.json", out=str(tmp_path / "all")))
    kept = json.loads((tmp_path / "all/results.json").read_text())
    assert len(kept["results"]) == 6 + 2 + 4 and {len(y["runs"]) for y in kept["yardsticks"]} == {1, 3}
    said = capsys.readouterr().out
    assert "| 1e12 FLOPs | tinybert |" in (tmp_path / "all/table.md").read_text() and "  tinybert " in said


def test_a_merged_report_overwrites_no_comparison_and_needs_a_record(tmp_path):
    first = record(tmp_path / "a", {"no_kd": [60, 61]}, 1e12)
    (tmp_path / "broken").write_text("{")
    (tmp_path / "other").write_text('{"runs": []}')
    (tmp_path / "strange").write_text(json.dumps(dict(config=[], results=3, yardsticks="x")))
    raw = json.loads((tmp_path / "a/results.json").read_text())
    raw["results"][0]["scores"] = dict(own=["high", {}])
    (tmp_path / "odd").write_text(json.dumps(raw))
    for merge, out, says in ((first, first, "holds a comparison of its own"),
                             (f"{first},{tmp_path}/broken", "all", "broken is damaged or not ours"),
                             (f"{tmp_path}/other", "all", "is no results.json that compare.py has written"),
                             (f"{first},{tmp_path}/strange", "all", "strange is damaged or not ours"),
                             (f"{tmp_path}/odd", "all", "odd is damaged or not ours")):
        with pytest.raises(UserError, match=says):
            compare.main(compare.Config(merge=merge, out=str(tmp_path / out)))


@pytest.mark.parametrize("change, says", [
    (dict(teacher=71.0), "teacher has other scores"), (dict(max_len=32), "was made with another --max-len than"),
    (dict(averages={"vanilla_kd": [60, 61]}, budget=2e12), "differences to no_kd and vanilla_kd have no common"),
    (dict(averages={"no_kd": [59]}), "no_kd at 1e12 FLOPs, seed 0, has other scores or another peak LR in"),
    (None, "is not there")])
def test_comparisons_of_different_plans_are_not_merged(tmp_path, change, says):
    first, second = record(tmp_path / "a", {"no_kd": [60, 61]}, 1e12), tmp_path / "b"
    if change is not None:
        record(second, **dict(averages={"no_kd": [60, 61]}, budget=1e12) | change)
    with pytest.raises(UserError, match=says):
        compare.main(compare.Config(merge=f"{first},{second}", out=str(tmp_path / "all")))
    assert not (tmp_path / "all/table.md").exists()


def test_total_hours_are_shared_among_the_runs_after_fine_tuning(small, tmp_path, monkeypatch, capsys):
    """0.9 x 2 h, less fine-tuning 2 x 3 students, 3 random ones and a teacher of 3 (48 / 32)^2 / 2 times the size."""
    monkeypatch.setattr(timing, "finetuning_seconds", lambda *_: 360.0)
    config = small(total_hours=2.0, budget_steps=None, arms="no_kd,minilm", seeds=3, dry_run=True)
    compare.main(config)
    each = (1.8 - (9 + 1.5 * 1.5 ** 2) * 0.1) / 6
    assert f"{math.floor(each * 1000) / 1000 * 60:.0f} min" in capsys.readouterr().out
    file = tmp_path / "out/taken.json"
    assert not file.exists() and compare.within(config).budget_hours == "0.093"
    given = dataclasses.replace(config, teacher="train", teacher_budget=0.3, dry_run=False)     # the random: 4L32
    each = (1.8 - 0.3 - (12 + 2) * 0.1) / 6                             # and three cuts of its layers
    taken, _ = compare.settled(given)
    assert taken.budget_hours == f"{math.floor(each * 1000) / 1000:g}" and taken.total_hours is None
    monkeypatch.setattr(timing, "finetuning_seconds", lambda *_: 0.0)
    again, _ = compare.settled(given)                                   # the same command goes on with its budget
    assert again == taken and json.loads(file.read_text())["taken"]["budget_hours"] == taken.budget_hours
    for wrong, said in ((dict(budget_hours="1"), "not both"), (dict(total_hours=0.9), "fine-tuning 10 models on 1 ")):
        monkeypatch.setattr(timing, "finetuning_seconds", lambda *_: 360.0)
        with pytest.raises(UserError, match=said):
            compare.main(dataclasses.replace(config, **wrong))


def test_total_hours_leave_out_the_last_of_the_default_arms_where_fine_tuning_would_take_all(
        small, narrow_teacher, monkeypatch, capsys):
    """Ten minutes a fine-tuning: five arms with the yardsticks take longer than there is."""
    monkeypatch.setattr(timing, "finetuning_seconds", lambda *_: 600.0)
    config = small(teacher=str(narrow_teacher), budget_steps=None, total_hours=1.2)
    taken = compare.within(config)
    assert taken.arms and len(taken.arms.split(",")) < 5 and taken.finetune_seeds == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("left out: minilm, since with it fine-tuning ") and " alone takes about " in said
    with pytest.raises(UserError, match="fine-tuning . models on 1 tasks alone takes about"):
        compare.within(dataclasses.replace(config, arms="no_kd,vanilla_kd,tinybert,minilm,no_kd+init"))


# ------------------------------------------------------------------------------------ what is settled where not given

@pytest.fixture
def encoder(narrow_teacher, corpus, tmp_path):
    """The narrow teacher without its LM head."""
    loaded = checkpoint.load_mlm(narrow_teacher)
    checkpoint.save_model(tmp_path / "encoder", loaded.model, checkpoint.read_tokenizer(narrow_teacher), head=False)
    return tmp_path / "encoder"


def test_the_arms_by_default_are_those_that_the_teacher_serves(small, encoder, teacher, capsys):
    """Of an encoder other ones than of a teacher with an LM head; what it cannot serve is left out, with the reason."""
    assert compare.Plan(small(teacher=str(encoder))).names == ["sentence", "tinybert+init", "no_kd", "minilmv2"]
    plan = compare.Plan(small(teacher=str(encoder), size="2L48"))
    assert plan.names == ["no_kd", "minilmv2"] and {plan.arms[each.out] for each in plan.runs} == {*plan.names}
    assert [*plan.left_out] == ["sentence", "tinybert+init"]
    why = plan.left_out["tinybert+init"]
    assert all("needs a student as wide as its teacher" in each for each in plan.left_out.values())
    compare.main(small(teacher=str(encoder), size="2L48", dry_run=True))
    said = " ".join(capsys.readouterr().out.split())
    assert f"left out: tinybert+init: {' '.join(why.split())}" in said
    assert [*compare.Plan(small(teacher=str(teacher))).left_out] == ["no_kd+init"]      # 48 wide
    with pytest.raises(UserError, match="has no LM head, which vanilla_kd needs; these do without: .*minilmv2"):
        compare.Plan(small(teacher=str(encoder), arms="no_kd,vanilla_kd"))


def test_arms_that_would_learn_nothing_are_left_out_by_name(small, narrow_teacher, capsys):
    """98 steps of 16 x 32 are too few from random weights, and not for a start from the teacher."""
    poor = small(teacher=str(narrow_teacher), batch_size=None, budget_steps=None, budget_tokens="50000", dry_run=True)
    config, _ = compare.settled(dataclasses.replace(poor, arms="no_kd,no_kd+init"))
    assert (config.arms, config.batch_size) == ("no_kd+init", 16)
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("left out: no_kd would get 98 steps of 16 x 32, 50,000 tokens, ")
    with pytest.raises(UserError, match="^no_kd would get 98 steps .*: too little to learn from random weights: give a "
                                        "larger budget, or, to go on anyway, --batch-size 16$"):
        compare.settled(dataclasses.replace(poor, arms="no_kd"))
    given, _ = compare.settled(dataclasses.replace(poor, arms="no_kd", batch_size=16))  # then it goes on
    assert given.arms == "no_kd" and "left out" not in capsys.readouterr().out


def test_the_refusal_names_the_largest_size_that_fits(small):
    config = small(batch_size=None, budget_steps=None, budget_tokens="2e5", arms="no_kd", size="4L256", dry_run=True)
    with pytest.raises(UserError, match="give --size 2L128, a larger budget, or, to go on anyway, --batch-size 16$"):
        compare.settled(config)
    assert compare.settled(dataclasses.replace(config, size="2L128"))[0].batch_size == 16
    trained = dataclasses.replace(config, teacher="train", size=None, budget_tokens="6e5")
    assert compare.settled(trained)[0].size == "2L128"                  # three times what it needs: no larger one


def test_hours_of_arms_that_are_left_out_go_to_the_others(small, narrow_teacher, monkeypatch):
    """Two arms share --total-hours; where one learns nothing, the other one gets it all."""
    monkeypatch.setattr(timing, "finetuning_seconds", lambda *_: 0.0)
    monkeypatch.setattr(timing, "speeds", lambda plan: {name: [1.0, 1.0] for name in plan.names})      # a block
    config = small(teacher=str(narrow_teacher), batch_size=None, budget_steps=None, total_hours=1.0, dry_run=True,
                   arms="no_kd,no_kd+init")
    assert compare.within(config).budget_hours == "0.45"                # 1,620 blocks: 101 steps of 16
    taken, _ = compare.settled(config)
    assert (taken.arms, taken.budget_hours) == ("no_kd+init", "0.9")


def test_one_batch_size_is_chosen_for_the_dearest_arm_and_read_back(small):
    config = small(batch_size=None, budget_steps=None, budget_flops="1e12,4e12", arms="no_kd,tinybert")
    taken, _ = compare.settled(config)
    plan = compare.Plan(dataclasses.replace(taken, batch_size=16, micro_batch=16))
    no_kd, tinybert = (timing.blocks_of(plan, each) / settle.STEPS for each in plan.runs[:2])
    assert tinybert < no_kd and taken.batch_size == max(16, 2 ** int(math.log2(tinybert))) > 16
    assert taken.batch_size < 2 ** int(math.log2(no_kd))                # which no_kd alone would have taken
    plan = compare.Plan(taken)
    assert {each.batch_size for each in plan.runs} == {taken.batch_size}
    compare.same_inputs(plan)
    assert json.loads((plan.out / "inputs.json").read_text())["--batch-size"] == taken.batch_size
    more, _ = compare.settled(dataclasses.replace(config, budget_flops="1e14"))         # a later command
    assert (more.batch_size, more.size, more.heads) == (taken.batch_size, taken.size, taken.heads)


def test_an_arm_may_have_the_teachers_budget_on_top(small, teacher, tmp_path, capsys):
    """It stands with the others of its budget; an arm that reads a teacher has had it already."""
    config = small(teacher="train", teacher_budget=3.0, budget_steps="2,4", arms="no_kd,no_kd+teacher_budget")
    compare.main(config)
    kept = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert [(r["strategy"], r["budget"], r["steps"]) for r in kept] == [
        ("no_kd", 2, 2), ("no_kd+teacher_budget", 2, 5), ("no_kd", 4, 4), ("no_kd+teacher_budget", 4, 7)]
    said = capsys.readouterr().out
    lines = said.splitlines()
    at = lines.index("4 steps on all of the data")                      # of the plan
    assert [line.split()[:2] for line in lines[at + 1:at + 3]] == [["no_kd", "4"], ["no_kd+teacher_budget", "7"]]
    assert max(map(len, lines[:lines.index("")])) <= 80
    assert "| 4 steps | no_kd+teacher_budget |" in (tmp_path / "out/table.md").read_text()
    for wrong in (dict(arms="minilm+teacher_budget"), dict(teacher_budget=None, teacher=str(teacher))):
        with pytest.raises(UserError, match="teacher_budget"):
            compare.Plan(dataclasses.replace(config, **wrong))


def test_it_ends_with_the_best_student_and_its_classifiers_in_hand(small, tmp_path, capsys):
    compare.main(small(arms="no_kd,tinybert", tasks=f"mine={tmp_path}/task,again={tmp_path}/task", finetune_seeds=2))
    said, results = capsys.readouterr().out, json.loads((tmp_path / "out/results.json").read_text())["results"]
    best = max(results, key=lambda r: r["average"])
    student, = re.findall(r'AutoModel.from_pretrained\("(.*)"\)', said)
    assert student == best["model"] and checkpoint.load_mlm(Path(student)).model.config.size == "2L32"
    found = dict(re.findall(r'(\w+) = pipeline\("text-classification", "(.*)"\)', said))
    assert [*found] == ["mine", "again"]
    for name, path in found.items():
        classifier, trials = checkpoint.read_classifier(Path(path)), best["tasks"][name]["scores"]
        assert len(classifier.names) == 2 and Path(path).is_relative_to(Path(student).parent)
        assert path.endswith(f"seed{best['tasks'][name]['first_seed'] + trials.index(max(trials))}")
    (tmp_path / "new.csv").write_text("text\nsome words\n")
    out = io.StringIO()
    finetune_glue.label_rows(finetune_glue.Config(model=path, predict=str(tmp_path / "new.csv")), out)
    assert json.loads(out.getvalue())["label"] in classifier.names


def test_processes_share_the_runs_and_each_is_done_once(tmp_path):
    directories, done, found = [str(tmp_path / str(i)) for i in range(6)], [], []

    def do(i):
        if not (tmp_path / f"{i}/finished").exists():
            done.append(i)
            time.sleep(0.2)
            (tmp_path / f"{i}/finished").touch()
        return i * i

    threads = [threading.Thread(target=lambda: found.append(compare.claim_each(directories, do))) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(done) == list(range(6)) and found == [[i * i for i in range(6)]] * 3


@pytest.mark.slow
def test_two_jobs_make_the_table_of_one_and_a_job_that_fails_is_told(small, tmp_path, capsys):
    """--jobs: worker processes over the same plan; the table is that of one process, to the last digit."""
    config = small(budget_flops="2e9", budget_steps=None, arms="no_kd,minilm")
    compare.main(config)
    table = (tmp_path / "out/table.md").read_text()
    compare.main(dataclasses.replace(config, jobs=2, out=str(tmp_path / "two")))
    logs = [(tmp_path / f"two/jobs/{i}.log").read_text() for i in range(2)]
    assert (tmp_path / "two/table.md").read_text() == table and all("fine-tuning on mine" in log for log in logs)
    victim = tmp_path / "two/runs/no_kd-2e+09flops-seed0"
    (victim / "summary.json").unlink()
    (victim / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="worker . of 2 stopped .*damaged.*jobs/.*the same command goes on"):
        compare.main(dataclasses.replace(config, jobs=2, out=str(tmp_path / "two")))


def test_of_a_worker_that_a_signal_ended_the_signal_is_told(tmp_path):
    """Not what its log ends with, and also where it was the last one at work."""
    with pytest.raises(UserError, match="worker 0 of 1 stopped .signal 9, Killed: perhaps there was no memory left.: "):
        jobs.run_jobs(1, signal.raise_signal, signal.SIGKILL, tmp_path, lambda: "")
    log = tmp_path / "log"
    assert jobs.reason(1, log) == "no word"
    log.write_text("step 3\nerror: no space left\n")
    assert [jobs.reason(code, log) for code in (1, 2, 143, -15)] == [
        "no space left", "no space left", "signal 15, Terminated", "signal 15, Terminated"]


@pytest.mark.slow
def test_killed_and_run_by_two_processes_the_table_is_the_same(small, tmp_path):
    config = small(seeds=2, budget_steps="30,60", arms="no_kd,minilm")
    compare.main(config)
    given = {f.name.replace("_", "-"): getattr(config, f.name) for f in dataclasses.fields(config)
             if getattr(config, f.name) != f.default and f.name != "out"}
    flags = [f"--{'no-' * (value is False)}{name}" + f"={value}" * (not isinstance(value, bool))
             for name, value in given.items()]
    command = [sys.executable, "compare.py", *flags, "--out", str(tmp_path / "again")]
    rng, home = random.Random(0), Path(compare.__file__).parent
    for goal in (1, 4, 9):                              # files of runs and trials: in the middle of the work
        killed = subprocess.Popen(command, cwd=home, env=os.environ, stdout=subprocess.DEVNULL)
        while sum(p.suffix in (".jsonl", ".npy") for p in (tmp_path / "again").rglob("*")) < goal:
            assert killed.poll() is None
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.5))
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    both = [subprocess.Popen(command, cwd=home, env=os.environ, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert (tmp_path / "again/table.md").read_text() == (tmp_path / "out/table.md").read_text()


def test_the_task_holds_validation_documents_alone_and_splits_them(tmp_path, monkeypatch):
    """Also where texts share their first 160 characters, differ in case, accents or width, or begin one another."""
    monkeypatch.setattr(demonstration, "LABELLED", 50)
    packages, head = ("torch", "sympy", "click"), prepare.docstring_head
    documents = [(package, f"{package} {d}") for package in packages for d in text(500, seed=2)]
    for package, d in list(documents[:500]):
        long = (d + "\nwords" * 40).replace("e", "\xe9")
        documents += [(package, long + " one"), (package, long.upper() + " two"), ("numpy", d[:60]),
                      (package, long.replace("\xe9", "e\u0301") + " three")]
    twice = documents[:100] + documents[-100:]
    documents += [("sympy", d.title()) for _, d in twice]
    demonstration.package_task(tmp_path, documents)
    rows = {name: [row.split("\t") for row in (tmp_path / f"{name}.tsv").read_text().splitlines()[1:]]
            for name in ("train", "dev")}
    assert len(rows["train"]) == demonstration.LABELLED and len(rows["dev"]) > 50
    rows["all"] = rows["train"] + rows["dev"]
    held_out, trained = set(), []
    for _, d in documents:
        if prepare.is_validation(prepare.docstring_key(d), demonstration.VAL_FRACTION):
            held_out.add(" ".join(d.split())[:demonstration.CHARACTERS])
        else:
            trained.append(head(d))
    assert {row for row, _ in rows["all"]} <= held_out
    assert {label for _, label in rows["train"]} == {"0", "1", "4"}             # click is not one of the labels
    seen = [head(row) for row, _ in rows["all"]]
    assert len(set(seen)) == len(seen)                                  # no dev row in the training rows, none twice
    cut = {head(" ".join(d.split())[:demonstration.CHARACTERS]) for _, d in twice}
    assert not set(seen) & cut                                          # two packages
    assert not any(d.startswith(row) for row in seen for d in trained)  # none begins a pretraining document


@pytest.mark.parametrize("changes, message", [
    (dict(data=None, tasks=None, budget_steps=None), "without --data"),
    (dict(teacher=None), "--data needs --teacher"),
    (dict(budget_steps=None), "exactly one budget"),
    (dict(budget_hours="4"), "exactly one budget"),
    (dict(unique_tokens="all,few"), "--unique-tokens few"),
    (dict(unique_tokens="600,600"), "--unique-tokens 600,600: one is given twice"),
    (dict(unique_tokens="all,1e12"), "--unique-tokens 1000000000000"),
    (dict(static_masks=True), "--static-masks"),
    (dict(teacher_size="4L32"), "--teacher train"),
    (dict(max_len=513), "--max-len 513: 8 to 512 here"),
    (dict(tasks="cola=nowhere"), "nowhere"),
    (dict(size="2Lx"), "2Lx"),
    (dict(batch_size=12), "--batch-size 12"),
    (dict(heads=4, arms="no_kd,minilm"), "--heads 2"),
    (dict(budget_steps=None, budget_hours="1", jobs=64), "--jobs 64 under --budget-hours: runs that share a device"),
    (dict(arms="no_kd+warm"), "--arms no_kd+warm: after the strategy may come +init"),
    (dict(arms="no_kd+init+init"), "each once"),
    (dict(arms="no_kd,magic"), "--strategy magic: must be one of no_kd"),
    (dict(arms="no_kd,no_kd"), "--arms no_kd,no_kd: must be arms, separated by commas, none twice"),
    (dict(arms="tinybert:0.3"), "phase tinybert:0.3: "),
    (dict(arms="no_kd+released"), "no other code was released for no_kd"),
    (dict(arms="no_kd,no_kd+init"), "no_kd --init teacher needs a student as wide as its teacher"),
])
def test_wrong_arguments_are_refused_before_anything_runs(small, tmp_path, changes, message):
    with pytest.raises(UserError) as refused:
        compare.main(small(**changes))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_one_micro_batch_for_all_runs_and_the_same_when_they_go_on(small, tmp_path, monkeypatch):
    for chosen, taken in ((4, 4), (2, 4)):
        monkeypatch.setattr(compare, "fitting_micro_batch", lambda device, batch, chosen=chosen: chosen)
        compare.main(small(arms="no_kd,tinybert", micro_batch=None))
        files = [tmp_path / "out/inputs.json", *(tmp_path / "out/runs").glob("*/config.json")]
        recorded = [json.loads(file.read_text()) for file in files]
        assert [r.get("--micro-batch", r.get("micro_batch")) for r in recorded] == [taken] * 3


def test_device_compilation_and_precision_reach_the_runs_the_estimates_and_fine_tuning(small, tmp_path, monkeypatch):
    """Compiled runs are estimated compiled; fine-tuning is compiled where it is asked for; inputs.json has it all."""
    made, scored = [], []

    class Seen(timing.Arm):
        def __init__(self, config, *models, **named):
            made.append((config.batch_size, config.micro_batch, config.compile, config.bf16))
            super().__init__(config, *models, **named)
    monkeypatch.setattr(timing, "Arm", Seen)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(finetune_glue, "finetune", lambda *args: scored.append(args[-2:]) or [0.0])
    compare.main(small(arms="no_kd", batch_size=64, micro_batch=32, val_blocks=8, compile=True, bf16=True))
    assert made == [(16, 16, True, True)] and len(scored) > 3 and set(scored) == {(True, True)}
    recorded = json.loads((tmp_path / "out/inputs.json").read_text())
    assert [recorded[f"--{name}"] for name in ("device", "compile", "bf16")] == ["cpu", True, True]
    run = json.loads(next((tmp_path / "out/runs").glob("*/config.json")).read_text())
    assert (run["device"], run["compile"], run["bf16"]) == ("cpu", True, True)
    plain = compare.Config.finetuning(small(compile=None, bf16=False), "model", "out")
    assert (plain.device, plain.compile, plain.bf16) == ("cpu", False, False)


# ------------------------------------------------------------------------------------- frozen encoders, and rivals

def test_without_fine_tuning_the_probes_are_the_score(small, encoder, corpus, tmp_path, capsys):
    """A rival that is the teacher scores as the teacher, and is a row and no advice, being larger than a student; the
    untrained layers, which nothing changes, are scored once."""
    out, words = tmp_path / "out", ["good", "bad", "a", "the", "film", "plot", "is", "was"]
    rng, rows = random.Random(0), []
    for _ in range(60):
        a, b = ([rng.choice(words) for _ in range(5)] for _ in range(2))
        rows.append(f"{' '.join(a)}\t{' '.join(b)}\t{len({*a} & {*b})}")
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("one\tother\tscore\n" + "\n".join(rows) + "\n")
    student = initial_student(train.Config(**TINY | dict(strategy="no_kd", data=str(corpus), size="1L32", seed=5)),
                              TokenDirectory(corpus))
    checkpoint.save_model(tmp_path / "small", student, checkpoint.read_tokenizer(encoder), head=False)
    config = small(teacher=str(encoder), arms="sentence,sentence+random", finetune_seeds=0, seeds=2,
                   tasks=f"pairs={pairs}", rivals=f"same={encoder},small={tmp_path / 'small'}")
    compare.main(config)
    kept = json.loads((out / "results.json").read_text())
    ys = {y["name"]: y["runs"] for y in kept["yardsticks"]}
    assert [*ys] == ["constant answer", "n-grams", "random init", "cut", "teacher", "same (not ours)",
                     "small (not ours)"]
    assert [len(runs) for runs in ys.values()] == [1, 1, 2, 1, 1, 1, 1]
    assert ys["same (not ours)"][0]["scores"] == ys["teacher"][0]["scores"] != ys["small (not ours)"][0]["scores"]
    assert ys["same (not ours)"][0]["larger"] and not ys["small (not ours)"][0]["larger"]
    assert not [*out.glob("**/trials/*.json")]                          # nothing was fine-tuned
    for r in kept["results"]:
        assert r["scores"]["pairs"] == pytest.approx(r["probes"]["tasks"]["pairs"]["similarity"])
        assert r["tasks"]["pairs"]["metric"] == "spearman"
    random_start, = (r for r in kept["results"] if r["strategy"] == "sentence+random" and r["seed"] == 0)
    record = json.loads((out / "runs/sentence+random-3steps-seed0/config.json").read_text())
    assert record["init"] == "random" and random_start["scores"] != kept["results"][0]["scores"]
    said = " ".join(capsys.readouterr().out.split())
    assert "small (not ours)" in said and "SentenceTransformer(" in said
    assert not any(row.name == "same (not ours)" for row, _ in judge.rows_of(
        kept["results"], kept["yardsticks"], ["pairs"]))                # of which one is the advice
    with pytest.raises(UserError, match="--rivals nameless: must be NAME=DIR"):
        compare.Plan(dataclasses.replace(config, rivals="nameless"))
    with pytest.raises(UserError, match="nowhere"):
        compare.Plan(dataclasses.replace(config, rivals=f"x={tmp_path}/nowhere"))
    with pytest.raises(UserError, match="it starts from the teacher, or not"):
        compare.Plan(dataclasses.replace(config, arms="sentence+init+random"))
