"""From any text to a token directory.  Read it when you bring your own corpus.

    python prepare.py docstrings --vocab-size 4096 --out data/docstrings          # the text every Python carries
    python prepare.py my_text.txt.xz more/ --vocab bert-base-uncased --out data/mine      # files and directories
    python prepare.py wikimedia/wikipedia/20231101.en --vocab bert-base-uncased --out data/wiki   # from the Hub

A source is a file, a directory (its readable files, sorted), a quoted glob, - for standard input, a data set on the
Hub in parquet (OWNER/NAME[@REVISION][/FOLDER]; @~parquet: the Hub's own conversion), or the word docstrings: the
English documentation on this disk, of the standard library and of the packages in requirements.txt with what those
require, read by `ast` and never imported.

.txt        one paragraph per line, a blank line between documents
.jsonl      a document per row, its text in --field; a first row without it is refused, later ones are counted
.parquet    the same, one file of a Hub data set downloaded ahead of the one that is read
.gz .xz .bz2 .zip     around the first two; a damaged or cut file is refused, never half used

What text can bring, and what is done, each counted in manifest.json: bytes that are no UTF-8 become U+FFFD (which
BERT's normaliser drops); a BOM at the start and NUL anywhere are removed; CRLF is LF, a lone CR a space; UTF-16 is
refused; a line over 64 kB is cut at whitespace (the ids stay the same), a document over 4 million characters at a
line.

A document is its paragraphs' WordPiece ids, then [SEP].  Exact duplicates are dropped; validation documents are chosen
by a hash of their text, so they stay the same when files are added or reordered.  Under 100 documents, every
so-many-th chunk of ids is kept for validation instead.  One pass, in bounded memory: one batch is tokenized while
the next is read.  The same input gives the same bytes; a run that was killed is started again.  All is written
under the name *.part first, manifest.json last: an earlier token directory stays until the new one is complete, and a
directory without manifest.json is not usable.
"""
import ast
import bz2
import contextlib
import glob
import gzip
import hashlib
import importlib.metadata
import inspect
import io
import itertools
import json
import lzma
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from cli import UserError, run
from data import SPECIAL

BATCH = 2 ** 18             # characters tokenized at a time; tokenizers takes some 150 bytes of memory for each
SAMPLE = 2 ** 26            # characters that a vocabulary is trained on: the first ones
ALPHABET = 1000             # characters a trained vocabulary knows, the most frequent ones
LINE = 2 ** 16              # bytes after which a line is cut
DOCUMENT = 2 ** 22          # characters after which a document is cut
CHUNK = 4096                # ids: what is split into training and validation when there are few documents
FEW = 100                   # documents
RECENT = 2 ** 20            # document keys held in a set before they are sorted away

PACKED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
SUFFIXES = ".txt, .jsonl, .parquet, also .gz .xz .bz2 .zip"
EXPANDS = {".gz": 3, ".xz": 4, ".bz2": 4, ".zip": 3, ".parquet": 2}     # text bytes per byte on disk, about
DAMAGED = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, zipfile.BadZipFile,
           RuntimeError)    # ValueError is pyarrow's, RuntimeError that of an encrypted .zip
READABLE = re.compile(r"\.(txt|jsonl)(\.(gz|xz|bz2|zip))?$|\.(gz|xz|bz2|zip|parquet)$")
HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.~-]+))?(?:/([\w./-]+?))?/?")


@dataclass
class Config:
    sources: list[str]              # files, directories, globs, - (standard input), Hub data sets, or docstrings
    out: str                        # the token directory to make
    vocab: str | None = None        # vocab.txt, tokenizer.json, a directory that holds one, or a Hub id
    vocab_size: int | None = None   # train a WordPiece vocabulary of this size instead
    val_fraction: float = 0.005     # documents kept for validation
    field: str = "text"             # what holds the text in a row of .jsonl or .parquet
    rows_per_document: int = 1      # rows joined to one document, for data sets with a sentence per row


# --------------------------------------------------------------------------------------------- sources -> files

class File(NamedTuple):
    name: str                       # what messages call it; its suffix says how to read it
    size: int                       # bytes
    fetch: Callable                 # () -> its path on this disk


def find_files(source):
    """The files of one source, in an order that depends on their names alone."""
    path = Path(source)
    if source in ("docstrings", "-"):
        return [File(source, 0, lambda: source)]
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = [p for p in path.rglob("*") if READABLE.search(p.name) and p.is_file()
                 and not any(part.startswith(".") for part in p.relative_to(path).parts)]
    elif glob.has_magic(source):
        paths = [Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file()]
    elif HUB.fullmatch(source) and not READABLE.search(source) and source[0] != ".":
        return hub_files(source)
    else:
        raise UserError(f"{source}: no such file: give files, directories, a Hub data set, or the word docstrings")
    if not paths:
        raise UserError(f"{source}: no file to read in it ({SUFFIXES})")
    return [File(str(p), p.stat().st_size, lambda p=p: p) for p in sorted(paths)]


def hub_files(source):
    """The parquet files of a data set on the Hub, of its training split where it has splits."""
    import huggingface_hub as hub  # comes with tokenizers
    name, revision, folder = HUB.fullmatch(source).groups()
    revision = "refs/convert/parquet" if revision == "~parquet" else revision
    try:
        if hub.constants.HF_HUB_OFFLINE:
            local = Path(hub.snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
            commit, sizes = local.name, {p.relative_to(local).as_posix(): p.stat().st_size
                                         for p in local.rglob("*.parquet")}
        else:
            info = hub.HfApi().dataset_info(name, revision=revision, files_metadata=True)
            commit, sizes = info.sha, {s.rfilename: s.size or 0 for s in info.siblings}
    except Exception as e:      # of many kinds: no network, no such data set, not allowed
        raise UserError(f"{source}: neither on this disk nor a data set that the Hub gives ({one_line(e)})") from None
    found = sorted(f for f in sizes if f.endswith(".parquet") and f.startswith(f"{folder}/" if folder else ""))
    found = [f for f in found if "train" in f.removeprefix(folder or "")] or found
    folders = sorted({f.split("/")[0] for f in found if "/" in f})
    if not found or not folder and len(folders) > 1:
        raise UserError(f"{source}: no parquet file there" if not found else f"{source} has {len(folders)} folders: "
                        f"name one, as in {name}/{folders[0]} (there are {', '.join(folders[:8])} ...)")
    for f in found:             # only a part is in the cache
        if (of := re.search(r"-of-(\d+)", f)) and len(found) < int(of[1]):
            raise UserError(f"{source}: {len(found)} of its {int(of[1])} files are there: download the rest first")

    def fetch(f):
        try:
            return hub.hf_hub_download(name, f, repo_type="dataset", revision=commit)
        except Exception as e:
            raise UserError(f"{name}/{f}: download failed ({one_line(e)}): run the same command again, what has been "
                            f"downloaded is kept") from None
    return [File(f"{name}@{commit}/{f}", sizes[f], lambda f=f: fetch(f)) for f in found]


def one_line(e):
    return (str(e).strip() or type(e).__name__).splitlines()[0][:120]


def check_space(files, out):
    """Refuses before the work what will not fit on the disk: about 4 bytes of text make one id of 2 bytes."""
    need = sum(f.size * EXPANDS.get(Path(f.name).suffix, 1) for f in files) // 2
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if need > (free := shutil.disk_usage(place).free):
        raise UserError(f"{out} will take about {need:,} bytes, {free:,} are free on its disk: make room, or give "
                        f"another --out")


# ------------------------------------------------------------------------------------------- files -> documents

def read_documents(files, field="text", rows_per_document=1, met=None):
    """The documents of files: strings with one paragraph per line.  `met` counts what was met on the way."""
    met = Counter() if met is None else met
    with ThreadPoolExecutor(1) as pool:                                 # downloads one file ahead
        paths = [pool.submit(file.fetch) for file in files[:1]]
        for i, file in enumerate(files):
            path, before = paths[i].result(), met["read"]
            paths += [pool.submit(f.fetch) for f in files[i + 1:i + 2]]
            if file.name == "docstrings":
                yield from (text for _, text in docstrings())
                continue
            try:
                for lines in open_lines(file.name, path, field, rows_per_document, met):
                    yield from documents_of(lines, met)
            except DAMAGED as e:
                raise UserError(f"{file.name} cannot be read, it is damaged or cut ({one_line(e)}): get it again, or "
                                f"leave it out") from None
            met["read"] = before + file.size


def open_lines(name, path, field, rows_per_document, met):
    """For each text in a file (a .zip may hold several) an iterable of its lines, documents parted by ''."""
    def lines(stream, name):
        first = stream.peek(1)[:1] if name == "-" else b""              # standard input has no suffix to tell
        if name.endswith(".jsonl") or first == b"{":
            return row_lines(json_rows(stream, field, name, met), rows_per_document, met)
        return paragraphs(stream, met, name)

    if name == "-":
        yield lines(sys.stdin.buffer, name)
    elif name.endswith(".parquet"):
        yield row_lines(parquet_rows(path, field, name, met), rows_per_document, met)
    else:
        inner, suffix = os.path.splitext(name)
        with open(path, "rb") as raw:
            if suffix == ".zip":
                with zipfile.ZipFile(raw) as archive:
                    inside = [m for m in archive.infolist() if not m.is_dir()]
                    texts = [m for m in inside if m.filename.endswith((".txt", ".jsonl"))]
                    if not texts and len(inside) != 1:
                        raise UserError(f"{name}: neither .txt nor .jsonl in it")
                    for member in texts or inside:
                        with archive.open(member) as f:
                            yield progress(lines(f, member.filename), raw, met)
            elif suffix in PACKED:
                with PACKED[suffix](raw) as f:
                    yield progress(lines(io.BufferedReader(f, 2 ** 20), inner), raw, met)
            else:
                yield progress(lines(raw, name), raw, met)


def progress(lines, raw, met):
    """The same lines; met["read"] follows the position in the file on disk."""
    before = met["read"]
    for i, line in enumerate(lines):
        if i % 256 == 0:
            met["read"] = max(met["read"], before + raw.tell())
        yield line


def decode(line, met):
    try:
        text = line.decode()
    except UnicodeDecodeError:
        text = line.decode(errors="replace")
        met["bad_utf8_lines"] += 1
    if "\0" in text:
        text = text.replace("\0", "")
        met["nul_lines"] += 1
    return text


def paragraphs(stream, met, name="a row"):
    """The lines of a binary stream as stripped text; a long one in pieces, so that memory stays bounded."""
    rest, inside = b"", False                                           # of a long line
    for i in itertools.count():
        chunk = stream.readline(LINE)
        goes_on = len(chunk) == LINE and chunk[-1:] != b"\n"
        if i == 0 and chunk[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{name} is UTF-16: convert it first, as in  iconv -f UTF-16 -t UTF-8")
        if i == 0 and chunk[:3] == b"\xef\xbb\xbf":
            chunk = chunk[3:]
            met["boms"] += 1
        elif not chunk:
            break
        line, rest = rest + chunk, b""
        if goes_on:
            met["long_lines"] += not inside
            inside, cut = True, max(line.rfind(b" "), line.rfind(b"\t")) + 1
            if not cut:         # no whitespace: anywhere but inside of a character
                cut = next((len(line) - back for back in (1, 2, 3, 4) if line[-back] >= 0xC0), len(line))
            line, rest = line[:cut], line[cut:]
            if piece := decode(line, met).strip():
                yield piece
            continue
        text = decode(line, met).strip()
        if text or not inside:                                          # the end of a long line is no blank line
            yield text
        inside = False
    if rest:
        yield decode(rest, met).strip()


def json_rows(stream, field, name, met):
    good = False
    for line in stream:
        if not line.strip():
            continue
        try:
            row = json.loads(decode(line, met).removeprefix("\ufeff"))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get(field), str):
            good = True
            yield row[field]
        elif good:
            met["bad_rows"] += 1
        else:
            raise UserError(f"{name}: its first row has no text in {field!r}: " + (
                f"give --field, one of {', '.join(row)}" if isinstance(row, dict) else "it is no JSON object"))


def parquet_rows(path, field, name, met):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{name}: reading parquet takes one more package: pip install pyarrow") from None
    size = os.path.getsize(path)
    with pyarrow.parquet.ParquetFile(path) as file:
        if field not in (names := file.schema_arrow.names):
            raise UserError(f"{name}: no column {field!r}: give --field, one of {', '.join(names)}")
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for text in batch.column(0).to_pylist():
                if isinstance(text, str):
                    yield text
                else:
                    met["bad_rows"] += 1
            met["read"] += size * len(batch) // file.metadata.num_rows


def row_lines(rows, rows_per_document, met):
    """The lines of rows' texts, none blank, and '' after so many rows."""
    for i, text in enumerate(rows, 1):
        yield from filter(None, paragraphs(io.BytesIO(text.encode(errors="replace")), met))
        if i % rows_per_document == 0:
            yield ""


def documents_of(lines, met):
    document, size = [], 0
    for line in itertools.chain(lines, [""]):
        if line:
            document.append(line)
            size += len(line)
        if document and (not line or size >= DOCUMENT):
            met["long_documents"] += size >= DOCUMENT
            yield "\n".join(document)
            document, size = [], 0


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
    """A tokenizer from vocab.txt, tokenizer.json, a directory that holds one of them, or a Hub id.

    Casing is what tokenizer_config.json beside it says; else what tokenizer.json says; a vocab.txt alone is cased if
    it has tokens with capitals."""
    names, settings = ("tokenizer.json", "vocab.txt"), {}
    path = Path(name)
    if path.is_dir():
        path = next((path / f for f in names if (path / f).exists()), path)
    if path.is_dir():
        raise UserError(f"--vocab {name}: neither tokenizer.json nor vocab.txt is in this directory")
    try:
        config = path.with_name("tokenizer_config.json")
        if not path.exists():
            path, config = hub_tokenizer(name)
        if config and config.exists():
            settings = json.loads(config.read_text(encoding="utf-8"))
        if path.suffix == ".json":
            tokenizer = Tokenizer.from_file(str(path))
        else:
            with open(path, encoding="utf-8") as f:     # not splitlines(): U+2028 may be a token
                tokens = [line.rstrip("\n") for line in f]
            cased = any(token != token.lower() for token in tokens if token not in SPECIAL)
            check_special(name, set(tokens))
            tokenizer = wordpiece({token: i for i, token in enumerate(tokens)}, lowercase=not cased)
        if isinstance(normalizer := tokenizer.normalizer, normalizers.BertNormalizer):
            for theirs, ours in (("do_lower_case", "lowercase"), ("strip_accents", "strip_accents"),
                                 ("tokenize_chinese_chars", "handle_chinese_chars")):
                if theirs in settings:
                    setattr(normalizer, ours, settings[theirs])
            tokenizer.normalizer = normalizer
    except UserError:
        raise
    except Exception as e:      # tokenizers raises a bare Exception for whatever it does not like
        raise UserError(f"--vocab {name}: neither a vocabulary on this disk nor one on the Hub "
                        f"({one_line(e)})") from None
    vocab = tokenizer.get_vocab()
    check_special(name, vocab)
    if max(vocab.values()) >= len(vocab):
        raise UserError(f"--vocab {name}: {len(vocab):,} tokens with ids up to {max(vocab.values()):,}: a token is "
                        f"there twice, or one is missing")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def hub_tokenizer(name):
    """(tokenizer.json or vocab.txt, tokenizer_config.json or None) of a model on the Hub, as files on this disk."""
    import huggingface_hub as hub
    found = []
    for names in (("tokenizer.json", "vocab.txt"), ("tokenizer_config.json",)):
        for f in names:
            with contextlib.suppress(hub.errors.EntryNotFoundError):
                found.append(Path(hub.hf_hub_download(name, f)))
                break
        else:
            found.append(None)
    if not found[0]:
        raise UserError(f"--vocab {name}: neither tokenizer.json nor vocab.txt is there on the Hub")
    return found


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


class Seen:
    """The documents met so far, at 8 bytes each: the newest keys in a set, the others sorted."""

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
            self.older = np.sort(np.concatenate([self.older, np.sort(recent)]), kind="stable")  # merges sorted runs
            self.recent = set()
        return True


def batches(documents, val_fraction, counts, characters=BATCH):
    """Lists of (line, "train" or "val", whether it ends its document), of about that many characters in all.  A
    document may go on in the next list."""
    seen, batch, size = Seen(), [], 0
    for document in documents:
        key = document_key(document)
        if not seen.add(key):
            counts["duplicates"] += 1
            continue
        counts["documents"] += 1
        counts["characters"] += len(document)
        name, lines = "val" if is_validation(key, val_fraction) else "train", document.split("\n")
        for i, line in enumerate(lines, 1):
            batch.append((line, name, i == len(lines)))
            size += len(line)
            if size >= characters:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def encoded(tokenizer, batches):
    """(batch, its encodings).  tokenizers works without Python's lock, so the next batch is read, and the last one
    written, while it does."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(tokenizer.encode_batch_fast, [line for line, _, _ in batch],
                                               add_special_tokens=False)))
            if len(waiting) == 2:
                batch, future = waiting.popleft()
                yield batch, future.result()
        for batch, future in waiting:
            yield batch, future.result()


def prepare(config, documents=None):
    """Makes the token directory and returns its manifest.  `documents` replaces the config's sources."""
    if (config.vocab is None) == (config.vocab_size is None):
        raise UserError("give either --vocab (an existing vocabulary) or --vocab-size (train one)")
    if not 0 < config.val_fraction < 1:
        raise UserError(f"--val-fraction {config.val_fraction} is not between 0 and 1")
    if config.rows_per_document < 1:
        raise UserError(f"--rows-per-document {config.rows_per_document}: at least 1")
    out, met, files = Path(config.out), Counter(), []
    tokenizer = load_tokenizer(config.vocab) if config.vocab else None
    if documents is None:
        files = [file for source in config.sources for file in find_files(source)]
        check_space(files, out)
        documents = read_documents(files, config.field, config.rows_per_document, met)
    documents = iter(documents)
    if tokenizer is None:
        sample, size = [], 0
        for document in tqdm(documents, desc="reading", unit=" documents", mininterval=1):
            sample.append(document)
            size += len(document)
            if size >= SAMPLE:
                break
        tokenizer = train_vocabulary(sample, config.vocab_size)
        documents = itertools.chain(sample, documents)
        del sample

    names = ("train.bin", "val.bin", "tokenizer.json", "manifest.json")
    part = {name: out / f"{name}.part" for name in names}
    try:
        out.mkdir(parents=True, exist_ok=True)
        dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2 ** 16 else np.uint32)
        counts = write_ids(config, documents, tokenizer, dtype, part, met, sum(file.size for file in files))
        tokenizer.save(str(part["tokenizer.json"]))
        sha256 = {}
        for name in names[:3]:
            with open(part[name], "rb+") as f:
                os.fsync(f.fileno())
                sha256[name] = hashlib.file_digest(f, "sha256").hexdigest()
        manifest = dict(
            counts, dtype=dtype.name, vocab_size=tokenizer.get_vocab_size(), fingerprint=fingerprint(tokenizer),
            sources=config.sources, files=len(files), val_fraction=config.val_fraction,
            met={name: n for name, n in sorted(met.items()) if n and name != "read"},
            bytes={name: part[name].stat().st_size for name in sha256}, sha256=sha256)
        if hub := {m[0] for m in (re.match(r"[^/]+/[^/]+@[0-9a-f]{40}(?=/)", file.name) for file in files) if m}:
            manifest["hub"] = sorted(hub)
        if "docstrings" in config.sources:
            manifest["versions"] = {"python": platform.python_version()} | {
                name: importlib.metadata.version(name) for name in sorted(required_packages())}
        part["manifest.json"].write_text(json.dumps(manifest, indent=1) + "\n")
        # From here on there is nothing left to do but to rename: the old manifest goes first, the new one comes last
        (out / "manifest.json").unlink(missing_ok=True)
        for name in names:
            os.replace(part[name], out / name)
    except OSError as e:
        raise UserError(f"{out} cannot be written ({e.strerror or e}): make room, or give another --out") from None
    finally:
        for path in part.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return manifest


def write_ids(config, documents, tokenizer, dtype, part, met, total):
    """Tokenizes the documents into train.bin.part and val.bin.part; returns the counts."""
    sep, unk = tokenizer.token_to_id("[SEP]"), tokenizer.token_to_id("[UNK]")
    counts = dict(documents=0, duplicates=0, characters=0, train_tokens=0, val_tokens=0, unknown=0)
    began = time.monotonic()
    with (open(part["train.bin"], "wb") as train, open(part["val.bin"], "wb") as val,
          tqdm(total=total or None, unit="B", unit_scale=True, desc=config.out, mininterval=1) as bar):
        for batch, encodings in encoded(tokenizer, batches(documents, config.val_fraction, counts)):
            ids = {"train": [], "val": []}
            for (_, name, ends), encoding in zip(batch, encodings, strict=True):
                ids[name] += encoding.ids
                if ends:
                    ids[name].append(sep)
            for name, file in (("train", train), ("val", val)):
                array = np.fromiter(ids[name], dtype, len(ids[name]))
                file.write(array)
                counts[f"{name}_tokens"] += len(array)
                counts["unknown"] += int((array == unk).sum())
            tokens, seconds = counts["train_tokens"] + counts["val_tokens"], time.monotonic() - began
            bar.set_postfix_str(f"{tokens / 1e6:.1f}M tokens, {tokens / seconds / 1e6:.2f}M/s, "
                                f"{counts['characters'] / seconds / 1e6:.1f} MB/s of text", refresh=False)
            bar.update(met["read"] - bar.n if total else sum(len(line) for line, _, _ in batch))
    if counts["train_tokens"] + counts["val_tokens"] == counts["documents"]:    # not one id but [SEP]
        raise UserError(f"{' '.join(config.sources)}: no text in it")
    if counts["documents"] < FEW or not counts["val_tokens"]:
        split_by_chunks(part, dtype, config.val_fraction, counts)
    return counts


def split_by_chunks(part, dtype, val_fraction, counts):
    """Few documents: validation is every so many-th chunk of the ids instead of a document (at least one chunk)."""
    ids = np.concatenate([np.fromfile(part[name], dtype) for name in ("train.bin", "val.bin")])
    chunks = np.array_split(ids, max(2, len(ids) // CHUNK))
    every = max(2, min(len(chunks), round(1 / val_fraction)))
    with open(part["train.bin"], "wb") as train, open(part["val.bin"], "wb") as val:
        for i, chunk in enumerate(chunks):
            chunk.tofile(val if i % every == every - 1 else train)
    counts["val_tokens"] = sum(map(len, chunks[every - 1::every]))
    counts["train_tokens"] = len(ids) - counts["val_tokens"]


def main(config):
    m = prepare(config)
    print(f"{config.out}: {m['documents']:,} documents ({m['duplicates']:,} duplicates dropped), "
          f"{m['train_tokens']:,} training and {m['val_tokens']:,} validation ids ({m['dtype']}), "
          f"{100 * m['unknown'] / (m['train_tokens'] + m['val_tokens']):.2f}% unknown, "
          f"vocabulary {m['vocab_size']:,}", file=sys.stderr)
    if m["met"]:
        print("met: " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in m["met"].items()), file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    run(main, Config, __doc__)
