"""From any text to a token directory.  Read it when you bring your own corpus.

    python prepare.py docstrings --vocab-size 4096 --out data/docstrings       # the text every Python carries
    python prepare.py my_text.txt.xz more/ --vocab bert-base-uncased --out data/mine   # files and directories
    python prepare.py wikimedia/wikipedia/20231101.en --vocab bert-base-uncased --out data/wiki   # from the Hub

What can be read, and what is done with damaged text: plumbing/sources.py.

A document is its paragraphs' WordPiece ids, then [SEP].  Duplicates, documents with the same ids, are
dropped.  A hash of its ids puts a document into training or validation, so it stays there when files are
added or reordered; for docstrings it is a hash of the beginning of the text, so they also stay when the rest
of the text, the package's version or the vocabulary changes.  A document over 262,144 characters comes in
pieces, each ended by [SEP]: each is compared as a document, and all are on the side of the first one.  Where
this puts nothing or far too much into validation, or there are under 100 documents, every so-many-th chunk of
ids is kept for validation instead.

One pass, in bounded memory: one batch is tokenized while the next is read.  The same input gives the same
bytes; a run that was killed is started again.  All is written under the name *.part first, manifest.json
last: an earlier token directory stays until the new one is complete, and a directory without
manifest.json is not usable.
"""
import contextlib
import errno
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from tokenizers import normalizers
from tqdm import tqdm

from plumbing.cli import Checked, Count, Fraction, UserError, run
from plumbing.files import claim, hold, sha256
from plumbing.sources import Piece, check_space, find_files, listed, read_documents, required_packages
from plumbing.tokenizer import fingerprint, load_tokenizer, train_vocabulary

BATCH = 2 ** 17           # characters tokenized at a time; tokenizers takes some 150 bytes of memory for each
SAMPLE = 2 ** 26            # characters that a vocabulary is trained on: the first ones
CHUNK = 4096                # ids: what is split into training and validation when there are few documents
FEW = 100                   # documents
RECENT = 2 ** 20            # document keys held in a set before they are sorted away
HEAD = 160                  # characters of a docstring that decide on its side
FEW_BLOCKS = 64             # of validation: below, its loss is noisy


@dataclass
class Config(Checked):
    sources: list[str]           # files, directories, globs, - (standard input), Hub data sets, or docstrings
    out: str                        # the token directory to make
    vocab: str | None = None        # vocab.txt, tokenizer.json, a directory that holds one, or a Hub id
    vocab_size: Annotated[int, "[6, 1e6]"] | None = None    # train a WordPiece vocabulary of this size instead
    val_fraction: Fraction = 0.005  # documents kept for validation
    field: str = "text"             # what holds the text in a row of .jsonl or .parquet
    rows_per_document: Count = 1    # rows joined to one document, for data sets with a sentence per row
    document_per: Literal["blank-line", "file", "line"] = "blank-line"  # what ends a document of plain text


# ------------------------------------------------------------------------------------------- documents -> ids

def document_key(content):
    """The hash of a document's ids (uint32, without [SEP]): tells duplicates, and
    training from validation."""
    return hashlib.blake2b(content, digest_size=8).digest()


def docstring_head(text):
    """The beginning of a docstring as an uncased vocabulary sees it."""
    for part in (text[:4 * HEAD], text):                                # the whole text is seldom needed
        head = " ".join(normalizers.BertNormalizer().normalize_str(part).split())
        if len(head) > HEAD:
            break
    return head[:HEAD]


def docstring_key(text):
    """What puts a docstring into training or validation: a hash of its beginning, whatever the vocabulary."""
    return document_key(docstring_head(text).encode("utf-8", "replace"))


def is_validation(key, val_fraction):
    return int.from_bytes(key, "big") < val_fraction * 2 ** 64


class Seen:
    """The pieces met so far, at 8 bytes each: the newest keys in a set, the others sorted."""

    def __init__(self):
        self.recent, self.older = set(), np.empty(0, np.uint64)

    def add(self, key):
        """True if it was not there."""
        number = int.from_bytes(key, "big")
        at = np.searchsorted(self.older, np.uint64(number))
        if number in self.recent or at < len(self.older) and self.older[at] == number:
            return False
        self.recent.add(number)
        if len(self.recent) >= RECENT:
            recent = np.fromiter(self.recent, np.uint64, len(self.recent))
            # merges sorted runs
            self.older = np.sort(np.concatenate([self.older, np.sort(recent)]), kind="stable")
            self.recent = set()
        return True


def batches(documents, characters=BATCH):
    """Lists of (line, the piece that it ends or None), of about that many characters in all.  A piece may
    go on in the next list."""
    batch, size = [], 0
    for piece in documents:
        lines = piece.text.split("\n")
        for i, line in enumerate(lines, 1):
            batch.append((line, piece if i == len(lines) else None))
            size += len(line)
            if size >= characters:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def encoded(tokenizer, batches):
    """(batch, its encodings).  tokenizers works without Python's lock, so the next batch is read, and the
    last one written, while it does."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(tokenizer.encode_batch_fast, [line for line, _ in batch],
                                               add_special_tokens=False)))
            if len(waiting) == 2:
                batch, future = waiting.popleft()
                yield batch, future.result()
        for batch, future in waiting:
            yield batch, future.result()


def tokenized(tokenizer, documents, show):
    """(piece, its ids with [SEP] at the end); show(batch) after each batch of lines."""
    ids, sep = [], tokenizer.token_to_id("[SEP]")
    for batch, encodings in encoded(tokenizer, batches(documents)):
        for (_, piece), encoding in zip(batch, encodings, strict=True):
            ids += encoding.ids
            if piece:
                yield piece, np.array([*ids, sep], "<u4")
                ids = []
        show(batch)


def prepare(config, documents=None):
    """Makes the token directory and returns its manifest.  `documents`, texts, replace
    the config's sources."""
    if (config.vocab is None) == (config.vocab_size is None):
        raise UserError("give either --vocab (an existing vocabulary) or --vocab-size (train one)")
    if config.document_per == "file" and config.rows_per_document > 1:
        raise UserError("--document-per file joins all rows of a file: leave out --rows-per-document")
    out, files, left_out = claim(config.out, "tokens", dry_run=True), [], Counter()
    if documents is None:
        files = [file for source in config.sources for file in find_files(source, left_out)]
        if left_out:
            print(listed("left out: ", left_out), file=sys.stderr)
        check_space(files, out)
    try:
        with hold(out, "tokens"):
            return make(config, documents, out, files, left_out)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        todo = "make room, or give another --out" if full else "give a directory that can be written as --out"
        raise UserError(f"{out} cannot be written ({e.strerror or e}): {todo}") from None


def make(config, documents, out, files, left_out):
    """prepare, in a directory that is ours."""
    met = Counter()
    tokenizer = load_tokenizer(config.vocab) if config.vocab else None
    if documents is None:
        documents = read_documents(files, met, config.field, config.rows_per_document, config.document_per)
    else:
        documents = (Piece(text, docstring=config.sources == ["docstrings"]) for text in documents)
    if tokenizer is None:
        tokenizer, documents = trained_on(documents, config.vocab_size)
    names = ("train.bin", "val.bin", "tokenizer.json", "manifest.json")
    part = {name: out / f"{name}.part" for name in (*names, "train.whole", "val.whole")}
    try:
        dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2 ** 16 else np.uint32)
        counts = write_ids(config, documents, tokenizer, dtype, part, met, sum(file.size for file in files))
        tokenizer.save(str(part["tokenizer.json"]))
        manifest = dict(
            counts, dtype=dtype.name, vocab_size=tokenizer.get_vocab_size(),
            fingerprint=fingerprint(tokenizer),
            sources=config.sources, files=len(files), val_fraction=config.val_fraction,
            document_per=config.document_per, left_out=dict(left_out),
            met={name: n for name, n in sorted(met.items()) if n and name[0] != "_"},
            bytes={name: part[name].stat().st_size for name in names[:3]},
            sha256={name: sha256(part[name]) for name in names[:3]})
        if hub := {m[0] for m in (re.match(r"[^/]+/[^/]+@[0-9a-f]{40}(?=/)", file.name)
                                  for file in files) if m}:
            manifest["hub"] = sorted(hub)
        if "docstrings" in config.sources:
            manifest["versions"] = {"python": platform.python_version()} | {
                name: importlib.metadata.version(name) for name in sorted(required_packages())}
        part["manifest.json"].write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for name in names:
            with open(part[name], "rb+") as f:
                os.fsync(f.fileno())
        # From here on there is nothing left to do but to rename: the old manifest goes
        # first, the new one comes last
        (out / "manifest.json").unlink(missing_ok=True)
        for name in names:
            os.replace(part[name], out / name)
        for source in config.sources if config.document_per == "blank-line" else ():
            if 2 * met[f"_ended in {source}"] < met[f"_lines of {source}"]:
                print(f"{source}: most lines do not end in . ! ? or :, as in hard-wrapped prose, whose blank lines end "
                      f"no documents: --document-per file makes each file one", file=sys.stderr)
    finally:
        for path in part.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return manifest


def trained_on(documents, vocab_size):
    """A tokenizer from the first SAMPLE characters; and all the documents again."""
    sample, size = [], 0
    for piece in tqdm(documents, desc="reading", unit=" documents", mininterval=1):
        sample.append(piece)
        size += len(piece.text)
        if size >= SAMPLE:
            break
    return train_vocabulary([piece.text for piece in sample], vocab_size), itertools.chain(sample, documents)


def write_ids(config, documents, tokenizer, dtype, part, met, total):
    """Tokenizes the documents into train.bin.part and val.bin.part; returns the counts."""
    unk = tokenizer.token_to_id("[UNK]")
    counts = dict(documents=0, duplicates=0, characters=0, train_tokens=0, val_tokens=0, unknown=0)
    began, seen, side = time.monotonic(), Seen(), "train"
    with (open(part["train.bin"], "wb") as train, open(part["val.bin"], "wb") as val,
          tqdm(total=total or None, unit="B", unit_scale=True, desc=config.out, mininterval=1) as bar):
        def show(batch):
            tokens, seconds = counts["train_tokens"] + counts["val_tokens"], time.monotonic() - began
            bar.set_postfix_str(f"{tokens / 1e6:.1f}M tokens, {tokens / seconds / 1e6:.2f}M/s, "
                                f"{counts['characters'] / seconds / 1e6:.1f} MB/s of text", refresh=False)
            bar.update(met["_read"] - bar.n if total else sum(len(line) for line, _ in batch))
        files = {"train": train, "val": val}
        for piece, ids in tokenized(tokenizer, documents, show):
            key = document_key(ids[:-1].tobytes())
            if piece.begins:
                side_key = docstring_key(piece.text) if piece.docstring else key
                side = "val" if is_validation(side_key, config.val_fraction) else "train"
            if len(ids) == 1:                                           # nothing but control characters
                continue
            if not seen.add(key):
                counts["duplicates"] += piece.begins
                continue
            files[side].write(ids.astype(dtype))
            counts["documents"] += piece.begins
            counts["characters"] += len(piece.text)
            counts[f"{side}_tokens"] += len(ids)
            counts["unknown"] += int((ids == unk).sum())
    tokens = counts["train_tokens"] + counts["val_tokens"]
    if not tokens:
        raise UserError(f"{' '.join(config.sources)}: no text in it")
    most = (config.val_fraction + 0.1) * tokens                        # beyond, one long document has come in
    if counts["documents"] < FEW or not 0 < counts["val_tokens"] < most:
        split_by_chunks(part, dtype, config.val_fraction, counts)
    return counts


def split_by_chunks(part, dtype, val_fraction, counts):
    """Validation is every so many-th chunk of the ids instead of a document: one at least, a
    tenth of a small text."""
    n = counts["train_tokens"] + counts["val_tokens"]
    chunks = max(min(n, 10), n // CHUNK)
    every = max(2, min(chunks, round(1 / val_fraction)))
    for name in ("train", "val"):
        os.replace(part[f"{name}.bin"], part[f"{name}.whole"])
    with (open(part["train.whole"], "rb") as first, open(part["val.whole"], "rb") as rest,
          open(part["train.bin"], "wb") as train, open(part["val.bin"], "wb") as val):
        for i in range(chunks):
            size = n // chunks + (i < n % chunks)
            ids = np.fromfile(first, dtype, size)
            ids = np.concatenate([ids, np.fromfile(rest, dtype, size - len(ids))])
            ids.tofile(val if i % every == every - 1 else train)
    counts["val_tokens"] = part["val.bin"].stat().st_size // dtype.itemsize
    counts["train_tokens"] = n - counts["val_tokens"]


def main(config):
    m = prepare(config)
    print(f"{config.out}: {m['documents']:,} documents ({m['duplicates']:,} duplicates dropped), "
          f"{m['train_tokens']:,} training and {m['val_tokens']:,} validation ids ({m['dtype']}), "
          f"{100 * m['unknown'] / (m['train_tokens'] + m['val_tokens']):.2f}% unknown, "
          f"vocabulary {m['vocab_size']:,}", file=sys.stderr)
    if m["met"]:
        print("met: " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in m["met"].items()),
              file=sys.stderr)
    if (blocks := m["val_tokens"] // (128 - 2)) < FEW_BLOCKS:
        print(f"validation is small: {blocks} blocks at --seq-len 128, so its loss is noisy: give more text, "
              f"or a larger --val-fraction than {config.val_fraction}", file=sys.stderr)


if __name__ == "__main__":
    run(main, Config, __doc__)
