"""Statistics, tables and the verdict on made-up results whose answer is known."""
import re

import numpy as np
import pytest

from comparison import figures, report


def result(strategy, seed, average, budget=1e12, unique=None, static=False, **other):
    return dict(dict(
        strategy=strategy, seed=seed, budget=budget, unit="flops", unique_tokens=unique, static_masks=static,
        average=average, scores={"sst2": average + 10, "rte": average - 10}, peak_lr=1e-3, steps=10,
        tokens=1000, epochs=2.0, charged_seconds=5.0, tokens_per_second=200.0, teacher_share=0.25, val={"mlm": 6.0},
        device="cpu",
        curve=[dict(seconds=1.0, tokens=200, mlm=7.0), dict(seconds=5.0, tokens=1000, mlm=6.0)],
        tasks={task: dict(metric="accuracy", n=872, scores=[average + lead], std=0.0, collapsed=0, majority=50.0)
               for task, lead in (("sst2", 10), ("rte", -10))}), **other)


def made_up(averages, **other):
    """{strategy: [average per seed]} -> results."""
    return [result(name, seed, float(v), **other) for name, values in averages.items() for seed, v in enumerate(values)]


def test_quantiles_of_student_s_t_are_scipy_s():
    scipy = pytest.importorskip("scipy.stats")
    for df in (1, 2, 3, 4, 9, 30, 200):
        for p in (0.9, 0.975, 1 - 0.025 / 3, 0.995):
            assert report.t_quantile(p, df) == pytest.approx(scipy.t.ppf(p, df), rel=2e-4)


def test_an_interval_is_the_paired_t_test_s():
    scipy = pytest.importorskip("scipy.stats")
    a, b = np.array([70.1, 71.0, 69.2, 70.5]), np.array([69.0, 70.4, 69.3, 69.1])
    low, high = scipy.ttest_rel(a, b).confidence_interval(0.95)
    mean, half = report.interval(list(a - b))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-3)
    assert report.interval([1.0]) == (1.0, float("inf"))


@pytest.mark.parametrize("seed_std, noise_std", [(0.05, 1.0), (5.0, 1.0), (5.0, 0.01)])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_of_equal_arms_contains_zero_in_95_of_100(seed_std, noise_std, seeds):
    """What the arms share (their seed) cancels; what they do not is covered."""
    rng, inside = np.random.default_rng(seeds), 0
    for _ in range(2000):
        shared = rng.normal(70, seed_std, seeds)
        arms = report.groups(made_up({name: shared + rng.normal(0, noise_std, seeds) for name in ("no_kd", "minilm")}))
        arms = arms[None, False, 1e12]
        mean, half = report.interval(report.differences(arms["minilm"], arms["no_kd"]))
        inside += abs(mean) <= half
    assert 0.93 <= inside / 2000 <= 0.97


@pytest.mark.parametrize("lead, low, high", [(0.0, 0.0, 0.05), (12.0, 0.95, 1.0)])
def test_the_verdict_claims_a_lead_where_there_is_one_and_seldom_where_there_is_none(lead, low, high):
    rng, claims = np.random.default_rng(0), 0
    for _ in range(1000):
        arms = {name: rng.normal(70, 1, 3) for name in ("no_kd", "vanilla_kd", "tinybert", "minilm")}
        arms["tinybert"] += lead
        line, = report.verdict(made_up(arms))
        claims += ("tinybert scores" in line if lead else True) and ", outside the noise" in line.split(";")[1]
    assert low <= claims / 1000 <= high


def test_the_table_says_what_was_put_in():
    results = made_up({"no_kd": [60, 61, 62], "minilm": [61, 63, 65]})
    yardsticks = [dict(name="random init", scores=dict(sst2=[50.0], rte=[40.0]), averages=[45.0])]
    head, _, *rows = report.score_table(results, yardsticks).splitlines()
    assert head == ("| budget | arm | peak LR | tokens | epochs | val MLM | sst2 | rte | average | Δ to no_kd [95%] | "
                    "n for 1 point |")
    assert rows[0] == "| 1e12 FLOPs | no_kd | 0.001 | 1,000 | 2 | 6.00 | 71.0 ± 1.0 | 51.0 ± 1.0 | 61.0 ± 1.0 |  |  |"
    # differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.303
    assert rows[1].endswith("| 73.0 ± 2.0 | 53.0 ± 2.0 | 63.0 ± 2.0 | +2.0 [-0.5, +4.5] | 7 |")
    assert rows[2] == "|  | random init |  |  |  |  | 50.0 | 40.0 | 45.0 |  |  |"
    assert "| 1e12 FLOPs | all of the data | minilm | 1,000 | 1.00 | 5.0 | 200 | 25% |" in report.cost_table(results)
    lines = report.comma_separated(results).splitlines()
    assert len(lines) == 7 and lines[0].endswith(",val_mlm,sst2,rte,average")
    assert lines[4] == "minilm,1000000000000.0,flops,,False,0,0.001,10,1000,2.0,5.0,200.0,0.25,6.0,71.0,51.0,61.0"


def test_the_paper_s_numbers_stand_beside_the_paper_s_setting_alone():
    results = made_up({"no_kd": [60, 61], "tinybert": [60, 61]})
    assert "paper" not in report.score_table(results, size="2L128")
    rows = [line for line in report.score_table(results, size="6L768").splitlines() if "the paper's" in line]
    assert len(rows) == 4 and all("one seed" in row for row in rows)
    assert any("tinybert" in row and "91.0 | 67.2" in row and "78.8 (7 tasks)" in row for row in rows)
    assert "90.3 | 65.7" not in str(rows) and "91.5 | 65.7" in report.score_table(
        made_up({"no_kd": [60], "minilm": [60]}, unique=10), size="6L768")


def test_the_verdict_names_the_best_its_lead_and_the_crossing():
    small = made_up({"no_kd": [60.0, 60.1, 60.2], "minilm": [58.0, 58.2, 58.1]}, budget=1e12)
    large = made_up({"no_kd": [61.0, 61.1, 61.2], "minilm": [63.0, 63.2, 63.1]}, budget=4e12)
    first, second, crossing = report.verdict(small + large)
    assert first.startswith("At 1e12 FLOPs on all of the data, no_kd scores highest: 60.1 ± 0.1; against minilm +2.0")
    assert first.endswith(", outside the noise.")
    assert "minilm scores highest: 63.1 ± 0.1" in second
    noisy = made_up({"no_kd": [58, 60, 62], "minilm": [58.1, 60, 62]}, budget=1e12)
    assert "resampled seeds, roughly: 3 seeds (inside the noise), between 5e11 FLOPs" in report.verdict(
        made_up({"no_kd": [61, 62, 63], "minilm": [60, 62, 60]}, budget=5e11) + noisy)[2]
    assert crossing == ("On all of the data, the mean of minilm overtakes no_kd's at about 2e12 FLOPs [1.9e12 FLOPs, "
                        "2.1e12 FLOPs], in 100% of resampled seeds, roughly: 3 seeds, between 1e12 FLOPs "
                        "and 4e12 FLOPs.")
    untrained = [dict(name="random init", averages=[60.2, 60.0, 60.1], scores=dict(sst2=[70.2, 70.0, 70.1],
                                                                                   rte=[50.2, 50.0, 50.1])),
                 dict(name="teacher", averages=[0])]
    assert "; against random init +0.0 [-0.4, +0.4], inside the noise." in report.verdict(small, untrained)[0]
    untrained[0]["scores"]["rte"] = [70.0, 70.6, 70.3]
    assert "against random init -10.1 [-10.3, -9.9], behind it, outside the noise." in report.verdict(
        small, untrained)[0]
    assert "against no_kd +8.0, of one seed" in report.verdict(made_up({"no_kd": [1.0], "minilm": [9.0]}))[0]


def test_a_point_is_outside_the_noise_from_so_many_seeds_on():
    for std in (0.1, 0.5, 1.0, 3.0, 10.0):
        lead = [-std / 2 ** 0.5, std / 2 ** 0.5]                        # of this standard deviation
        n = report.seeds_for(lead)
        wide = [report.t_quantile(0.975, k - 1) * std / k ** 0.5 for k in (n, max(2, n - 1))]
        assert wide[0] < 1 and (n == 2 or wide[1] >= 1)
    assert report.seeds_for([1, 2, 3]) == 7


def test_an_earlier_record_says_what_the_planned_seeds_can_tell():
    results = made_up({"no_kd": [60, 61, 62], "minilm": [61, 63, 65], "tinybert": [60, 61.1, 62.2]})
    assert report.resolution(results, 1) == ("1 seed tells no difference from noise; a difference of 1 point needs 2 "
                                             "to 7")
    # standard deviations 1 and 0.1 of the differences; t(0.975, 3) = 3.182
    assert report.resolution(results, 4) == ("4 seeds tell differences from 0.2 to 1.6 points from noise (median 1.6); "
                                             "a difference of 1 point needs 2 to 7")
    assert report.resolution(made_up({"no_kd": [60], "minilm": [61]}), 3) == ""


def judged(rng, leads, seeds=3, finetuned=3, n=872, floor=60.0, metric="accuracy"):
    """(results, yardsticks) of four arms, on task i leads[i] points above a floor, with noise of 1 point and the
    dev set's own; the teacher is as far above."""
    error = [100 * (floor / 100 * (1 - floor / 100) / n) ** 0.5 * rng.normal() for _ in leads]     # shared by all
    def run(ahead, spread):
        tasks = {f"t{i}": dict(metric=metric, n=n, majority=floor, std=1.0, collapsed=0, scores=list(
            floor + ahead * (lead + e) + spread + rng.normal(0, 1, finetuned)))
            for i, (lead, e) in enumerate(zip(leads, error, strict=True))}
        scores = {task: float(np.mean(t["scores"])) for task, t in tasks.items()}
        return dict(tasks=tasks, scores=scores, average=float(np.mean(list(scores.values()))))
    results = [result(name, seed, 0.0) | run(1, rng.normal())
               for name in ("no_kd", "vanilla_kd", "tinybert", "minilm") for seed in range(seeds)]
    yardsticks = [report.constant_answer(results)]
    for name, of in (("random init", [run(0, 0.0) for _ in range(seeds)]), ("teacher", [run(1, 0.0)])):
        yardsticks.append(dict(name=name, runs=of, averages=[r["average"] for r in of],
                               scores={task: [r["scores"][task] for r in of] for task in of[0]["scores"]}))
    return results, yardsticks


@pytest.mark.parametrize("seeds, finetuned", [(3, 1), (3, 3), (1, 3)])
def test_a_task_at_its_floor_measures_nothing_and_one_above_it_does(seeds, finetuned):
    rng, called = np.random.default_rng(seeds + finetuned), np.zeros(2)
    for _ in range(300):
        measures, nothing = report.measuring(*judged(rng, [0.0, 12.0], seeds, finetuned))
        assert sorted(measures + nothing) == ["t0", "t1"]
        called += ["t0" in measures, "t1" in measures]
    assert called[0] / 300 <= 0.05 and called[1] / 300 >= 0.95


def test_what_is_above_the_constant_answer_but_not_the_untrained_student_measures_nothing():
    results, yardsticks = judged(np.random.default_rng(0), [12.0])
    assert report.measuring(results, yardsticks) == (["t0"], [])
    for run in yardsticks[1]["runs"]:
        run["scores"]["t0"] += 12
        run["tasks"]["t0"]["scores"] = [s + 12 for s in run["tasks"]["t0"]["scores"]]
    assert report.measuring(results, yardsticks) == ([], ["t0"])
    assert "That is every task: the averages below rank noise." in report.verdict(results, yardsticks)[0]


def test_a_correlation_s_floor_is_as_wide_as_its_dev_set_is_small():
    for n, found in ((30, ([], ["t0"])), (3000, (["t0"], []))):
        assert report.measuring(*judged(np.random.default_rng(0), [15.0], n=n, floor=0.0, metric="matthews")) == found


def test_one_run_of_each_cannot_tell_what_measures():
    results, yardsticks = judged(np.random.default_rng(0), [12.0, 0.0], seeds=1, finetuned=1)
    assert report.measuring(results, yardsticks) is None
    assert "Measures nothing" not in " ".join(report.verdict(results, yardsticks))


def test_table_and_verdict_speak_of_both_averages():
    results, yardsticks = judged(np.random.default_rng(1), [0.0, 12.0, 30.0])
    head, _, *rows = report.score_table(results, yardsticks).splitlines()
    assert head.endswith("| t0 | t1 | t2 | average | Δ to no_kd [95%] | n for 1 point | average of t1+t2 | "
                         "Δ to no_kd [95%] | n for 1 point |")
    assert all(row.count("|") == head.count("|") for row in rows)
    assert [row for row in rows if "constant answer" in row] == [
        "|  | constant answer |  |  |  |  | 60.0 | 60.0 | 60.0 | 60.0 |  |  | 60.0 |  |  |"]
    floors, full, measured = report.verdict(results, yardsticks)
    assert floors.startswith("Measures nothing here: t0: neither the teacher nor any arm is above the constant answer")
    assert full.startswith("At 1e12 FLOPs on all of the data, ")
    assert measured.startswith("Over t1+t2, which measure, at 1e12 FLOPs on all of the data, ")
    best = measured.partition("data, ")[2].partition(" scores")[0]
    mean = np.mean([(r["scores"]["t1"] + r["scores"]["t2"]) / 2 for r in results if r["strategy"] == best])
    assert f"{best} scores highest: {mean:.1f} ± " in measured


def test_with_one_pretraining_seed_the_spread_is_that_of_fine_tuning_and_is_called_so():
    results, yardsticks = judged(np.random.default_rng(1), [12.0], seeds=1)
    row = report.score_table(results, yardsticks).splitlines()[2]
    scores = results[0]["tasks"]["t0"]["scores"]
    assert f"| {np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f} |" in row
    assert report.remarks(results)[0].startswith("One pretraining seed per arm: ± is the standard deviation over 3 "
                                                 "fine-tuning seeds of one pretrained model")


def test_a_crossing_lies_on_the_straight_line_over_log_budget():
    """A lead of -1 that becomes +3 over a factor of 16 is zero after a quarter of it in logarithms: a factor of 2."""
    low = made_up({"no_kd": [60, 60.1], "minilm": [59, 59.1]}, budget=1e12)
    high = made_up({"no_kd": [60, 60.1], "minilm": [63, 63.1]}, budget=16e12)
    crossing = report.verdict(low + high)[-1]
    assert "overtakes no_kd's at about 2e12 FLOPs [2e12 FLOPs, 2e12 FLOPs], in 100% of resampled seeds, roughly: 2 " \
           "seeds, between 1e12 FLOPs and 1.6e13 FLOPs." in crossing
    assert report.amount(0.0125, "hours") == "45 s" and report.amount(4.0, "hours") == "4 h"


def test_the_interval_of_a_crossing_holds_the_true_one_in_about_95_of_100():
    """Leads of -2 and +2 a factor of 4 apart cross in the middle; eight seeds, each budget with its own noise."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(100):
        results = [r for budget, lead in ((1e12, -2), (4e12, 2)) for r in made_up(
            {"no_kd": np.full(8, 60), "minilm": 60 + lead + rng.normal(0, 1, 8)}, budget=budget)]
        line, = report.crossings(report.groups(results), "flops", resamples=400)
        low, high = (float(x) for x in re.search(r"\[(\S+) FLOPs, (\S+) FLOPs\]", line).groups())
        inside += low <= 2e12 <= high
    assert 85 <= inside <= 99


def test_each_of_two_crossings_has_its_own_interval():
    results = [r for budget, lead in ((1e12, -2), (4e12, 2), (16e12, -2), (64e12, 2)) for r in made_up(
        {"no_kd": [60] * 5, "minilm": 60 + lead + np.array([-0.2, -0.1, 0, 0.1, 0.2])}, budget=budget)]
    first, _, last = report.crossings(report.groups(results), "flops")
    assert "at about 2e12 FLOPs [1.9e12 FLOPs, 2.1e12 FLOPs]" in first
    assert "at about 3.2e13 FLOPs [3.1e13 FLOPs, 3.3e13 FLOPs]" in last


def test_a_lead_that_never_changes_its_sign_has_no_crossing():
    results = made_up({"no_kd": [60, 61], "minilm": [62, 64]}, budget=1e12) + made_up(
        {"no_kd": [60, 61], "minilm": [60.1, 63]}, budget=4e12)
    assert report.crossings(report.groups(results), "flops") == []


@pytest.mark.parametrize("seeds, freedom", [(2, "1 degree of freedom"), (3, "2 degrees of freedom")])
def test_the_remarks_name_the_seeds_and_the_degrees_of_freedom(seeds, freedom):
    """± is over the pretraining seeds, and Student's t has one degree of freedom fewer than there are."""
    line, = report.remarks(made_up({"no_kd": [60] * seeds, "minilm": [61] * seeds}))
    assert f"over {seeds} pretraining seeds" in line and f"(Student's t, {freedom})" in line


def test_repetition_is_a_difference_of_differences():
    results = (made_up({"no_kd": [60, 61, 62], "minilm": [61, 62, 63]})
               + made_up({"no_kd": [58, 59, 60], "minilm": [62, 63, 64]}, unique=500, epochs=8.0)
               + made_up({"no_kd": [57, 58, 59], "minilm": [60, 61, 62]}, unique=500, static=True, epochs=8.0))
    limited, static = report.verdict(results)[3:]
    assert limited == ("At 1e12 FLOPs, 500 unique tokens (8.0 epochs of no_kd) against all of the data: no_kd changes "
                       "by -2.0 [-2.0, -2.0], the lead of minilm over it by +3.0 [+3.0, +3.0].")
    assert static.startswith("At 1e12 FLOPs, 500 unique tokens, static masks (8.0 epochs of no_kd) against 500 unique "
                             "tokens: no_kd changes by -1.0")
    assert static.endswith("the lead of minilm over it by -1.0 [-1.0, -1.0].")


def test_with_one_pretraining_seed_the_remarks_give_the_size_of_the_noise():
    tasks = {"mine": dict(metric="accuracy", n=2500, scores=[50, 50], std=2 ** 0.5, collapsed=2)}
    line, collapsed = report.remarks(made_up({"no_kd": [50.0], "minilm": [50.0]}, tasks=tasks))
    assert collapsed == "Fine-tuning runs that predicted a single class, of 4 per task: mine 4."
    assert "1.0 points from its 2 fine-tuning seeds and 1.0 from the 2,500 dev examples: a difference under 4.0" in line
    assert "no difference here can be told from noise" in report.remarks(made_up({"no_kd": [50.0]}, tasks=tasks | {
        "other": tasks["mine"]}))[0]
    two = made_up({"no_kd": [5]}) + made_up({"minilm": [5]}, device="cuda")
    assert "different devices (cpu, cuda)" in report.remarks(two)[-1]


def test_the_tokens_to_the_turn_are_where_d_order_passed_its_threshold():
    def run(seed, *d_orders):
        return result("no_kd", seed, 60.0, tokens=len(d_orders) * 1e6, curve=[
            dict(seconds=1.0, tokens=(i + 1) * 1e6, mlm=6.0, d_order=d) for i, d in enumerate(d_orders)])
    early, late, never = run(0, 0.1, 0.5), run(1, 0.0, 0.0, 0.0, 0.6), run(2, 0.0, 0.29)
    assert [report.turned(r) for r in (early, late, never)] == [pytest.approx(1.5e6), pytest.approx(3.5e6), np.inf]
    at_once = run(3, 0.9)
    for runs, said in (([early, late], "2.5M"), ([at_once], "< 1M"), ([early, never], "1.5M (1 of 2 later)"),
                       ([never], "> 2M")):
        assert f" | {said} | " in report.score_table(runs)
    assert "turn" not in report.score_table([result("minilm", 0, 60.0)]) and report.turned(result("a", 0, 1)) is None


def test_the_figure_is_drawn_for_one_budget_and_for_many(tmp_path):
    pytest.importorskip("matplotlib")
    one = made_up({"no_kd": [60], "minilm": [61]})
    many = one + made_up({"no_kd": [60, 61], "minilm": [61, 62]}, budget=2e12) + made_up(
        {"no_kd": [60, 61], "minilm": [61, 62]}, unique=500, static=True, budget=2e12)
    for i, results in enumerate((one, many)):
        report.figure(results, [dict(name="teacher", averages=[70.0])], tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")


def test_the_pictures_of_the_docs_are_drawn_from_the_records(tmp_path):
    pytest.importorskip("matplotlib")
    figures.main(figures.Config(out=str(tmp_path)))
    drawn = {p.name for p in tmp_path.glob("*.png")}
    assert drawn == {p.name for p in figures.DOCS.glob("*.png")} and len(drawn) > 1
