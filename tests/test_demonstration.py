"""The teacher in the box, and what holds the demonstration's text and task apart from its training."""
import json
import random
import sys

import pytest

import compare
import prepare
from comparison import demonstration
from conftest import text
from plumbing import checkpoint
from plumbing.cli import UserError


def test_the_teacher_is_read_with_the_four_packages_alone(monkeypatch):
    """No safetensors; its files are those that were written, under 12 MB; its head and vocabulary are there."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path = checkpoint.find_model(str(demonstration.TEACHER))
    model, missing, ignored = checkpoint.load_mlm(path)
    assert model.config.size == "4L128" and not missing and not ignored
    assert len(checkpoint.read_tokenizer(path).get_vocab()) == model.config.vocab_size == 4096
    assert sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) < 12e6
    assert json.loads((path / "corpus.json").read_text())["val_fraction"] == demonstration.VAL_FRACTION


def test_a_later_version_of_a_docstring_stays_on_its_side():
    """The held-out rule is a function of a text's beginning alone: what another machine's packages say after it, in
    other case or spacing, is on the same side."""
    sides, rng = set(), random.Random(0)
    for d in text(300, seed=8):
        beginning = prepare.docstring_head(d)[:159].ljust(160, "x")
        versions = [beginning, f"{beginning} and more", f"  {beginning.upper()}\n\nchanged in 3.{rng.randint(1, 9)}"]
        found = {prepare.is_validation(prepare.docstring_key(v), demonstration.VAL_FRACTION) for v in versions}
        assert len(found) == 1
        sides |= found
    assert sides == {True, False}


def test_the_demonstration_has_its_own_sizes():
    with pytest.raises(UserError, match="--size without --data: the demonstration"):
        demonstration.demonstrated(compare.Config(size="2L64"))


def test_what_students_say_can_be_looked_at(teacher, capsys):
    """A line of fillings for every student of seed 0 whose LM head was trained."""
    results = [dict(seed=seed, budget=1, strategy=name, model=str(teacher), val=val) for seed in (0, 1)
               for name, val in (("no_kd", dict(mlm=5.0)), ("tinybert", dict(attn=1.0)))]
    demonstration.look(results)
    head, no_kd, tinybert, _, *own = capsys.readouterr().out.splitlines()
    assert own[0] == "Your own text:" and "prepare.py" in own[1] and max(map(len, own)) <= 80
    assert demonstration.MASKED in head and no_kd.startswith("no_kd ") and no_kd.count("%") == 5
    assert tinybert.startswith("tinybert ") and tinybert.endswith("(no LM head)")
