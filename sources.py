"""From files, directories, archives, standard input and the Hub to documents.  Read it when a source surprises you.

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
"""
import ast
import bz2
import glob
import gzip
import importlib.metadata
import inspect
import io
import itertools
import json
import lzma
import os
import re
import shutil
import sys
import sysconfig
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cli import UserError

LINE = 2 ** 16              # bytes after which a line is cut
DOCUMENT = 2 ** 18          # characters after which a document is cut: whole books would be most of the memory
PACKED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
SUFFIXES = ".txt, .jsonl, .parquet, also .gz .xz .bz2 .zip"
EXPANDS = {".gz": 3, ".xz": 4, ".bz2": 4, ".zip": 3, ".parquet": 2}     # text bytes per byte on disk, about
DAMAGED = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, zipfile.BadZipFile,
           RuntimeError)    # ValueError is pyarrow's, RuntimeError that of an encrypted .zip
READABLE = re.compile(r"\.(txt|jsonl)(\.(gz|xz|bz2|zip))?$|\.(gz|xz|bz2|zip|parquet)$")
HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.~-]+))?(?:/([\w./-]+?))?/?")


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
    import huggingface_hub.constants  # which it does not import by itself
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
