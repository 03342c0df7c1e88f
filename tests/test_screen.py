"""What a run says: on a terminal, in a pipe, in its log; the recent rate; where a validation stands."""
import datetime
import io
import json
import re
import runpy
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import finetune_glue
import train
import watch
from plumbing import diagnose, rehearsal, screen
from plumbing.budget import Budget
from plumbing.cli import parse
from plumbing.screen import Screen
from plumbing.tokens import TokenDirectory
from plumbing.validation import validation_blocks

ROOT = Path(train.__file__).parent


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def screen_at(monkeypatch):
    """(a Screen of a run of 100 blocks of 10 tokens a step over 10 hours, goes(charged seconds, steps), its lines)."""
    at, said = [0.0], []
    monkeypatch.setattr(screen.time, "monotonic", lambda: at[0])
    budget = Budget(10, "hours")
    arm = SimpleNamespace(config=SimpleNamespace(batch_size=100, seq_len=10), device=torch.device("cpu"), bf16=False)
    shown = Screen(arm, budget, said.append)
    shown.mark()

    def goes(seconds, steps=1):
        at[0], budget.seconds, budget.steps = at[0] + seconds, budget.seconds + seconds, budget.steps + steps
        shown.mark()
        shown.show(dict(step=budget.steps, loss=2.0, gradient_norm=1.5))
    return shown, goes, said


def test_the_rate_is_that_of_the_last_half_minute_so_a_stall_shows(screen_at):
    shown, goes, _ = screen_at
    for _ in range(1000):
        goes(1)
        assert shown.speed() == {"tokens_per_second": 1000.0} and len(shown.recent) <= screen.RECENT + 1
    goes(21)
    assert shown.speed()["tokens_per_second"] == pytest.approx(1000 / 3, abs=0.1)      # 10 steps in 30 s
    for _ in range(40):
        goes(1)
    assert shown.speed()["tokens_per_second"] == 1000


def test_a_pipe_gets_one_line_a_minute_with_progress_time_left_loss_and_rate(screen_at):
    _, goes, said = screen_at
    for _ in range(3600):
        goes(1)
    assert len(said) == 60
    assert said[-1] == "step 3,541, 0:59 of 10:00 h, 9.8%, 9:00 h left, loss 2.0000, 1,000 tokens/s, gradient 1.5"


def test_on_cuda_memory_and_mfu(screen_at, monkeypatch):
    shown, goes, said = screen_at
    shown.cuda, shown.peak, shown.arm.counted = True, 1e12, {0: (1.5e9, 0.5e9)}
    shown.arm.ranks, shown.arm.number = SimpleNamespace(size=2), 0
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5_000_000_000)
    goes(1)
    assert shown.speed() == {"tokens_per_second": 1000, "memory": 5_000_000_000, "mfu": 0.1}    # 100 x 2e9 in a second
    assert "1,000 tokens/s, 5.0 GB, MFU 10%" in said[0]


def test_a_terminal_keeps_validations_and_rewrites_one_line(tiny, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(screen.time, "monotonic", iter(range(0, 10 ** 6, 2)).__next__)
    train.train(tiny(budget_steps=6, val_times=3))
    kept = [line.rsplit("\r", 1)[-1] for line in out.getvalue().split("\n")]
    assert [line[:9] for line in kept if line.startswith("at ")] == ["at 33.3%,", "at 66.7%,", "at 100.0%"]
    assert any(line.startswith("finished") for line in kept) and not any("left" in line for line in kept)
    shown = [text for text in out.getvalue().split("\r") if "left" in text]
    assert len(shown) >= 6 and "of 6 steps" in shown[0] and "6 of 6 steps, 100.0%" in shown[-1]


def test_a_pipe_sees_no_carriage_return_and_what_order_is_worth(tiny, corpus, tmp_path, capsys):
    summary = train.train(tiny(budget_steps=40, val_times=2))
    said, err = capsys.readouterr()
    assert not err and "\r" not in said and said.count(" left, ") == 1
    first, last = (line for line in said.splitlines() if line.startswith("at "))
    assert re.fullmatch(r"at 50.0%, step 20: mlm \d.\d+ \(-\d.*\), D_order -?0.\d\d", first)
    directory = TokenDirectory(corpus)
    forward, _ = diagnose.masked_lm(str(tmp_path / "run/model"), directory.read_tokenizer(), 32)
    batch = diagnose.validation(validation_blocks(directory, 32), 8)
    order = diagnose.order_gain(forward, batch, directory.special)
    assert summary["d_order"] == pytest.approx(order, abs=1e-4)
    assert f", D_order {order:z.2f}" in last
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    validations = [record for record in log if "val" in record]
    assert [r["step"] for r in validations] == [20, 40] and validations[1]["d_order"] == summary["d_order"]
    change = validations[1]["val"]["mlm"] - validations[0]["val"]["mlm"]
    assert f"mlm {summary['val']['mlm']:.5g} ({change:+.2g})" in last
    assert all(record["tokens_per_second"] > 0 for record in log if "val" not in record)


def test_after_a_stall_one_validation_stands_for_those_that_were_missed(tiny, tmp_path, monkeypatch):
    at, gradients = [0.0], train.gradients

    def slowly(arm, batch, step, stages):
        at[0] += 355 if step == 20 else 10
        return gradients(arm, batch, step, stages)
    monkeypatch.setattr(train, "gradients", slowly)
    train.train(tiny(budget_steps=None, budget_hours=999 / 3600, val_times=10), say=lambda line: None,
                now=lambda: at[0])
    log = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())
    assert [record["step"] for record in log if "val" in record] == [10, 20, 21, 26, 36, 46, 56, 66]


def test_what_trains_no_lm_head_has_no_order_to_measure(tiny, tmp_path):
    said = []
    summary = train.train(tiny(strategy="minilm", budget_steps=2), say=said.append)
    assert "d_order" not in summary and not any("D_order" in line for line in said)


@pytest.mark.parametrize("strategy", ["no_kd", "minilm"])
def test_a_dry_run_says_what_the_budget_buys_and_writes_nothing(tiny, tmp_path, monkeypatch, strategy):
    monkeypatch.setattr(rehearsal, "SECONDS", 0)
    before, said = sorted(tmp_path.rglob("*")), []
    config = tiny(strategy=strategy, budget_steps=None, budget_flops=3e8, val_times=3)
    assert train.train(replace(config, dry_run=True), say=said.append) is None
    assert sorted(tmp_path.rglob("*")) == before
    summary = train.train(config, say=lambda line: None)
    memory, speed, buys = said[-3:]
    assert re.fullmatch(r"memory: \d+\.\d of \d+\.\d GB on cpu: it fits", memory)
    assert re.fullmatch(r"speed: [\d,]+ tokens/s, \S+ s a step, measured over 1", speed) and "2L32" in said[0]
    assert f"buys {summary['steps']:,} steps, {summary['tokens']:,} tokens, {summary['epochs']:.3g} epochs" in buys
    assert "to 3 validations" in buys and str(datetime.date.today().year) in buys
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 39e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=40e9))
    assert rehearsal.memory(torch.device("cuda")) == "39.0 of 40.0 GB on cuda: hardly anything is left: give a " \
                                                     "smaller --micro-batch"


def test_a_time_budget_buys_what_the_measured_speed_makes_of_it(tiny, monkeypatch):
    monkeypatch.setattr(rehearsal, "SECONDS", 0.05)
    said = []
    train.train(tiny(budget_steps=None, budget_hours=2, dry_run=True), say=said.append)
    seconds, steps = float(re.search(r"(\S+) s a step", said[-2])[1]), said[-1].split(" buys ")[1].split(" steps")[0]
    assert int(steps.replace(",", "")) == pytest.approx(7200 / seconds, rel=0.01) and " in 2:00 h, " in said[-1]


@pytest.mark.parametrize("strategy", ["no_kd", "minilm"])
def test_the_last_lines_are_commands_that_work(tiny, tmp_path, capsys, strategy):
    train.main(tiny(strategy=strategy, budget_steps=1))
    said = [line.split("python ")[-1] for line in capsys.readouterr().out.splitlines()]
    *commands, tune = said[-3 if strategy == "no_kd" else -2:]
    for line in commands:
        said = []
        watch.main(parse(watch.Config, "", shlex.split(line)[1:]), say=said.append)
        assert said
    assert parse(finetune_glue.Config, "", shlex.split(tune)[1:]).model == f"{tmp_path}/run/model"


@pytest.mark.parametrize("file", [f"{folder}/{f.name}" for folder in (".", "plumbing")
                                  for f in sorted((ROOT / folder).glob("*.py"))])
def test_nothing_that_other_systems_lack_is_imported_at_the_top(file, monkeypatch):
    for name in ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    runpy.run_path(str(ROOT / file), run_name="read_again")
