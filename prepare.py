"""From any text to a token directory.  Read it when you bring your own corpus.

    python prepare.py docstrings --vocab-size 4096 --out data/docstrings        # the text every Python carries
    python prepare.py my_text.txt.xz --vocab bert-base-uncased --out data/mine  # the vocabulary of your teacher

Text files (.txt, also .gz and .xz) hold one paragraph per line and a blank line between documents.  `docstrings`
is the English documentation on this disk: docstrings of the standard library and of the packages in
requirements.txt with what those require, read by `ast` and never imported.  A document is its paragraphs' WordPiece
ids, then [SEP].  Exact duplicates are dropped; validation documents are chosen by a hash of their text, so they stay
the same when files are added.  The same input gives the same bytes.  manifest.json is written last: a directory
without it is not usable.
"""
import ast
import gzip
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import lzma
import os
import platform
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from cli import UserError, run
from data import SPECIAL

BATCH = 2 ** 21             # characters tokenized at a time
SAMPLE = 2 ** 26            # characters that a vocabulary is trained on
ALPHABET = 1000             # characters a trained vocabulary knows, the most frequent ones
CHUNK = 4096                # ids: what is split into training and validation when there are few documents
FEW = 100                   # documents


@dataclass
class Config:
    sources: list[str]              # text files, or the word docstrings
    out: str                        # the token directory to make
    vocab: str | None = None        # vocab.txt, tokenizer.json, a directory that holds one, or a Hub id
    vocab_size: int | None = None   # train a WordPiece vocabulary of this size instead
    val_fraction: float = 0.005     # documents kept for validation


# ------------------------------------------------------------------------------------------- text -> documents

def read_documents(source):
    """The documents of one source: strings with one paragraph per line."""
    if source == "docstrings":
        yield from (text for _, text in docstrings())
        return
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(source).suffix, open)
    paragraphs = []
    try:
        with opener(source, "rt", encoding="utf-8", errors="replace") as f:
            for line in itertools.chain(f, [""]):
                if line := line.strip():
                    paragraphs.append(line)
                elif paragraphs:
                    yield "\n".join(paragraphs)
                    paragraphs = []
    except FileNotFoundError:
        raise UserError(f"{source}: no such file: give text files, or the word docstrings") from None
    except (OSError, EOFError, lzma.LZMAError) as e:
        raise UserError(f"{source} cannot be read: {e}") from None


def docstrings():
    """(package, docstring) of the standard library and the packages that requirements.txt brings, sorted."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = {"python": [p for p in stdlib.rglob("*.py") if not {"site-packages", "dist-packages"} & set(p.parts)]}
    for name in required_packages():
        files[name] = [Path(p.locate()) for p in importlib.metadata.files(name) or () if p.suffix == ".py"]
    for package in sorted(files):
        for path in sorted(files[package]):
            if {"test", "tests"} & set(path.parts):
                continue
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, OSError):                  # templates, and files of other Pythons
                continue
            if path.parent.name == "pydoc_data":                        # one dict: topic -> text
                texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            else:
                texts = [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(
                    n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
            for text in texts:
                lines = [line.strip() for line in inspect.cleandoc(text or "").splitlines() if line.strip()]
                if sum(map(len, lines)) >= 20:
                    yield package, "\n".join(lines)


def required_packages():
    """The packages that requirements.txt names, with what they require in turn: no other that is installed."""
    from packaging.requirements import Requirement  # comes with tokenizers, through huggingface_hub
    from packaging.utils import canonicalize_name
    todo = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    found = set()
    while todo:
        line = todo.pop().split("#")[0].strip()
        need = Requirement(line) if line else None
        if need is None or need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(need.name)
        if name in found:
            continue
        try:
            todo += importlib.metadata.requires(name) or []
            found.add(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"the package {name} is missing: pip install -r requirements.txt") from None
    return found


# ------------------------------------------------------------------------------------------------- the tokenizer

def wordpiece(vocab, lowercase=True):
    """BERT's tokenizer, as Hugging Face's tokenizers builds it, for a token -> id map."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    if vocab:
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])])
    return tokenizer


def train_vocabulary(texts, size):
    """A WordPiece vocabulary, the same on each run: special tokens, then the rest in sorted order.

    tokenizers breaks ties between merges by ids that follow a hash map's order, so two runs differ in ids and, where
    there are ties, in tokens too.  Naming every character and its `##` form in advance fixes those ids."""
    learner = wordpiece({})
    count = Counter()
    for text in texts:
        count.update(learner.normalizer.normalize_str(text))
    alphabet = sorted(sorted((c for c in count if not c.isspace()), key=lambda c: (-count[c], c))[:ALPHABET])
    forms = []
    for vocab_size in (1, size):                        # a first pass without merges, to find the forms that occur
        learner.train_from_iterator(texts, trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=[*SPECIAL, *forms], show_progress=False,
            initial_alphabet=alphabet, limit_alphabet=len(alphabet)))
        forms = sorted(token for token in learner.get_vocab() if token.startswith("##"))
    tokens = [*SPECIAL, *sorted(set(learner.get_vocab()) - set(SPECIAL))]
    if len(tokens) > size:
        raise UserError(f"--vocab-size {size}: the text's characters alone take {len(tokens)} entries")
    return wordpiece({token: i for i, token in enumerate(tokens)})


def load_tokenizer(name):
    """A tokenizer from vocab.txt, tokenizer.json, a directory that holds one of them, or a Hub id."""
    path = Path(name)
    if path.is_dir():
        path = next((path / f for f in ("tokenizer.json", "vocab.txt") if (path / f).exists()), path)
    if path.is_dir():
        raise UserError(f"--vocab {name}: neither tokenizer.json nor vocab.txt is in this directory")
    try:
        if path.suffix == ".json":
            tokenizer = Tokenizer.from_file(str(path))
        elif path.exists():
            tokens = path.read_text(encoding="utf-8").splitlines()
            cased = any(token != token.lower() for token in tokens if token not in SPECIAL)
            check_special(name, set(tokens))
            tokenizer = wordpiece({token: i for i, token in enumerate(tokens)}, lowercase=not cased)
        else:
            tokenizer = Tokenizer.from_pretrained(name)
    except UserError:
        raise
    except Exception as e:      # tokenizers raises a bare Exception for whatever it does not like
        raise UserError(f"--vocab {name}: neither a vocabulary on this disk nor one on the Hub "
                        f"({str(e).splitlines()[0][:120] if str(e) else type(e).__name__})") from None
    check_special(name, tokenizer.get_vocab())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_special(name, vocab):
    missing = [token for token in SPECIAL if token not in vocab]
    if missing:
        raise UserError(f"--vocab {name}: a BERT vocabulary has {' '.join(missing)}, this one does not")


def fingerprint(tokenizer):
    """What two tokenizers must share to share a corpus: the id map and the normaliser."""
    parts = json.loads(tokenizer.to_str())
    text = json.dumps([sorted(tokenizer.get_vocab().items()), parts["normalizer"], parts["pre_tokenizer"]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------- documents -> ids

def document_key(document):
    """The hash by which duplicates are found and validation documents chosen."""
    return hashlib.blake2b(document.encode("utf-8", "replace"), digest_size=8).digest()


def is_validation(key, val_fraction):
    return int.from_bytes(key, "big") < val_fraction * 2 ** 64


def batches(documents, characters=BATCH):
    """Lists of documents of about that many characters in all."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def prepare(config, documents=None):
    """Makes the token directory and returns its manifest.  `documents` replaces the config's sources."""
    if (config.vocab is None) == (config.vocab_size is None):
        raise UserError("give either --vocab (an existing vocabulary) or --vocab-size (train one)")
    if not 0 < config.val_fraction < 1:
        raise UserError(f"--val-fraction {config.val_fraction} is not between 0 and 1")
    if documents is None:
        documents = itertools.chain.from_iterable(map(read_documents, config.sources))
    documents, out = iter(documents), Path(config.out)

    if config.vocab:
        tokenizer = load_tokenizer(config.vocab)
    else:
        sample, size = [], 0
        for document in tqdm(documents, desc="reading", unit=" documents", mininterval=1):
            sample.append(document)
            size += len(document)
            if size >= SAMPLE:
                break
        tokenizer = train_vocabulary(sample, config.vocab_size)
        documents = itertools.chain(sample, documents)

    out.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2 ** 16 else np.uint32)
    sep, unk = tokenizer.token_to_id("[SEP]"), tokenizer.token_to_id("[UNK]")
    seen, counts = set(), dict(documents=0, duplicates=0, train_tokens=0, val_tokens=0, unknown=0)
    part = {name: open(out / f"{name}.bin.part", "wb") for name in ("train", "val")}
    with part["train"], part["val"], tqdm(unit="B", unit_scale=True, desc=f"{out}", mininterval=1) as bar:
        for batch in batches(documents):
            fresh = []
            for document in batch:
                key = document_key(document)
                counts["duplicates"] += key in seen
                if key not in seen:
                    seen.add(key)
                    fresh.append((key, document.split("\n")))
            lines = [line for _, document in fresh for line in document]
            encoded = iter(tokenizer.encode_batch_fast(lines, add_special_tokens=False))
            for key, document in fresh:
                ids = np.array([i for line in itertools.islice(encoded, len(document)) for i in line.ids] + [sep])
                name = "val" if is_validation(key, config.val_fraction) else "train"
                part[name].write(ids.astype(dtype).tobytes())
                counts[f"{name}_tokens"] += len(ids)
                counts["unknown"] += int((ids == unk).sum())
            counts["documents"] += len(fresh)
            bar.update(sum(map(len, batch)))
            bar.set_postfix_str(f"{(counts['train_tokens'] + counts['val_tokens']) / 1e6:.1f}M tokens")

    if 0 < counts["documents"] < FEW:
        split_by_chunks(out, dtype, config.val_fraction, counts)
    if not counts["val_tokens"]:
        for name in part:
            (out / f"{name}.bin.part").unlink()
        raise UserError(f"{' '.join(config.sources)}: no text in it" if not counts["documents"] else
                        f"{' '.join(config.sources)}: no document was chosen for validation out of "
                        f"{counts['documents']}: give a larger --val-fraction")
    (out / "manifest.json").unlink(missing_ok=True)
    for name in part:
        os.replace(out / f"{name}.bin.part", out / f"{name}.bin")
    tokenizer.save(str(out / "tokenizer.json"))

    files = ("train.bin", "val.bin", "tokenizer.json")
    manifest = dict(counts, dtype=dtype.name, vocab_size=tokenizer.get_vocab_size(), fingerprint=fingerprint(tokenizer),
                    sources=config.sources, val_fraction=config.val_fraction,
                    bytes={name: (out / name).stat().st_size for name in files},
                    sha256={name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in files})
    if "docstrings" in config.sources:
        manifest["versions"] = {"python": platform.python_version()} | {
            name: importlib.metadata.version(name) for name in sorted(required_packages())}
    (out / "manifest.json.part").write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(out / "manifest.json.part", out / "manifest.json")
    return manifest


def split_by_chunks(out, dtype, val_fraction, counts):
    """Few documents: validation is every so many-th chunk of the ids instead of a document (at least one chunk)."""
    ids = np.concatenate([np.fromfile(out / f"{name}.bin.part", dtype) for name in ("train", "val")])
    chunks = np.array_split(ids, max(2, len(ids) // CHUNK))
    every = max(2, min(len(chunks), round(1 / val_fraction)))
    for name, picked in (("train", [c for i, c in enumerate(chunks) if i % every != every - 1]),
                         ("val", [c for i, c in enumerate(chunks) if i % every == every - 1])):
        np.concatenate(picked).tofile(out / f"{name}.bin.part")
        counts[f"{name}_tokens"] = sum(map(len, picked))


def main(config):
    m = prepare(config)
    print(f"{config.out}: {m['documents']:,} documents ({m['duplicates']:,} duplicates dropped), "
          f"{m['train_tokens']:,} training and {m['val_tokens']:,} validation ids ({m['dtype']}), "
          f"{100 * m['unknown'] / (m['train_tokens'] + m['val_tokens']):.2f}% unknown, "
          f"vocabulary {m['vocab_size']:,}", file=sys.stderr)


if __name__ == "__main__":
    run(main, Config, __doc__)
