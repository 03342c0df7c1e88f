"""Where a masked LM stands, against counting and without the order of its context.  Read it to judge a loss.

    python -m plumbing.diagnose data/wiki                                    # what counting reaches
    python -m plumbing.diagnose data/wiki --model runs/no_kd/model           # and where a model stands

A masked LM stays for long at what counting does better, and leaves abruptly when attention structure forms.
Three measurements on validation's own blocks and masks tell on which side of that turn a model is:

  baselines   what counting over train.bin reaches: unigram, and bigram (the left neighbour)
  D_order     loss with each block's unmasked tokens permuted, minus the loss: about 0 for a bag of words
  induction   the loss at masked tokens that also occur unmasked in their block, and at the others

A baseline sees the corrupted block, as a model does: a [MASK] tells nothing of its neighbours, and a token that
stands at a masked position tells much (half of them were left as they are).

Legend: B blocks, S sequence, k masked positions per block, V vocabulary.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data import Blocks, hashed
from plumbing import checkpoint
from plumbing.cli import Checked, Count, Length, UserError, run
from plumbing.tokens import SCAN, TokenDirectory

D_ORDER_TURN = 0.3          # nat; under it a teacher has no attention structure to give
COUNTED = 2 ** 26           # training ids that are counted over: the first ones


def counting(directory, batch):
    """{name: (B, k) losses} at the masked positions, in nats, of words as often as they and their left neighbour
    stand in train.bin."""
    V, special, train = len(directory.vocab), directory.special, directory.split("train")[:COUNTED]
    unigram, pairs, counts = np.ones(V), np.empty(0, np.int64), np.empty(0)
    for at in range(0, len(train), SCAN):
        ids = train[at:at + SCAN + 1].astype(np.int64)
        unigram += np.bincount(ids[:SCAN], minlength=V)
        new, often = np.unique(ids[:-1] * V + ids[1:], return_counts=True)
        pairs, where = np.unique(np.concatenate([pairs, new]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, often]))
    unigram[special["[SEP]"]] = 1                                       # never masked
    unigram /= unigram.sum()
    counts[pairs % V == special["[SEP]"]] = 0
    total = np.bincount(pairs // V, counts, V)
    types = np.maximum(np.bincount(pairs // V, counts > 0, V), 1)       # nothing seen: unigram as it is

    def bigram(words):
        """Interpolated: (count + types * unigram) / (total + types), types = the different words seen after `left`
        (Witten and Bell 1991, doi 10.1109/18.87000, method C)."""
        at = np.minimum(np.searchsorted(pairs, left * V + words), len(pairs) - 1)
        count = np.where(pairs[at] == left * V + words, counts[at], 0)
        p = (count + types[left] * unigram[words]) / (total[left] + types[left])
        return np.where(left >= 0, p, unigram[words])
    seen = np.where(batch.ids == special["[MASK]"], -1, batch.ids)
    seen[:, [0, -1]] = -1                                               # always [CLS] and [SEP]
    left, own = (np.take_along_axis(seen, batch.masked + offset, 1) for offset in (-1, 0))
    uniform, losses = 1 / (V - len(special)), {}
    for name, p in (("unigram", lambda words: unigram[words]), ("bigram", bigram)):
        # As many are kept as random: p(w | what stands there) ~ p(w) (1[it is w] + uniform)
        given = ((batch.labels == own) + uniform) / (p(own) + uniform)
        losses[name] = -np.log(p(batch.labels) * np.where(own >= 0, given, 1))
    return losses


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


def order_gain(forward, batch, special, plain=None):
    """D_order, what the order of the context is worth, in nats.  `plain`: the loss on the batch itself, if known."""
    if plain is None:
        plain = token_losses(forward, batch).mean()
    return float(token_losses(forward, permuted(batch, special)).mean() - plain)


def repeated(batch):
    """(B, k): does the masked token also occur unmasked in its block?"""
    context = batch.ids.copy()
    np.put_along_axis(context, batch.masked, -1, 1)
    return (batch.labels[:, :, None] == context[:, None, :]).any(2)


@dataclass
class Config(Checked):
    directory: list[str]        # a token directory
    model: str | None = None    # a model directory or Hub id with an LM head
    seq_len: Length = 128       # block length
    val_blocks: Count = 512     # validation blocks


def main(config):
    if len(config.directory) > 1:
        raise UserError(f"{' '.join(config.directory)}: give one token directory")
    directory = TokenDirectory(config.directory[0])
    forward = None
    if config.model:                                                    # refused before anything is counted
        forward, _ = masked_lm(config.model, directory.read_tokenizer(), config.seq_len)
    batch = validation(Blocks(directory, "val", config.seq_len, seed=0), config.val_blocks)
    again, losses = repeated(batch), counting(directory, batch)
    if forward:
        losses["model"] = token_losses(forward, batch)
    means = {name: loss.mean() for name, loss in losses.items()}
    print(f"{directory.path}: {len(batch.ids)} validation blocks of {config.seq_len}, {again.size:,} masked "
          f"tokens, {again.mean():.0%} of them also unmasked in their block\n"
          f"{'':12}    loss repeated   others")
    for name, loss in losses.items():
        split = [f"{part.mean():9.3f}" if part.size else "         " for part in (loss[again], loss[~again])]
        print(f"{name:<12}{means[name]:8.3f}{split[0]}{split[1]}")
    if forward:
        beaten = " and ".join(name for name in means if means["model"] < means[name])
        d = order_gain(forward, batch, directory.special, means["model"])
        print(f"{config.model}: {f'better than {beaten}' if beaten else 'worse than counting'}, D_order {d:.2f}"
              + f", under {D_ORDER_TURN}: it has no attention structure to give" * (d < D_ORDER_TURN))


def masked_lm(path, tokenizer, seq_len=0, flag="--model", device=None, bf16=False):
    """(forward(ids, masked) -> logits (M, V) on the device, the model's BertConfig) of a model directory or
    Hub id.  Refuses, as `flag`, what has no LM head, another vocabulary or too few positions."""
    found = checkpoint.find_model(path)
    checkpoint.same_vocabulary(tokenizer, found)
    model, missing, _ = checkpoint.load_mlm(found, tokenizer.get_vocab_size())
    if missing:
        raise UserError(f"{flag} {path} has no LM head, so it has no masked-LM loss: give one saved by a strategy "
                        f"that trains it")
    if seq_len > model.config.max_position_embeddings:
        raise UserError(f"--seq-len {seq_len}: {flag} {path} ends at position {model.config.max_position_embeddings}")
    model.to(device, torch.bfloat16 if bf16 else None).eval()
    return lambda ids, masked: model(ids.to(device), masked.to(device))["logits"], model.config


if __name__ == "__main__":
    run(main, Config, __doc__)
