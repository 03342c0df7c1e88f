"""The tour, the exercises with their solutions and without, and what the pages say."""
import copy
import dataclasses
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import check_docs
import pytest
import torch

import prepare
import train
from conftest import text
from data import Blocks
from exercises import tinybert_in_25_lines
from plumbing.budget import Stages
from plumbing.cli import parse
from plumbing.tokens import TokenDirectory
from step import make_arm

ROOT = Path(__file__).parents[1]


def test_the_tour_runs_with_the_four_packages(monkeypatch, capsys):
    for other in ("safetensors", "transformers", "scipy", "sklearn", "matplotlib", "pyarrow"):
        monkeypatch.setitem(sys.modules, other, None)                   # an import of it fails
    monkeypatch.chdir(ROOT)
    seen = runpy.run_path("exercises/tour.py")
    assert capsys.readouterr().out.count(" by hand ") > len(seen["done"]) and seen["soft_ce"] > seen["entropy"]


@pytest.mark.parametrize("after, status, said", [
    ("| head -1", 0, ""), (">&-", 0, ""), ("--help", 0, ""), ("--fast", 2, "usage: tour.py [-h]"),
    ("x", 2, "usage: tour.py [-h]")])
def test_the_tour_from_another_directory_in_a_c_locale(tmp_path, after, status, said):
    env = os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    command = f"{sys.executable} {ROOT}/exercises/tour.py {after}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == status and done.stderr.startswith(said) and bool(done.stderr) == bool(said), done.stderr


def test_distillation_in_25_lines_is_the_real_step(tiny, narrow_teacher, monkeypatch, capsys):
    """Its loss and every gradient are those of train.py's step; no import but torch and model.py."""
    config = tiny(strategy="tinybert", teacher=str(narrow_teacher))
    directory = TokenDirectory(config.data)
    arm, batch = make_arm(config, directory), Blocks(directory, "train", config.seq_len, seed=0).batch(3, 8)
    student = copy.deepcopy(arm.student).requires_grad_()
    names, values = train.gradients(arm, batch, 0, Stages(arm.device))
    loss = tinybert_in_25_lines.tinybert(student, arm.teacher, torch.from_numpy(batch.ids))
    loss.backward()
    assert loss.item() == pytest.approx(values[names.index("loss")].item(), abs=1e-6) and loss > 0.1
    theirs = {name: p.grad for name, p in arm.student.named_parameters()}
    reached = [name for name, p in student.named_parameters() if p.grad is not None]
    assert reached == [name for name, grad in theirs.items() if grad is not None] and len(reached) > 30
    for name, p in student.named_parameters():
        assert name not in reached or torch.allclose(p.grad, theirs[name], rtol=0, atol=1e-6), name
    assert max(theirs[name].abs().max() for name in reached) > 0.01     # 1e-6 is small beside it
    source = Path(tinybert_in_25_lines.__file__).read_text()
    code = source.split('"""')[2].split("\n")
    assert sum(map(bool, code)) == 25 and re.findall(r"^\s*(?:import|from) (\S+)", "\n".join(code), re.M) == [
        "torch", "torch.nn.functional", "model"]
    monkeypatch.chdir(ROOT)
    runpy.run_path("exercises/tinybert_in_25_lines.py", run_name="__main__")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(losses) == 20 and losses[-1] < 0.7 * losses[0]


class Outcomes:
    def __init__(self):
        self.seen = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.seen.append(report.outcome)


@pytest.mark.parametrize("solved", [False, True])
def test_every_exercise_fails_until_it_is_solved(tmp_path, monkeypatch, capsys, solved):
    """In a copy, so that the solutions need not stand beside the stubs."""
    shutil.copytree(ROOT / "exercises", tmp_path / "exercises", ignore=shutil.ignore_patterns("__pycache__"))
    if solved:
        shutil.copytree(ROOT / "tests/solutions", tmp_path / "exercises", dirs_exist_ok=True)
    for name in ("stubs", "test_session1", "test_session2"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    outcomes = Outcomes()
    pytest.main(["-q", "-p", "no:cacheprovider", str(tmp_path / "exercises")], plugins=[outcomes])
    assert len(outcomes.seen) > 20 and set(outcomes.seen) == {"passed" if solved else "failed"}


def test_the_commands_of_the_exercises_run(tmp_path, monkeypatch):
    """Every train.py command of docs/exercises.md, two steps, on made-up text in the teacher's vocabulary."""
    monkeypatch.chdir(ROOT)
    data = str(tmp_path / "data")
    prepare.prepare(prepare.Config(["made up"], data, "teacher", val_fraction=0.3), text(400))
    commands = map(check_docs.program, check_docs.documented(Path("docs/exercises.md").read_text()))
    commands = [arguments for name, arguments in filter(None, commands) if name == "train.py"]
    for i, arguments in enumerate(commands):
        config = dataclasses.replace(parse(train.Config, "", arguments), data=data, budget_steps=2,
                                     out=str(tmp_path / f"run{i}"), budget_flops=None, val_blocks=2)
        assert train.train(config, say=lambda line: None)["steps"] == 2
    assert len(commands) == 2


def test_what_the_exercises_break_is_there_to_be_broken():
    changes = re.findall(r"`(\w+\.py)`: `([^`]+)`\s+becomes `", (ROOT / "docs/exercises.md").read_text())
    assert len(changes) == 3 and all((ROOT / file).read_text().count(old) == 1 for file, old in changes)


def test_the_plain_test_command_does_not_collect_the_exercises(request):
    assert request.config.getini("testpaths") == ["tests"]


def test_the_pages_hold():
    assert check_docs.faults() == []


def test_a_circle_of_imports_is_found_and_one_inside_of_functions_is_none(tmp_path):
    (tmp_path / "plumbing").mkdir()
    files = {"a.py": "import plumbing.b\n", "plumbing/b.py": "from plumbing import c\n",
             "plumbing/c.py": "import torch\ndef f():\n    from a import x\n"}
    for name, source in files.items():
        (tmp_path / name).write_text(source)
    assert check_docs.imports(tmp_path) == (
        {"a": {"plumbing.b"}, "plumbing.b": {"plumbing.c"}, "plumbing.c": set()},
        {"a": set(), "plumbing.b": set(), "plumbing.c": {"a"}})
    assert list(check_docs.import_faults(tmp_path)) == []
    (tmp_path / "plumbing/c.py").write_text("try:\n    from a import x\nexcept ImportError:\n    pass\n")
    assert list(check_docs.import_faults(tmp_path)) == [
        "a circle of imports: a -> plumbing.b -> plumbing.c -> a"]


def test_the_checker_finds_what_is_wrong(tmp_path):
    for part in ("README.md", "RECORDS.md", "docs", "tests", "teacher"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copyfile
        copy(ROOT / part, tmp_path / part)
    wrong = [
        ("README.md", "python compare.py --data", "python compare.py --datum", "unknown flag --datum"),
        ("docs/running.md", "$ python watch.py runs/", "$ python watch.py --x 3 runs/", "no line for: watch.py --x"),
        ("README.md", "(docs/gpu.md)", "(docs/gpus.md)", "the link docs/gpus.md leads nowhere"),
        ("README.md", "(docs/running.md)", "(docs/running.md#ram)", "running.md has no heading #ram"),
        ("README.md", "63.9 ± 1.5", "63.98 ± 1.5", "63.98 not in RECORDS.md or docs/"),
        ("docs/data.md", "`--static-masks`", "`--static-mask`", "--static-mask is a flag of no program here"),
        ("docs/data.md", "# My text", "# My text DEMO_SECONDS", "docs/data.md:1: a placeholder is left"),
        ("docs/gpu.md", "`aot_eager`", "`aot_eager` and `aot_lazy`", "docs/gpu.md: `aot_lazy` is no name here"),
        ("docs/models.md", "`pytorch_model.bin`", "`step.no_such`", "docs/models.md: `step.no_such` is no name here"),
        ("docs/tests.md", "# Tests", "# Tests" + 29 * " word", "31 words in a sentence, at most 30: # Tests word"),
        ("RECORDS.md", "| open |", f"| {601 * 'x'} |", "a cell of 601 characters, at most 600"),
        ("tests/commands.txt", "data::the_script", "data::no_script", "test_data.py has no test_no_script"),
        ("tests/commands.txt", "watch::follow_redraws_until_ctrl_c", "data::the_script_shows_what_was_masked",
         "no test that is named there has --follow")]
    for page, old, new, _ in wrong:
        said = (tmp_path / page).read_text()
        assert old in said, old
        (tmp_path / page).write_text(said.replace(old, new, 1))
    found = check_docs.faults(tmp_path)
    assert [fault for *_, fault in wrong if not any(fault in line for line in found)] == []


def test_the_limits_of_the_readme_hold_once_they_are_switched_on(tmp_path, monkeypatch):
    """Lines, words, numbers before the first command (not in code, links and names) and sentences, each by one."""
    (tmp_path / "teacher").mkdir()
    for page in ("RECORDS.md", "teacher/README.md"):
        (tmp_path / page).write_text("# Nothing\n")
    numbers = "0.5, " * 19 + "+1 `3` [four](docs/4.md) all-MiniLM-L6-v2.\n"
    sentence = " ".join(29 * ["word"]) + " `of code.`\n"
    short = numbers + sentence + "\n    $ python train.py 1 2 3\n\n"
    short += "x.\n" * (109 - short.count("\n"))
    short += "x. " * (900 - len(short.split()))
    assert short.count("\n") == 109 and len(short.split()) == 900
    longer = short.replace(" `of code.`", " of `code.`").replace("x.", "", 1)
    for switched_on, page, expected in (
            (False, 3 * short, []), (True, short + "\n", []),
            (True, short + "\n\n", ["README.md: 111 lines, at most 110"]),
            (True, short + "x.\n", ["README.md: 901 words, at most 900"]),
            (True, short.replace("`3`", "3") + "\n", ["README.md: 21 numbers, at most 20"]),
            (True, longer + "\n", ["31 words in a sentence"])):
        monkeypatch.setattr(check_docs, "README_IS_SHORT", switched_on)
        (tmp_path / "README.md").write_text(page)
        found = list(check_docs.length_faults(tmp_path))
        assert len(found) == len(expected) and all(e in f for e, f in zip(expected, found, strict=True)), found
