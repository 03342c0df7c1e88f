"""What a frozen encoder already knows, without fine-tuning: probes.  Read it when fine-tuning cannot see a difference.

  linear        a linear classifier (ridge for scores; plumbing/linear.py) of the last hidden state, pooled; of a
                pair u, v: of [u, v, |u - v|, u v] (InferSent, arXiv 1705.02364), each sentence encoded by itself
  similarity    Spearman of cosine(u, v) with the score: nothing is trained
  word order    that classifier again: have two neighbouring ids of a block of 32 been exchanged, in half of
                the token directory's blocks (Bigram Shift, arXiv 1805.01070)?  A bag of words says 50

Features are standardised on the training examples, and divided by sqrt(F).  Nothing is drawn: folds, and the examples
taken where there are more, go by their number's hash.
Probes say what is there to be read off linearly, not what fine-tuning makes of it: no fine-tuned score holds them.

Legend: n examples, F features, D hidden size.
"""
import numpy as np
import torch

from data import Blocks, hashed
from kd_losses import pooled
from plumbing import glue, linear

EXAMPLES = 10_000                               # of a task's training examples, at most: seconds per task
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


def predicted(train, y, dev, classes=None, metric=None):
    """(n of dev,) classes, or scores where `classes` is None, by the linear classifier of (n, F) features."""
    order = np.argsort(hashed(1, np.arange(len(y))), kind="stable")
    mean, std = train.mean(0), train.std(0)
    x = np.concatenate([train[order], dev])
    x = (x - mean) / np.where(std > 0, std, 1) / np.sqrt(x.shape[1])
    x = torch.from_numpy(np.pad(x, ((0, 0), (0, 1)), constant_values=1).astype(np.float32))             # the intercept

    def part(some):
        mine = x[some]
        return lambda w: mine @ w, lambda a: mine.T @ a
    logits = linear.fit_predict(part, y[order], len(dev), classes, metric)
    return logits[:, 0] if classes is None else logits.argmax(-1)


def probe_task(task, parts, embed, alone=False):
    """({name: percent}, predictions of dev) for one task: the cosines, where there is a similarity, else what the
    regression says.  `embed` makes (n, D) states of n texts; `alone`: no regression beside a similarity."""
    (x, y), (dev, labels), *_ = parts.values()
    metric, found, states = task.metrics[0], {}, [embed([s[i] for s in dev]) for i in range(len(dev[0]))]
    if similar := task.labels == () and len(states) == 2:
        u, v = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in states)
        cosines = (u * v).sum(1)
        found["similarity"] = 100 * float(glue.spearman(cosines, labels))
        if alone:
            return found, cosines
    some = taken(len(y))
    train = pair_features(*(embed([x[k][i] for k in some]) for i in range(len(x[0]))))
    predictions = predicted(train, y[some], pair_features(*states), task.classes(y[some]), glue.METRICS[metric])
    found |= dict(linear=glue.evaluate(task, predictions, labels)[0][metric], n_train=len(some))
    return found, cosines if similar else predictions


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
    return dict(linear=100 * float(np.mean(predicted(states(x), y, states(dev), 2) == labels)), n_train=len(y))


def in_words(found):
    return ", ".join(f"{name} {value:,.{0 if name == 'n_train' else 2}f}" for name, value in found.items())
