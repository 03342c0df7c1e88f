"""Probes: the regressions against scikit-learn, what is deterministic, what is seen and what is not."""
import json

import numpy as np
import pytest
import torch

import finetune_glue as ft
from data import Blocks, hashed
from plumbing import checkpoint, glue, linear, probe
from plumbing.cli import UserError
from plumbing.tokens import TokenDirectory


def made_up(n, classes, width=12, seed=0):
    """(features, labels) that overlap, of widths as unlike as hidden units are."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)) * np.geomspace(0.1, 10, width)
    z = (x / x.std(0)) @ rng.normal(size=(width, classes)) + rng.gumbel(size=(n, classes)) * 2
    return x.astype(np.float32), z.argmax(1)


def scikit_learns(train, y, dev, classes):
    """What scikit-learn predicts by its own cross-validation on our folds and features, the intercept one of them."""
    pytest.importorskip("sklearn")
    from sklearn import linear_model, model_selection, preprocessing, svm
    scaler = preprocessing.StandardScaler().fit(train)
    train, dev = (np.pad(scaler.transform(x) / x.shape[1] ** 0.5, ((0, 0), (0, 1)), constant_values=1)
                  for x in (train.astype(np.float64), dev.astype(np.float64)))
    fold = model_selection.PredefinedSplit(
        np.argsort(np.argsort(hashed(1, np.arange(len(y))), kind="stable")) % linear.FOLDS)
    if classes is None:
        kind, options = linear_model.Ridge(fit_intercept=False), dict(alpha=[1 / (2 * C) for C in linear.STRENGTHS])
        middle, how = y.mean(), "r2"
    else:
        kind, options = svm.LinearSVC(fit_intercept=False, tol=1e-6, max_iter=20_000), dict(C=linear.STRENGTHS)
        middle, how = 0, "accuracy"
    search = model_selection.GridSearchCV(kind, options, cv=fold, scoring=how)
    return search.fit(train, y - middle).predict(dev) + middle


@pytest.mark.parametrize("classes", [2, 3, None])
def test_the_linear_probe_is_scikit_learns_cross_validation(classes):
    x, y = made_up(500, classes or 2, width=40, seed=1)
    if classes is None:
        y = x @ np.ones(40) + 50 * y
    ours, theirs = (f(x[:300], y[:300], x[300:], classes) for f in (probe.predicted, scikit_learns))
    if classes:
        assert np.mean(ours == theirs) > 0.98 and np.mean(ours == y[300:]) > 0.6
    else:
        assert np.corrcoef(ours, theirs)[0, 1] > 0.999 and np.corrcoef(ours, y[300:])[0, 1] > 0.6


@pytest.mark.parametrize("name, n", [("sst2", 2000), ("rte", 1000), ("stsb", 1000)])
def test_on_real_tasks_too(name, n, real_data, teacher):
    """On the mean-pooled states of a small encoder."""
    task, tokenizer = glue.TASKS[name], checkpoint.read_tokenizer(teacher)
    parts = glue.read_task(name, task, real_data / "glue")
    encoder = probe.Pooled(checkpoint.load_mlm(teacher).model.bert, "mean")

    def states(file):
        x, y = parts[file]
        u = [ft.predict(encoder, ft.encode(tokenizer, [(s[i],) for s in x[:n]], 64), 0) for i in range(len(x[0]))]
        return probe.pair_features(*u), y[:n]
    (train, y), (dev, labels) = states("train"), states("dev")
    ours, theirs = (f(train, y, dev, task.classes(y)) for f in (probe.predicted, scikit_learns))
    metric = glue.pearson if task.labels == () else glue.accuracy
    print(name, metric(ours, labels), metric(theirs, labels))
    assert abs(metric(ours, labels) - metric(theirs, labels)) < 0.01


def test_no_examples_more_than_that_are_taken_and_none_twice():
    some = probe.taken(50_000, 10_000)
    assert len(set(some)) == 10_000 and (np.diff(some) > 0).all() and 0.4 < np.mean(some < 25_000) < 0.6
    assert probe.taken(7).tolist() == list(range(7))


@pytest.fixture
def scored(teacher, tmp_path):
    """A task of pairs whose score is the share of words that both have."""
    words = [t for t in checkpoint.read_tokenizer(teacher).get_vocab() if t.isalpha() and len(t) > 2][:60]
    rng, task = np.random.default_rng(0), tmp_path / "pairs"
    task.mkdir()
    for name, n in (("train", 150), ("dev", 100)):
        rows = ["first\tsecond\tscore"]
        for _ in range(n):
            same, a, b = rng.integers(0, 9), rng.permutation(words)[:8], rng.permutation(words)[:8]
            rows.append(f"{' '.join(a)}\t{' '.join([*a[:same], *b[same:]])}\t{same / 8}")
        (task / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    return task


def test_a_model_s_probes_are_written_once_and_are_the_same_every_time(teacher, corpus, scored, tmp_path, capsys):
    config = ft.Config(str(teacher), tasks=f"own={scored}", probe=True, data=str(corpus), out=str(tmp_path / "a"),
                       max_len=32, device="cpu")
    result = ft.main(config)
    own = result["tasks"]["own"]
    assert own["similarity"] > 30 and set(own) == {"linear", "similarity", "n_train"}
    said = capsys.readouterr().out
    assert set(result["tasks"]) == {"own", "word order"}
    assert f"similarity {own['similarity']:.2f}" in said
    kept = (tmp_path / "a/probes.json").read_bytes()
    lines = []
    assert json.loads(kept) == result == ft.probes(config, say=lines.append)
    assert all("text from" in line for line in lines)                   # nothing was probed again
    config.out = str(tmp_path / "b")
    ft.probes(config, say=lambda line: None)
    assert (tmp_path / "b/probes.json").read_bytes() == kept
    assert not (tmp_path / "a/trials").exists() and not (tmp_path / "a/glue.json").exists()


def test_word_order_is_two_neighbours_exchanged_in_half_of_the_blocks(corpus):
    directory = TokenDirectory(corpus)
    blocks = Blocks(directory, "train", 32, seed=0).read(np.arange(300))
    ids, labels = probe.exchanged(directory, "train", 32, 300)
    assert 0.4 < labels.mean() < 0.6
    for before, after, label in zip(blocks.tolist(), ids.tolist(), labels, strict=True):
        at = [i for i in range(32) if before[i] != after[i]]
        assert bool(at) == label
        if at:
            left, right = at
            assert right == left + 1 and 1 <= left < 30 and (before[left], before[right]) == (after[right], after[left])


def test_a_bag_of_words_does_not_know_word_order_and_a_reader_of_neighbours_does(corpus, monkeypatch):
    directory = TokenDirectory(corpus)
    seen = {int(a) << 20 | int(b) for split in ("train", "val") for a, b in
            zip(directory.split(split)[:-1], directory.split(split)[1:], strict=True)}
    monkeypatch.setattr(probe, "ORDER", dict(train=1000, val=300))

    def bag(ids):
        return np.sort(ids % 7, 1).astype(np.float64)

    def neighbours(ids):
        return np.array([[sum(a << 20 | b not in seen for a, b in zip(row[1:-2], row[2:-1], strict=True))]
                         for row in ids.tolist()], np.float64)
    bag, neighbours = (probe.probe_word_order(directory, states)["linear"] for states in (bag, neighbours))
    assert abs(bag - 50) < 10 and neighbours > 80


def test_states_are_sentence_transformers_mean(teacher):
    """The mean over real positions alone, whatever stands beside a sentence in its batch."""
    transformers = pytest.importorskip("transformers")
    tokenizer = checkpoint.read_tokenizer(teacher)
    encoder = probe.Pooled(checkpoint.load_mlm(teacher).model.bert, "mean")
    words = [t for t in tokenizer.get_vocab() if t.isalpha()]
    sentences = [" ".join(words[i:i + 1 + 3 * i]) for i in range(6)]
    ours = ft.predict(encoder, ft.encode(tokenizer, [(s,) for s in sentences], 64), 0)
    theirs = transformers.AutoModel.from_pretrained(teacher).eval()
    for state, s in zip(ours, sentences, strict=True):
        ids = torch.tensor([checkpoint.framed(tokenizer).encode(s).ids])
        with torch.no_grad():
            assert state == pytest.approx(theirs(ids).last_hidden_state[0].mean(0).numpy(), abs=1e-4)


def test_what_cannot_be_probed_is_said(teacher, corpus, scored, tmp_path, capsys):
    config = ft.Config(str(teacher), tasks=f"own={scored}", data=str(corpus), out=str(tmp_path / "a"), max_len=32)
    with pytest.raises(UserError, match="--data is for --probe"):
        ft.main(config)
    config.probe = True
    config.data = str(tmp_path / "none")
    with pytest.raises(UserError, match="is not a token directory"):
        ft.main(config)
