"""From a token directory to batches: memmapped ids, blocks, masks.  Read it after train.py.

A token directory (made by prepare.py) holds train.bin and val.bin (flat ids, each document ended by [SEP]),
tokenizer.json and manifest.json.  A block is [CLS] + S-2 consecutive ids + [SEP]: always full, so pretraining
needs no padding and no attention mask (the strategy `sentence` alone reads whole
sentences, padded: Sentences).  k = round(0.15 S) positions are masked in every block: 80% [MASK],
10% a random token, 10% left as they are (Devlin 2018, arXiv 1810.04805, section 3.1); special tokens never.

A batch is a pure function of (seed, i): which blocks it holds follows from a permutation of (seed, epoch),
their masks from a hash of (seed, epoch, block, position).  So every arm sees the same data in the same order
under the same masks, a resumed run needs no generator state, and each epoch masks afresh (static_masks: as in
the first).  Any sequence length reads the same files, in an order of its own.

    python data.py data/wiki            # verify the files against the manifest, describe them
    python data.py data/wiki --show 3   # and show three blocks with their masks
"""
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from plumbing.cli import Checked, Length, Natural, Seed, UserError, run
from plumbing.tokens import SCAN, TokenDirectory


class Batch(NamedTuple):
    ids: np.ndarray         # (B, S) int64, corrupted
    masked: np.ndarray      # (B, k) int64, the masked positions
    labels: np.ndarray      # (B, k) int64, the ids that stood there


def hashed(*parts):
    """Uniform uint64 from integers and integer arrays (broadcast together), by the 64-bit generator splitmix64 (Steele
    2014, doi 10.1145/2714064.2660195)."""
    x = np.uint64(0)
    with np.errstate(over="ignore"):                                    # modulo 2^64 is the point
        for part in parts:
            x = (x ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return x


def masked_positions(seq_len):
    """k, of a block: 15% (arXiv 1810.04805, section 3.1)."""
    return round(0.15 * seq_len)


class Blocks:
    """Batches of masked blocks of one split.  batch(i, B) depends on (seed, i, B) and on nothing else.

    unique_tokens: the split's first so many ids alone, again and again (the limited-data setting; the same
    ids for every seed).  static_masks: the masks of the first epoch in each.  causal: nothing is corrupted;
    the labels stay, and `masked` is the position before each, from which it is predicted."""

    def __init__(self, directory, split, seq_len, seed, unique_tokens=None, static_masks=False, causal=False):
        self.tokens, self.seq_len, self.seed = directory.split(split), seq_len, seed
        self.static_masks, self.causal = static_masks, causal
        if unique_tokens is not None:
            if not seq_len <= unique_tokens <= len(self.tokens):
                raise UserError(f"--unique-tokens {unique_tokens}: {directory.path}/{split}.bin has "
                                f"{len(self.tokens)} ids, and one block takes {seq_len}")
            self.tokens = self.tokens[:unique_tokens]
        self.special, self.vocab_size = directory.special, len(directory.vocab)
        self.body = seq_len - 2                                         # ids between [CLS] and [SEP]
        self.count = self.find(directory.vocab)
        self.k = masked_positions(seq_len)
        if self.count < 1:
            todo = "a larger --val-fraction" if split == "val" else "more text"
            raise UserError(f"{directory.path}/{split}.bin: {len(self.tokens)} ids do not make one block "
                            f"of length {seq_len}: run prepare.py again with {todo}, or give a smaller "
                            f"--seq-len")
        self.order = functools.lru_cache(2)(                            # a batch can span two epochs
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(self.count))

    def find(self, vocab):
        """How many blocks there are."""
        return len(self.tokens) // self.body

    def batch(self, i, batch_size):
        epoch, at = np.divmod(np.arange(i * batch_size, (i + 1) * batch_size), self.count)
        block = np.empty_like(at)
        for e in np.unique(epoch):
            block[epoch == e] = self.order(int(e))[at[epoch == e]]
        return self.mask(self.read(block), hashed(self.seed, 0 * epoch if self.static_masks else epoch, block))

    def read(self, block):
        """(B, S) ids of the blocks, uncorrupted: one gather."""
        ids = np.empty((len(block), self.seq_len), dtype=np.int64)
        ids[:, 0], ids[:, -1] = self.special["[CLS]"], self.special["[SEP]"]
        ids[:, 1:-1] = self.tokens[block[:, None] * self.body + np.arange(self.body)]
        return ids

    def mask(self, ids, key):
        """Corrupts `ids` (B, S) in place; `key` (B,) is all that the masks depend on."""
        B, S = ids.shape
        draw = hashed(key[:, None], np.arange(S)) >> np.uint64(1)       # (B, S): the k smallest are masked
        # Special tokens come last; in a block of unknown words alone [UNK] ones are masked
        draw[ids == self.special["[UNK]"]] |= np.uint64(1 << 63)
        for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"):
            draw[ids == self.special[token]] = np.uint64(2 ** 64 - 1)
        masked = np.sort(np.argpartition(draw, self.k, axis=1)[:, :self.k], axis=1)         # (B, k)
        labels = np.take_along_axis(ids, masked, 1)
        if self.causal:
            return Batch(ids, masked - 1, labels)
        action = hashed(key[:, None], masked, 1)                        # (B, k)
        tenth, token = action % np.uint64(10), hashed(action) % np.uint64(self.vocab_size - len(self.special))
        # A random token is any but a special one: specials are passed over by counting up from the smallest
        token = token.astype(np.int64)
        for special in sorted(self.special.values()):
            token += token >= special
        new = np.where(tenth < 8, self.special["[MASK]"], np.where(tenth == 8, token, labels))
        np.put_along_axis(ids, masked, new, 1)
        return Batch(ids, masked, labels)


class Sentences(Blocks):
    """Batches of whole sentences, unmasked, in place of blocks: [CLS] + at most S - 2 ids + [SEP], then [PAD] up to S.

    A sentence ends at [SEP], and at . ! ? before a word start, but not after a single letter (an initial).  One under
    SHORTEST ids joins the next of its document.  What comes after S - 2 ids is left out."""
    SHORTEST = 5

    def find(self, vocab):
        """Sets `begin` and `size` of each sentence; how many there are."""
        words = sorted(vocab, key=vocab.get)
        stop, letter, word = (np.array([test(w) for w in words]) for test in (
            lambda w: w in (".", "!", "?"), lambda w: len(w) == 1 and w.isalpha(), lambda w: w[0].isalpha()))
        ids, sep, ends = self.tokens, self.special["[SEP]"], []
        for at in range(0, len(ids), SCAN):
            here = np.arange(at, min(at + SCAN, len(ids)))
            before, after = ids[np.maximum(here - 1, 0)], ids[np.minimum(here + 1, len(ids) - 1)]
            ends.append(here[(ids[here] == sep) | stop[ids[here]] & ~letter[before] & word[after]])
        ends = np.concatenate(ends)
        last = ids[ends] == sep                                         # of a document: itself no part of it
        joins = (np.diff(ends, prepend=-1) < self.SHORTEST) & ~last
        ends, last = ends[~joins], last[~joins]
        begin = np.concatenate([[0], ends + 1])[:-1]
        size = ends + ~last - begin
        self.begin, self.size = begin[size > 0], np.minimum(size[size > 0], self.body)
        self.joined, self.cut = int(joins.sum()), int((size > self.body).sum())
        return len(self.begin)

    def read(self, block):
        at, size = np.arange(self.body), self.size[block][:, None]
        ids = np.full((len(block), self.seq_len), self.special["[PAD]"], dtype=np.int64)
        ids[:, 0] = self.special["[CLS]"]
        inside = self.tokens[np.minimum(self.begin[block][:, None] + at, len(self.tokens) - 1)]
        ids[:, 1:-1] = np.where(at < size, inside, self.special["[PAD]"])
        np.put_along_axis(ids, 1 + size, self.special["[SEP]"], 1)
        return ids

    def mask(self, ids, key):
        """None is masked."""
        none = np.empty((len(ids), 0), dtype=np.int64)
        return Batch(ids, none, none)


def phase_blocks(phase, directory, split, seed, unique_tokens=None, static_masks=False):
    """The Blocks, or Sentences, of a strategies.Phase."""
    kind = Sentences if phase.strategy.seq_len else Blocks
    return kind(directory, split, phase.seq_len, seed, unique_tokens, static_masks, phase.strategy.causal)


def ahead(do, items):
    """do(item) of each: the next one is done in a thread while one is used.  Close the generator to end the thread."""
    with ThreadPoolExecutor(1) as pool:
        following = None
        for item in items:
            now, following = following, pool.submit(do, item)
            if now:
                yield now.result()
        yield following.result()


def batches_of(blocks, start, batch_size, device):
    """Every batch from `start` on; on CUDA one ahead, in a thread: NumPy works without Python's lock, so while the
    main thread waits for the device, batches cost no time."""
    if device.type == "cuda":
        return ahead(lambda i: blocks.batch(i, batch_size), itertools.count(start))
    return (blocks.batch(i, batch_size) for i in itertools.count(start))


@dataclass
class Config(Checked):
    directory: list[str]    # token directories
    show: Natural = 0       # how many blocks to show with their masks
    seq_len: Length = 128   # block length
    seed: Seed = 0          # of the order and the masks of what is shown


def main(config):
    for directory in map(TokenDirectory, config.directory):
        directory.verify()
        m, token = directory.manifest, {i: t for t, i in directory.vocab.items()}
        print(f"{directory.path}: verified: {', '.join(m['sha256'])}")
        for key, value in m.items():
            if key not in ("sha256", "bytes", "sources"):
                print(f"{key}: {value}")
        print(f"unknown_rate: {m['unknown'] / (m['train_tokens'] + m['val_tokens']):.4%}")
        shown = Blocks(directory, "train", config.seq_len, config.seed).batch(0, config.show) if config.show else []
        for ids, masked, labels in zip(*shown, strict=True):
            words = [token[i] for i in ids]
            for at, label in zip(masked, labels, strict=True):      # {what stands there <- what stood there}
                words[at] = f"{{{words[at]} <- {token[label]}}}"
            print("\n" + "".join(w[2:] if w.startswith("##") else " " + w for w in words).strip())


if __name__ == "__main__":
    run(main, Config, __doc__)
