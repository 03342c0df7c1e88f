"""One line, exit status 2, no traceback, nothing written; help for every flag; what a field allows."""
import importlib
import inspect
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch

import bench_throughput
import compare
import data
import finetune_glue
import prepare
import train
import watch
from plumbing import cli

ROOT = Path(train.__file__).parent


@dataclass
class Example(cli.Checked):
    paths: list[str]                # what to read
    rate: cli.Positive = 0.5        # 100% of something
    count: cli.Natural | None = None        # how many
    fast: bool | None = None        # or not
    kind: Literal["near", "far"] = "near"   # of two
    parts: Annotated[str, float, "(0, 1]"] = ""     # of the whole
    layer: int | None = None        # from either end


def test_fields_become_flags():
    assert cli.parse(Example, "", ["a", "b", "--rate", "2", "--no-fast"]) == Example(["a", "b"], 2.0, None, False)
    assert cli.parse(Example, "", ["a", "--count", "3"]) == Example(["a"], 0.5, 3, None)
    given = cli.parse(Example, "", "--count=0 - --rate 1e-3 --kind far --parts .5,1 --layer -1".split())
    assert given == Example(["-"], 1e-3, 0, None, "far", ".5,1", -1) and cli.numbers(given.parts) == [.5, 1.0]


@pytest.mark.parametrize("text, value", [("1e6", 10 ** 6), ("12", 12), ("2.0", 2), (f"{10 ** 17 + 1}", 10 ** 17 + 1)])
def test_whole_numbers_may_be_written_with_an_exponent(text, value):
    assert Example([], count=text).count == value


@pytest.mark.parametrize("changes, message", [
    *((dict(rate=v), f"--rate {v}: must be a number, above 0")
      for v in ("0", "-1e-3", "nan", "inf", "-inf", "fast", "", 0)),
    *((dict(count=v), f"--count {v}: must be a whole number, at least 0")
      for v in ("-1", "1.5", "nan", "1e999", "x", -2)),
    *((dict(parts=v), f"--parts {v}: must be numbers, above 0 and at most 1, separated by commas, none twice")
      for v in ("0,1", "1.1", ".5,.5", ".5,,1", ",", "half")),
    (dict(kind="nearby"), "--kind nearby: must be one of near, far"),
    (dict(kind=""), "--kind : must be one of near, far"),
    (dict(layer="last"), "--layer last: must be a whole number")])
def test_what_a_field_does_not_allow_is_refused_in_code_and_on_the_command_line(changes, message):
    (name, value), = changes.items()
    for make in (lambda: Example([], **changes), lambda: cli.parse(Example, "", ["a", f"--{name}", str(value)])):
        with pytest.raises(cli.UserError) as refused:
            make()
        assert str(refused.value) == message


@pytest.mark.parametrize("script", [prepare, data, train, finetune_glue, compare, bench_throughput, watch])
def test_every_flag_has_help(script, capsys):
    with pytest.raises(SystemExit) as e:
        cli.parse(script.Config, script.__doc__, ["--help"])
    assert e.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    source = "".join(inspect.getsource(c) for c in reversed(script.Config.__mro__) if c is not object)
    helps = dict(re.findall(r"^    (\w+):.*?  # (.*)$", source, re.M))
    for field in fields(script.Config):
        assert len(helps[field.name]) > 3 and " ".join(helps[field.name].split()[:3]) in out


# ------------------------------------------------------------------------------------------- what a user can get wrong

POSITIVE, SHARE = "a number, above 0", "a number, at least 0 and below 1"
COUNT, NATURAL = "a whole number, at least 1", "a whole number, at least 0"
POSITIVES, COUNTS = "numbers, above 0", "whole numbers, at least 1"
TRAIN, BENCH, FINE = "train.py --budget-steps 4 --data {corpus}", "bench_throughput.py --size 1L64", "finetune_glue.py"
COMPARE = "compare.py --data {corpus} --teacher {teacher} --tasks mine={tmp} --budget-steps 4"
WRONG = [                                       # (command, its line on stderr, or how that begins)
    *((f"train.py --{flag} {value}", f"--{flag} {value}: must be {wanted}") for flag, values, wanted in [
        ("tau", "-3 0 nan inf warm", POSITIVE), ("clip", "-1 nan", "a number, at least 0"),
        ("warmup", "-1 1 nan", SHARE), ("weight-decay", "-1 -1e-3", "a number, at least 0"),
        ("heads", "0 -2 1.5", COUNT), ("dropout", "1.5 1 -0.1", SHARE),
        ("seed", "-1 1e30", "a whole number, at least 0 and at most 1e18"),
        ("seq-len", "2 0 1e9", "a whole number, at least 4 and at most 65536"),
        ("peak-lr", "-1 0 nan", POSITIVE), ("budget-hours", "4h 0 -inf", POSITIVE),
        ("budget-steps", "2.5 0 1e400", COUNT),
        ("strategy", "magic", "one of no_kd, vanilla_kd, distilbert, tinybert, minilm, minilmv2"),
        ("init", "warm", "one of random, teacher"), ("recipe", "long", "one of paper, short"),
        ("fractions", "0.5,2 half 0.5,0.5", "numbers, above 0 and below 1, separated by commas, none twice")]
       for value in values.split()),
    ("train.py --data {tmp}", "give exactly one budget: --budget-hours or --budget-flops or "),
    ("train.py --budget-stpes 3", "unknown flag --budget-stpes: is --budget-steps meant? (see python train.py --help)"),
    ("train.py --magic 3", "unknown flag --magic (see python train.py --help)"),
    ("train.py -tau 3", "unknown flag -tau"),
    ("train.py --budget-step 3", "unknown flag --budget-step: is --budget-steps meant?"),
    ("train.py --tau", "argument --tau: expected one argument"), ("train.py wiki", "unrecognized arguments: wiki"),
    (TRAIN + " --device gpu", "--device gpu: must be cpu, cuda or cuda:N"),
    (TRAIN + " --device cuda", "--device cuda: torch sees 0 CUDA device(s) here: give --device cpu"),
    (TRAIN + " --device cuda:1", "--device cuda:1: torch sees 0 CUDA device(s) here: give --device cpu"),
    (TRAIN + " --out {file}", "--out {file}: no directory to write in: {file}: Not a directory"),
    (TRAIN + " --out {file}/x/y", "--out {file}/x/y: no directory to write in: {file}: Not a directory"),
    (TRAIN + " --out /proc/x", "--out /proc/x: no directory to write in: /proc: "),
    (TRAIN + " --size 2L --device cpu", "--size: size '2L' is not LAYERSLWIDTH, such as 6L768"),
    (TRAIN + " --size 2L32 --heads 5 --device cpu", "--size: width 32 is not a multiple of 5 heads"),
    (TRAIN + " --strategy minilm --teacher {file}", "{file} "),
    (TRAIN + " --strategy minilm --teacher {tmp}", "{tmp} is not a model directory (no config.json)"),
    (TRAIN + " --batch-size 10 --micro-batch 4", "--batch-size 10 is not a multiple of --micro-batch 4"),
    ("train.py --budget-steps 4 --data {file}", "{file} is not a token directory"),
    ("prepare.py a.txt --vocab bert-base-uncased", "the following arguments are required: --out"),
    ("prepare.py a.txt --otu {tmp}", "unknown flag --otu: is --out meant?"),
    ("prepare.py a.txt --out {tmp} --vocab-size 0", "--vocab-size 0: must be a whole number, at least 1"),
    ("prepare.py a.txt --out {tmp} --val-fraction 1", "--val-fraction 1: must be a number, above 0 and below 1"),
    ("prepare.py a.txt --out {tmp} --rows-per-document 0", "--rows-per-document 0: must be a whole number, at least 1"),
    ("data.py {corpus} --seq-len 1", "--seq-len 1: must be a whole number, at least 4"),
    ("data.py {corpus} --show -1", "--show -1: must be a whole number, at least 0"),
    ("data.py", "the following arguments are required: DIRECTORY"),
    *((f"{FINE} --model {{teacher}} --{flag}", f"--{flag}: must be {wanted}") for flag, wanted in [
        ("peak-lrs nan", POSITIVES), ("peak-lrs 0,1e-5", POSITIVES), ("peak-lrs fast", POSITIVES),
        ("batch-sizes 1.5", COUNTS), ("seeds 0", COUNT),
        ("first-seed -1", NATURAL), ("epochs 0", COUNT),
        ("max-len 4", "a whole number, at least 8"), ("dropout 1", SHARE)]),
    (FINE + " --model {teacher} --tasks mine={task} --device gpu", "--device gpu: must be cpu, cuda or cuda:N"),
    ("finetune_glue.py --tasks rte", "the following arguments are required: --model"),
    ("finetune_glue.py --model {tmp}/none --tasks rte", "{tmp}/none is neither a model directory nor a Hub id"),
    *((f"{COMPARE} --{flag}", f"--{flag}: must be {wanted}") for flag, wanted in [
        ("finetune-lrs a", POSITIVES), ("finetune-batch-sizes 0", COUNTS),
        ("teacher-budget -5", POSITIVE), ("peak-lrs nan", POSITIVES), ("peak-lrs 0", POSITIVES),
        ("seeds 0", COUNT), ("finetune-epochs 0", COUNT),
        ("max-len 4", "a whole number, at least 8"), ("budget-steps 4,x", COUNTS),
        ("budget-steps 4,4", "whole numbers, at least 1, separated by commas, none twice"),
        ("budget-tokens 1.5", COUNTS), ("budget-hours -1", POSITIVES),
        ("strategies no_kd,magic", "names out of no_kd, "), ("strategies no_kd,no_kd", "names out of no_kd, "),
        ("unique-tokens few", COUNT), ("dropout 1.5", SHARE),
        ("heads -2", COUNT), ("seq-len 2", "a whole number, at least 4")]),
    (COMPARE + " --out {file}", "--out {file}: no directory to write in: {file}: Not a directory"),
    ("compare.py --out {file}/x", "--out {file}/x: no directory to write in: {file}: Not a directory"),
    (COMPARE + " --budgt-steps 4", "unknown flag --budgt-steps: is --budget-steps meant?"),
    ("compare.py --shard 0/2", "--shard is gone: processes with the same --out share the runs, and --jobs N starts "),
    ("finetune_glue.py --shard=1/2", "--shard is gone: processes with the same --out share the trials"),
    ("compare.py --data nowhere", "--data needs --teacher"),
    *((f"{BENCH} --{flag}", f"--{flag}: must be {wanted}") for flag, wanted in [
        ("strategies magic", "names out of no_kd, "), ("baseline keras", "transformers"),
        ("seconds nan", "a number, at least 0"), ("vocab-size 5", "a whole number, at least 6"),
        ("batch-size 0", COUNT), ("device gpu", "cpu, cuda or cuda:N")]),
    (BENCH + " --batch-size 10 --micro-batch 4", "--batch-size 10 is not a multiple of --micro-batch 4"),
    (BENCH + " --strategies minilm --heads 2 --vocab-size 99 --teacher-size 2L256 --batch-size 4 --seconds 0",
     "minilm compares attention head by head, but the student has 2 heads and the teacher 4: give --heads 4"),
    ("bench_throughput.py --size 6L", "--size, --teacher-size: size '6L' is not LAYERSLWIDTH"),
]


@pytest.mark.parametrize("command, line", WRONG, ids=[command for command, _ in WRONG])
def test_a_users_mistake_is_one_line_and_status_2(command, line, corpus, teacher, tmp_path, monkeypatch, capsys):
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("CUDA is here")
    work, file, task = tmp_path / "work", tmp_path / "file", tmp_path / "task"
    work.mkdir()
    file.touch()
    task.mkdir()
    for part in ("train", "dev"):
        (task / f"{part}.tsv").write_text("sentence\tlabel\none\t0\ntwo\t1\n")
    there = dict(corpus=corpus, teacher=teacher, tmp=tmp_path, file=file, task=task)
    name, *argv = shlex.split(command.format(**there))
    script = importlib.import_module(name.removesuffix(".py"))
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", [name, *argv])
    monkeypatch.setattr(signal, "signal", lambda *_: None)              # this process keeps its own
    with pytest.raises(SystemExit) as e:
        cli.run(script.main, script.Config, script.__doc__)
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith("error: " + line.format(**there)) and said.count("\n") == 1, said
    assert not list(work.iterdir()) and sorted(tmp_path.iterdir()) == [file, task, work]


def test_one_gpu_is_not_shared_by_the_processes_of_torchrun(monkeypatch):
    import step
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device, message in ((None, "torch sees 1 CUDA device.*or fewer processes"),
                            ("cuda:0", "--device cuda:0: 2 processes would share one GPU: --device cuda gives each")):
        with pytest.raises(cli.UserError, match=message):
            step.choose_device(device)


def test_what_the_system_refuses_is_one_line_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "a"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def denied(config):
        raise PermissionError(13, "Permission denied", str(tmp_path / "manifest.json"))
    with pytest.raises(SystemExit) as e:
        cli.run(denied, Example, "")
    assert e.value.code == 2 and capsys.readouterr().err == f"error: {tmp_path}/manifest.json: Permission denied\n"

    def bug(config):
        raise ConnectionResetError(104, "Connection reset by peer")
    with pytest.raises(ConnectionResetError):
        cli.run(bug, Example, "")


def test_a_script_says_it_and_exits_with_2(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--strategy", "tinybert", "--budget-hours", "4"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "python prepare.py" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
