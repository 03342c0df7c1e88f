"""What a frozen encoder already knows, without fine-tuning: probes.  Read it when fine-tuning cannot see a difference.

  linear        logistic regression (ridge for scores) on the last hidden state, pooled; of a pair u, v:
                [u, v, |u - v|, u v] (InferSent, arXiv 1705.02364), each sentence encoded by itself
  similarity    Spearman of cosine(u, v) with the score: nothing is trained
  word order    logistic regression again: have two neighbouring ids of a block of 32 been exchanged, in half of
                the token directory's blocks (Bigram Shift, arXiv 1805.01070)?  A bag of words says 50

Features are standardised on the training examples; the strength of L2 is the one that does best in cross-validation on
them (five folds).  Nothing is drawn: folds and the examples taken, where there are more, go by their number's hash.
Probes say what is there to be read off linearly, not what fine-tuning makes of it: they are no part of any average.

Legend: n examples, F features, K classes, D hidden size.
"""
import numpy as np
import torch
import torch.nn.functional as F

from data import Blocks, hashed
from kd_losses import pooled
from plumbing import glue

EXAMPLES = 10_000                               # of a task's training examples, at most: seconds per task
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)     # C of the logistic regression; its inverse is the ridge's alpha
FOLDS = 5
ORDER = dict(train=EXAMPLES, val=3000)          # blocks of the word-order probe, at most, ...
ORDER_LENGTH = 32                               # ... of so many ids: about a sentence


class Pooled(torch.nn.Module):
    """The encoder as sentence-transformers reads it; pooling: "mean" over real positions, or "cls"."""
    def __init__(self, bert, pooling):
        super().__init__()
        self.bert, self.config, self.pooling = bert, bert.config, pooling

    def forward(self, ids, real, token_types):
        return pooled(self.bert(ids, real, token_types)["hidden"], real, self.pooling)      # (B, D)


def taken(n, limit=EXAMPLES):
    """The numbers of `limit` out of n examples, those of the lowest hashes, in their order."""
    return np.sort(np.argsort(hashed(0, np.arange(n)), kind="stable")[:limit])


def pair_features(u, v=None):
    """(n, D) or (n, 4 D), from the sentences' states."""
    return u if v is None else np.concatenate([u, v, np.abs(u - v), u * v], 1)


# ------------------------------------------------------------------------------------------------ regressions

def logistic(x, y, C, start=None):
    """(K, F + 1) weights, the intercept last: minimises C * sum of cross-entropies + |w|^2 / 2, by L-BFGS.

    Two classes share one row of weights, as in scikit-learn: (1, F + 1)."""
    x, y = torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y)
    classes = int(y.max()) + 1
    w = torch.zeros(1 if classes == 2 else classes, x.shape[1] + 1, dtype=torch.float64)
    if start is not None:
        w.copy_(torch.as_tensor(start))
    w.requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=1000, history_size=20, tolerance_grad=1e-6,
                                  tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = F.cross_entropy(logits(x, w), y) + w[:, :-1].square().sum() / (2 * C * len(y))
        total.backward()
        return total
    optimizer.step(loss)
    return w.detach().numpy()


def logits(x, w):
    z = x @ w[:, :-1].T + w[:, -1]
    return F.pad(z, (1, 0)) if len(w) == 1 else z                    # two classes: the first one's logit is 0


def ridge(x, y, alphas):
    """{alpha: (1, F + 1) weights}, the intercept last: minimises sum of squared errors + alpha |w|^2, exactly."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    mean, target = x.mean(0), y.mean()
    values, vectors = np.linalg.eigh((x - mean).T @ (x - mean))
    projected = vectors.T @ ((x - mean).T @ (y - target))
    found = {}
    for alpha in alphas:
        w = vectors @ (projected / (np.maximum(values, 0) + alpha))
        found[alpha] = np.append(w, target - mean @ w)[None]
    return found


def predicted(x, w, score):
    x = torch.as_tensor(x, dtype=torch.float64)
    z = logits(x, torch.as_tensor(w))
    return z[:, -1].numpy() if score else z.argmax(1).numpy()


def path(x, y, score):
    """{strength: weights} for each of STRENGTHS, each search beginning where the one before ended."""
    if score:
        return {1 / alpha: w for alpha, w in ridge(x, y, [1 / C for C in STRENGTHS]).items()}
    found, w = {}, None
    for C in STRENGTHS:
        found[C] = w = logistic(x, y, C, w)
    return found


def linear(train, y, dev, score):
    """(predictions on dev, the strength chosen): accuracy, or the squared error of scores, on left-out folds."""
    mean, std = train.mean(0), train.std(0)
    train, dev = ((x - mean) / np.where(std > 0, std, 1) for x in (train, dev))
    fold = np.argsort(np.argsort(hashed(1, np.arange(len(y))), kind="stable")) % FOLDS
    quality = dict.fromkeys(STRENGTHS, 0.0)
    for k in range(FOLDS):
        rest, out = fold != k, fold == k
        if not score and len(set(y[rest])) <= int(y.max()):             # a class is in this fold alone
            continue
        for C, w in path(train[rest], y[rest], score).items():
            p = predicted(train[out], w, score)
            quality[C] += -np.sum((p - y[out]) ** 2) if score else np.sum(p == y[out])
    best = max(STRENGTHS, key=quality.get)                            # of equals the strongest regularisation
    return predicted(dev, path(train, y, score)[best], score), best


# ----------------------------------------------------------------------------------------------------- probes

def probe_task(task, parts, embed):
    """({name: percent}, predictions of dev) for one task: the cosines, where there is a similarity, else what the
    regression says.  `embed` makes (n, D) states of n texts."""
    (x, y), (dev, labels), *_ = parts.values()
    some = taken(len(y))
    x, y, score = [x[i] for i in some], y[some], task.labels == ()
    (train_states, dev_states), found = ([embed([s[i] for s in of]) for i in range(len(of[0]))]
                                         for of in (x, dev)), {}
    predictions, C = linear(pair_features(*train_states), y, pair_features(*dev_states), score)
    found["linear"] = glue.evaluate(task, predictions, labels)[0][task.metrics[0]]
    if score and len(dev_states) == 2:
        u, v = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in dev_states)
        predictions = (u * v).sum(1)
        found["similarity"] = 100 * float(glue.spearman(predictions, labels))
    return dict(found, strength=C, n_train=len(y)), predictions


def exchanged(directory, split, seq_len, limit):
    """(ids (n, S), labels (n,)): a split's first blocks, in about half of which two neighbours have changed places."""
    blocks = Blocks(directory, split, seq_len, seed=0)
    ids = blocks.read(np.arange(min(limit, blocks.count)))
    row = np.arange(len(ids))
    left = 1 + (hashed(2, row) % np.uint64(seq_len - 3)).astype(int)                # not [CLS], not [SEP]
    labels = (hashed(3, row) >> np.uint64(63)).astype(int) * (ids[row, left] != ids[row, left + 1])
    row, left = row[labels == 1], left[labels == 1]
    ids[row, left], ids[row, left + 1] = ids[row, left + 1], ids[row, left]
    return ids, labels


def probe_word_order(directory, states):
    """{linear: percent, ...}; `states` makes (n, D) of (n, S) ids."""
    (x, y), (dev, labels) = (exchanged(directory, split, ORDER_LENGTH, limit) for split, limit in ORDER.items())
    predictions, C = linear(states(x), y, states(dev), score=False)
    return dict(linear=100 * float(np.mean(predictions == labels)), strength=C, n_train=len(y))


def in_words(found):
    return ", ".join(f"{name} {value:,}" if name == "n_train" else f"{name} {value:g}" if name == "strength" else
                     f"{name} {value:.2f}" for name, value in found.items())
