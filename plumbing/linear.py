"""A linear classifier: what n-grams (comparison/ngrams.py) and probes (plumbing/probe.py) are read by.

It is scikit-learn's LinearSVC, the squared hinge loss of one class against the rest; for scores it is ridge.  The
strength of L2 is the one that does best in cross-validation on the training examples.  Nothing is drawn.

Legend: n training examples, F features, K classes (1 for scores).
"""
import numpy as np
import torch

from plumbing import glue

STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)              # C of LinearSVC; 1 / (2 C) is the alpha of ridge
FOLDS = 5


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


def fit_predict(part, labels, n_dev, classes=None, metric=None):
    """(dev examples, classes) logits, or (dev examples, 1) scores where `classes` is None.

    part(some) gives (x, x_t) of these of the n + n_dev examples, functions that multiply with their features; example
    i is in fold i modulo 5.  The strength is chosen by `metric`: accuracy, or Pearson of scores, if none is given."""
    score, n = classes is None, len(labels)
    number = np.arange(n + n_dev)
    train, fold = number < n, number % FOLDS
    middle = np.float32(labels.mean()) if score else 0
    y = (labels - middle)[:, None] if score else np.where(labels[:, None] == np.arange(classes), 1, -1)
    y = torch.from_numpy(y[:, classes == 2:]).float()                   # of two classes the second: (n, K)
    left_out, metric = torch.zeros(len(STRENGTHS), *y.shape), metric or (glue.pearson if score else glue.accuracy)

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
