"""Where a masked LM stands, against counting and without the order of its context.  Read it to judge a loss.

A masked LM stays for long at what counting does better, and leaves abruptly when attention structure forms.
Three measurements on validation's own blocks and masks tell on which side of that turn a model is:

  baselines   what counting over train.bin reaches: unigram, bigram (left neighbour), both neighbours
  D_order     loss with each block's unmasked tokens permuted, minus the loss: about 0 for a bag of words
  induction   the loss at masked tokens that also occur unmasked in their block, and at the others

A baseline sees what a model sees, the corrupted block: a neighbour that is [MASK] tells nothing, and a token
that stands at a masked position tells much (half of them were left as they are; at 10% of the positions that
is worth more than half a nat, and a model learns it first of all).

Legend: B blocks, S sequence, k masked positions per block, n positions in one go, V vocabulary.

    python -m plumbing.diagnose data/wiki                                    # what counting reaches
    python -m plumbing.diagnose data/wiki --model runs/no_kd/model           # and where a model stands
    python -m plumbing.diagnose data/wiki --model teacher --seq-len 64       # at another block length
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data import Blocks, hashed
from plumbing.cli import Checked, Count, Length, UserError, run
from plumbing.tokens import SCAN, TokenDirectory

D_ORDER_TURN = 0.3          # nat; under it a teacher has no attention structure to give
COUNTED = 2 ** 26           # training ids that are counted over: the first ones
CELLS = 2 ** 21             # probabilities made in one go
# The two neighbours' joint evidence is tempered; 1 would take them as independent given the word.  Chosen
# among 0.7, 0.8, 0.9 and 1 on blocks of the first 131,072 training ids of docstrings and of Wikipedia,
# counting over the rest of train.bin; 1 costs 0.07 to 0.11 nat there.
EXPONENT = 0.8


# --------------------------------------------------------------------------------------------------- counting

class Followers:
    """How often each word stands in the `queries`, contexts as integers; -1 is a context that tells nothing.

    key(left, right): the context's integer, from the ids on both sides of a word."""

    def __init__(self, train, key, queries, V, never):
        self.V, self.contexts = V, np.unique(queries[queries >= 0])
        self.pairs, self.counts = np.empty(0, np.int64), np.empty(0, np.int64)
        for at in range(0, len(train) - 2 if len(self.contexts) else 0, SCAN):
            ids = train[at:at + SCAN + 2].astype(np.int64)
            row, known = self.find(key(ids[:-2], ids[2:]))
            known &= ids[1:-1] != never
            pairs, counts = np.unique(row[known] * V + ids[1:-1][known], return_counts=True)
            self.pairs, where = np.unique(np.concatenate([self.pairs, pairs]), return_inverse=True)
            self.counts = np.bincount(where, np.concatenate([self.counts, counts])).astype(np.int64)
        self.start = np.searchsorted(self.pairs, np.arange(len(self.contexts) + 1) * V)

    def find(self, queries):
        row = np.minimum(np.searchsorted(self.contexts, queries), max(0, len(self.contexts) - 1))
        return row, self.contexts[row] == queries if len(self.contexts) else np.zeros(len(queries), bool)

    def probabilities(self, queries, lower):
        """(n, V), interpolated with `lower` (n, V): (count + types * lower) / (total + types), types = the
        different words seen in the context (Witten and Bell 1991, doi 10.1109/18.87000, method C)."""
        row, known = self.find(queries)
        length = np.where(known, np.diff(self.start)[row], 0) if known.any() else np.zeros(len(queries), int)
        at = np.arange(length.sum()) + np.repeat(self.start[row] - np.cumsum(length) + length, length)
        counts = np.zeros((len(queries), self.V))
        counts[np.repeat(np.arange(len(queries)), length), self.pairs[at] % self.V] = self.counts[at]
        types = np.maximum(length, 1)[:, None]                          # nothing seen: `lower` as it is
        return (counts + types * lower) / (counts.sum(1, keepdims=True) + types)


def counting(directory, batch):
    """({name: (B, k) losses}, the same without the token that stands at the masked position itself)."""
    V, special, train = len(directory.vocab), directory.special, directory.split("train")[:COUNTED]
    seen = np.where(batch.ids == special["[MASK]"], -1, batch.ids)
    seen[:, [0, -1]] = -1                                               # always [CLS] and [SEP]
    left, own, right = (np.take_along_axis(seen, batch.masked + offset, 1).ravel() for offset in (-1, 0, 1))
    labels, both = batch.labels.ravel(), np.where((left >= 0) & (right >= 0), left * V + right, -1)

    unigram = 1.0 + sum(np.bincount(train[at:at + SCAN], minlength=V) for at in range(0, len(train), SCAN))
    unigram[special["[SEP]"]] = 1                                       # never masked
    unigram /= unigram.sum()
    by_left, by_right, by_both = (
        Followers(train, key, queries, V, special["[SEP]"]) for key, queries in
        ((lambda a, b: a, left), (lambda a, b: b, right), (lambda a, b: a * V + b, both)))

    with_own, context = {}, {}
    for at in range(0, len(labels), max(1, CELLS // V)):
        s = slice(at, at + max(1, CELLS // V))
        n, stands, uniform = np.arange(len(labels[s])), own[s], 1 / (V - len(special))
        alone = np.broadcast_to(unigram, (len(n), V))
        table = dict(unigram=alone, bigram=by_left.probabilities(left[s], alone))
        # Bayes, neighbours independent given the word: p(w | l, r) ~ p(w | l) p(w | r) / p(w); then counts
        joint = table["bigram"] * by_right.probabilities(right[s], alone) / unigram
        joint **= np.where(both[s] >= 0, EXPONENT, 1)[:, None]
        table["neighbours"] = by_both.probabilities(both[s], joint / joint.sum(1, keepdims=True))
        for name, p in table.items():
            there = p[n, labels[s]]
            context.setdefault(name, []).append(-np.log(there))
            # As many are kept as random: p(w | what stands there) ~ p(w) (1[it is w] + uniform)
            given = there * ((labels[s] == stands) + uniform) / (p[n, stands] + uniform)
            there = np.where(stands < 0, there, given)
            with_own.setdefault(name, []).append(-np.log(there))
    return tuple({name: np.concatenate(parts).reshape(batch.masked.shape) for name, parts in losses.items()}
                 for losses in (with_own, context))


def where_it_stands(loss, baselines):
    """In words, from {name: mean loss}: "between bigram and neighbours"."""
    beaten = [name for name in baselines if loss < baselines[name]]
    others = [name for name in baselines if name not in beaten]
    if not others:
        return f"better than {min(beaten, key=baselines.get)}"
    ahead = max(others, key=baselines.get)
    return f"between {min(beaten, key=baselines.get)} and {ahead}" if beaten else f"worse than {ahead}"


# ---------------------------------------------------------------------------------------------------- a model

def validation(blocks, val_blocks):
    """The blocks and masks that train.py validates on, as one batch."""
    return blocks.batch(0, min(val_blocks, blocks.count))


@torch.no_grad()
def token_losses(forward, batch, size=64):
    """(B, k) cross-entropies at the masked positions; forward(ids, masked) -> logits (size * k, V)."""
    losses = []
    for at in range(0, len(batch.ids), size):
        ids, masked, labels = (torch.from_numpy(a[at:at + size]) for a in batch)
        logits = forward(ids, masked).float()
        loss = F.cross_entropy(logits, labels.flatten().to(logits.device), reduction="none")
        losses.append(loss.cpu().numpy())
    return np.concatenate(losses).reshape(batch.masked.shape)


def permuted(batch, special):
    """The batch with each block's unmasked tokens in another order, a pure function of the corrupted block.

    Masked positions, [CLS] and [SEP] stay where they are."""
    moves = ~np.isin(batch.ids, (special["[CLS]"], special["[SEP]"]))
    np.put_along_axis(moves, batch.masked, False, 1)
    draw = hashed(hashed(*batch.ids.T)[:, None], np.arange(batch.ids.shape[1])) >> np.uint64(1)
    # What moves comes first in both orders, by place and by chance; the rest follows by place in both
    to = np.argsort(~moves, axis=1, kind="stable")
    by_chance = np.argsort(np.where(moves, draw, np.uint64(2 ** 64 - 1)), axis=1, kind="stable")
    ids = np.empty_like(batch.ids)
    np.put_along_axis(ids, to, np.take_along_axis(batch.ids, by_chance, 1), 1)
    return batch._replace(ids=ids)


def d_order(forward, batch, special, plain=None):
    """What the order of the context is worth, in nats.  `plain`: the loss on the batch itself, if known."""
    if plain is None:
        plain = token_losses(forward, batch).mean()
    return float(token_losses(forward, permuted(batch, special)).mean() - plain)


def repeated(batch):
    """(B, k): does the masked token also occur unmasked in its block?"""
    context = batch.ids.copy()
    np.put_along_axis(context, batch.masked, -1, 1)
    return (batch.labels[:, :, None] == context[:, None, :]).any(2)


# ----------------------------------------------------------------------------------------------------- script

@dataclass
class Config(Checked):
    directory: list[str]        # token directories
    model: str | None = None    # a model directory or Hub id with an LM head
    seq_len: Length = 128       # block length
    val_blocks: Count = 512     # validation blocks


def main(config):
    for path in config.directory:
        diagnose(TokenDirectory(path), config)


def diagnose(directory, config):
    # refused before anything is counted
    forward, _ = masked_lm(config.model, directory, config.seq_len) if config.model else (None, None)
    batch = validation(Blocks(directory, "val", config.seq_len, seed=0), config.val_blocks)
    again, (losses, context) = repeated(batch), counting(directory, batch)
    means = {name: loss.mean() for name, loss in losses.items()}

    def row(name, loss, last=""):
        split = [f"{part.mean():9.3f}" if part.size else "         " for part in (loss[again], loss[~again])]
        print(f"{name:<12}{loss.mean():8.3f}{split[0]}{split[1]}{last}")
    print(f"{directory.path}: {len(batch.ids)} validation blocks of {config.seq_len}, {again.size:,} masked "
          f"tokens, {again.mean():.0%} of them also unmasked in their block\n"
          f"{'':12}    loss repeated   others   loss without the token that stands there")
    for name, loss in losses.items():
        row(name, loss, f"{context[name].mean():9.3f}")
    if forward:
        own = token_losses(forward, batch)
        row("model", own)
        d = d_order(forward, batch, directory.special, own.mean())
        print(f"{config.model}: {where_it_stands(own.mean(), means)}, D_order {d:.2f}"
              + f", under {D_ORDER_TURN}: it has no attention structure to give" * (d < D_ORDER_TURN))


def masked_lm(path, directory, seq_len, flag="--model", device=None, bf16=False):
    """(forward(ids, masked) -> logits (M, V) on the device, the model's BertConfig) of a model directory or
    Hub id.  Refuses, as `flag`, what has no LM head, another vocabulary or too few positions."""
    from plumbing import checkpoint
    found = checkpoint.find_model(path)
    checkpoint.same_vocabulary(directory.read_tokenizer(), found)
    model, missing, _ = checkpoint.load_mlm(found, len(directory.vocab))
    if missing:
        raise UserError(f"{flag} {path} has no LM head, so it has no masked-LM loss: give one saved by a strategy "
                        f"that trains it")
    if seq_len > model.config.max_position_embeddings:
        raise UserError(f"--seq-len {seq_len}: {flag} {path} ends at position "
                        f"{model.config.max_position_embeddings}")
    model.to(device, torch.bfloat16 if bf16 else None).eval()
    return lambda ids, masked: model(ids.to(device), masked.to(device))["logits"], model.config


if __name__ == "__main__":
    run(main, Config, __doc__)
