"""From any text to a token directory.

    python prepare.py docstrings --vocab-size 4096 --out data/docstrings       # the text every Python carries
    python prepare.py my_text.txt.xz more/ --vocab bert-base-uncased --out data/mine   # files and directories
    python prepare.py my_text/ reviews.csv queries.jsonl --document-per line --vocab DIR --out data/mine   # a teacher's

What can be read: docs/data.md; what is done with damaged text: plumbing/sources.py.

A document is its paragraphs' WordPiece ids, then [SEP]; one with the ids of another is dropped.  A hash of its ids puts
it into training or validation (docs/data.md, What holds).  100 bytes of memory are kept for each.  All is written under
the name *.part first, manifest.json last: a directory without that is not usable.
"""
import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from tokenizers import normalizers
from tqdm import tqdm

from data import ahead
from plumbing import glue
from plumbing.cli import Checked, Count, Fraction, UserError, run, shown
from plumbing.files import claim, hold, sha256
from plumbing.sources import Piece, find_files, read_documents
from plumbing.tokenizer import fingerprint, load_tokenizer, train_vocabulary

BATCH = 2 ** 17           # characters tokenized at a time; tokenizers takes some 150 bytes of memory for each
SAMPLE = 2 ** 26            # characters that a vocabulary is trained on: the first ones
CHUNK = 4096                # ids: what is split into training and validation when there are few documents
FEW = 100                   # documents
HEAD = 160                  # characters of a docstring that decide on its side
FEW_BLOCKS = 64             # of validation: below, its loss is noisy


@dataclass
class Config(Checked):
    sources: list[str]              # files, directories, - (standard input), or docstrings
    out: str                        # the token directory to make
    vocab: str | None = None        # vocab.txt, tokenizer.json, a directory that holds one, or a Hub id
    vocab_size: Annotated[int, "[6, 1e6]"] | None = None    # train a WordPiece vocabulary of this size instead
    val_fraction: Fraction = 0.005  # documents kept for validation
    columns: str | None = None      # columns of text in a table; default: text, or what fine-tuning would take
    document_per: Literal["blank-line", "line", "file"] = "blank-line"  # what ends a document; file: a table's too
    without: str | None = None      # tasks, as finetune_glue.py's --tasks: lines that are a side of a dev row go
    glue_dir: str | None = None     # directory of GLUE's official TSVs for --without
    at_most: Count | None = None    # ids of each source: the first ones


def document_key(content):
    """The hash of a document's ids (uint32, without [SEP]): tells duplicates, and training from validation."""
    return hashlib.blake2b(content, digest_size=8).digest()


def docstring_head(text):
    """The beginning of a docstring as an uncased vocabulary sees it."""
    return " ".join(normalizers.BertNormalizer().normalize_str(text).split())[:HEAD]


def docstring_key(text):
    """What puts a docstring into training or validation: a hash of its beginning, whatever the vocabulary."""
    return document_key(docstring_head(text).encode("utf-8", "replace"))


def is_validation(key, val_fraction):
    return int.from_bytes(key, "big") < val_fraction * 2 ** 64


def batches(documents, characters=BATCH):
    """Lists of pieces, of about that many characters in all."""
    batch, size = [], 0
    for piece in documents:
        batch.append(piece)
        size += len(piece.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    yield batch


def held_out(tokenizer, tasks, glue_dir):
    """The ids of the lines in all dev rows of the tasks, each side by itself."""
    lines = []
    for name, task in glue.parse_tasks(tasks).items() if tasks else ():
        parts = glue.read_task(name, task, glue_dir)
        lines += [line for part in parts if part != "train" for sides in parts[part][0] for side in sides
                  for line in side.split("\n")]
    encodings = tokenizer.encode_batch_fast(lines, add_special_tokens=False)
    return {tuple(encoding.ids) for encoding in encodings if encoding.ids}


def tokenized(tokenizer, documents, without, met):
    """(piece, its ids with [SEP] at the end).  The next batch is read while tokenizers works without Python's lock."""
    sep = tokenizer.token_to_id("[SEP]")

    def ids_of(batch):
        lines = [piece.text.split("\n") for piece in batch]
        encodings = tokenizer.encode_batch_fast([*itertools.chain(*lines)], add_special_tokens=False)
        kept = [() if without and tuple(encoding.ids) in without else encoding.ids for encoding in encodings]
        met["lines left out: a side of a row of --without"] += kept.count(())
        kept = iter(kept)
        return [(piece, np.array([*itertools.chain(*itertools.islice(kept, len(of))), sep], "<u4"))
                for piece, of in zip(batch, lines, strict=True)]
    return itertools.chain.from_iterable(ahead(ids_of, batches(documents)))


def prepare(config, documents=None):
    """Makes the token directory and returns its manifest.  `documents`, texts, replace the config's sources."""
    if (config.vocab is None) == (config.vocab_size is None):
        raise UserError("give either --vocab (an existing vocabulary) or --vocab-size (train one)")
    out, met = claim(config.out, "tokens", dry_run=True), Counter()
    files = [file for source in config.sources if documents is None for file in find_files(source, met)]
    try:
        with hold(out, "tokens"):
            return make(config, documents, out, files, met)
    except OSError as e:
        raise UserError(f"{out} cannot be written ({e.strerror or e}): make room, or give another --out") from None


def make(config, documents, out, files, met):
    """prepare, in a directory that is ours."""
    tokenizer = load_tokenizer(config.vocab) if config.vocab else None
    documents = (Piece(text, config.sources[0]) for text in documents) if documents is not None else read_documents(
        files, met, config.columns, config.document_per)
    if tokenizer is None:       # from the first SAMPLE characters
        sample = next(batches(tqdm(documents, desc="reading", unit=" documents", mininterval=1), SAMPLE))
        tokenizer = train_vocabulary([piece.text for piece in sample], config.vocab_size)
        documents = itertools.chain(sample, documents)
    names = ("train.bin", "val.bin", "tokenizer.json", "manifest.json")
    part = {name: out / f"{name}.part" for name in names}
    try:
        dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2 ** 16 else np.uint32)
        counts = write_ids(config, documents, tokenizer, dtype, part, met, sum(file.size() for file in files))
        tokenizer.save(str(part["tokenizer.json"]))
        manifest = dict(
            counts, dtype=dtype.name, vocab_size=tokenizer.get_vocab_size(), fingerprint=fingerprint(tokenizer),
            sources=config.sources, files=len(files), val_fraction=config.val_fraction,
            document_per=config.document_per,
            met={name: n for name, n in sorted(met.items()) if n and name[0] != "_"},
            bytes={name: part[name].stat().st_size for name in names[:3]},
            sha256={name: sha256(part[name]) for name in names[:3]})
        part["manifest.json"].write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for name in names:
            with open(part[name], "rb+") as f:
                os.fsync(f.fileno())
        (out / "manifest.json").unlink(missing_ok=True)                 # the old one goes first, the new one comes last
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


def write_ids(config, documents, tokenizer, dtype, part, met, total):
    """Tokenizes the documents into train.bin.part and val.bin.part; returns the counts."""
    unk = tokenizer.token_to_id("[UNK]")
    counts = dict(documents=0, duplicates=0, characters=0, train_tokens=0, val_tokens=0, unknown=0)
    counts["source_tokens"] = dict.fromkeys(config.sources, 0)
    seen, side, without = set(), "train", held_out(tokenizer, config.without, config.glue_dir)
    with (open(part["train.bin"], "wb") as train, open(part["val.bin"], "wb") as val,
          tqdm(total=total or None, unit="B", unit_scale=True, desc=config.out, mininterval=1) as bar):
        files = {"train": train, "val": val}
        for piece, ids in tokenized(tokenizer, documents, without, met):
            bar.update(met["_read"] - bar.n if total else len(piece.text))
            key = document_key(ids[:-1].tobytes())
            if piece.begins:
                side_key = docstring_key(piece.text) if piece.source == "docstrings" else key
                side = "val" if is_validation(side_key, config.val_fraction) else "train"
            if len(ids) == 1:                                           # nothing but control characters
                continue
            if key in seen:
                counts["duplicates"] += piece.begins
                continue
            total_of, full = counts["source_tokens"], f"_full {piece.source}"
            met[full] |= bool(config.at_most) and total_of[piece.source] + len(ids) > config.at_most
            if met[full]:
                continue
            total_of[piece.source] += len(ids)
            seen.add(key)
            files[side].write(ids.astype(dtype))
            counts["documents"] += piece.begins
            counts["characters"] += len(piece.text)
            counts[f"{side}_tokens"] += len(ids)
            counts["unknown"] += int((ids == unk).sum())
    tokens = counts["train_tokens"] + counts["val_tokens"]
    if not tokens:
        raise UserError(f"{' '.join(config.sources)}: no text in it; {listed(met)}")
    most = (config.val_fraction + 0.1) * tokens                        # beyond, one long document has come in
    if counts["documents"] < FEW or not 0 < counts["val_tokens"] < most:
        split_by_chunks(part, dtype, config.val_fraction, counts)
    return counts


def split_by_chunks(part, dtype, val_fraction, counts):
    """Validation is every so many-th chunk of the ids instead of a document: one at least, a tenth of a small text."""
    ids = np.concatenate([np.fromfile(part[f"{name}.bin"], dtype) for name in ("train", "val")])
    chunks = np.array_split(ids, max(min(len(ids), 10), len(ids) // CHUNK))
    every = max(2, min(len(chunks), round(1 / val_fraction)))
    with open(part["train.bin"], "wb") as train, open(part["val.bin"], "wb") as val:
        for i, chunk in enumerate(chunks, 1):
            chunk.tofile(train if i % every else val)
    counts["val_tokens"] = part["val.bin"].stat().st_size // dtype.itemsize
    counts["train_tokens"] = len(ids) - counts["val_tokens"]


def listed(met):
    """What was met, in words: the twelve most frequent."""
    met = Counter({name: n for name, n in met.items() if n and name[0] != "_"})
    words = [f"{n:,} {shown(name.replace('_', ' '))}" for name, n in met.most_common(12)]
    return f"met: {', '.join(words) or 'nothing'}" + ", ..." * (len(met) > 12)


def main(config):
    m = prepare(config)
    total = m["train_tokens"] + m["val_tokens"]
    print(f"{config.out}: {m['documents']:,} documents ({m['duplicates']:,} duplicates dropped), "
          f"{m['train_tokens']:,} training and {m['val_tokens']:,} validation ids ({m['dtype']}), "
          f"{100 * m['unknown'] / total:.2f}% unknown, vocabulary {m['vocab_size']:,}", file=sys.stderr)
    if len(m["source_tokens"]) > 1:
        print("shares: " + ", ".join(f"{shown(source)} {n / total:.1%}" for source, n in m["source_tokens"].items()),
              file=sys.stderr)
    if m["met"]:
        print(listed(m["met"]), file=sys.stderr)
    if (blocks := m["val_tokens"] // (128 - 2)) < FEW_BLOCKS:
        print(f"validation is small: {blocks} blocks at --seq-len 128, so its loss is noisy: give more text, "
              f"or a larger --val-fraction than {config.val_fraction}", file=sys.stderr)


if __name__ == "__main__":
    run(main, Config, __doc__)
