"""One line, exit status 2, no traceback, nothing written; help for every flag; what a field allows."""
import ast
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch

from plumbing import cli
from plumbing.device import Ranks, choose_device

ROOT = Path(__file__).parents[1]


@dataclass
class Example(cli.Checked):
    paths: list[str]                # what to read
    rate: cli.Positive = 0.5        # 100% of something
    count: cli.Seed | None = None   # how many
    fast: bool | None = None        # or not
    kind: Literal["near", "far"] = "near"   # of two
    parts: Annotated[str, float, "(0, 1]"] = ""     # of the whole
    layer: int | None = None        # from either end
    name: str | None = None         # of its own


def test_fields_become_flags():
    assert cli.parse(Example, "", ["a", "b", "--rate", "2", "--no-fast"]) == Example(["a", "b"], 2.0, None, False)
    assert cli.parse(Example, "", ["a", "--count", "3"]) == Example(["a"], 0.5, 3, None)
    given = cli.parse(Example, "", "--count=0 - --rate 1e-3 --kind far --parts .5,1 --layer -1".split())
    assert given == Example(["-"], 1e-3, 0, None, "far", ".5,1", -1) and cli.numbers(given.parts) == [.5, 1.0]


@pytest.mark.parametrize("text, value", [("1e6", 10 ** 6), ("12", 12), ("2.0", 2), (f"{10 ** 17 + 1}", 10 ** 17 + 1)])
def test_whole_numbers_may_be_written_with_an_exponent(text, value):
    assert Example([], count=text).count == value


@pytest.mark.parametrize("changes, message", [
    *((dict(rate=v), f"--rate {v}: must be a number, at least 1e-9 and at most 1e5")
      for v in ("0", "-1e-3", "nan", "inf", "-inf", "fast", "", 0, "1e300", "1e-300")),
    *((dict(count=v), f"--count {v}: must be a whole number, at least 0 and at most 1e18")
      for v in ("-1", "1.5", "nan", "1e999", "x", -2, "-0.0", "-1e-400")),
    *((dict(parts=v), f"--parts {v}: must be numbers, above 0 and at most 1, separated by commas, none twice")
      for v in ("0,1", "1.1", ".5,.5", ".5,0.50", ".5,,1", ",", "half", ".5, 1")),
    *((dict(parts=",".join(f"{i / 1000:.3f}" for i in range(1, n))),
       "--parts 0.001,0.002,0.003,0.004,0.005,0.006,0.007,0.008,0.009,0.010,0.011,0.012,0.013,0.014,0.015,0.016, ...: "
       "must be numbers, above 0 and at most 1, separated by commas, none twice" + more)
      for n, more in ((66, ", at most 64 of them"), (1002, ""))),
    (dict(kind="nearby"), "--kind nearby: must be one of near, far"),
    (dict(kind=""), "--kind : must be one of near, far"),
    (dict(layer="last"), "--layer last: must be a whole number"),
    (dict(name=" "), "--name is empty: say what belongs there, or leave it out"),
    (dict(name="a\udcff"), "--name a\\udcff: is not UTF-8, or the locale is not (PYTHONUTF8=1)"),
    (dict(paths=["a", "a\udcff"]), "--paths a\\udcff: is not UTF-8, or the locale is not (PYTHONUTF8=1)")])
def test_what_a_field_does_not_allow_is_refused_in_code_and_on_the_command_line(changes, message):
    (name, value), = changes.items()
    argv = value if name == "paths" else ["a", f"--{name}", str(value)]
    for make in (lambda: Example(**dict(paths=[]) | changes), lambda: cli.parse(Example, "", argv)):
        with pytest.raises(cli.UserError) as refused:
            make()
        assert str(refused.value) == message


PROGRAMS = [importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
            for folder in (ROOT, ROOT / "plumbing", ROOT / "comparison") for file in sorted(folder.glob("*.py"))
            if 'if __name__ == "__main__"' in file.read_text(encoding="utf-8")]
each_program = pytest.mark.parametrize("script", PROGRAMS, ids=[script.__name__ for script in PROGRAMS])


def required(cls):
    return {f.name: ["x"] if "list" in str(f.type) else "x" for f in fields(cls)
            if f.default is MISSING and f.default_factory is MISSING}


@each_program
def test_text_becomes_what_each_field_holds(script):
    for field, kind in cli.annotated(script.Config):
        of, several, limit = cli.allowed(kind)
        if of in (int, float, str):
            text = {int: "64", float: "0.5"}.get(of, limit[-1] if limit else "some text")
            value = getattr(script.Config(**required(script.Config) | {field.name: text}), field.name)
            as_it_is = of is str or several is True                     # a list is read where it is used
            assert value == (text if as_it_is else of(text)) and type(value) is (str if as_it_is else of)


@each_program
def test_no_flag_takes_an_absurd_number(script):
    """None is found out by what it allocates."""
    for field, kind in cli.annotated(script.Config):
        line = f"{cli.flag_of(field.name)} (?s:.{{,100}}): must be .{{,200}}"
        for text in ("1e300", "-1e300", "1e30", "9" * 5000, "-0", "-1e-400", "", " ", " 8", "8\n", "1_0", "\u0661",
                     "\uff18", "0x10", "1e", "nan", "inf", ",", "1,1", "8,8.0", ",".join(map(str, range(1, 9999)))):
            if cli.allowed(kind)[0] in (int, float) and text != field.default:
                with pytest.raises(cli.UserError) as refused:
                    script.Config(**required(script.Config) | {field.name: text})
                assert re.fullmatch(line, str(refused.value))


@each_program
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

POSITIVE, SHARE = "a number, at least 1e-9 and at most 1e5", "a number, at least 0 and below 1"
COUNT, TIMES = ("a whole number, at least 1 and at most 1e15", "a whole number, at least 1 and at most 1000")
POSITIVES, COUNTS = "numbers, at least 1e-9 and at most 1e5, sep", "whole numbers, at least 1 and at most 1e15, sep"
FLOPS, BATCHES = "1e-9 and at most 1e24", "whole numbers, at least 1 and at most 4096, separated by commas, none twice"
TRAIN, BENCH, FINE = "train.py --budget-steps 4 --data {corpus}", "bench_throughput.py --size 1L64", "finetune_glue.py"
COMPARE = "compare.py --data {corpus} --teacher {teacher} --tasks mine={tmp} --budget-steps 4"
WRONG = [                                       # (command, its line on stderr, or how that begins)
    *((f"train.py --{flag} {value}", f"--{flag} {value}: must be {wanted}") for flag, values, wanted in [
        ("tau", "-3 0 nan inf warm 1e300 1e-300", POSITIVE),
        ("clip", "-1 -1e-3 nan 1e300", "a number, at least 0 and at most 1e5"),
        ("warmup", "-1 1 nan", SHARE), ("weight-decay", "-1 -1e-3 -0", "a number, at least 0 and at most 1e5"),
        ("heads", "0 -2 1.5", COUNT), ("dropout", "1.5 1 -0.1", SHARE),
        ("seed", "-1 1e30", "a whole number, at least 0 and at most 1e18"),
        ("seq-len", "2 0 1e9 60000 60000:0.5,32", "a whole number, at least 4 and at most 8192"),
        ("peak-lr", "-1 0 nan", POSITIVE), ("budget-hours", "4h 0 -inf", POSITIVE),
        ("budget-steps", "2.5 0 1e400 1e300 \u0661 1_0", COUNT), ("batch-size", "9e99", COUNT),
        ("budget-flops", "1e300", f"a number, at least {FLOPS}"), ("budget-tokens", "1e300 -0", COUNT),
        ("strategy", "magic", "one of no_kd, vanilla_kd, distilbert, tinybert, minilm, minilmv2"),
        ("init", "warm", "one of random, teacher"), ("recipe", "long", "one of paper, short"),
        ("fractions", "0.5,2 half 0.5,0.5", "numbers, above 0 and below 1, separated by commas, none twice")]
       for value in values.split()),
    ("train.py --data {tmp}", "give exactly one budget: --budget-hours or --budget-flops or "),
    ("train.py --budget-stpes 3", "unknown flag --budget-stpes: is --budget-steps meant? (see python train.py --help)"),
    ("train.py --magic 3", "unknown flag --magic (see python train.py --help)"),
    ("train.py -tau 3", "unrecognized arguments: -tau 3"),
    ("train.py --budget-step 3", "unknown flag --budget-step: is --budget-steps meant?"),
    ("train.py --tau", "argument --tau: expected one argument"), ("train.py wiki", "unrecognized arguments: wiki"),
    (TRAIN + " --device gpu", "--device gpu: must be cpu, cuda or cuda:N"),
    (TRAIN + " --device cuda", "--device cuda: torch sees 0 CUDA device(s) here: give --device cpu"),
    (TRAIN + " --device cuda:1", "--device cuda:1: torch sees 0 CUDA device(s) here: give --device cpu"),
    (TRAIN + " --out {file}", "--out {file}: no directory to write in: {file}: Not a directory"),
    (TRAIN + " --out {file}/x/y", "--out {file}/x/y: no directory to write in: {file}: Not a directory"),
    (TRAIN + " --out /proc/x", "--out /proc/x: no directory to write in: /proc: "),
    *((f"{TRAIN} --device {name}", f"--device {name}: must be cpu, cuda or cuda:N")
      for name in ("cuda:\u0661", "cuda:99999999999999999999")),
    (TRAIN + " --device ''", "--device is empty: say what belongs there, or leave it out"),
    *((f"{TRAIN} --size {size}", f"--size: size '{size}' is not LAYERSLWIDTH, such as 6L768")
      for size in ("2L", "2L6400000000", "\u0662L32", "2L\u0663\u0662")),
    (TRAIN + " --size 6400000000L2 --strategy mobilebert", "--size: size '6400000000L2' is not LAYERSLWIDTH"),
    (TRAIN + " --size 999L64000 --strategy mobilebert", "--size: size '999L64000' has 4.9e+13 parameters, and 4e"),
    (TRAIN + " --size 2L32 --heads 5", "--size: width 32 is not a multiple of 5 heads"),
    (TRAIN + " --size 2L32 --heads 1e15", "--size: width 32 is not a multiple of 1000000000000000 heads"),
    *((f"{TRAIN} --strategy no_kd:{share}/no_kd", f"--strategy no_kd:{share}/no_kd: phase no_kd:{share}: every")
      for share in ("\u0660.\u0665", "1e-400", "1_0", "nan", "")),
    (TRAIN + " --unique-tokens 1e12", "--unique-tokens 1000000000000: {corpus}/train.bin has "),
    (TRAIN + " --strategy 'a\nb'", r"--strategy a\nb: must be one of no_kd, "),
    (TRAIN + " --strategy minilm --teacher {file}", "{file} "),
    (TRAIN + " --strategy minilm --teacher {tmp}", "{tmp} is not a model directory (no config.json)"),
    (TRAIN + " --batch-size 10 --micro-batch 4", "--batch-size 10 is not a multiple of --micro-batch 4"),
    ("train.py --budget-steps 4 --data {tmp}/none", "{tmp}/none is not a token directory"),
    ("prepare.py a.txt --vocab bert-base-uncased", "the following arguments are required: --out"),
    ("prepare.py a.txt --otu {tmp}", "unknown flag --otu: is --out meant?"),
    ("prepare.py a.txt --out {tmp} --vocab-size 0", "--vocab-size 0: must be a whole number, at least 6 and at"),
    ("prepare.py a.txt --out {tmp} --vocab-size 1e12", "--vocab-size 1e12: must be a whole number, at least 6"),
    ("prepare.py a.txt '' --out {tmp} --vocab x", "--sources is empty: say what belongs there"),
    ("prepare.py a.txt --out {tmp} --val-fraction 1", "--val-fraction 1: must be a number, at least 1e-9 and below 1"),
    ("prepare.py a.txt --out {tmp} --at-most 0", "--at-most 0: must be a whole number, at least 1"),
    ("data.py {corpus} --seq-len 1", "--seq-len 1: must be a whole number, at least 4"),
    *((f"data.py {{corpus}} --show {n}", f"--show {n}: must be a whole number, at least 0 and at most 1e4")
      for n in ("-1", "99999999999")),
    ("plumbing.diagnose {corpus} --seq-len 60000", "--seq-len 60000: must be a whole number, at least 4 and"),
    ("plumbing.diagnose {corpus} --val-blocks 0", f"--val-blocks 0: must be {COUNT}"),
    *((f"miniplm.py {{corpus}} --teacher {{teacher}} --out {{tmp}}/out {flag}", line) for flag, line in [
        ("--reference-size 2L6400000000", "--size: size '2L6400000000' is not LAYERSLWIDTH"),
        ("--draws 1e9", f"--draws 1e9: must be {TIMES}"),
        ("--unique-tokens 1e12", "--unique-tokens 1000000000000: ")]),
    ("data.py", "the following arguments are required: DIRECTORY"),
    *((f"{FINE} --model {{teacher}} --{flag}", f"--{flag}: must be {wanted}") for flag, wanted in [
        ("peak-lrs nan", POSITIVES), ("peak-lrs 0,1e-5", POSITIVES), ("peak-lrs fast", POSITIVES),
        ("batch-sizes 1.5", BATCHES), ("batch-sizes 16,1e9", BATCHES), ("seeds 0", TIMES), ("seeds 1e9", TIMES),
        ("first-seed -1", "a whole number, at least 0 and at most 1e18"), ("epochs 0", TIMES), ("epochs 1e300", TIMES),
        ("max-len 4", "a whole number, at least 8 and at most 65536"), ("dropout 1", SHARE)]),
    (FINE + " --model {teacher} --tasks mine={task} --device gpu", "--device gpu: must be cpu, cuda or cuda:N"),
    ("finetune_glue.py --tasks rte", "the following arguments are required: --model"),
    ("finetune_glue.py --model {tmp}/none --tasks rte", "{tmp}/none is neither a model directory nor a Hub id"),
    *((f"{COMPARE} --{flag}", f"--{flag}: must be {wanted}") for flag, wanted in [
        ("finetune-lrs a", POSITIVES), ("finetune-batch-sizes 0", BATCHES),
        ("teacher-budget -5", f"a number, at least {FLOPS}"), ("peak-lrs nan", POSITIVES), ("peak-lrs 0", POSITIVES),
        ("seeds 0", TIMES), ("seeds 1e9", TIMES), ("finetune-epochs 0", TIMES),
        ("jobs 1e9", "a whole number, at least 1 and at most 128"),
        ("budget-flops 1e300", f"numbers, at least {FLOPS}"),
        ("max-len 4", "a whole number, at least 8"), ("budget-steps 4,x", COUNTS),
        ("budget-steps 4,4", f"{COUNTS}arated by commas, none twice"),
        ("budget-tokens 1.5", COUNTS), ("budget-hours -1", POSITIVES),
        ("recipes paper,magic", "names out of paper, short"), ("recipes paper,paper", "names out of paper, short"),
        ("unique-tokens few", COUNT), ("dropout 1.5", SHARE),
        ("heads -2", COUNT), ("seq-len 2", "a whole number, at least 4")]),
    (COMPARE + " --out {file}", "--out {file}: no directory to write in: {file}: Not a directory"),
    ("compare.py --out {file}/x", "--out {file}/x: no directory to write in: {file}: Not a directory"),
    *((f"{COMPARE} --arms {arms}", f"--arms {arms}: must be arms, separated by commas, none twice")
      for arms in (",", "no_kd,", "no_kd,no_kd")),
    (COMPARE + " --arms ''", "--arms is empty: say what belongs there, or leave it out"),
    (COMPARE + " --arms no_kd,tinybert --seeds 1000 --peak-lrs 1e-3,2e-3,3e-3 --budget-steps 4,5,6",
     "these are 6,018 runs, and 5,000 can be planned: give fewer arms, budgets, --seeds, --peak-lrs or"),
    (COMPARE + " --unique-tokens ,", "--unique-tokens : must be a whole number, at least 1"),
    (COMPARE + " --size 2L6400000000", "--size: size '2L6400000000' is not LAYERSLWIDTH"),
    (COMPARE + " --budgt-steps 4", "unknown flag --budgt-steps: is --budget-steps meant?"),
    ("compare.py --data nowhere", "--data needs --teacher"),
    *((f"{BENCH} --{flag}", f"--{flag}: must be {wanted}") for flag, wanted in [
        ("strategies magic", "names out of no_kd, "),
        ("seconds nan", "a number, at least 0"), ("vocab-size 5", "a whole number, at least 6 and at most 1e6"),
        ("vocab-size 1e12", "a whole number, at least 6 and at most 1e6"),
        ("batch-size 0", COUNT), ("device gpu", "cpu, cuda or cuda:N")]),
    (BENCH + " --batch-size 10 --micro-batch 4", "--batch-size 10 is not a multiple of --micro-batch 4"),
    (BENCH + " --strategies minilm --heads 2 --vocab-size 99 --teacher-size 2L256 --batch-size 4 --seconds 0",
     "minilm compares attention head by head, but the student has 2 heads and the teacher 4: give --heads 4"),
    ("bench_throughput.py --size 6L", "--size: size '6L' is not LAYERSLWIDTH"),
    ("bench_throughput.py --teacher-size 2L6400000000", "--size, --teacher-size: size '2L6400000000' is not LAY"),
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
        cli.run(getattr(script, "main", None) or script.miniplm, script.Config, script.__doc__)
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith("error: " + line.format(**there)) and said.count("\n") == 1, said
    assert not list(work.iterdir()) and sorted(tmp_path.iterdir()) == [file, task, work]


TORCHRUN = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="29500")


@pytest.mark.parametrize("changes", [
    dict(WORLD_SIZE=None), dict(RANK=None), dict(RANK=None, WORLD_SIZE="1"), dict(WORLD_SIZE=None, RANK="0"),
    *({name: text} for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
      for text in ("two", "", "-1", "1.0", "\u0661", " 1", "9" * 5000)),
    dict(RANK="2"), dict(WORLD_SIZE="0"), dict(WORLD_SIZE="1"), dict(LOCAL_RANK="2"), dict(MASTER_ADDR=None),
    dict(MASTER_PORT=None)])
def test_a_part_of_torchruns_environment_is_refused(changes, monkeypatch):
    for name, value in (TORCHRUN | changes).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    for of in (Ranks, choose_device):
        with pytest.raises(cli.UserError, match="in the environment are not what torchrun puts there: start"):
            of()


def test_torchruns_environment_is_read(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert (Ranks().rank, Ranks().size) == (0, 1)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert (Ranks().rank, Ranks().size, Ranks().local) == (1, 2, 1)


def test_one_gpu_is_not_shared_by_the_processes_of_torchrun(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device, message in ((None, "torch sees 1 CUDA device.*or fewer processes"),
                            ("cuda:0", "--device cuda:0: 2 processes would share one GPU: --device cuda gives each")):
        with pytest.raises(cli.UserError, match=message):
            choose_device(device)


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


@pytest.mark.parametrize("closed, status", [(">&-", 0), (">&- 2>&-", 0), ("<&- >&- 2>&-", 0), ("2>&-", 0),
                                            ("--show=-1 2>&-", 2), ("--magic <&- >&- 2>&-", 2), (">/dev/full", 2)])
def test_closed_streams_change_no_exit_status(corpus, closed, status):
    command = f"{sys.executable} {ROOT}/data.py {corpus} --show 1 {closed}"
    assert subprocess.run(["sh", "-c", command], timeout=60).returncode == status


def test_what_is_closed_is_no_files_number(tmp_path):
    """A file that is opened later must not become standard output, here or in a child."""
    (tmp_path / "program.py").write_text("""import dataclasses, subprocess, sys
sys.path.insert(0, sys.argv.pop(1))
from plumbing import cli
@dataclasses.dataclass
class Config(cli.Checked):
    out: str        # the file
def main(config):
    with open(config.out, "w") as file:
        print("said here")
        child = "import os; [os.open('%s', os.O_WRONLY) for _ in range(3)]; os.write(1, b'there'); os.write(2, b'too')"
        subprocess.run([sys.executable, "-c", child % config.out], check=True)
        assert file.fileno() > 2
cli.run(main, Config, "")
""")
    command = f"{sys.executable} {tmp_path}/program.py {ROOT} --out {tmp_path}/file <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], timeout=60).returncode == 0
    assert (tmp_path / "file").read_text() == ""


C_LOCALE = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")


def test_a_c_locale_changes_what_is_shown_and_not_what_is_read(corpus, tmp_path):
    copy = shutil.copytree(corpus, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text()) | {"name": "caf\xe9 \u732b"}
    (copy / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
    done = subprocess.run([sys.executable, ROOT / "data.py", copy], env=os.environ | C_LOCALE, capture_output=True)
    assert done.returncode == 0 and b"\nname: caf? ?\n" in done.stdout, done.stderr


def test_every_text_file_is_opened_with_an_encoding():
    """Else what a file says depends on the locale."""
    found, bare = 0, []
    for file in (f for folder in (".", "plumbing", "comparison", "exercises") for f in (ROOT / folder).glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = ast.unparse(call) if isinstance(call, ast.Call) else ""
            if re.match(r"(open|.*\.open|.*\.(read|write)_text)$", text and ast.unparse(call.func), re.S):
                found += 1
                if not re.search(r"encoding='utf-8'|\('utf-8'|[( ]'[rwa]b\+?'|^os\.open|^tarfile\.open", text):
                    bare.append(f"{file.name}, line {call.lineno}: {text}")
    assert found > 20 and bare == []


def test_a_script_says_it_and_exits_with_2(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--budget-hours", "4", "--data", "data/wiki"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "python prepare.py" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
