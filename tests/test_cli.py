"""One line, exit status 2, no traceback; help for every flag."""
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import bench_throughput
import cli
import compare
import data
import finetune_glue
import prepare
import train

ROOT = Path(cli.__file__).parent


@dataclass
class Example:
    paths: list[str]                # what to read
    rate: float = 0.5               # 100% of something
    count: int | None = None        # how many
    fast: bool | None = None        # or not


def test_fields_become_flags():
    assert cli.parse(Example, "", ["a", "b", "--rate", "2", "--no-fast"]) == Example(["a", "b"], 2.0, None, False)
    assert cli.parse(Example, "", ["a", "--count", "3"]) == Example(["a"], 0.5, 3, None)


@pytest.mark.parametrize("argv", [["a", "--rat", "2"], ["a", "--rate", "x"], [], ["a", "--other", "1"]])
def test_a_wrong_flag_is_one_line_and_status_2(argv, capsys):
    with pytest.raises(SystemExit) as e:
        cli.parse(Example, "", argv)
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("script", [prepare, data, train, finetune_glue, compare, bench_throughput])
def test_every_flag_has_help(script, capsys):
    with pytest.raises(SystemExit) as e:
        cli.parse(script.Config, script.__doc__, ["--help"])
    assert e.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    import inspect
    import re
    helps = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(script.Config), re.M))
    for field in fields(script.Config):
        assert len(helps[field.name]) > 3 and " ".join(helps[field.name].split()[:3]) in out


@pytest.mark.parametrize("argv, message", [
    (["train.py", "--strategy", "tinybert", "--budget-hours", "4"], "python prepare.py"),
    (["train.py", "--strategy", "magic", "--budget-hours", "4"], "magic"),
    (["train.py", "--budget-hours", "4h"], "4h"),
    (["compare.py", "--data", "nowhere"], "--teacher"),
    (["finetune_glue.py", "--model", "no/such/model", "--tasks", "rte"], "no/such/model")])
def test_a_users_mistake_is_one_line_and_status_2(argv, message, tmp_path):
    done = subprocess.run([sys.executable, ROOT / argv[0], *argv[1:]], cwd=tmp_path, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "error: " in line]      # a library may have warned before
    assert done.returncode == 2 and len(said) == 1 and message in said[0], done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
