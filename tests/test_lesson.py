"""The tour, the exercises with their solutions and without, and what the pages say."""
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_tour_runs_with_the_four_packages(monkeypatch, capsys):
    for other in ("safetensors", "transformers", "scipy", "sklearn", "matplotlib", "pyarrow"):
        monkeypatch.setitem(sys.modules, other, None)                   # an import of it fails
    monkeypatch.chdir(ROOT)
    seen = runpy.run_path("tour.py")
    assert capsys.readouterr().out.count(" by hand ") > len(seen["done"]) and seen["loss"] > seen["entropy"]


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
    for name in ("session1", "session2", "broken", "test_session1", "test_session2"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    outcomes = Outcomes()
    pytest.main(["-q", "-p", "no:cacheprovider", str(tmp_path / "exercises")], plugins=[outcomes])
    assert len(outcomes.seen) > 20 and set(outcomes.seen) == {"passed" if solved else "failed"}


def test_the_plain_test_command_does_not_collect_the_exercises(request):
    assert request.config.getini("testpaths") == ["tests"]
