"""The cheap rival of every pretrained model: n-grams and a linear classifier, the row "n-grams" of a table.

A text is counted twice, in lower case: its runs of 2 to 5 characters within a word and the spaces around it, and
its words and pairs of neighbouring words, as TF-IDF (scikit-learn's TfidfVectorizer with sublinear_tf, "char_wb" and
"word").  A pair u, v has the features u, v, sqrt(u v) and their cosine.  plumbing/linear.py reads them.  Nothing is
drawn, nothing is pretrained.

Legend: n training examples, N those and dev's, F features, V terms.
"""
import re

import numpy as np
import torch
import torch.nn.functional as F

from data import hashed
from plumbing import glue, linear

TEXT = 2_000_000        # characters of training text, at most, by their number's hash: a minute on one core
BASE = np.uint64(0x9E3779B97F4A7C15)                # of a polynomial modulo 2^64, the hash of an n-gram


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


def fit_predict(sentences, labels, dev_sentences, classes=None, metric=None):
    """(dev examples, classes) logits, or (dev examples, 1) scores where `classes` is None, from tuples of one or
    two texts: plumbing.linear's, of the n-grams."""
    order = np.argsort(hashed(1, np.arange(len(labels))), kind="stable")
    length = np.cumsum([sum(map(len, sentences[i])) for i in order])
    order = order[:max(1, np.count_nonzero(length <= TEXT))]
    row, column, value, width = features([*(sentences[i] for i in order), *dev_sentences], len(order))

    def part(some):
        kept = some[row]
        i, j, v = (np.cumsum(some) - 1)[row[kept]], column[kept], value[kept]
        return matrix(i, j, v, some.sum()), matrix(j, i, v, width)
    return linear.fit_predict(part, np.asarray(labels)[order], len(dev_sentences), classes, metric)


def score(task, parts, draws=(None,)):
    """(scores, predictions (draws, dev examples)) of a task of plumbing.glue, from the training examples of each draw
    (their numbers; None: all)."""
    (x, y), (dev, labels), *_ = parts.values()
    classes, metric = task.classes(y), task.metrics[0]
    found = []
    for of in draws:
        of = np.arange(len(y)) if of is None else of
        logits = fit_predict([x[i] for i in of], y[of], dev, classes, glue.METRICS[metric])
        found.append(logits[:, 0] if classes is None else logits.argmax(-1))
    return [glue.evaluate(task, p, labels)[0][metric] for p in found], np.stack(found)
