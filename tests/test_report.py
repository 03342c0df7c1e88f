"""Statistics, tables and the verdict on made-up results whose answer is known."""
import json
from pathlib import Path

import numpy as np
import pytest

import compare
from comparison import judge, merge, report

RECORDS = Path(__file__).parents[1] / "docs/records"


def result(strategy, seed, average, budget=1e12, unique=None, static=False, **other):
    return dict(dict(
        strategy=strategy, seed=seed, budget=budget, unit="flops", unique_tokens=unique, static_masks=static,
        average=average, scores={"sst2": average + 10, "rte": average - 10}, peak_lr=1e-3, steps=10,
        tokens=1000, epochs=2.0, charged_seconds=5.0, tokens_per_second=200.0, teacher_share=0.25, val={"mlm": 6.0},
        device="cpu",
        tasks={task: dict(metric="accuracy", n=872, scores=[average + lead], std=0.0, collapsed=0, majority=50.0)
               for task, lead in (("sst2", 10), ("rte", -10))}), **other)


def made_up(averages, **other):
    """{strategy: [average per seed]} -> results."""
    return [result(name, seed, float(v), **other) for name, values in averages.items() for seed, v in enumerate(values)]


def yardstick(name, *averages, runs=1):
    """A yardstick of so many models, each with these fine-tunings' averages."""
    of = [result("", 0, float(np.mean(averages)), tasks={
        task: dict(metric="accuracy", n=872, scores=[a + lead for a in averages], collapsed=0, majority=50.0)
        for task, lead in (("sst2", 10), ("rte", -10))}) for _ in range(runs)]
    return dict(name=name, runs=of)


def test_the_table_says_what_was_put_in():
    results = made_up({"no_kd": [60, 61, 62], "minilm": [70, 72, 74]})
    yardsticks = [yardstick("random init", 45.0)]
    head, _, *rows = report.score_table(results, yardsticks).splitlines()
    assert head == ("| budget | arm | peak LR | tokens | epochs | val MLM | sst2 | rte | average of sst2+rte | "
                    "Δ to no_kd [95%] | so |")
    assert rows[0] == "| 1e12 FLOPs | no_kd | 0.001 | 1,000 | 2 | 6.00 | 71.0 ± 1.0 | 51.0 ± 1.0 | 61.0 ± 1.0 |  |  |"
    d, = judge.differences(judge.groups(results)[None, False, 1e12], (), ["sst2", "rte"]).values()
    assert d.d == pytest.approx(11) and rows[1].endswith(
        f"| 82.0 ± 2.0 | 62.0 ± 2.0 | 72.0 ± 2.0 | +11.0 [{11 - d.half:+.1f}, {11 + d.half:+.1f}] | "
        "ahead, outside the noise, on this dev set only |")
    assert rows[2] == "|  | random init |  |  |  |  | 55.0 | 35.0 | 45.0 | -16.0 | no interval |"
    assert "| 1e12 FLOPs | all of the data | minilm | 1,000 | 1.00 | 5.0 | 200 | 25% | 1e+12 |  |" in report.cost_table(
        results)
    assert "| 25% | 1e+12 | 4e+12 |" in report.cost_table(results, 3e12)


def test_the_screen_has_80_columns_and_short_words():
    arms = {"no_kd": [60, 61, 62], "a_strategy_with_a_long_name:0.3/no_kd+init": [70, 72, 74], "minilm": [60, 61, 62.1]}
    text = report.screen_table(made_up(arms), [yardstick("teacher", 80.0)])
    assert max(map(len, text.splitlines())) <= 80 and "  ahead" in text and "  within" in text
    assert text.splitlines()[1].startswith("1e12 FLOPs on all of the data")


def test_a_name_gives_way_to_numbers_and_a_heading_to_nothing():
    rows = [["a heading longer than its column", "", ""], ["name " * 8, 1, "xy"]]
    assert report.aligned(["", "a", "b"], rows, 32).splitlines() == [
        "                           a  b", "a heading longer than its column", "name name name name name…  1  xy"]


def test_seeds_that_ran_at_different_speeds_are_told_under_hours():
    for unit, slow, told in (("hours", 150.0, True), ("hours", 190.0, False), ("flops", 150.0, False)):
        results = made_up({"no_kd": [60, 61], "minilm": [60, 61]}, unit=unit)
        results[1]["tokens_per_second"] = slow
        said = [line for line in report.remarks(results) if "an hour was not the same for all" in line]
        assert bool(said) == told and (not told or "up to 1.3 times" in said[0])


# ------------------------------------------------------------------------------------------------- the first line

def test_the_first_line_says_what_to_do():
    """The cheapest row that no other is ahead of: the untrained layers, where nothing trained is ahead of them."""
    arms = made_up({"no_kd": [60, 61, 62], "no_kd+init": [76.0, 76.2, 76.4], "tinybert": [72.0, 72.3, 72.6]})
    low = [yardstick("n-grams", 55.0), yardstick("random init", 50.0, 50.4, runs=3), yardstick("constant answer", 40.0)]
    cut = yardstick("cut", 77.4, 77.5, 77.6)
    line, *_ = judge.instruction(arms, [*low, cut], layers="0, 3")
    assert line.startswith("Copy layers 0, 3 of the teacher, untrained: 77.5 ± 0.1; nothing that was trained is ahead")
    worse = yardstick("cut", 65.4, 65.5, 65.6)
    line, = judge.instruction(arms, [*low, worse], layers="0, 3")
    assert line.startswith("Train no_kd+init with 1e12 FLOPs: 76.2 ± 0.2; no other row is ahead of it")
    assert "--teacher-flops" in line
    grams = judge.instruction(arms, [*low[1:], yardstick("n-grams", 78.0, 78.2, 78.4), cut])[0]
    assert grams.startswith("Take n-grams and a linear classifier: 78.2")


def test_the_teacher_charged_may_change_what_to_do():
    small, large = made_up({"no_kd": [60, 60.3, 60.6], "tinybert": [70, 70.3, 70.6]}), made_up(
        {"no_kd": [70.1, 70.4, 70.5], "tinybert": [70.3, 70.5, 70.4]}, budget=4e12)
    free, charged = judge.instruction(small + large, [], teacher_flops=1e13)
    assert free.startswith("Train tinybert with 1e12 FLOPs: 70.3")
    assert charged.startswith("With the teacher's 1e+13 FLOPs charged to one student: train no_kd with 4e12 FLOPs: 70")
    for over in (1, 1.002):                                             # a run's last step may go over its budget
        small[3]["flops"] = small[4]["flops"] = small[5]["flops"] = over * 1e12
        line, = (line for line in judge.pays_from(small + large, [], 1e13) if line.startswith("tinybert at 1e12"))
        # no_kd has 60.3 at 1e12 and 70.33 at 4e12: 70.3 at 3.98e12, so 1e13 / 2.98e12 students
        assert line.endswith("is paid for from 4 students on.")


def test_one_seed_tells_nothing_apart():
    line, = judge.instruction(made_up({"no_kd": [60], "minilm": [69]}), [])
    assert line == "One seed tells nothing apart. The highest score: train minilm with 1e12 FLOPs: 69.0."


def test_a_task_on_which_nothing_is_above_n_grams_is_named_and_no_average_has_it():
    results = made_up({"no_kd": [60, 61, 62], "minilm": [63, 64, 65]})
    grams = yardstick("n-grams", 40.0, 40.1, 40.2)
    for r in grams["runs"]:
        r["tasks"]["sst2"]["scores"] = [74.0, 74.2, 74.4]               # the arms have 70 to 75 there
    assert judge.measuring(results, [grams]) == (["rte"], {"sst2": "n-grams"})
    assert judge.tasks_of(results, [grams]) == ["rte"]
    assert any(line.startswith("sst2 measures nothing here: no arm and no teacher is ahead of n-grams")
               for line in report.verdict(results, [grams]))
    assert "average of rte" in report.score_table(results, [grams])


def test_collapsed_fine_tunings_are_left_out_and_counted():
    def run(seed, scores, collapsed):
        tasks = {"mine": dict(metric="accuracy", n=100, scores=scores, collapsed=sum(collapsed),
                              collapsed_trials=collapsed, majority=40.0)}
        return result("no_kd", seed, 60.0, tasks=tasks, scores={"mine": 60.0})
    good, half = run(0, [60.0, 62.0], [False, False]), run(1, [40.0, 61.0], [True, False])
    a = judge.arm("no_kd", [good, half], ["mine"])
    assert a.scores == [[60.0, 62.0], [61.0]] and (a.collapsed, a.trials) == (1, 4)
    del half["tasks"]["mine"]["collapsed_trials"]                       # an older record counts them only
    assert judge.arm("no_kd", [good, half], ["mine"]).scores == a.scores


def test_kept_predictions_widen_an_interval_to_other_examples(tmp_path):
    """The same scores, with and without predictions; written as results.npz and read again."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    results, labels = [], {"mine": y}
    for name, able in (("no_kd", rng.random(400)), ("minilm", rng.random(400))):        # each its own examples
        for seed in range(3):
            p = np.stack([np.where(rng.random(400) < able, y, 1 - y) for _ in range(2)])
            scores = [float(100 * np.mean(q == y)) for q in p]
            tasks = {"mine": dict(metric="accuracy", n=400, scores=scores, collapsed=0, majority=50.0)}
            results.append(result(name, seed, float(np.mean(scores)), tasks=tasks,
                                  scores={"mine": float(np.mean(scores))}, predicted={"mine": p}))
    arrays = judge.arrays_of(results, [], labels)
    without, = judge.differences(judge.groups(results)[None, False, 1e12], (), ["mine"]).values()
    for r in results:
        r.pop("predicted")
    assert np.array_equal(judge.attach(results, [], arrays)["mine"], y)
    for r in results:
        judge.keep_examples(r, r["predicted"], labels)
    within, = judge.differences(judge.groups(results)[None, False, 1e12], (), ["mine"]).values()
    assert within.se > without.se and "on this dev set only" in without.says and within.scope == ""


def test_a_ceiling_and_the_runner_up_are_said():
    results = made_up({"no_kd": [60, 61, 62], "minilm": [78, 79, 80], "tinybert": [79.0, 79.4, 79.8]})
    lines = report.verdict(results, [yardstick("teacher", 79.5, 79.7)])
    assert any("tinybert, minilm are within 1 point of the teacher: a ceiling" in line for line in lines)
    assert any("tinybert scores highest; against minilm, the next, +0.4 [" in line for line in lines)


# ------------------------------------------------------------------------------------------------------ the rest

def test_the_figure_is_drawn_for_one_budget_and_for_many(tmp_path):
    pytest.importorskip("matplotlib")
    one = made_up({"no_kd": [60], "minilm": [61]})
    many = one + made_up({"no_kd": [60, 61], "minilm": [61, 62]}, budget=2e12) + made_up(
        {"no_kd": [60, 61], "minilm": [61, 62]}, unique=500, static=True, budget=2e12)
    for i, results in enumerate((one, many)):
        report.figure(results, [yardstick("teacher", 70.0)], tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_names_what_lies_far_below_and_keeps_its_scale(tmp_path, monkeypatch):
    figures = []
    Figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(Figure, "savefig", lambda fig, *a, **k: figures.append(fig))
    report.figure(made_up({"no_kd": [60, 61], "minilm": [61, 62]}),
                  [yardstick("teacher", 70.0), yardstick("cut", 55.0), yardstick("n-grams", 12.0)], tmp_path / "f.png")
    axis, = figures[0].axes
    assert 50 < axis.get_ylim()[0] < 55 and axis.get_ylim()[1] > 70
    assert {"teacher 70.0", "cut 55.0", "n-grams 12.0, below"} <= {text.get_text() for text in axis.texts}


@pytest.mark.parametrize("record", [p for p in sorted(RECORDS.glob("*.json"))
                                    if '"yardsticks"' in p.read_text()], ids=lambda p: p.stem)
def test_every_record_is_merged_and_judged_again(record, tmp_path):
    """Arms and fields of older versions as they stand."""
    _, results, yardsticks, *_ = merge.merged(compare.Config(merge=str(record), out=str(tmp_path / "out")))
    of = json.loads(record.read_text())
    assert [r["scores"] for r in results] == [r["scores"] for r in of["results"]]
    assert len(yardsticks) == len(of["yardsticks"])
    assert report.verdict(results, yardsticks)[0] and report.score_table(results, yardsticks).count("\n") > 2
