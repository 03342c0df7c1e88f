"""N-grams: the features against a slow transcription, the classifier and its choices against scikit-learn."""
import math
import re
import time
from collections import Counter

import numpy as np
import pytest
import torch

from comparison import demonstration, ngrams
from data import hashed
from plumbing import glue, linear, sources

ODD = ["", " ", "a", "!?", "A  cat's\tFur; a cat", "naïve ＣＡＴ, ünter\u2028den x_1", "\ud800 lone cat",
       "İstanbul's cats' cat", "the cat sat on the mat", "dogs and cats " * 5]


def made_up(n, classes, sides=1, seed=0):
    """(sentences, labels): made-up words, of which each class likes others; of pairs the label is how much of the
    first one is in the second."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(1, 8))) for _ in range(120)]
    labels, sentences = rng.integers(0, classes, n), []
    for y in labels:
        first = [words[w] for w in (rng.integers(0, 120, 9) if sides == 2 else np.where(
            rng.random(9) < 0.3, rng.integers(0, 20, 9) + 20 * y, rng.integers(0, 120, 9)))]
        same = rng.random(9) < 0.2 + 0.5 * y / (classes - 1)
        second = [w if s else words[i] for w, s, i in zip(first, same, rng.integers(0, 120, 9), strict=True)]
        sentences.append((" ".join(first), " ".join(second))[:sides])
    return sentences, labels


# ------------------------------------------------------------------------------------------------- features

def counted(text):
    """(Counter of character n-grams, Counter of words and pairs of words), as the words of the page say it."""
    characters, words = Counter(), re.findall(r"\w+", text.lower())
    for word in text.lower().split():
        word = f" {word} "
        characters.update(word[i:i + k] for k in (2, 3, 4, 5) for i in range(len(word) - k + 1))
    return characters, Counter(words) + Counter(zip(words[:-1], words[1:], strict=True))


def transcribed(sentences, n):
    """[{name: value}] of each example's features."""
    rows = [{"intercept": 1.0} for _ in sentences]
    for kind in (0, 1):
        counts = [[counted(text)[kind] for text in s] for s in sentences]
        df = Counter(term for s in counts[:n] for count in s for term in count)
        texts = sum(len(s) for s in sentences[:n])
        for row, sides in zip(rows, counts, strict=True):
            vectors = []
            for count in sides:
                v = {t: (1 + math.log(tf)) * (math.log((1 + texts) / (1 + df[t])) + 1)
                     for t, tf in count.items() if df[t]}
                length = math.sqrt(sum(x * x for x in v.values()))
                vectors.append({t: x / length for t, x in v.items()})
            row |= {(kind, i, t): x for i, v in enumerate(vectors) for t, x in v.items()}
            if len(vectors) == 2:
                u, v = vectors
                row |= {(kind, "both", t): math.sqrt(u[t] * v[t]) for t in u.keys() & v.keys()}
                row[kind, "cosine"] = sum(u[t] * v[t] for t in u.keys() & v.keys())
    return rows


def dense(sentences, n):
    row, column, value, width = ngrams.features(sentences, n)
    x = np.zeros((len(sentences), width))
    np.add.at(x, (row, column), value)
    assert len(set(zip(row.tolist(), column.tolist(), strict=True))) == len(row)
    return x


@pytest.mark.parametrize("sides", [1, 2])
def test_the_features_are_those_of_a_slow_transcription(sides):
    """By the inner products of all examples, which do not depend on the order of the features, and their number."""
    sentences = [tuple(ODD[i:i + sides]) for i in range(len(ODD) - 1)] + made_up(30, 2, sides)[0]
    for n in (len(sentences), 12):                                      # the others have terms that are not known
        theirs, ours = transcribed(sentences, n), dense(sentences, n)
        products = [[sum(x * b.get(t, 0) for t, x in a.items()) for b in theirs] for a in theirs]
        assert ours @ ours.T == pytest.approx(np.array(products), abs=1e-12)
        assert np.count_nonzero(ours.any(0)) == len(set().union(*({t for t, x in r.items() if x} for r in theirs)))


def scikit_learns_features(sentences, n):
    sparse, text = pytest.importorskip("scipy.sparse"), pytest.importorskip("sklearn.feature_extraction.text")
    parts = []
    for options in (dict(analyzer="char_wb", ngram_range=(2, 5)),
                    dict(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b")):
        tfidf = text.TfidfVectorizer(sublinear_tf=True, **options).fit([t for s in sentences[:n] for t in s])
        sides = [tfidf.transform(side) for side in zip(*sentences, strict=True)]
        parts += sides
        if len(sides) == 2:
            product = sides[0].multiply(sides[1]).tocsr()
            parts += [product.sqrt(), sparse.csr_matrix(product.sum(1))]
    x = sparse.hstack(parts).tocsr()
    return x[:n], x[n:]


@pytest.mark.parametrize("sides", [1, 2])
def test_the_features_are_scikit_learns(sides):
    sentences = made_up(80, 3, sides)[0] + [("the cat's fur",) * sides, ("",) * sides]
    ours, (train, dev) = dense(sentences, 60), scikit_learns_features(sentences, 60)
    theirs = np.concatenate([train.toarray(), dev.toarray()])
    assert ours.shape[1] == theirs.shape[1] + 1
    assert ours @ ours.T - 1 == pytest.approx(theirs @ theirs.T, abs=1e-12)


# ----------------------------------------------------------------------------------------------- classifier

def fitted(x, y, C, hinge):
    """(F, P) weights, by fit."""
    row, column = np.nonzero(x)
    times = ngrams.matrix(row, column, x[row, column], len(x))
    back = ngrams.matrix(column, row, x[row, column], x.shape[1])
    y = torch.from_numpy(np.asarray(y, np.float32))
    return back(linear.fit(times, back, y, C, hinge, torch.zeros_like(y))).double().numpy()


@pytest.mark.parametrize("C", linear.STRENGTHS)
def test_the_classifier_s_loss_is_as_low_as_linear_svc_s(C):
    svm, sparse = pytest.importorskip("sklearn.svm"), pytest.importorskip("scipy.sparse")
    sentences, labels = made_up(300, 3)
    x = dense(sentences, 300)
    y = np.where(labels[:, None] == np.arange(3), 1, -1)
    theirs = svm.LinearSVC(C=C, fit_intercept=False, tol=1e-5).fit(sparse.csr_matrix(x), labels).coef_.T

    def loss(w):
        return (w ** 2).sum(0) / 2 + C * (np.maximum(0, 1 - y * (x @ w)) ** 2).sum(0)
    ours = fitted(x, y, C, hinge=True)
    assert loss(ours) == pytest.approx(loss(theirs), rel=1e-3) and (loss(ours) > loss(theirs) - 1e-3).all()
    assert np.mean((x @ ours).argmax(1) == (x @ theirs).argmax(1)) > 0.99


@pytest.mark.parametrize("C", linear.STRENGTHS)
def test_scores_are_ridge_s(C):
    sentences, labels = made_up(200, 6, 2)
    x, y = dense(sentences, 200), (labels - labels.mean())[:, None]
    w = x.T @ np.linalg.solve(x @ x.T + np.eye(len(x)) / (2 * C), y)
    assert x @ fitted(x, y, C, hinge=False) == pytest.approx(x @ w, abs=0.05)        # of scores from -3 to 3


# --------------------------------------------------------------------------------------------------- choice

def scikit_learns(sentences, labels, dev_sentences, score, metric):
    """(metric at the strength that cross-validation on the same folds chooses, metric at the default)."""
    model, select = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.model_selection")
    svm = pytest.importorskip("sklearn.svm")
    n = len(labels)
    train, dev = scikit_learns_features([*sentences, *dev_sentences], n)
    folds = select.PredefinedSplit(np.argsort(np.argsort(hashed(1, np.arange(n)), kind="stable")) % linear.FOLDS)
    kind, options = (model.Ridge, [dict(alpha=1 / (2 * C), solver="sparse_cg") for C in linear.STRENGTHS]) \
        if score else (svm.LinearSVC, [dict(C=C) for C in linear.STRENGTHS])
    left_out = [metric(select.cross_val_predict(kind(**o), train, labels, cv=folds), labels) for o in options]
    return tuple(kind(**o).fit(train, labels).predict(dev) for o in (options[int(np.argmax(left_out))], {}))


def predictions(found, score):
    return found[:, 0] if score else found.argmax(1)


@pytest.mark.parametrize("classes, sides", [(2, 1), (3, 1), (2, 2), (None, 2)])
def test_predictions_are_scikit_learns(classes, sides):
    (x, y), score = made_up(400, classes or 6, sides, seed=3), classes is None
    metric = glue.pearson if score else glue.accuracy
    found = ngrams.fit_predict(x[:250], y[:250], x[250:], classes)
    assert found.shape == (150, classes or 1) and found.dtype == np.float32
    ours, theirs = predictions(found, score), scikit_learns(x[:250], y[:250], x[250:], score, metric)[0]
    assert metric(ours, y[250:]) == pytest.approx(metric(theirs, y[250:]), abs=0.01)
    assert metric(ours, y[250:]) > 0.45
    assert glue.pearson(ours, theirs) > 0.99 if score else np.mean(ours == theirs) > 0.97


def test_the_strength_is_the_one_that_does_best_by_the_metric_on_left_out_training_examples(monkeypatch):
    (x, y), seen, fits = made_up(200, 3, seed=4), [], []
    fit = linear.fit
    monkeypatch.setattr(linear, "fit", lambda *given: fits.append((len(given[2]), given[3])) or fit(*given))

    def metric(p, labels):
        seen.append((p, labels))
        return [0.1, 0.3, 0.3, 0.2, 0.0][len(seen) - 1]
    found = ngrams.fit_predict(x[:150], y[:150], x[150:], 3, metric)
    assert fits == [(120, C) for _ in range(linear.FOLDS) for C in linear.STRENGTHS] + [(150, linear.STRENGTHS[1])]
    assert all(len(p) == 150 and sorted(labels) == sorted(y[:150]) for p, labels in seen)
    monkeypatch.setattr(linear, "STRENGTHS", linear.STRENGTHS[1:2])
    assert np.array_equal(found, ngrams.fit_predict(x[:150], y[:150], x[150:], 3))          # the first of the two best


def test_an_example_s_prediction_depends_on_no_other_example_of_dev():
    x, y = made_up(200, 2, 2)
    every = ngrams.fit_predict(x[:120], y[:120], x[120:], 2)
    assert np.array_equal(ngrams.fit_predict(x[:120], y[:120], x[120:], 2), every)
    for some in (x[120:121], x[150:], x[:1:-1]):
        found = ngrams.fit_predict(x[:120], y[:120], some, 2)
        at = [x[120:].index(s) if s in x[120:] else None for s in some]
        assert all(found[i] == pytest.approx(every[j], abs=1e-4) for i, j in enumerate(at) if j is not None)


# ---------------------------------------------------------------------------------------------------- edges

@pytest.mark.parametrize("classes", [2, 3])
def test_one_class_alone_is_what_is_predicted(classes):
    x, _ = made_up(60, 2)
    found = ngrams.fit_predict(x[:50], np.full(50, 1), [*x[50:], ("",), ("zzzz qqq",)], classes)
    assert found.shape == (12, classes) and (found.argmax(1) == 1).all() and np.isfinite(found).all()


def test_one_score_alone_is_what_is_predicted():
    x, _ = made_up(60, 2, 2)
    found = ngrams.fit_predict(x[:50], np.full(50, 2.5, np.float32), x[50:])
    assert found == pytest.approx(np.full((10, 1), 2.5))


def test_few_labels_and_labels_that_appear_once():
    x, y = made_up(450, 4)
    y = np.where(np.arange(450) == 7, 4, y)
    found = ngrams.fit_predict(x[:50], y[:50], x[50:], 5)
    assert glue.accuracy(found.argmax(1), y[50:]) > 0.4                                     # chance: 25%
    for n in (1, 2, 3):
        found = ngrams.fit_predict(x[:n], y[:n], x[50:], 4)
        assert found.shape == (400, 4) and np.isfinite(found).all() and set(found.argmax(1)) <= set(y[:n])


@pytest.mark.parametrize("empty", [[("",)] * 3, [("", "")] * 3, [("", "cat"), ("cat", ""), ("", "")]])
def test_empty_texts_are_examples_too(empty):
    found = ngrams.fit_predict(empty, np.array([1, 1, 0]), empty, 2)
    assert found.shape == (3, 2) and np.isfinite(found).all()
    words, labels = made_up(40, 2, len(empty[0]))
    found = ngrams.fit_predict([*words, *empty], [*labels, 1, 1, 1], empty, 2)
    assert np.isfinite(found).all()


def test_more_text_than_the_limit_is_left_out(monkeypatch):
    """What is taken depends on the examples' numbers; one example is, however long."""
    x, y = made_up(300, 2)
    kept = np.argsort(hashed(1, np.arange(300)), kind="stable")[:100]
    limit, seen, features = sum(len(x[i][0]) for i in kept), [], ngrams.features
    monkeypatch.setattr(ngrams, "features", lambda s, n: seen.append(s[:n]) or features(s, n))
    for text, taken in ((limit, 100), (limit - 1, 99), (3, 1)):
        monkeypatch.setattr(ngrams, "TEXT", text)
        ngrams.fit_predict(x, y, x[:5], 2)
        assert seen.pop() == [x[i] for i in kept[:taken]]


# ------------------------------------------------------------------------------------------------ real tasks

def against_scikit_learn(name, task, parts, rows=None):
    """Within a point of scikit-learn where the same folds choose the strength; not a point under its default."""
    (x, y), (dev, labels) = parts["train"], parts["dev"]
    x, y, score = x[:rows], y[:rows], task.labels == ()
    metric, began = glue.pearson if score else glue.accuracy, time.process_time()
    found = ngrams.fit_predict(x, y, dev, None if score else int(y.max()) + 1)
    seconds = time.process_time() - began
    ours = 100 * metric(predictions(found, score), labels)
    began = time.process_time()
    chosen, default = (100 * metric(p, labels) for p in scikit_learns(x, y, dev, score, metric))
    print(f"{name}: {len(y):,} rows, {metric.__name__} {ours:.2f} in {seconds:.1f} s; scikit-learn's {chosen:.2f}, "
          f"by default {default:.2f}, in {time.process_time() - began:.1f} s")
    assert abs(ours - chosen) < 1 and ours > default - 1 and seconds < 60


@pytest.mark.slow
@pytest.mark.parametrize("name, rows", [("sst2", 20_000), ("cola", None), ("mrpc", None), ("rte", None),
                                        ("stsb", None)])
def test_real_tasks_are_within_a_point_of_scikit_learn(name, rows, real_data):
    against_scikit_learn(name, glue.TASKS[name], glue.read_task(name, glue.TASKS[name], real_data / "glue"), rows)


@pytest.mark.slow
def test_the_demonstration_s_task_is_within_a_point_of_scikit_learn(tmp_path):
    demonstration.package_task(tmp_path, list(sources.docstrings()))
    task = glue.own_task(tmp_path)
    against_scikit_learn("package", task, glue.read_task("package", task, None))
