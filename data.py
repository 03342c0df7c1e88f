"""From a token directory to batches: memmapped ids, blocks, masks.  Read it fifth.

A token directory (made by prepare.py) holds train.bin and val.bin (flat ids, each document ended by [SEP]),
tokenizer.json and manifest.json.  A block is [CLS] + S-2 consecutive ids + [SEP]: always full, so pretraining needs
no padding and no attention mask.  k = round(0.15 S) positions are masked in every block: 80% [MASK], 10% a random
token, 10% left as they are (Devlin 2018, arXiv 1810.04805, section 3.1); special tokens never.

A batch is a pure function of (seed, i): which blocks it holds follows from a permutation of (seed, epoch), their
masks from a hash of (seed, epoch, block, position).  So every arm sees the same data in the same order under the
same masks, a resumed run needs no generator state, and each epoch masks afresh.

    python data.py data/wiki            # verify the files against the manifest, describe them
    python data.py data/wiki --show 3   # and show three blocks with their masks
"""
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import UserError, run

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Batch(NamedTuple):
    ids: np.ndarray         # (B, S) int64, corrupted
    masked: np.ndarray      # (B, k) int64, the masked positions
    labels: np.ndarray      # (B, k) int64, the ids that stood there


def mix(x):
    """64-bit finaliser of splitmix64 (Steele 2014, doi 10.1145/2714064.2660195): an avalanche hash, vectorised."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed(*parts):
    """Uniform uint64 from integers and integer arrays (broadcast together)."""
    x = np.uint64(0)
    with np.errstate(over="ignore"):                                    # modulo 2^64 is the point
        for part in parts:
            x = mix((x ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return x


class TokenDirectory:
    """The files of a token directory, opened.  `split(name)` is the memmapped ids of "train" or "val"."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.manifest = json.loads((self.path / "manifest.json").read_text())
        except FileNotFoundError:
            raise UserError(f"{path} is not a token directory (no manifest.json): make one with  "
                            f"python prepare.py TEXT.txt --vocab bert-base-uncased --out {path}") from None
        self.vocab = {}
        tokenizer = self.read_tokenizer()
        self.vocab = tokenizer.get_vocab()
        self.special = {token: self.vocab[token] for token in SPECIAL}
        for name, size in self.manifest["bytes"].items():
            found = (self.path / name).stat().st_size if (self.path / name).exists() else 0
            if found != size:
                raise UserError(f"{self.path / name}: {found} bytes where manifest.json says {size}: "
                                f"run prepare.py again")

    def read_tokenizer(self):
        from tokenizers import Tokenizer
        return Tokenizer.from_file(str(self.path / "tokenizer.json"))

    def split(self, name):
        return np.memmap(self.path / f"{name}.bin", dtype=self.manifest["dtype"], mode="r")

    def verify(self):
        """Compares every file with its sha256 in the manifest."""
        for name, expected in self.manifest["sha256"].items():
            with open(self.path / name, "rb") as f:
                found = hashlib.file_digest(f, "sha256").hexdigest()
            if found != expected:
                raise UserError(f"{self.path / name}: sha256 is {found[:12]}..., manifest.json says "
                                f"{expected[:12]}...: the file was changed; run prepare.py again")


class Blocks:
    """Batches of masked blocks of one split.  batch(i, B) depends on (seed, i, B) and on nothing else."""

    def __init__(self, directory, split, seq_len, seed):
        self.tokens, self.seq_len, self.seed = directory.split(split), seq_len, seed
        self.special, self.vocab_size = directory.special, len(directory.vocab)
        self.body = seq_len - 2                                         # ids between [CLS] and [SEP]
        self.count = len(self.tokens) // self.body
        self.k = round(0.15 * seq_len)                                  # masked positions in every block
        if self.k < 1 or self.count < 1:
            raise UserError(f"{directory.path}/{split}.bin: {len(self.tokens)} ids do not make one block of length "
                            f"{seq_len}: give a longer corpus or another --seq-len")
        self.order = functools.lru_cache(2)(                            # a batch can span two epochs
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(self.count))

    def batch(self, i, batch_size):
        epoch, at = np.divmod(np.arange(i * batch_size, (i + 1) * batch_size), self.count)
        block = np.empty_like(at)
        for e in np.unique(epoch):
            block[epoch == e] = self.order(int(e))[at[epoch == e]]
        return self.mask(self.read(block), hashed(self.seed, epoch, block))

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
        # Special tokens come last.  A block of unknown words alone still has k positions to offer: [UNK] ones.
        draw[ids == self.special["[UNK]"]] |= np.uint64(1 << 63)
        for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"):
            draw[ids == self.special[token]] = np.uint64(2 ** 64 - 1)
        masked = np.sort(np.argpartition(draw, self.k, axis=1)[:, :self.k], axis=1)         # (B, k)
        labels = np.take_along_axis(ids, masked, 1)
        action = hashed(key[:, None], masked, 1)                        # (B, k)
        tenth, token = action % np.uint64(10), hashed(action) % np.uint64(self.vocab_size - len(self.special))
        # A random token is any but a special one: specials are passed over by counting up from the smallest
        token = token.astype(np.int64)
        for special in sorted(self.special.values()):
            token += token >= special
        new = np.where(tenth < 8, self.special["[MASK]"], np.where(tenth == 8, token, labels))
        np.put_along_axis(ids, masked, new, 1)
        return Batch(ids, masked, labels)


# ------------------------------------------------------------------------------------------------------- script

@dataclass
class Config:
    directory: list[str]    # token directory
    show: int = 0           # how many blocks to show with their masks
    seq_len: int = 128      # block length


def main(config):
    directory = TokenDirectory(config.directory[0])
    directory.verify()
    for key, value in directory.manifest.items():
        if key not in ("sha256", "bytes", "sources"):
            print(f"{key}: {value}")
    print("verified: " + ", ".join(directory.manifest["sha256"]))
    if config.show:
        token = {i: t for t, i in directory.vocab.items()}
        batch = Blocks(directory, "train", config.seq_len, seed=0).batch(0, config.show)
        for ids, masked, labels in zip(*batch, strict=True):
            words = [token[i] for i in ids]
            for at, label in zip(masked, labels, strict=True):          # {what stands there <- what stood there}
                words[at] = f"{{{words[at]} <- {token[label]}}}"
            print("\n" + "".join(w[2:] if w.startswith("##") else " " + w for w in words).strip())


if __name__ == "__main__":
    run(main, Config, __doc__)
