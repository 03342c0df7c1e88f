"""What is not ours is neither overwritten nor removed, and a directory is one process's own while it works there."""
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_reliability import QUIET, Killed, final, interrupted

import compare
import finetune_glue
import prepare
import train
from comparison import demonstration
from conftest import TINY, text
from model import BertConfig, BertForMaskedLM
from plumbing import checkpoint, files
from plumbing.cli import UserError
from plumbing.tokens import TokenDirectory

# A file of each kind as the versions before the marks wrote it
BEFORE = {"run": ("config.json", dict(strategy="no_kd", seed=0)),
          "tokens": ("manifest.json", dict(sha256={}, vocab_size=300)),
          "compare": ("inputs.json", {"--data": "data/wiki", "--size": "6L768"}),
          "glue": ("glue.json", dict(model="runs/x/model", tasks={}))}

pytestmark = pytest.mark.usefixtures("often")


def tree(path):
    """{name: contents} of all files below; of a link where it leads."""
    return {p.relative_to(path).as_posix(): os.readlink(p) if p.is_symlink() else p.read_bytes()
            for p in sorted(path.rglob("*")) if p.is_symlink() or p.is_file()}


@pytest.fixture
def labelled(tmp_path):
    """Labelled text: 40 rows in train and dev each."""
    task = tmp_path / "task"
    task.mkdir()
    for name, seed in (("train", 5), ("dev", 6)):
        (task / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(
            f"{d.splitlines()[0]}\t{i % 2}\n" for i, d in enumerate(text(40, seed))))
    return task


@pytest.fixture
def tools(tiny, corpus, teacher, labelled, tmp_path):
    """{kind: what writes into tmp_path / "out"}"""
    out = str(tmp_path / "out")
    raw = tmp_path / "raw.txt"
    raw.write_text("\n\n".join(text(200)))
    recipe = {k: v for k, v in TINY.items() if k in {f.name for f in dataclasses.fields(compare.Config)}}
    tune = finetune_glue.Config(str(teacher), tasks=f"own={labelled}", quick=True, seeds=1, epochs=1, max_len=16,
                                out=out, save=True, device="cpu", bf16=False)
    return SimpleNamespace(
        run=lambda: train.train(tiny(out=out, budget_steps=6, fractions="0.5"), **QUIET),
        tokens=lambda: prepare.prepare(prepare.Config([str(raw)], out, str(corpus / "tokenizer.json"),
                                                      val_fraction=0.1)),
        compare=lambda: compare.main(compare.Config(**recipe | dict(
            data=str(corpus), teacher=str(teacher), tasks=f"own={labelled}", budget_steps="3", seeds=1, out=out,
            arms="no_kd", quick=True, finetune_epochs=1, finetune_seeds=1))),
        glue=lambda: finetune_glue.score_model(tune, **QUIET), probes=lambda: finetune_glue.probes(tune, **QUIET))


def killed_after(count, monkeypatch, *names):
    """From now on the process dies in place of the next but so many operations of os; returns the list of them."""
    calls = []

    def dying(whole):
        def operation(*args, **named):
            calls.append(1)
            if len(calls) > count:
                raise Killed
            return whole(*args, **named)
        return operation
    for name in names:
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    return calls


# --------------------------------------------------------------------------------------------- what is not ours

PRECIOUS = [
    *(("run", name) for name in ("notes.txt", "config.json", "log.jsonl", "summary.json", "checkpoint.pt",
                                 "model/pytorch_model.bin", "model.part/notes.txt", "model-0.5/notes.txt")),
    *(("tokens", name) for name in ("train.bin", "val.bin", "tokenizer.json", "manifest.json", "train.bin.part")),
    *(("compare", name) for name in ("table.md", "costs.md", "results.npz", "figure.png", "results.json", "total.json",
                                     "inputs.json", "runs/no_kd-3steps-seed0/model/config.json")),
    *(("glue", name) for name in ("glue.json", "trials/own-b32-lr0.0007-seed0.json", "trials/notes/a")),
    ("probes", "probes.json")]


@pytest.mark.parametrize("kind, name", PRECIOUS)
def test_a_precious_file_is_found_again_in_every_place_that_the_tools_write_to(tools, kind, name, tmp_path):
    """The directory is refused for it, and nothing in it has changed."""
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"precious": 1}')
    before = tree(tmp_path)
    with pytest.raises(UserError, match="another configuration|damaged|nothing was touched; give a new dir") as e:
        getattr(tools, kind)()
    assert "\n" not in str(e.value) and tree(tmp_path) == before
    assert kind == "run" or f"({name.split('/')[0]} is there)" in str(e.value)


def test_a_teacher_or_a_token_directory_as_out_is_refused(tools, teacher, corpus, tmp_path):
    for source, kinds in ((teacher, "run tokens compare glue"), (corpus, "run compare glue")):
        shutil.copytree(source, tmp_path / "out")
        before = tree(tmp_path / "out")
        for kind in kinds.split():
            with pytest.raises(UserError, match="--out .*out is (neither empty nor|a token directory, not)"):
                getattr(tools, kind)()
            assert tree(tmp_path / "out") == before
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("kind", ["run", "tokens", "compare", "glue"])
def test_what_is_laid_into_a_directory_of_ours_stays_there(tools, kind, tmp_path):
    """Marked; and unmarked, as before there were marks."""
    out, makes = tmp_path / "out", getattr(tools, kind)
    makes()
    assert (out / ".nanokd").read_text() == f"{kind}\n"
    names = ("model", "runs", "trials", "runs/no_kd-3steps-seed0", "trials/own-b32-lr0.0007-seed0")
    places = [out, *(out / name for name in names if (out / name).is_dir())]
    for place in places:
        (place / "notes.txt").write_text("precious")
    makes()
    marks = list(out.rglob(".nanokd"))
    assert len(marks) == (6 if kind == "compare" else 1)                # a run, three scores and the kept classifier
    for mark in marks:
        mark.unlink()
    makes()
    assert {place: (place / "notes.txt").read_text() for place in places} == dict.fromkeys(places, "precious")
    finished = [mark for mark in marks if (mark.parent / "summary.json").exists()]          # those are not opened
    assert set(out.rglob(".nanokd")) == set(marks) - set(finished)


@pytest.mark.parametrize("place, marked", [*((place, True) for place in (
    "file", "link", "model", "notes", "part", "old", "fraction", "hidden", "sums", "summary.json")), ("notes", False)])
def test_what_stands_where_a_run_is_to_end_is_refused_at_its_start(tools, tiny, teacher, tmp_path, monkeypatch,
                                                                   place, marked):
    """A killed run goes on only when it is gone: with no step done, and nothing lost."""
    out = tmp_path / "out"
    config = tiny(out=str(out), budget_steps=6, fractions="0.5")
    interrupted(monkeypatch, config, 2)
    if not marked:
        (out / ".nanokd").unlink()
    elsewhere, model = tmp_path / "elsewhere", out / "model"
    if place == "file":
        model.write_text("precious")
    elif place == "link":
        shutil.copytree(teacher, elsewhere)
        model.symlink_to(elsewhere)
    elif place == "model":                              # a model with our names alone, which we have not saved
        shutil.copytree(teacher, model)
        (model / "SHA256SUMS").unlink()
    elif place == "sums":                               # ours, then trained further elsewhere
        shutil.copytree(teacher, model)
        weights, = model.glob("*model.*")
        weights.write_bytes(weights.read_bytes()[::-1])
    elif place in ("notes", "hidden"):
        shutil.copytree(teacher, model)
        (model / ("notes.txt" if place == "notes" else ".notes")).write_text("precious")
    else:
        name = dict(part="model.part", old="model.old", fraction="model-0.5").get(place, place)
        (out / name).mkdir()
        (out / name / "notes.txt").write_text("precious")
    before = tree(tmp_path)
    for dry_run in (True, False):
        with pytest.raises(UserError, match="is not ours, and .* is where a model is to be saved: nothing was touched"
                           "|summary.json is damaged"):
            train.train(dataclasses.replace(config, dry_run=dry_run), **QUIET)
        found = tree(tmp_path)
        found.pop("out/.nanokd", None)
        before.pop("out/.nanokd", None)
        assert found == before
    shutil.rmtree(model) if model.is_dir() and not model.is_symlink() else model.unlink(missing_ok=True)
    for name in ("model.part", "model.old", "model-0.5", "summary.json"):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    assert train.train(config, **QUIET)["steps"] == 6
    if place == "link":
        assert tree(elsewhere) == tree(teacher)


def test_a_foreign_directory_in_the_place_of_a_classifier_is_refused_before_it_is_trained(tools, tmp_path, monkeypatch):
    tools.glue()
    kept, = (p for p in (tmp_path / "out/trials").iterdir() if p.is_dir())
    Path(f"{kept}.json").unlink()
    (kept / "notes.txt").write_text("precious")
    before = tree(kept)
    monkeypatch.setattr(finetune_glue, "finetune", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match="notes.txt is not ours"):
        tools.glue()
    assert tree(kept) == before


# ------------------------------------------------------------------------------------------------------ a claim

@pytest.mark.parametrize("kind", BEFORE)
def test_a_directory_is_claimed_once_and_for_one_kind(kind, tmp_path):
    out, (name, contents) = tmp_path / "a/b", BEFORE[kind]
    assert files.claim(str(out), kind, dry_run=True) == out and not (tmp_path / "a").exists()
    for _ in range(2):
        assert files.claim(str(out), kind) == out and tree(out) == {".nanokd": f"{kind}\n".encode()}
    (out / "notes.txt").write_text("")
    files.claim(out, kind)
    other = next(k for k in BEFORE if k != kind)
    for dry_run in (True, False):
        with pytest.raises(UserError, match=f"--out {out} is .*, not .*: give another --out"):
            files.claim(out, other, dry_run)
    old = tmp_path / "old"
    old.mkdir()
    (old / name).write_text(json.dumps(contents))
    (old / "notes.txt").write_text("")
    for refused in (k for k in BEFORE if k != kind):
        with pytest.raises(UserError, match=rf"\({min(name, 'notes.txt')} is there\)"):
            files.claim(old, refused)
    assert files.claim(old, kind, dry_run=True) == old and not (old / ".nanokd").exists()
    files.claim(old, kind)
    assert (old / ".nanokd").read_text() == f"{kind}\n" and len(tree(old)) == 3


@pytest.mark.parametrize("contents", [
    "", "{", "[]", "null", '"strategy"', '{"seed": 0}', '{"strategy": "no_kd", "model_type": "bert"}', "[" * 100_000,
    "\udcff"])
def test_a_file_that_only_has_our_name_makes_no_directory_ours(tmp_path, contents):
    (tmp_path / "config.json").write_text(contents, errors="surrogateescape")
    with pytest.raises(UserError, match=r"config.json is there"):
        files.claim(tmp_path, "run")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", [".DS_Store", "lost+found", ".nfs0000a1", ".nanokd.123.part"])
def test_what_no_one_has_laid_there_does_not_make_a_directory_full(tmp_path, name):
    (tmp_path / name).write_text("x")
    assert files.claim(tmp_path, "run") == tmp_path and (tmp_path / name).read_text() == "x"


@pytest.mark.parametrize("name", [".git", ".env", ".nanokd.notes", ".nanokd-1.part", "..data", "trials"])
def test_a_hidden_file_is_as_precious_as_another(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match="is there"):
        files.claim(tmp_path, "run")


def test_links_files_and_names_that_are_empty(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for empty in ("", " "):
        for dry_run in (True, False):
            with pytest.raises(UserError, match="--out is empty: give the name of a directory"):
                files.claim(empty, "run", dry_run)
    for other in (dict(), dict(dry_run=True)):
        with pytest.raises(UserError, match="--out is empty"):
            config = tiny(out="", **other)
            train.train(config, **QUIET)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    files.claim("link", "run")
    assert (tmp_path / "real/.nanokd").exists() and (tmp_path / "link").is_symlink()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("x")
    for path, why in (("dangling", "No such file or directory"), ("file", "Not a directory"),
                      ("file/deeper", "Not a directory")):
        with pytest.raises(UserError, match=f"--out {path}: no directory to write in: .*: {why}"):
            files.claim(path, "run")
    assert (tmp_path / "file").read_text() == "x" and not (tmp_path / "nowhere").exists()
    with pytest.raises(UserError, match=r"\(dangling is there\)"):
        files.claim(".", "run")


def test_where_nothing_can_be_written_a_finished_run_is_finished_and_another_one_is_refused(tiny, monkeypatch):
    config, said = tiny(budget_steps=3), []
    train.train(config, **QUIET)

    def read_only(dir):
        raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    for marked in (True, False):
        assert train.train(config, say=said.append)["steps"] == 3 and said.pop().endswith("is finished: nothing to do")
        for other in (config.out + "/deeper", str(Path(config.out).parent / "other")):
            with pytest.raises(UserError, match="no directory to write in: .*: Read-only file system"):
                train.train(dataclasses.replace(config, out=other), **QUIET)
        if marked:
            Path(config.out, ".nanokd").unlink()


def test_a_mark_that_means_nothing_here_is_refused_without_escapes(tmp_path):
    for mark in (b"", b"\x1b[2Jnovel\n\n", b"\xff"):
        (tmp_path / ".nanokd").write_bytes(mark)
        with pytest.raises(UserError, match="not a run of train.py") as e:
            files.claim(tmp_path, "run")
        assert "\x1b" not in str(e.value)


@pytest.mark.parametrize("links", [True, False])
def test_of_two_that_claim_at_once_the_second_finds_the_firsts_mark(tmp_path, monkeypatch, links):
    """The second comes when the first has found an empty directory and not yet marked it; where a disk has no hard
    links, a mark is still whole."""
    whole, at_once = os.link, []

    def link(a, b):
        if not at_once:
            at_once.append(1)
            with monkeypatch.context() as m:
                m.setattr(os, "getpid", lambda: 17)
                files.claim(tmp_path, "tokens")
        if not links:
            raise OSError(errno.EPERM, "Operation not permitted")
        whole(a, b)
    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UserError, match="is a token directory, not a run of train.py"):
        files.claim(tmp_path, "run")
    assert tree(tmp_path) == {".nanokd": b"tokens\n"}


def test_a_claim_that_was_killed_anywhere_can_be_made_again(tmp_path, monkeypatch):
    for cut in range(9):
        out = tmp_path / str(cut)
        with monkeypatch.context() as m:
            killed_after(cut, m, "mkdir", "fsync", "link", "unlink")
            try:
                files.claim(out, "run")
                break
            except Killed:
                pass
        assert files.claim(out, "run") == out and (out / ".nanokd").read_text() == "run\n"
    assert cut == 4                                     # each of the four was the last one once


def test_what_was_made_for_nothing_goes_and_nothing_else(tmp_path):
    for out, left in (("a/b/c", []), ("empty", ["empty", "empty/.nanokd"])):
        (tmp_path / left[0]).mkdir() if left else None
        with pytest.raises(KeyError), files.hold(tmp_path / out, "run"):
            raise KeyError
        assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == left
        shutil.rmtree(tmp_path / "empty") if left else None
    with files.hold(tmp_path / "kept/run", "run"):
        (tmp_path / "kept/run/log.jsonl").write_text("")
    assert len(tree(tmp_path)) == 2


def test_the_demonstrations_dry_run_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(demonstration.sources, "docstrings", lambda: [("torch", t) for t in text(300)])
    config = compare.Config(out=str(tmp_path / "out"), dry_run=True)
    made = demonstration.demonstrated(config)
    assert not list(tmp_path.iterdir()) and Path(made.data, "manifest.json").exists()
    real = demonstration.demonstrated(dataclasses.replace(config, dry_run=False))
    assert real.data == str(tmp_path / "out/data") and (tmp_path / "out/.nanokd").read_text() == "compare\n"
    assert demonstration.demonstrated(config).data == real.data         # what is there is read


# -------------------------------------------------------------------------------------- one process, one recipe

def test_a_second_run_in_the_same_directory_is_refused_and_a_dead_one_holds_nothing(tiny, tmp_path):
    config = tiny(out=str(tmp_path / "run"), budget_steps=3)
    code = ("import sys, time; from pathlib import Path; from plumbing import files\n"
            "with files.hold(Path(sys.argv[1]), 'run'):\n    print(flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, config.out], cwd=Path(train.__file__).parent,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    for seed in (0, 1):
        with pytest.raises(UserError, match="another process is writing there: wait for it, or give another --out"):
            train.train(dataclasses.replace(config, seed=seed), **QUIET)
    assert tree(tmp_path / "run") == {".nanokd": b"run\n"}
    other.kill()
    other.wait()
    assert train.train(config, **QUIET)["steps"] == 3


def test_the_checkpoints_own_configuration_is_compared(tiny, monkeypatch):
    """As two processes in one directory once left it: config.json of seed 1, the checkpoint of seed 0."""
    config = tiny(budget_steps=6)
    interrupted(monkeypatch, config, 3)
    file = Path(config.out, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(seed=1)))
    with pytest.raises(UserError, match=r"another configuration: seed \(0 there, 1 here\)"):
        train.train(dataclasses.replace(config, seed=1), **QUIET)
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(seed=0)))
    assert train.train(config, **QUIET)["steps"] == 6


@pytest.mark.parametrize("old", [False, True])
def test_a_run_goes_on_where_the_data_and_the_teacher_have_moved(tiny, corpus, teacher, tmp_path, monkeypatch, old):
    """`old`: a directory without a mark, whose checkpoint does not say what the data held."""
    config = tiny(strategy="minilm", budget_steps=6)
    train.train(dataclasses.replace(config, out=str(tmp_path / "whole")), **QUIET)
    interrupted(monkeypatch, config, 3)
    if old:
        out = Path(config.out)
        state = checkpoint.load_run(out)
        state["config"] = {k: v for k, v in state["config"].items() if not k.startswith("contents")}
        del state["ended"], state["vals"]
        checkpoint.save_run(out, state)
        (out / ".nanokd").unlink()
    shutil.copytree(corpus, tmp_path / "data")
    shutil.copytree(teacher, tmp_path / "teacher")
    moved, said = dataclasses.replace(config, data=str(tmp_path / "data"), teacher=str(tmp_path / "teacher")), []
    if old:                             # nor does its config.json: what lies elsewhere may be something else
        file, whole = Path(config.out, "config.json"), Path(config.out, "config.json").read_text()
        file.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if not k.startswith("contents")}))
        with pytest.raises(UserError, match="another configuration: teacher .*data "):
            train.train(moved, **QUIET)
        train.train(dataclasses.replace(config, dry_run=True), **QUIET)
        file.write_text(whole)
    train.train(moved, say=said.append)
    assert f"{config.out}: going on after step 3" in said and final(config.out) == final(tmp_path / "whole")
    assert json.loads(Path(config.out, "config.json").read_text())["data"] == str(tmp_path / "data")
    train.train(config, say=said.append)
    assert said[-1] == f"{config.out} is finished: nothing to do"


def test_a_comparison_goes_on_where_the_data_and_the_teacher_have_moved(tools, corpus, teacher, labelled, tmp_path,
                                                                        capsys, monkeypatch):
    """And every file is read once for its sha256, however many runs there are."""
    recipe = {k: v for k, v in TINY.items() if k in {f.name for f in dataclasses.fields(compare.Config)}}
    shutil.copytree(corpus, tmp_path / "data")
    shutil.copytree(teacher, tmp_path / "teacher")
    config = compare.Config(**recipe | dict(
        data=str(tmp_path / "data"), teacher=str(tmp_path / "teacher"), tasks=f"own={labelled}", budget_steps="3",
        seeds=1, out=str(tmp_path / "out"), arms="no_kd,minilm", quick=True, finetune_epochs=1,
        finetune_seeds=1))
    read, whole = [], hashlib.file_digest
    with monkeypatch.context() as m:
        m.setattr(hashlib, "file_digest", lambda f, *how: read.append(Path(f.name)) or whole(f, *how))
        compare.main(config)
    inputs = [p for p in read if p.parent in (tmp_path / "data", tmp_path / "teacher")]
    assert len(inputs) == len(set(inputs)) and {p.name for p in inputs} >= {"train.bin", "val.bin"}
    assert any("model" in p.name for p in inputs)
    first = (tmp_path / "out/table.md").read_text()
    compare.main(dataclasses.replace(config, data=str(corpus), teacher=str(teacher)))
    assert (tmp_path / "out/table.md").read_text() == first
    assert json.loads((tmp_path / "out/inputs.json").read_text())["--data"] == str(corpus)
    other = tmp_path / "other"
    prepare.prepare(prepare.Config(["made up"], str(other), str(corpus / "tokenizer.json"), val_fraction=0.1), text(99))
    with pytest.raises(UserError, match="holds runs with another contents of data"):
        compare.main(dataclasses.replace(config, data=str(other)))


def test_what_a_killed_process_was_writing_goes_at_the_start(tiny, monkeypatch):
    config = tiny(budget_steps=6)
    interrupted(monkeypatch, config, 3)
    out, kept = Path(config.out), {"checkpoint.pt.part", "a.1.part", "checkpoint.pt.x.part", "checkpoint-mine.pt"}
    for name in kept | {"checkpoint.pt.17.part", "log.jsonl.1.part", "config.json.2.part", ".nanokd.3.part"}:
        (out / name).write_text("x")
    (out / "model.part").mkdir()
    (out / "model.part/SHA256SUMS.12.part").write_text("x")
    with pytest.raises(KeyError), monkeypatch.context() as m:
        m.setattr(train, "make_arm", lambda *_: {}["at the start"])
        train.train(config, **QUIET)
    assert {p.name for p in out.glob("*.p*t")} == kept | {"checkpoint.pt"}
    train.train(config, **QUIET)
    assert {p.name for p in out.glob("*.part")} == {name for name in kept if name.endswith(".part")}


def test_a_run_that_starts_anew_keeps_no_fraction_of_another_one(tiny):
    config = tiny(budget_steps=4, fractions="0.5", seed=1)
    saved = Path(config.out, "model-0.5")
    other = train.train(dataclasses.replace(config, seed=0), **QUIET) and tree(saved)
    (saved.parent / "checkpoint.pt").unlink()
    (saved.parent / "summary.json").unlink()            # as if it had died before its first checkpoint
    train.train(config, **QUIET)
    assert tree(saved)["SHA256SUMS"] != other["SHA256SUMS"]


# --------------------------------------------------------------------------------------------- a model is whole

def of_seed(seed):
    torch.manual_seed(seed)
    return BertForMaskedLM(BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                                      intermediate_size=32))


@pytest.mark.parametrize("operations", [("replace", "unlink", "rmdir"), ("mkdir", "fsync")])
def test_a_save_that_is_cut_anywhere_leaves_a_whole_model(corpus, tmp_path, monkeypatch, operations):
    """F2 for models: dies before each file operation; the old or the new one is found, the next save finds room."""
    tokenizer = TokenDirectory(corpus).read_tokenizer()
    models = [of_seed(seed) for seed in range(3)]
    words = [m.bert.embeddings.word_embeddings.weight for m in models]
    seen = set()
    for cut in range(99):
        directory = tmp_path / f"{cut}/model"
        checkpoint.save_model(directory, models[0], tokenizer)
        with monkeypatch.context() as m:
            calls = killed_after(cut, m, *operations)
            try:
                checkpoint.save_model(directory, models[1], tokenizer)
            except Killed:
                pass
        path = checkpoint.find_model(str(directory))
        found = checkpoint.load_mlm(path).model.bert.embeddings.word_embeddings.weight
        which = [i for i in range(3) if torch.equal(found, words[i])]
        assert which in ([0], [1]) and set(tree(path)) == set(tree(directory) or tree(path))
        seen.add((which[0], path.name))
        checkpoint.room(directory)                      # as a run does when it goes on
        assert [p.name for p in directory.parent.iterdir()] == ["model"]
        checkpoint.save_model(directory, models[2], tokenizer)
        assert torch.equal(checkpoint.load_mlm(directory).model.bert.embeddings.word_embeddings.weight, words[2])
        assert [p.name for p in directory.parent.iterdir()] == ["model"]
        if len(calls) <= cut:
            break
    assert seen >= {(0, "model"), (1, "model")} and ((0, "model.old") in seen) == ("replace" in operations)
    assert cut > 10


def test_all_of_a_model_is_on_the_disk_before_it_takes_its_place(corpus, tmp_path, monkeypatch):
    order, whole = [], dict(fsync=os.fsync, replace=os.replace)

    def fsync(fd):
        order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).relative_to(tmp_path).as_posix())
        whole["fsync"](fd)

    def replace(a, b):
        order.append((Path(a).name, Path(b).name))
        whole["replace"](a, b)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    checkpoint.save_model(tmp_path / "model", of_seed(0), TokenDirectory(corpus).read_tokenizer())
    at = order.index(("model.part", "model"))
    written = {name.replace(f".{os.getpid()}.part", "") for name in order[:at] if isinstance(name, str)}
    assert written == {f"model.part/{name}" for name in tree(tmp_path / "model")} and not order[at + 1:]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_a_disk_that_fills_while_a_model_is_written_is_one_line_and_the_earlier_one_stays(corpus, tmp_path, monkeypatch,
                                                                                       name):
    tokenizer, whole = TokenDirectory(corpus).read_tokenizer(), os.fsync
    checkpoint.save_model(tmp_path / "model", of_seed(0), tokenizer)
    before = tree(tmp_path / "model")

    def full(fd):
        if Path(os.readlink(f"/proc/self/fd/{fd}")).name.startswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(fd)
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=rf"model.part/{name} could not be written \(No space left on device\): "
                                            r"[\d,]+ bytes needed, [\d,]+ free; what was there before is intact"):
            checkpoint.save_model(tmp_path / "model", of_seed(1), tokenizer)
    assert tree(tmp_path / "model") == before
    checkpoint.save_model(tmp_path / "model", of_seed(1), tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_single_file_is_overwritten_only_where_it_is_ours(tmp_path):
    precious, ours = tmp_path / "page.html", tmp_path / "ours.html"
    precious.write_text("<p>mine</p>")
    ours.write_text("<!doctype html><title>nanoKD: runs</title>")
    for path in (ours, tmp_path / "new.html"):
        assert files.claim_file(path) == path
    os.mkfifo(tmp_path / "fifo.png")                                    # not waited for
    for path in (precious, tmp_path, tmp_path / "fifo.png"):
        with pytest.raises(UserError, match="nothing was touched; give another name"):
            files.claim_file(path)
    assert precious.read_text() == "<p>mine</p>"
