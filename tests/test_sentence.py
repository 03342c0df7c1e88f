"""The strategy `sentence`: whole sentences, its loss in a real run, the form of what is saved; and `cut`."""
import importlib
import itertools
import json
import os
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import finetune_glue
import train
from conftest import text
from data import Sentences
from plumbing import checkpoint, encoder
from plumbing.budget import flops_of
from plumbing.checkpoint import Form
from plumbing.cli import UserError
from plumbing.tokenizer import SPECIAL
from plumbing.tokens import TokenDirectory
from step import make_arm

QUIET = dict(say=lambda line: None)
WORDS = [*SPECIAL, ".", "!", "?", ",", "j", "2", "##a", "one", "two", "(", "é"]


@pytest.fixture(scope="session")
def make_encoder(narrow_teacher, tmp_path_factory):
    """make_encoder(Form) is a teacher of 4 layers without LM head, whose embeddings have that form."""
    def make(form):
        out = tmp_path_factory.mktemp("encoder") / "model"
        model, tokenizer = checkpoint.load_mlm(narrow_teacher).model, checkpoint.read_tokenizer(narrow_teacher)
        checkpoint.save_model(out, model, tokenizer, False, "", form.max_len, form=form)
        return out
    return make


@pytest.fixture
def sentences(tiny, make_encoder):
    """Makes the train.Config of a tiny run of `sentence`."""
    def make(form=None, **other):
        return tiny(**dict(strategy="sentence", peak_lr=None, teacher=str(make_encoder(form or Form()))) | other)
    return make


# ------------------------------------------------------------------------------------------------------ Sentences

def directory_of(ids):
    vocab = {word: i for i, word in enumerate(WORDS)}
    return SimpleNamespace(path="ids", split=lambda name: np.array(ids, np.uint16), vocab=vocab,
                           special={token: vocab[token] for token in SPECIAL})


def slow_sentences(words, most):
    """([sentence], joined, cut): word by word."""
    raw, now = [], []                                                   # (words, does a document end with them?)
    for i, word in enumerate(words):
        before, after = words[i - 1] if i else "", words[i + 1] if i + 1 < len(words) else ""
        now += [word] if word != "[SEP]" else []
        initial = len(before) == 1 and before.isalpha()
        if word == "[SEP]" or word in (".", "!", "?") and after[:1].isalpha() and not initial:
            raw.append((now, word == "[SEP]"))
            now = []
    found, begun, joined = [], [], 0
    for part, ends in raw:
        begun = begun + part
        if len(part) < 5 and not ends:
            joined += 1
        else:
            found, begun = found + [begun], []
    return [s[:most] for s in found if s], joined, sum(len(s) > most for s in found)


def test_sentences_end_where_a_slow_reader_ends_them():
    rng = np.random.default_rng(0)
    p = np.array([0, .02, 0, .04, 0, .1, .03, .03, .05, .08, .05, .1, .2, .2, .05, .05])
    for most in (6, 30):
        words = ["one", *rng.choice(WORDS, 3000, p=p / p.sum()), "[SEP]"]
        found = Sentences(directory_of([WORDS.index(w) for w in words]), "train", most + 2, 0)
        ids = found.read(np.arange(found.count))
        shown = [[WORDS[i] for i in row[1:1 + n]] for row, n in zip(ids, found.size, strict=True)]
        expected, joined, cut = slow_sentences(words, most)
        assert shown == expected and (found.joined, found.cut) == (joined, cut)
        assert joined > 20 and (cut > 20 or most > 6)
        for row, n in zip(ids, found.size, strict=True):
            assert [WORDS[i] for i in row[[0, n + 1]]] == ["[CLS]", "[SEP]"] and (row[n + 2:] == 0).all()


@pytest.mark.parametrize("document, expected", [
    ("one two one two . two one one two", ["one two one two .", "two one one two"]),
    ("two j . one two one", ["two j . one two one"]),                           # an initial
    ("one two one 2 . 2 one two one", ["one two one 2 . 2 one two one"]),       # a decimal
    ("one two one two . ##a one", ["one two one two . ##a one"]),
    ("one ! two one two one ?", ["one ! two one two one ?"]),                   # one of 2 ids joins the next
    ("one two", ["one two"])])                                                  # of its own document
def test_what_ends_a_sentence(document, expected):
    words = [*document.split(), "[SEP]", *"two two two two two".split(), "[SEP]"]
    blocks = Sentences(directory_of([WORDS.index(w) for w in words]), "train", 32, 0)
    shown = [" ".join(WORDS[i] for i in row[1:1 + n]) for row, n in zip(blocks.read(np.arange(blocks.count)),
                                                                        blocks.size, strict=True)]
    assert shown == [*expected, "two two two two two"]


def test_each_epoch_has_each_sentence_once_in_another_order(corpus):
    directory = TokenDirectory(corpus)
    blocks, other = (Sentences(directory, "val", 64, seed) for seed in (0, 1))
    n = blocks.count
    first, second, again = (blocks.batch(i, n).ids for i in (0, 1, 0))
    everything = Counter(map(bytes, blocks.read(np.arange(n))))
    assert Counter(map(bytes, first)) == Counter(map(bytes, second)) == everything
    assert (first == again).all() and (first != second).any() and (first != other.batch(0, n).ids).any()
    assert (blocks.batch(3, 5).ids == np.concatenate([first, second])[15:20]).all()
    assert blocks.batch(0, 4).masked.shape == (4, 0)


# ---------------------------------------------------------------------------------------------------- a real run

@pytest.mark.parametrize("recipe", ["paper", "short"])
def test_a_run_regresses_the_embeddings_of_whole_sentences(sentences, watched, corpus, recipe):
    """Seen from outside: the sentences of the step, unmasked, each once, padding at the ends alone; the teacher reads
    what the student reads; no dropout; peak 4e-4 and clip 1 whatever the recipe; the loss is that of the embeddings;
    the student starts from the teacher's layers."""
    config = sentences(recipe=recipe, optimizer="adamw", dropout=0.1, micro_batch=4, budget_steps=4, warmup=0.25)
    seen, blocks = watched(config), Sentences(TokenDirectory(corpus), "train", 64, 0)
    for step in range(4):
        read = [f for f in seen.micro_batches if f.step == step]
        rows = Counter(tuple(i for i in row if i) for f in read for row in f.ids.tolist())
        assert rows == Counter(tuple(i for i in row if i) for row in blocks.batch(step, 4).ids.tolist())
        assert len(read) == 2 and all(f.ids[:, -1].any() and not any(p for _, p, _, _ in f.drops) for f in read)
    training, _ = seen.teachers
    assert [f.ids.tolist() for f in training] == [f.ids.tolist() for f in seen.micro_batches]
    assert [g["lr"] for u in seen.updates for g in u.groups[:1]] == pytest.approx([0, 4e-4, 8e-4 / 3, 4e-4 / 3])
    norms = [torch.nn.utils.get_total_norm(list(u.grads.values())).item() for u in seen.updates]
    assert seen.log[0]["gradient_norm"] > 0 and max(norms) < 1.0001 and config.record["clip"] == 1
    assert seen.summary["teacher_mlm"] is None and set(seen.summary["val"]) == {"sentence"}
    assert seen.summary["tokens"] == 4 * 8 * 32 and seen.summary["epochs"] == pytest.approx(4 * 4 / blocks.count)
    teacher = checkpoint.load_mlm(checkpoint.find_model(config.teacher)).model.eval()
    for layer, of in enumerate((0, 3)):
        name = f"bert.encoder.layer.{layer}.attention.self.query.weight"
        assert torch.equal(seen.first[dict(seen.student.named_parameters())[name]],
                                     teacher.state_dict()[name.replace(f".{layer}.", f".{of}.")])


def test_two_ranks_update_as_one_does(sentences, watched, watched_ranks, tmp_path):
    """They read disjoint halves of one process's sentences, and their gradient is its."""
    common = dict(budget_steps=2, clip=0.0)
    ranks = watched_ranks(sentences(**common, micro_batch=4, out=str(tmp_path / "two")))
    one = watched(sentences(**common, out=str(tmp_path / "one")))
    for step, update in enumerate(one.updates):
        alone = [row[row > 0].tolist() for f in one.micro_batches if f.step == step for row in f.ids]
        both = [[row[row > 0].tolist() for f in forwards if f["step"] == step for row in f["ids"]]
                for forwards, _ in ranks]
        assert [len(rows) for rows in both] == [2, 2] and both[0] + both[1] == alone
        for _, gradients in ranks:
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(
                update.grads.values(), gradients[step], strict=True))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_loss_of_a_micro_batch_is_that_of_sentences_one_by_one(sentences, corpus, pooling):
    """Without padding, each alone, by hand: so padding is neither attended to nor pooled."""
    arm = make_arm(sentences(Form(pooling)), TokenDirectory(corpus))
    batch = Sentences(TokenDirectory(corpus), "train", 64, 0).batch(0, 16)
    _, terms = arm.forward(*arm.to_device(batch))
    expected = []
    for row in batch.ids:
        ids = torch.from_numpy(row[row > 0])[None]
        a, b = (m.eval()(ids, want=("hidden",))["hidden"][0] for m in (arm.student, arm.teacher))
        a, b = (x.mean(0) if pooling == "mean" else x[0] for x in (a, b))
        expected.append(2 - 2 * torch.cosine_similarity(a, b, 0).item())
    assert terms["sentence"].item() == pytest.approx(np.mean(expected), rel=1e-4) and np.mean(expected) > 0.01
    sizes = {len(row[row > 0]) for row in batch.ids}
    assert len(sizes) > 5                                               # there was padding


def test_a_step_costs_what_its_tokens_cost(sentences, tiny):
    """As many tokens as any other arm's step, at its own S, whatever --seq-len says; the price goes with them."""
    found = {}
    for seq_len, batch in ((64, 8), (128, 4), (32, 16)):
        config = sentences(seq_len=seq_len, batch_size=batch, micro_batch=batch)
        phase, = config.phases
        assert (phase.seq_len, phase.blocks(batch)) == (64, 8)
        arm = make_arm(config, TokenDirectory(config.data))
        found[seq_len] = batch * sum(flops_of(arm, 0))
    assert len(set(found.values())) == 1


@pytest.mark.parametrize("other, said", [
    (dict(strategy="sentence:0.5/no_kd"), "sentence is no part of several phases"),
    (dict(strategy="clm:0.3/sentence"), "sentence is no part of several phases"),
    (dict(seq_len=48, micro_batch=2), "--micro-batch 2: their tokens must be a multiple of 64.*multiples of 4"),
    (dict(size="2L64"), "sentence needs a student as wide as its teacher"),
    (dict(init_layers="best"), "--init-layers best: must be whole numbers")])
def test_what_is_refused(sentences, other, said):
    with pytest.raises(UserError, match=said):
        train.train(sentences(**other), **QUIET)


@pytest.mark.parametrize("name, content, said", [
    ("1_Pooling/config.json", dict(pooling_mode_max_tokens=True), "pooling max"),
    ("1_Pooling/config.json", dict(pooling_mode=["mean", "cls"]), "pooling mean, cls"),
    ("1_Pooling/config.json", dict(pooling_mode_mean_sqrt_len_tokens=True), "pooling mean_sqrt_len"),
    ("modules.json", [dict(type=f"x.{t}", path=t) for t in ("Transformer", "Pooling", "Dense")], "Pooling, Dense"),
    ("modules.json", [1], "damaged or not ours")])
def test_another_form_of_embedding_is_refused(make_encoder, name, content, said):
    teacher = make_encoder(Form())
    (teacher / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        checkpoint.read_form(teacher)


# ----------------------------------------------------------------------------------------------- what is saved

@pytest.mark.parametrize("form", [Form("mean", True, 40), Form("cls", False, 24)])
def test_the_student_opens_in_sentence_transformers_in_its_teachers_form(sentences, form):
    """Plain encode() has the teacher's pooling, maximum length and normalisation, and is what we compute."""
    st = (importlib.import_module if os.environ.get("CI") else pytest.importorskip)("sentence_transformers")
    config = sentences(form, budget_steps=2)
    train.train(config, **QUIET)
    texts = [line for document in text(10, seed=9) for line in document.split("\n")][:20]
    student = config.path / "model"
    assert checkpoint.read_form(student) == checkpoint.read_form(checkpoint.find_model(config.teacher)) == form
    model, tokenizer = checkpoint.load_mlm(student).model.eval(), checkpoint.read_tokenizer(student)
    rows, lengths = [], []
    for example in finetune_glue.encode(tokenizer, [(t,) for t in texts], form.max_len):
        ids = torch.from_numpy(example[:1].astype(np.int64))
        with torch.no_grad():
            h = model(ids, want=("hidden",))["hidden"][0]
        e = h.mean(0) if form.pooling == "mean" else h[0]
        rows.append((e / e.norm() if form.normalize else e).numpy())
        lengths.append(ids.shape[1])
    assert max(lengths) == form.max_len                                 # some are cut
    for where in (student, config.teacher):
        opened = st.SentenceTransformer(str(where), device="cpu")
        assert opened.max_seq_length == form.max_len
        if where == student:
            assert np.abs(opened.encode(texts) - np.stack(rows)).max() < 1e-5


def test_the_end_says_what_was_lost_and_won(sentences, corpus):
    """The loss and the neighbours of the first weights and the last, by brute force."""
    said, config = [], sentences(Form("mean", True), budget_steps=10, peak_lr=3e-3)
    summary = train.train(config, say=said.append)
    found, blocks = summary["held_out"], Sentences(TokenDirectory(corpus), "val", 64, 0)
    n = found["n"]
    assert n == min(1000, blocks.count) > 100
    teacher = checkpoint.load_mlm(checkpoint.find_model(config.teacher)).model.eval()
    student = checkpoint.load_mlm(config.path / "model").model.eval()
    e = {}
    for name, model in dict(teacher=teacher, student=student).items():
        rows = []
        for row in blocks.batch(0, n).ids:
            with torch.no_grad():
                h = model(torch.from_numpy(row[row > 0])[None], want=("hidden",))["hidden"][0].mean(0)
            rows.append((h / h.norm()).numpy())
        e[name] = np.stack(rows)
    near = {}
    for name, rows in e.items():
        similar = rows @ rows.T
        np.fill_diagonal(similar, -9)
        near[name] = [set(row[:10]) for row in np.argsort(-similar, 1)]
    shared = np.mean([len(a & b) / 10 for a, b in zip(near["student"], near["teacher"], strict=True)])
    assert found["student"]["neighbours"] == pytest.approx(shared, abs=0.01)
    assert found["student"]["loss"] == pytest.approx(((e["student"] - e["teacher"]) ** 2).sum(1).mean(), rel=1e-3)
    assert found["student"]["loss"] < found["cut"]["loss"] == pytest.approx(
        train.train(sentences(Form("mean", True), budget_steps=1, peak_lr=1e-9, out=config.out + "0"),
                    **QUIET)["held_out"]["student"]["loss"], rel=1e-4)
    line, = (line for line in said if f"student: on {n:,} held-out sentences" in line)
    assert f"{found['student']['neighbours']:.1%}" in line


def test_one_command_prepares_the_text_and_ends_with_the_neighbours(make_encoder, tmp_path, monkeypatch, capsys):
    """A file of text, a document a line: prepared once in the teacher's vocabulary, with 1,000 sentences held out; the
    student has half of the teacher's layers and its heads."""
    lines = list(dict.fromkeys(line for document in text(2500, seed=5) for line in document.split("\n")))
    (tmp_path / "my.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    config = train.Config(strategy="sentence", teacher=str(make_encoder(Form("mean", True))), data="my.txt",
                          batch_size=4, budget_steps=2, val_times=1, val_blocks=8, device="cpu", bf16=False, out="run")
    train.main(config)
    said = capsys.readouterr()
    directory, = (tmp_path / "data").iterdir()
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["documents"] == len(lines) and manifest["document_per"] == "line"
    assert directory.name.startswith("my-") and "sentence: student 2L32, 2 heads" in said.out
    for name in ("cut", "student"):
        assert re.search(rf"^{name}: on 1,000 held-out sentences loss 0\.\d+, and of the 10 nearest", said.out, re.M)
    train.main(config)
    again = capsys.readouterr()
    assert "run is finished" in again.out and "duplicates" not in again.err


# ---------------------------------------------------------------------------------------------------------- cut

def cut(tmp_path, **other):
    config = train.Config(**dict(strategy="cut", out=str(tmp_path / "cut")) | other)
    train.main(config)
    return config.path


def test_cut_writes_the_teachers_layers_in_its_form(make_encoder, narrow_teacher, tmp_path, capsys):
    for teacher, head in ((make_encoder(Form("cls", True, 50)), False), (narrow_teacher, True)):
        out = cut(tmp_path / f"{head}", teacher=str(teacher), size="2L32", init_layers="1,3")
        said = capsys.readouterr().out
        assert "layers 1, 3, from 0, of" in said and "classifier" not in said
        ours, theirs = (checkpoint.read_weights(path) for path in (out, teacher))
        for name, weight in ours.items():
            of = re.sub(r"layer\.(\d)", lambda m: f"layer.{2 * int(m[1]) + 1}", name)
            assert torch.equal(weight, theirs[of])
        assert len(ours) < len(theirs) and checkpoint.read_form(out) == checkpoint.read_form(teacher)
        assert ("cls.predictions.bias" in ours) == head and checkpoint.read_config(out).num_hidden_layers == 2


def test_cut_says_that_a_classifier_stays_behind(narrow_teacher, tmp_path, capsys):
    classifier = checkpoint.load_classifier(narrow_teacher, 3, 0)
    checkpoint.save_model(tmp_path / "c", classifier, checkpoint.read_tokenizer(narrow_teacher))
    cut(tmp_path, teacher=str(tmp_path / "c"), size="2L32")
    assert capsys.readouterr().out.endswith("; its classifier is left out\n")


@pytest.mark.parametrize("other, said", [
    (dict(budget_hours=1), "trains nothing"), (dict(teacher=None), "give --teacher"),
    (dict(size="5L32"), "4L32, and a cut is as wide and at most as deep"),
    (dict(size="2L64"), "a cut is as wide"), (dict(init_layers="0,4"), "2 of 0 to 3 belong there"),
    (dict(init_layers="0"), "2 of 0 to 3"), (dict(init_layers="first"), "--init-layers first: must be whole numbers"),
    (dict(init_layers="best"), "not a token directory"), (dict(init_layers="best", data=None), "give --data")])
def test_a_cut_that_cannot_be_made_writes_nothing(make_encoder, tmp_path, other, said):
    with pytest.raises(UserError, match=said):
        cut(tmp_path, **dict(teacher=str(make_encoder(Form())), size="2L32", data=str(tmp_path)) | other)
    assert not list(tmp_path.iterdir())


def test_the_best_layers_are_those_whose_student_is_nearest(make_encoder, narrow_teacher, corpus, tmp_path, capsys,
                                                            monkeypatch):
    """Every set's loss is that of the student made of it; the best five are printed, the best is written.  Beyond the
    FLOPs that all of them may take, a set grows from the first and the last layer."""
    teacher, directory = make_encoder(Form("mean", True)), TokenDirectory(corpus)
    out = cut(tmp_path, teacher=str(teacher), size="2L32", init_layers="best", data=str(corpus))
    printed = re.findall(r"  (\d\.\d{4})  --init-layers (\S+)", capsys.readouterr().out)
    ids = torch.from_numpy(Sentences(directory, "train", 64, 0).batch(0, 1000).ids)
    whole, losses = checkpoint.load_mlm(teacher).model.eval(), {}
    for layers in itertools.combinations(range(4), 2):
        part = checkpoint.load_mlm(teacher).model.eval()
        part.bert.encoder["layer"] = torch.nn.ModuleList(whole.bert.encoder["layer"][i] for i in layers)
        a, b = (encoder.embeddings(m, ids, Form()) for m in (part, whole))
        losses[",".join(map(str, layers))] = (a - b).square().sum(1).mean().item()
    ranked = sorted(losses, key=losses.get)
    assert [layers for _, layers in printed] == ranked[:5]
    assert [float(loss) for loss, _ in printed] == pytest.approx([losses[n] for n in ranked[:5]], rel=0.05, abs=1e-3)
    kept = checkpoint.read_weights(out)["bert.encoder.layer.0.attention.self.query.weight"]
    assert torch.equal(kept, whole.bert.encoder["layer"][int(ranked[0][0])].attention["self"]["query"].weight)
    monkeypatch.setattr(encoder, "ALL_SETS", 0)
    assert encoder.best_layers(whole, Form(), 3, directory) in ((0, 1, 3), (0, 2, 3))
    with pytest.raises(UserError, match="a sentence encoder, without an LM head"):
        cut(tmp_path / "mlm", teacher=str(narrow_teacher), size="2L32", init_layers="best", data=str(corpus))
