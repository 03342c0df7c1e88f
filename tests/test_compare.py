"""The whole way at the smallest size, and what the table says of its noise."""
import dataclasses
import json

import pytest

import compare
from cli import UserError
from conftest import TINY, text


def test_the_whole_way_ends_with_the_table_and_a_second_call_repeats_nothing(corpus, teacher, tmp_path, capsys):
    task = tmp_path / "task"
    task.mkdir()
    for name, seed in (("train", 5), ("dev", 6)):
        (task / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(
            f"{d.splitlines()[0]}\t{i % 2}\n" for i, d in enumerate(text(40, seed))))
    recipe = {k: v for k, v in TINY.items() if k in {f.name for f in dataclasses.fields(compare.Config)}}
    config = compare.Config(data=str(corpus), teacher=str(teacher), task_dir=str(task), budget_steps=3,
                            out=str(tmp_path / "out"), finetune_epochs=1, finetune_seeds=2, **recipe)
    compare.main(config)
    first = (tmp_path / "out/table.md").read_text()
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["no_kd", "vanilla_kd", "tinybert", "minilm", "random init", "teacher"]
    assert first.count("\n| ") == 6 and "is noise" in first and first in capsys.readouterr().out + "\n"
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")
              if p.suffix in (".bin", ".safetensors", ".jsonl")}
    compare.main(config)
    assert (tmp_path / "out/table.md").read_text() == first
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


def test_the_task_holds_validation_documents_alone_and_splits_them(tmp_path):
    packages = ("torch", "sympy", "click")
    documents = [(package, f"{d} {package}") for package in packages for d in text(3000, seed=2)]
    compare.write_task(tmp_path, documents)
    rows = {name: (tmp_path / f"{name}.tsv").read_text().splitlines()[1:] for name in ("train", "dev")}
    assert 0 < len(rows["train"]) <= compare.DEMO_LABELLED
    held_out = {" ".join(t.split())[:compare.DEMO_CHARACTERS] for _, t in documents
                if compare.prepare.is_validation(compare.prepare.document_key(t), compare.DEMO_VAL_FRACTION)}
    assert all(row.split("\t")[0] in held_out for part in rows.values() for row in part)
    assert {row.split("\t")[1] for row in rows["train"]} == {"0", "1"}          # click is not one of the labels
    assert not set(rows["train"]) & set(rows["dev"])


def test_wrong_arguments_are_refused_before_anything_runs(tmp_path):
    for changes, message in ((dict(budget_hours=1.0), "without --data"), (dict(data="x"), "--teacher"),
                             (dict(data="x", teacher="y", task_dir="z"), "exactly one budget"),
                             (dict(data="x", teacher="y", task_dir="z", strategies="no_kd,magic"), "magic")):
        with pytest.raises(UserError, match=message):
            compare.main(compare.Config(out=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()
