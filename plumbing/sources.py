"""From files, directories, archives, standard input and the Hub to documents: read it when one surprises you.

A source is a file, a directory (its readable files, sorted; linked folders too), a quoted glob, - for
standard input, a data set on the Hub in parquet (OWNER/NAME[@REVISION][/FOLDER]; @~parquet: the Hub's own
conversion), or the word docstrings: the English documentation on this disk, of the standard library and of
the packages in requirements.txt with what those require, read by `ast` and never imported.

How a file is read follows from its first bytes, its name comes second:
text        one paragraph per line, a blank line between documents (--document-per file: each file is one).  Two shapes
            have documents of their own: WikiExtractor's <doc ...> lines, and WikiText's " = Title = ": its
            " = = Section = = " and its blank lines end none
JSON        a document per line, its text in --field; a first row without it is refused, later ones are counted
parquet     the same, one file of a Hub data set downloaded ahead of the one that is read
gzip, xz, bzip2, zip, tar   around all but parquet; a damaged or cut file is refused, never half used

Of a directory or an archive, .txt, .text, .json, .jsonl, .ndjson, .parquet, archives and files without a
suffix are read; the others are counted as left out, but for dot files and __MACOSX.  PDF, Office, pickles,
images and the like are refused by name; so are HTML, XML and tables (.csv, .tsv), whose markup and numbers
are no sentences; so is what has more than 5% of bad lines or rows.

What text can bring, and what is done, each counted in manifest.json: bytes that are no UTF-8 become U+FFFD
(which BERT's normaliser drops, as it does control characters); a BOM at the start and NUL anywhere are
removed; CRLF is LF, a lone CR a space; UTF-16 is refused; a line over 64 kB is cut at whitespace (the ids
stay the same), a document over 262,144 characters at a line, into pieces on one side (see prepare.py).
"""
import ast
import bz2
import contextlib
import functools
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
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from plumbing.cli import UserError, shown

LINE = 2 ** 16              # bytes after which a line is cut
DOCUMENT = 2 ** 18         # characters after which a document is cut: whole books would be most of the memory
LOOK = 256                  # lines among which the shape of a text is looked for
BAD = 0.05           # share of bad lines or rows above which a file is refused, if there are some: these many
BAD_BYTES, BAD_ROWS = 20, 10
CONTROL = bytes({*range(32), 127} - {*b"\t\n\v\f\r\x1b\x1c\x1d\x1e\x1f"})
SUFFIXES = ".txt, .text, .json, .jsonl, .ndjson, without suffix, also .gz .xz .bz2 .tar .tgz .zip, .parquet"
# Bytes of text per byte on disk, about
EXPANDS = {".gz": 3, ".tgz": 3, ".xz": 4, ".bz2": 4, ".zip": 3, ".parquet": 2}
DAMAGED = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, tarfile.TarError,
           RuntimeError)    # ValueError is pyarrow's, RuntimeError that of an encrypted .zip
READABLE = re.compile(r"(^[^.]+|\.(txt|text|jsonl?|ndjson|tar))(\.(gz|xz|bz2))?$|\.(zip|tgz|parquet)$", re.I)
JSON_NAME = re.compile(r"\.(jsonl?|ndjson)(\.(gz|xz|bz2))?$", re.I)
PACKED = ((rb"\x1f\x8b", gzip.open), (rb"\xfd7zXZ\0", lzma.open), (rb"BZh[1-9](1AY&SY|\x17rE8P)", bz2.open))
ZIP = rb"PK(\x03\x04|\x05\x06)"
TEXT_FIRST = "take the text out of it first, or leave it out"
NO_TEXT = (                 # how it begins, what it is, what to do
    (rb"%PDF-", "a PDF", "convert it first, as pdftotext does, or leave it out"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", "convert it first, as in  iconv -f UTF-16 -t UTF-8"),
    (rb"\(\xb5/\xfd", "packed by Zstandard", "unpack it first, as in  zstd -dc FILE | python prepare.py -"),
    (rb"7z\xbc\xaf|Rar!\x1a", "a 7-Zip or RAR archive", "unpack it first"),
    (rb"\x80[\x02-\x05]", "a Python pickle", TEXT_FIRST),
    (rb"\xd0\xcf\x11\xe0|\{\\rtf", "an Office document", TEXT_FIRST),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a", "an image", TEXT_FIRST),
    (rb"\x7fELF|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe", "a program", "leave it out"),
    (rb"\x93NUMPY|\x89HDF|ARROW1|\xff{4}|SQLite format 3", "numpy, HDF5, Arrow or SQLite", TEXT_FIRST),
    (rb"version https://git-lfs", "a Git LFS pointer", "fetch the file itself, as in  git lfs pull"),
    (rb"(\xef\xbb\xbf)?\s*<(?i:!doctype|html|\?xml)", "HTML or XML", TEXT_FIRST))
NO_TEXT_NAMES = (
    (r"\.html?", "HTML", TEXT_FIRST),
    (r"\.[ct]sv", "a table", "write its text column as JSON lines first, {\"text\": ...} in each"))
DOC = re.compile(r"<doc id=.*>|</doc>")                                 # WikiExtractor
TITLE, SECTION = re.compile(r"= [^=].* ="), re.compile(r"(= ){2,}[^=].*( =){2,}")           # WikiText
HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.~-]+))?(?:/([\w./-]+?))?/?")


# ------------------------------------------------------------------------------------------- sources -> files

class File(NamedTuple):
    name: str                       # what messages call it; its suffix says how to read it
    size: int                       # bytes
    fetch: Callable                 # () -> its path on this disk


def find_files(source, left_out):
    """The files of one source, in an order that depends on their names alone.  `left_out` counts, by suffix,
    what a directory has besides, and names what cannot be opened there."""
    path = Path(source)
    if source in ("docstrings", "-"):
        return [File(source, 0, lambda: source)]
    try:
        if path.is_dir():
            paths = files_below(path, left_out)
        elif path.exists():
            paths = [path]
        elif glob.has_magic(source):
            paths = [Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file()]
        elif HUB.fullmatch(source) and not (path.suffix and READABLE.search(source)) and source[0] != ".":
            return hub_files(source)
        else:
            raise UserError(f"{source}: no such file: give files, directories, a Hub data set, "
                            f"or the word docstrings")
        if not paths:
            raise UserError(f"{source}: no file to read in it (read are "
                            f"{SUFFIXES}){listed('; left out: ', left_out)}")
        return [File(str(p), p.stat().st_size, lambda p=p: p) for p in sorted(paths)]
    except OSError as e:
        raise UserError(f"{source} cannot be opened ({e.strerror or e}): give "
                        f"another, or the permission") from None


def files_below(top, left_out):
    """The readable files of a directory and of those in it, linked ones once."""
    def cannot(e):
        left_out[f"{e.filename} ({e.strerror})"] += 1

    found, entered = [], set()
    for folder, folders, names in os.walk(top, onerror=cannot, followlinks=True):
        if (real := os.path.realpath(folder)) in entered:               # a link to where we have been
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not hidden(name))
        for path in (Path(folder, name) for name in names if not hidden(name)):
            try:
                path.stat()
            except OSError as e:                                        # a link that leads nowhere
                cannot(e)
                continue
            if READABLE.search(path.name) and path.is_file():
                found.append(path)
            else:
                left_out[path.suffix.lower() or "special file"] += 1
    return found


def hidden(name):
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def listed(before, left_out):
    """The twelve most frequent of what was left out, as words after `before`; "" if there is nothing."""
    words = [f"{n:,} {name}" for name, n in left_out.most_common(12)] + ["..."] * (len(left_out) > 12)
    return before * bool(words) + ", ".join(words)


def hub_files(source):
    """The parquet files of a data set on the Hub, of its training split where it has splits."""
    import huggingface_hub as hub  # comes with tokenizers
    import huggingface_hub.constants  # which it does not import by itself
    name, revision, folder = HUB.fullmatch(source).groups()
    revision = "refs/convert/parquet" if revision == "~parquet" else revision
    try:
        if hub.constants.HF_HUB_OFFLINE:
            local = Path(hub.snapshot_download(name, repo_type="dataset", revision=revision,
                                               local_files_only=True))
            commit, sizes = local.name, {p.relative_to(local).as_posix(): p.stat().st_size
                                         for p in local.rglob("*.parquet")}
        else:
            info = hub.HfApi().dataset_info(name, revision=revision, files_metadata=True)
            commit, sizes = info.sha, {s.rfilename: s.size or 0 for s in info.siblings}
    except Exception as e:      # of many kinds: no network, no such data set, not allowed
        raise UserError(f"{source}: neither on this disk nor a data set that the Hub "
                        f"gives ({shown(e)})") from None
    inside = f"{folder}/" if folder else ""
    found = sorted(f for f in sizes if f.endswith(".parquet") and f.startswith(inside))
    found = [f for f in found if "train" in f.removeprefix(folder or "")] or found
    folders = sorted({f.split("/")[0] for f in found if "/" in f})
    if not found:
        raise UserError(f"{source}: no parquet file there")
    if not folder and len(folders) > 1:
        raise UserError(f"{source} has {len(folders)} folders: name one, as in {name}/{folders[0]} (there "
                        f"are {', '.join(folders[:8])} ...)")
    for f in found:             # only a part is in the cache
        if (of := re.search(r"-of-(\d+)", f)) and len(found) < int(of[1]):
            raise UserError(f"{source}: {len(found)} of its {int(of[1])} files are there: "
                            f"download the rest first")

    def fetch(f):
        try:
            return hub.hf_hub_download(name, f, repo_type="dataset", revision=commit)
        except Exception as e:
            raise UserError(f"{name}/{f}: download failed ({shown(e)}): run the same command again, what "
                            f"has been downloaded is kept") from None
    return [File(f"{name}@{commit}/{f}", sizes[f], lambda f=f: fetch(f)) for f in found]


def check_space(files, out):
    """Refuses before the work what will not fit on the disk: about 4 bytes of text make one id of 2 bytes."""
    need = sum(f.size * EXPANDS.get(Path(f.name).suffix.lower(), 1) for f in files) // 2
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if need > (free := shutil.disk_usage(place).free):
        raise UserError(f"{out} will take about {need:,} bytes, {free:,} are free on its disk: make "
                        f"room, or give another --out")


# ----------------------------------------------------------------------------------------- files -> documents

class Piece(NamedTuple):
    """A document, or a part of one that is too long."""
    text: str                       # one paragraph per line
    begins: bool = True             # it does not go on with the document of the piece before
    docstring: bool = False         # from the source docstrings, whose split has a rule of its own


def read_documents(files, met, field="text", rows_per_document=1, document_per="blank-line"):
    """The documents of files, as Pieces.  `met` counts what was met; what begins with _ is for us alone."""
    with ThreadPoolExecutor(1) as pool:                                 # downloads one file ahead
        paths = [pool.submit(file.fetch) for file in files[:1]]
        for i, file in enumerate(files):
            path, before = paths[i].result(), met["_read"]
            paths += [pool.submit(f.fetch) for f in files[i + 1:i + 2]]
            if file.name == "docstrings":
                yield from (Piece(text, docstring=True) for _, text in docstrings())
            else:
                yield from pieces_of(file.name, path, met, field, rows_per_document, document_per)
            met["_read"] = before + file.size


def pieces_of(name, path, met, field, rows_per_document, document_per):
    """The Pieces of one file, or of standard input."""
    before, on_disk = met["_read"], name != "-" and os.path.isfile(path)
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else open(path, "rb") as raw:
            for inner, stream, whole in unpacked(name, raw, path if on_disk else None, met):
                lines = lines_of(inner, stream, whole, field, rows_per_document, met)
                lines = watched(lines, inner, raw, before, on_disk, met)
                yield from pieces(shaped(lines, document_per), met)
    except DAMAGED as e:
        if getattr(e, "errno", None):
            raise UserError(f"{name} cannot be read ({e.strerror}): mend that, or leave it out") from None
        raise UserError(f"{name} cannot be read, it is damaged or cut ({shown(e)}): get it again, or "
                        f"leave it out") from None


class Full(io.RawIOBase):
    """A stream whose reads are full ones, so that the first look shows as much of a pipe as of a file."""

    def __init__(self, stream):
        self.stream = stream

    def readable(self):
        return True

    def readinto(self, buffer):
        n = 0
        while n < len(buffer) and (part := self.stream.read(len(buffer) - n)):
            buffer[n:n + len(part)] = part
            n += len(part)
        return n


class Member(tarfile.TarInfo):
    """tarfile takes a header that is cut or damaged for the archive's end: here it is an error."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:                                  # the true end
            raise
        except tarfile.HeaderError as e:
            raise tarfile.ReadError(str(e)) from None


def unpacked(name, stream, path, met):
    """(name, stream, path) of each text in a stream, archives opened.  path: None if no file on disk."""
    stream = io.BufferedReader(Full(stream), 2 ** 20)
    start = stream.peek()
    for begins, what, todo in NO_TEXT:
        if re.match(begins, start):
            raise UserError(f"{name} is {what}, not text: {todo}")
    for ends, what, todo in NO_TEXT_NAMES:
        if re.search(ends + r"(\.(gz|xz|bz2))?$", name, re.I):
            raise UserError(f"{name} is {what}, not text: {todo}")
    if not path and re.match(ZIP + rb"|PAR1", start):
        raise UserError(f"{name} is a .zip or .parquet inside of an archive or a pipe: give "
                        f"it as a file of its own")
    for begins, unpack in PACKED:
        if re.match(begins, start):
            with unpack(stream) as f:
                yield from unpacked(name, f, None, met)
            return
    if start[257:262] == b"ustar":
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=Member) as archive:
            yield from members(name, ((m.name, functools.partial(archive.extractfile, m))
                                      for m in archive if m.isfile()), met)
    elif re.match(ZIP, start):
        with zipfile.ZipFile(path) as archive:
            if {"[Content_Types].xml", "mimetype"} & set(archive.namelist()):
                raise UserError(f"{name} is an Office document or an EPUB, not text: {TEXT_FIRST}")
            yield from members(name, ((m.filename, functools.partial(archive.open, m))
                                      for m in archive.infolist() if not m.is_dir()), met)
    elif path and start[:4] != b"PAR1" and re.search(r"\.(gz|tgz|xz|bz2|zip|tar|parquet)$", name, re.I):
        raise ValueError("it does not begin as its name says")
    else:
        yield name, stream, path


def members(name, inside, met):
    """The texts among (a member's name, what opens it)."""
    found = False
    for member, opened in inside:
        if hidden(member):
            continue
        if READABLE.search(PurePosixPath(member).name):
            found = True
            with opened() as f:
                yield from unpacked(f"{name}:{member}", f, None, met)
        else:
            met["archived_files_left_out"] += 1
    if not found:
        raise UserError(f"{name}: no file to read in it (read are {SUFFIXES})")


def lines_of(name, stream, path, field, rows_per_document, met):
    """The lines of one text, documents parted by ''."""
    start = stream.peek()
    if start[:4] == b"PAR1":
        return row_lines(parquet_rows(path, field, name, met), rows_per_document, met)
    if re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", start):
        raise UserError(f"{name} is one JSON array: make it one object per line first, as in  jq -c '.[]'")
    if JSON_NAME.search(name) or re.match(rb'(\xef\xbb\xbf)?\s*\{\s*"', start):
        return row_lines(json_rows(stream, field, name, met), rows_per_document, met)
    return paragraphs(stream, met)


def watched(lines, name, raw, before, on_disk, met):
    """The same lines; met["_read"] follows the position in the file on disk; what is no text is refused."""
    old = Counter(met)

    def check():
        new = Counter(met)
        new.subtract(old)
        if new["_bad_lines"] > BAD * new["_lines"] and new["_bad_bytes"] >= BAD_BYTES:
            raise UserError(f"{name}: {new['_bad_lines'] / new['_lines']:.0%} of its lines hold control "
                            f"characters or bytes that are no UTF-8: leave it out if it is no text, convert "
                            f"it first if it is another encoding, as in  iconv -f LATIN1 -t UTF-8")
        if new["bad_rows"] > BAD * new["_rows"] and new["bad_rows"] >= BAD_ROWS:
            raise UserError(f"{name}: {new['bad_rows'] / new['_rows']:.0%} of its rows are damaged or have "
                            f"no text in the --field: mend it, or leave it out")

    for i, line in enumerate(lines, 1):
        if on_disk and i % 256 == 0:
            met["_read"] = max(met["_read"], before + raw.tell())
        if i % 2 ** 16 == 0:
            check()
        yield line
    check()


def decode(line, met):
    met["_lines"] += 1
    bad = len(line) - len(line.translate(None, CONTROL))
    try:
        text = line.decode()
    except UnicodeDecodeError:
        text = line.decode(errors="replace")
        met["bad_utf8_lines"] += 1
        bad += text.count("\ufffd")
    if bad:
        met["_bad_lines"] += 1
        met["_bad_bytes"] += bad
        if "\0" in text:
            text = text.replace("\0", "")
            met["nul_lines"] += 1
    return text


def paragraphs(stream, met):
    """The lines of a binary stream as stripped text; a long one in pieces, so that memory stays bounded."""
    rest, inside = b"", False                                           # of a long line
    for i in itertools.count():
        chunk = stream.readline(LINE)
        goes_on = len(chunk) == LINE and chunk[-1:] != b"\n"
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
        if text or not inside:                                       # the end of a long line is no blank line
            yield text
        inside = False
    if rest:
        yield decode(rest, met).strip()


def json_rows(stream, field, name, met):
    good = False
    for line in stream:
        if not (line := decode(line, met).strip("\ufeff \t\r\n")):
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        met["_rows"] += 1
        if isinstance(row, dict) and isinstance(row.get(field), str):
            good = True
            yield row[field]
        elif good:
            met["bad_rows"] += 1
        else:
            raise UserError(f"{name}: its first row has no text in {field!r}: " + (
                f"give --field, one of {', '.join(row)}" if isinstance(row, dict) else
                "it is no JSON object: one per line belongs here, as  jq -c .  writes them"))


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
            texts = [text for text in batch.column(0).to_pylist() if isinstance(text, str)]
            met["_rows"] += len(batch)
            met["bad_rows"] += len(batch) - len(texts)
            yield from texts
            met["_read"] += size * len(batch) // file.metadata.num_rows


def row_lines(rows, rows_per_document, met):
    """The lines of rows' texts, none blank, and '' after so many rows."""
    for i, text in enumerate(rows, 1):
        yield from filter(None, paragraphs(io.BytesIO(text.encode(errors="replace")), met))
        if i % rows_per_document == 0:
            yield ""


def shaped(lines, document_per):
    """The same lines, documents parted by '' as the text's own shape or --document-per says."""
    start = list(itertools.islice(lines, LOOK))
    lines, first = itertools.chain(start, lines), next(filter(None, start), "")
    if DOC.fullmatch(first):
        lines = ("" if DOC.fullmatch(line) else line for line in lines if line)
    elif TITLE.fullmatch(first) or any(map(SECTION.fullmatch, start)):
        lines = articles(lines)
    return filter(None, lines) if document_per == "file" else lines


def articles(lines):
    """WikiText's lines: '' before each title, which has a blank line before it, and nowhere else."""
    blank = True
    for line in lines:
        if blank and TITLE.fullmatch(line):
            yield ""
        if line:
            yield line
        blank = not line


def pieces(lines, met):
    piece, size, begins = [], 0, True
    for line in itertools.chain(lines, [""]):
        if line:
            piece.append(line)
            size += len(line)
        if piece and (not line or size >= DOCUMENT):
            yield Piece("\n".join(piece), begins)
            met["long_documents"] += begins and bool(line)
            piece, size, begins = [], 0, False
        begins = begins or not line


def docstrings():
    """(package, docstring) of the standard library and the packages that requirements.txt brings, sorted."""
    files = {"python": [path for path in Path(sysconfig.get_path("stdlib")).rglob("*.py")
                        if not {"site-packages", "dist-packages"} & set(path.parts)]}
    for name in required_packages():
        files[name] = [Path(p.locate()) for p in importlib.metadata.files(name) or () if p.suffix == ".py"]
    for package in sorted(files):
        for path in sorted(files[package]):
            if not {"test", "tests"} & set(path.parts):
                yield from ((package, text) for text in docstrings_in(path))


def docstrings_in(path):
    """Those of 20 characters or more in one Python file."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):                         # templates, and files of other Pythons
        return
    if path.parent.name == "pydoc_data":                                # one dict: topic -> text
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    else:
        texts = [ast.get_docstring(n) for n in statements(tree)
                 if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    for text in texts:
        lines = [line.strip() for line in inspect.cleandoc(text or "").splitlines() if line.strip()]
        if sum(map(len, lines)) >= 20:
            yield "\n".join(lines)


def statements(tree):
    """ast.walk without what is inside expressions: in a quarter of the time."""
    todo = [tree]
    for node in todo:
        if isinstance(node, (ast.mod, ast.stmt, ast.excepthandler, ast.match_case)):
            todo.extend(ast.iter_child_nodes(node))
            yield node


def required_packages():
    """The packages that requirements.txt names, with what they require in turn: no other installed one."""
    from packaging.requirements import Requirement  # comes with tokenizers, through huggingface_hub
    from packaging.utils import canonicalize_name
    lines = (Path(__file__).parents[1] / "requirements.txt").read_text(encoding="utf-8").splitlines()
    todo, found = [line for line in (line.split("#")[0].strip() for line in lines) if line], set()
    while todo:
        need = Requirement(todo.pop())
        name = canonicalize_name(need.name)
        if name in found or need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            todo += importlib.metadata.requires(name) or []
            found.add(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"the package {name} is missing: pip install -r requirements.txt") from None
    return found
