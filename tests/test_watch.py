"""Runs made by train.py and by hand, as table and figure, and what a model says."""
import json
import re
import shutil
import sys

import pytest

import train
import watch
from plumbing import cli
from plumbing.checkpoint import cut_log
from plumbing.cli import UserError


def shown(*paths, **other):
    lines = []
    watch.watch(watch.Config([str(p) for p in paths], **other), say=lines.append)
    return "\n".join(lines)


def cells(*paths):
    """{run: {heading: text}} of the table."""
    return {row[0]: dict(zip(head, row, strict=True)) for head, *rows in [watch.run_table(watch.find(paths))]
            for row in rows}


@pytest.fixture
def made(tmp_path):
    """Writes a run directory: 100 blocks of 10 tokens a step, a step a second, validations at 20, 40, ..."""
    def make(name="run", steps=60, tail="", finished=False, extra=lambda step: {}, **budget):
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        config = dict(strategy="no_kd", batch_size=100, seq_len=10) | (budget or dict(budget_hours=0.1))
        (path / "config.json").write_text(json.dumps(config))
        records = []
        for step in range(10, steps + 1, 10):
            record = dict(step=step, progress=(step - 1) / 360, seconds=float(step), lr=1e-4 * step, epoch=0.1,
                          loss=9 - step / 20, mlm=8 - step / 20, soft=1.0, gradient_norm=2.5,
                          tokens_per_second=900.0) | extra(step)
            records += [record] + [dict(record, val=dict(mlm=9 - step / 20))] * (step % 20 == 0)
        (path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
        if finished:
            (path / "summary.json").write_text("{}")
        return path
    return make


def test_a_run_of_train_py_is_shown_with_the_numbers_of_its_files(tiny, tmp_path):
    summary = train.train(tiny(strategy="vanilla_kd", val_times=2), say=lambda line: None)
    out = shown(tmp_path / "run")
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-2])
    assert re.search(r"^state +finished$", out, re.M) and "20 of 20 steps, 100.0%" in out
    assert f"{last['loss']:.5g}" in out and f"soft_ce {last['soft_ce']:.5g}" in out
    assert f"{20 * 8 * 32 / summary['charged_seconds']:,.0f}" in out
    assert out.count("  at ") == 2 and f"mlm {summary['val']['mlm']:.5g} (" in out


def test_progress_time_left_rates_and_changes_of_a_run_under_way(made):
    path = made(tail='{"step": 70, "progre')
    found = cells(path)["run"]
    assert found["spent"] == "60 of 360 s, 16.7%" and found["left"] == "300 s" and found["loss"] == "6"
    assert found["terms"] == "mlm 5, soft 1" and found["tokens/s"] == "900"
    assert found["validation"] == "mlm 6 (-1) [3]" and "last line 0 s ago" == found["state"]
    assert re.findall(r"at +(\S+ s)  mlm (.*)", shown(path)) == [("20 s", "8"), ("40 s", "7 (-1)"), ("60 s", "6 (-1)")]
    found = cells(made("slow", steps=100, extra=lambda step: dict(seconds=2.0 * step), budget_tokens=1_000_000))["slow"]
    assert found["left"] == "0:30 h"                                    # 100,000 tokens in 200 s, 900,000 to go
    assert found["spent"] == "100,000 of 1,000,000 tokens, 10.0%"
    found = cells(made("done", finished=True))["done"]
    assert found["tokens/s"] == "1,000" and "left" not in found         # of the whole run


def test_several_runs_are_one_table_and_one_that_starts_is_in_it(made):
    first, second, other = made("a"), made("b", steps=120, finished=True), made("c", steps=0)
    head, a, b, c = shown(first, second, other).rstrip().splitlines()
    assert head.split()[:3] == ["run", "spent", "left"] and "starting" in c and " 1,000 " in b
    narrow = watch.in_terminal(watch.find([first, second]), 80)
    assert max(map(len, narrow.splitlines())) == 80 and "loss" in narrow and "mlm 6 (-1) [3]" in narrow
    (first.parent / "d").mkdir()                                        # claimed by compare.py, not begun
    shutil.copytree(first, first.parent.parent / "teacher")
    assert list(cells(first.parent.parent)) == ["teacher", "a", "b", "c"]       # a comparison under way
    shutil.copytree(second, first.parent.parent / "teacher", dirs_exist_ok=True)
    assert list(cells(first.parent.parent)) == ["a", "b", "c"]


def test_flops_are_what_a_budget_of_flops_has_spent(made):
    assert cells(made("c", budget_flops=360))["c"]["spent"] == "59 of 360 FLOPs, 16.4%"


STRANGE = (b"", b"[1, 2]", b"7", b"null", b'{"step": 3', b'{"step": 3, "seconds": "1"}', b"\xff\xfe{", b"{}",
           b'{"step": 3, "seconds": NaN}', b'{"step": [], "seconds": 1}', b'{"step": 3, "seconds": 1, "loss": "\xe9"}',
           b'{"step": 3, "seconds": 1, "val": [1]}', b'{"step": 3, "seconds": 1, "loss": {}}', b"[" * 10 ** 5,
           b'{"step": 3, "seconds": 1, "val": {"mlm": "low"}}', b'{"step": NaN, "seconds": 1}',
           b'{"step": 3, {"step": 4}')


def test_lines_of_a_log_that_are_none_are_passed_over_as_half_lines_are(made):
    """By watch.py and by a run that goes on."""
    path = made(steps=100)
    expected, log = watch.LoggedRun(path), path / "log.jsonl"
    good = [line for line in log.read_bytes().split(b"\n") if line.endswith(b"}")]
    mixed = [line for pair in zip(good, STRANGE * len(good), strict=False) for line in pair]
    log.write_bytes(b"\n".join([*mixed, *STRANGE]) + b"\n")
    found = watch.LoggedRun(path)
    assert found.records == expected.records and found.curves == expected.curves and len(expected.records) >= 10
    cut_log(log, 20)
    kept = [json.loads(line) for line in log.read_bytes().splitlines()]
    assert [r["step"] for r in kept] == [r["step"] for r in map(json.loads, good) if r["step"] <= 20]


def test_follow_redraws_until_ctrl_c(made, monkeypatch):
    path, naps = made(), []

    def sleep(seconds):
        naps.append(seconds)
        (path / "summary.json").write_text("{}")
        if len(naps) == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(watch.time, "sleep", sleep)
    before, after = shown(path, follow=True).split("\033[H\033[2J")[1:]
    assert "last line" in before and "last line" not in after


@pytest.mark.parametrize("change, message", [
    (lambda p: dict(paths=[p / "nowhere"]), "neither a run's directory"),
    (lambda p: dict(out="x.html"), "--out x.html: a name that ends in one of .png, .svg, .pdf"),
    (lambda p: dict(out=str(p / "config.json/x.png")), "no directory to write in"),
    (lambda p: (p / "config.json").write_text("{"), "config.json is damaged or not ours"),
    (lambda p: (p / "config.json").write_text("[]"), "not a mapping"),
    (lambda p: (p / "config.json").write_text('{"model_type": "bert"}'), "is a model directory"),
    (lambda p: (p / "config.json").write_text("{}"), "not that of a run"),
    (lambda p: (p / "config.json").write_text('{"budget_steps": "x", "batch_size": 8, "seq_len": 8}'), "damaged"),
    (lambda p: (p / "config.json").write_text('{"budget_hours": NaN, "batch_size": 8, "seq_len": 32}'), "not ours .V"),
    (lambda p: (p / "config.json").write_text("[" * 10 ** 5), "config.json is damaged or not ours .RecursionError")])
def test_bad_input_is_one_clear_line(made, change, message):
    path = made()
    other = change(path)
    other = other if isinstance(other, dict) else {}
    with pytest.raises(UserError, match=message) as e:
        shown(*other.pop("paths", [path]), **other)
    assert "\n" not in str(e.value)


def test_the_two_command_lines():
    assert cli.parse(watch.Config, "", ["a", "b", "--follow"]) == watch.Config(["a", "b"], True)
    asked = cli.parse(watch.Config, "", ["--model", "m", "--sentence", "s"])
    assert asked == watch.Config(model="m", sentence="s") and asked.runs == []
    for wrong in ({}, dict(runs=["a"], model="m", sentence="s"), dict(model="m"), dict(runs=["a"], sentence="s")):
        with pytest.raises(UserError, match="^give run directories"):
            watch.main(watch.Config(**wrong))


def test_a_run_whose_loss_is_no_number_is_shown_too(made):
    found = cells(made("a", extra=lambda step: dict(loss=float("nan"), mlm=float("inf"))))["a"]
    assert found["loss"] == "nan" and found["validation"] == "mlm 6 (-1) [3]"


def test_runs_of_one_name_are_told_apart_and_none_moves_the_cursor(made):
    one, two, three = made("x/run"), made("y/run"), made("\x1b[2J")
    assert set(cells(one, two, three)) == {str(one), str(two), r"\x1b[2J"}


# ---------------------------------------------------------------------------------------------------- the figure

STRANGE_NAME = "_a$b$_<c>-seed0"


@pytest.fixture
def comparison(made):
    """A comparison's directory; one of its runs has a strange name, one holds what is not finite."""
    made("tinybert-seed0", finished=True)
    return made(STRANGE_NAME, extra=lambda step: dict(gradient_norm=float("inf"))).parent.parent


def test_the_figure_has_a_panel_per_curve_and_a_line_per_run(comparison, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    train.train(tiny(strategy="minilm", val_times=2), say=lambda line: None)
    fig = watch.figure(runs := watch.find([comparison, tmp_path / "run"]))
    panels = {axis.get_title(): [line.get_xydata() for line in axis.lines] for axis in fig.axes}
    assert list(panels)[-3:] == ["validation mlm", "validation attn", "validation value"]
    assert {"loss", "mlm", "soft", "attn", "learning rate", "tokens/s", "gradient norm"} < set(panels)
    assert [len(points) for points in panels["loss"]] == [6, 6, 20]
    assert [len(points) for points in panels["soft"]] == [6, 6, 0]
    assert [len(points) for points in panels["gradient norm"]] == [0, 6, 20]         # what is not finite is no point
    assert panels["validation mlm"][1].tolist() == [[20 / 3600, 8], [40 / 3600, 7], [60 / 3600, 6]]
    assert {axis.get_xlabel() for axis in fig.axes} == {"charged hours"}
    legend, = fig.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert legend.get_title().get_text() == watch.WARNING
    assert names == [run.name for run in runs] == [STRANGE_NAME, "tinybert-seed0", "run"]


@pytest.mark.parametrize("suffix, begins", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_figure_is_written_again_and_no_file_of_others_is(comparison, tmp_path, suffix, begins):
    pytest.importorskip("matplotlib")
    out = tmp_path / f"new/x.{suffix}"
    for _ in range(2):
        assert re.search("tinybert-seed0 +60 of 360 s, 16.7% ", shown(comparison, out=str(out)))
    assert out.read_bytes().startswith(begins) and list(out.parent.iterdir()) == [out]
    (mine := tmp_path / f"mine.{suffix}").write_bytes(begins + b" of somebody who runs nanoKD")
    with pytest.raises(UserError, match=f"mine.{suffix} is there and was not written by this program"):
        shown(comparison, out=str(mine))
    assert mine.read_bytes() == begins + b" of somebody who runs nanoKD"


def test_names_stand_in_the_figure_as_they_are(comparison):
    """Drawn: the legend's first name takes the room of its own characters, a formula's or none would be smaller."""
    pytest.importorskip("matplotlib")
    fig = watch.figure(watch.find([comparison]))
    fig.draw_without_rendering()
    strange, plain = fig.legends[0].get_texts()
    assert strange.get_text() == STRANGE_NAME and not strange.get_parse_math() and strange.get_visible()
    plain.set_text(STRANGE_NAME.replace("$", "S").replace("_", "-"))
    width, other = (text.get_window_extent().width for text in (strange, plain))
    assert width == pytest.approx(other, rel=0.2)


def test_seeds_of_an_arm_look_alike_and_no_two_arms_do(made):
    pytest.importorskip("matplotlib")
    runs = watch.find([made(f"{i}-seed{seed}", steps=10) for seed in range(2) for i in range(35)])
    looks = [(line.get_color(), line.get_marker()) for line in watch.figure(runs).axes[0].lines]
    assert len(set(looks)) == 35 and looks[:35] == looks[35:]


def test_runs_that_have_not_begun_have_an_empty_panel(made):
    pytest.importorskip("matplotlib")
    axis, = watch.figure(watch.find([made(steps=0)])).axes
    assert axis.get_title() == "loss" and [len(line.get_xydata()) for line in axis.lines] == [0]
    assert watch.figure([]).axes


def test_without_matplotlib_one_line_says_what_to_install_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="^--out takes one more package: pip install matplotlib$"):
        shown(tmp_path / "nowhere", out=str(tmp_path / "new/x.png"))
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------------- a model

def asked(**config):
    lines = []
    watch.main(watch.Config(**config), say=lines.append)
    return lines


def test_masks_are_filled_as_transformers_fills_them(teacher):
    transformers = pytest.importorskip("transformers")
    lines = asked(model=str(teacher), sentence="a [MASK] b c [MASK]")
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    model = transformers.AutoModelForMaskedLM.from_pretrained(teacher).eval()
    ids = tokenizer("a [MASK] b c [MASK]", return_tensors="pt")["input_ids"]
    assert len(lines) == 2 and (ids == tokenizer.mask_token_id).sum() == 2
    for line, p in zip(lines, model(ids).logits.softmax(-1)[ids == tokenizer.mask_token_id], strict=True):
        words = [f"{tokenizer.convert_ids_to_tokens(int(k))} {p[k]:.1%}" for k in p.topk(5).indices]
        assert line.split(": ", 1)[1].split(", ") == words


@pytest.mark.parametrize("other, message", [
    (dict(sentence="nothing hidden"), "has no \\[MASK\\]"), (dict(sentence="a [MASK]" * 600), "tokens, the model 512"),
    (dict(model="no/such/model/there"), "neither a model directory")])
def test_a_bad_question_is_one_clear_line(teacher, other, message):
    with pytest.raises(UserError, match=message) as e:
        asked(**dict(model=str(teacher), sentence="a [MASK]") | other)
    assert "\n" not in str(e.value)


def test_a_student_without_an_lm_head_fills_nothing(tiny, tmp_path):
    train.train(tiny(strategy="minilm", budget_steps=1), say=lambda line: None)
    with pytest.raises(UserError, match="has no LM head"):
        asked(model=str(tmp_path / "run/model"), sentence="a [MASK]")
