"""The cheap rival of every pretrained model: n-grams and a linear classifier, the row "n-grams" of a table.

A text is counted twice, in lower case: its runs of 2 to 5 characters within a word and the spaces around it, and
its words and pairs of neighbouring words, as TF-IDF (scikit-learn's TfidfVectorizer with sublinear_tf, "char_wb" and
"word").  A pair u, v has the features u, v, sqrt(u v) and their cosine.  The classifier is scikit-learn's LinearSVC,
the squared hinge loss of one class against the rest; for scores it is ridge.  The strength of L2 is the one that does
best in cross-validation on the training examples.  Nothing is drawn, nothing is pretrained.

Legend: n training examples, N those and dev's, F features, V terms, K classes (1 for scores).
"""
import re

import numpy as np
import torch
import torch.nn.functional as F

from data import hashed
from plumbing import glue

STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)              # C of LinearSVC; 1 / (2 C) is the alpha of ridge
FOLDS = 5
TEXT = 2_000_000        # characters of training text, at most, by their number's hash: a minute on one core
BASE = np.uint64(0x9E3779B97F4A7C15)                # of a polynomial modulo 2^64, the hash of an n-gram


# ------------------------------------------------------------------------------------------------- features

def ngrams(lines, sizes):
    """(text, term) arrays: every run of symbols of these sizes, as 64 bits, in one of the lines (a string or a
    list of words) with no space but at its ends."""
    number, found = {" ": 0}, []
    codes = np.array([number.setdefault(symbol, len(number)) for line in lines for symbol in line], np.uint64)
    text = np.repeat(np.arange(len(lines)), [len(line) for line in lines])
    h, inside = np.zeros_like(codes), np.zeros(len(codes), bool)
    for size in range(1, max(sizes) + 1):
        end = max(0, len(codes) - size + 1)
        h = h[:end] * BASE + codes[size - 1:] + np.uint64(1)            # + 1: a run of 0 is no shorter run
        if size > 2:
            inside = inside[:end] | (codes[size - 2:-1] == 0)
        if size in sizes:
            good = (text[:end] == text[size - 1:]) & ~inside[:end]
            found.append((text[:end][good], h[good]))
    return [np.concatenate(part) for part in zip(*found, strict=True)]


def tfidf(text, term, train):
    """(text, term from 0 to V - 1, value, V), an entry for each text and each of its terms that a training text
    has too; `train` (number of texts,) says which those are."""
    vocabulary, term = np.unique(term, return_inverse=True)
    key, tf = np.unique(text * len(vocabulary) + term, return_counts=True)
    text, term = np.divmod(key, max(1, len(vocabulary)))
    df = np.bincount(term[train[text]], minlength=len(vocabulary))
    known = df[term] > 0
    text, term, tf = text[known], term[known], tf[known]
    value = (1 + np.log(tf)) * (1 + np.log((1 + train.sum()) / (1 + df[term])))
    value /= np.sqrt(np.bincount(text, value ** 2, len(train)))[text]
    return text, (np.cumsum(df > 0) - 1)[term], value, np.count_nonzero(df)


def features(sentences, n):
    """(row, column, value, F): the entries of an (N, F) matrix; the first n sentences are for training."""
    N, texts = len(sentences), [text.lower() for side in zip(*sentences, strict=True) for text in side]
    found, width = [(np.arange(N), np.zeros(N, int), np.ones(N))], 1                        # the intercept
    for count in (ngrams([" ".join(["", *text.split(), ""]) for text in texts], range(2, 6)),
                  ngrams([re.findall(r"\w+", text) for text in texts], range(1, 3))):
        text, term, value, V = tfidf(*count, np.arange(len(texts)) % N < n)
        side, row = np.divmod(text, N)
        found.append((row, width + side * V + term, value))
        width += V
        if len(texts) > N:
            u, v = np.flatnonzero(side == 0), np.flatnonzero(side == 1)
            _, i, j = np.intersect1d((row * V + term)[u], (row * V + term)[v], True, return_indices=True)
            row, term, product = row[u[i]], term[u[i]], value[u[i]] * value[v[j]]
            found += [(row, width + V + term, np.sqrt(product)),
                      (np.arange(N), np.full(N, width + 2 * V), np.bincount(row, product, N))]
            width += 2 * V + 1
    return *(np.concatenate(part) for part in zip(*found, strict=True)), width


def matrix(row, column, value, height):
    """The function that multiplies a sparse matrix with a dense one; torch.sparse's is far slower."""
    order = np.argsort(row, kind="stable")
    column, value, starts = map(torch.from_numpy, (
        column[order], value[order].astype(np.float32), np.searchsorted(row[order], np.arange(height))))
    return lambda other: F.embedding_bag(column, other, starts, mode="sum", per_sample_weights=value)


# ----------------------------------------------------------------------------------------------- classifier

def fit(x, x_t, y, C, hinge, a):
    """(n, K) coefficients, from a on; weights w = x_t(a).  Each column minimises |w|^2 / 2 + C * sum of
    (y - x w)^2, with `hinge` (y is -1 or 1) only over the examples where y x w < 1.

    Newton's method on the coefficients (Chapelle 2007, doi 10.1162/neco.2007.19.5.1155), for all columns at
    once; where a column would get worse, half of the step, and half of that."""
    def active(z):
        return (y * z < 1).float() if hinge else torch.ones_like(y)

    def loss(a, z):
        return (a * z).sum(0) / 2 + C * (active(z) * (y - z).square()).sum(0)               # (K,)
    z = x(x_t(a))
    now = loss(a, z)
    for _ in range(30):
        on = active(z)
        target = solved(lambda p, on=on: on * x(x_t(p)) + p / (2 * C), on * y, on * a)
        step, change, share, worse = target - a, x(x_t(target)) - z, torch.ones_like(now), now < now + 1
        while worse.any() and share.min() > 1e-3:
            worse = loss(a + share * step, z + share * change) > now * (1 + 1e-6)
            share[worse] /= 2
        a, z, before = a + share * step, z + share * change, now
        now = loss(a, z)
        if (before - now <= 1e-6 * before).all():
            break
    return a


def solved(product, b, x):
    """Solves product(x) = b (n, K) for each column, from x on, to 0.1% of b, by conjugate gradients."""
    r = p = b - product(x)
    square, goal = r.square().sum(0), 1e-6 * b.square().sum(0)                              # (K,)
    for _ in range(500):
        if (square <= goal).all():
            break
        q = product(p)
        share = square / (p * q).sum(0).clamp(min=1e-30)
        x, r, before = x + share * p, r - share * q, square
        square = r.square().sum(0)
        p = r + square / before.clamp(min=1e-30) * p
    return x


def fit_predict(sentences, labels, dev_sentences, classes=None, metric=None):
    """(dev examples, classes) logits, or (dev examples, 1) scores where `classes` is None, from tuples of one or
    two texts.  The strength is chosen by `metric`: accuracy, or Pearson of scores, if none is given."""
    score, order = classes is None, np.argsort(hashed(1, np.arange(len(labels))), kind="stable")
    length = np.cumsum([sum(map(len, sentences[i])) for i in order])
    order = order[:max(1, np.count_nonzero(length <= TEXT))]
    labels, n, n_dev = np.asarray(labels)[order], len(order), len(dev_sentences)
    row, column, value, width = features([*(sentences[i] for i in order), *dev_sentences], n)
    number = np.arange(n + n_dev)
    train, fold = number < n, number % FOLDS
    middle = np.float32(labels.mean()) if score else 0
    y = (labels - middle)[:, None] if score else np.where(labels[:, None] == np.arange(classes), 1, -1)
    y = torch.from_numpy(y[:, classes == 2:]).float()                   # of two classes the second: (n, K)
    left_out, metric = torch.zeros(len(STRENGTHS), *y.shape), metric or (glue.pearson if score else glue.accuracy)

    def part(some):
        """(x, x_t) of these of the n + n_dev examples, as functions that multiply with it."""
        kept = some[row]
        i, j, v = (np.cumsum(some) - 1)[row[kept]], column[kept], value[kept]
        return matrix(i, j, v, some.sum()), matrix(j, i, v, width)

    def logits(z):
        z = z.numpy()
        return np.concatenate([-z, z], 1) if classes == 2 else z + middle

    for k in range(FOLDS):
        (x, x_t), (rest, _), mine = part(train & (fold != k)), part(train & (fold == k)), y[fold[:n] != k]
        a = torch.zeros_like(mine)
        for i, C in enumerate(STRENGTHS):
            a = fit(x, x_t, mine, C, not score, a)
            left_out[i, fold[:n] == k] = rest(x_t(a))
    found = [logits(z)[:, 0] if score else logits(z).argmax(1) for z in left_out]
    C = STRENGTHS[np.argmax([metric(p, labels) for p in found])]        # of equals the strongest L2
    (x, x_t), (dev, _) = part(train), part(~train)
    return logits(dev(x_t(fit(x, x_t, y, C, not score, torch.zeros_like(y)))))


def score(task, parts, draws=(None,)):
    """(scores, predictions (draws, dev examples)) of a task of plumbing.glue, from the training examples of each draw
    (their numbers; None: all)."""
    (x, y), (dev, labels), *_ = parts.values()
    classes, metric = None if task.labels == () else len(task.labels or ()) or int(y.max()) + 1, task.metrics[0]
    found = []
    for of in draws:
        of = np.arange(len(y)) if of is None else of
        logits = fit_predict([x[i] for i in of], y[of], dev, classes, glue.METRICS[metric])
        found.append(logits[:, 0] if classes is None else logits.argmax(-1))
    return [glue.evaluate(task, p, labels)[0][metric] for p in found], np.stack(found)
