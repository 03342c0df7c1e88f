"""From files, directories, archives, standard input and the Hub to documents: read it when one surprises you.

A source is a file, a directory (its texts, sorted; linked folders too), a quoted glob, - for standard input, a data
set on the Hub in parquet (OWNER/NAME[@REVISION][/FOLDER]; @~parquet: the Hub's own conversion), or the word
docstrings: the English documentation on this disk, of the standard library and of the packages in requirements.txt
with what those require, read by `ast` and never imported.  How a file is read follows from its first bytes, its name
comes second:
text        a paragraph per line, a blank line between documents (--document-per file, line: each is one).  Two shapes
            have documents of their own: WikiExtractor's <doc ...> lines, and WikiText's " = Title = "
JSON lines, parquet         a document per row, its text in --field (plumbing/rows.py)
gzip, xz, bzip2, zip, tar   around text and JSON lines, no archive inside of another

Of a directory or an archive all that is text is read, whatever it is called.  What is no text there is left out and
counted, but for dot files and __MACOSX; a file given by name, or called .txt, .json and the like, is refused.  What is
mended in text is counted in manifest.json: bytes that are no UTF-8 and lone surrogates become U+FFFD (which BERT's
normaliser drops, as it does control characters); a BOM at the start and NUL are removed; CRLF is LF, a lone CR a space;
a line over 64 kB is cut at whitespace (the ids stay the same), a document over 262,144 characters at a line, into
pieces on one side (see prepare.py).
"""
import ast
import contextlib
import functools
import glob
import importlib.metadata
import inspect
import io
import itertools
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from plumbing import rows
from plumbing.cli import UserError, shown
from plumbing.rows import reading

LINE = 2 ** 16              # bytes after which a line is cut
DOCUMENT = 2 ** 18         # characters after which a document is cut: whole books would be most of the memory
SHAPE = 256                 # lines among which the shape of a text is looked for
BAD = 0.05           # share of bad lines or rows above which a file is refused, if there are some: these many
BAD_BYTES, BAD_ROWS = 20, 10
# Bytes of text per byte on disk, about
EXPANDS = {".gz": 3, ".tgz": 3, ".xz": 4, ".bz2": 4, ".zip": 3, ".parquet": 2}
# What is called so is text, or an error; the rest of a directory is looked into
TEXT_NAME = re.compile(r"\.(txt|text|(?P<json>jsonl?|ndjson))(\.(gz|xz|bz2))?$", re.I)
ARCHIVE_NAME = re.compile(r"\.(tar(\.(gz|xz|bz2))?|zip|tgz|parquet)$", re.I)
JSON = rb'(\xef\xbb\xbf)?\s*(\{\s*"|\[\s*\{)'
# Found in a directory, lines of objects: one over many lines is somebody's settings, as is a single one of another name
JSON_LINES, JSON_SETTINGS = rb'(\xef\xbb\xbf)?\s*\{\s*".*\}\s*\n\s*\{\s*"', rb"(\xef\xbb\xbf)?\s*\{[ \t\r]*\n"
PACKED = b"|".join((rows.ARCHIVE, *(begins for begins, _ in rows.PACKED)))
ENDS, CLOSING = (*".!?:…。！？：",), "\"')]}»”’*_`"
DOC = re.compile(r"<doc id=.*>|</doc>")                                 # WikiExtractor
TITLE, SECTION = re.compile(r"= [^=].* ="), re.compile(r"(= ){2,}[^=].*( =){2,}")           # WikiText
HUB = re.compile(r"(?!\.)([\w.-]+/[\w.-]+)(?:@([\w.~-]+))?(?:/([\w./-]+?))?/?")


# ------------------------------------------------------------------------------------------- sources -> files

class File(NamedTuple):
    source: str                     # where it was found
    name: str                       # what messages call it; its suffix says how to read it
    size: int                       # bytes
    fetch: Callable                 # () -> its path on this disk


def find_files(source, left_out):
    """The files of one source, in an order that depends on their names alone.  `left_out` counts, by suffix,
    what a directory has besides, and names what cannot be opened there."""
    path = Path(source)
    if source in ("docstrings", "-"):
        return [File(source, source, 0, lambda: source)]
    try:
        if path.is_dir():
            paths = files_below(path, left_out)
        elif path.exists():
            paths = [path]
        elif glob.has_magic(source):
            paths = [Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file()]
        elif HUB.fullmatch(source) and not (TEXT_NAME.search(source) or ARCHIVE_NAME.search(source)):
            return hub_files(source)
        else:
            raise UserError(f"{source}: no such file: give files, directories, a Hub data set, or the word docstrings")
        if not paths:
            raise UserError(f"{source}: no file to read in it{listed('; left out: ', left_out)}")
        return [File(source, str(p), p.stat().st_size, lambda p=p: p) for p in sorted(paths)]
    except OSError as e:
        raise UserError(f"{source} cannot be opened ({e.strerror or e}): give another, or the permission") from None


def files_below(top, left_out):
    """The texts in a directory and in those in it, linked ones once."""
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
            if what := other_than_text(str(path)) if path.is_file() else "a FIFO or a device":
                left_out[f"{path.suffix.lower() or 'without suffix'} ({what})"] += 1
            else:
                found.append(path)
    return found


def hidden(name):
    return any(part[0] == "." and part != ".." or part == "__MACOSX" for part in PurePosixPath(name).parts)


def other_than_text(name, start=None):
    """What is found in a directory, or in an archive where it begins so, if it is no text; else None.  What its name
    calls text is some: its faults are errors."""
    called = TEXT_NAME.search(name)
    if called and not called["json"] or start is None and ARCHIVE_NAME.search(name):
        return None
    if start is None:
        with rows.opening(name) as raw:
            start = rows.unpacked(name, raw)[0].peek()
    if called:
        return "JSON over many lines" if re.match(JSON_SETTINGS, start) else None
    if found := rows.no_text(start, name):
        return found[0]
    if re.match(PACKED, start):
        return "packed"
    if PurePosixPath(name).suffix and re.match(JSON, start) and not re.match(JSON_LINES, start):
        return "JSON"
    met = Counter()
    for line in start[:LINE].splitlines():
        rows.decode(line, met)
    return "no UTF-8" if spoilt(met) else None


def listed(before, left_out):
    """The twelve most frequent of what was left out, as words after `before`; "" if there is nothing."""
    words = [f"{n:,} {shown(name)}" for name, n in left_out.most_common(12)] + ["..."] * (len(left_out) > 12)
    return before * bool(words) + ", ".join(words)


def hub_files(source):
    """The parquet files of a data set on the Hub, of its training split where it has splits."""
    import huggingface_hub as hub  # comes with tokenizers
    import huggingface_hub.constants  # which it does not import by itself
    name, revision, folder = HUB.fullmatch(source).groups()
    revision = "refs/convert/parquet" if revision == "~parquet" else revision
    try:
        if hub.constants.HF_HUB_OFFLINE:
            local = Path(hub.snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
            commit = local.name
            sizes = {p.relative_to(local).as_posix(): p.stat().st_size for p in local.rglob("*.parquet")}
        else:
            info = hub.HfApi().dataset_info(name, revision=revision, files_metadata=True)
            commit, sizes = info.sha, {s.rfilename: s.size or 0 for s in info.siblings}
    except Exception as e:      # of many kinds: no network, no such data set, not allowed
        raise UserError(f"{source}: neither on this disk nor a data set that the Hub gives ({shown(e)})") from None
    inside = f"{folder}/" if folder else ""
    found = sorted(f for f in sizes if f.endswith(".parquet") and f.startswith(inside))
    found = [f for f in found if "train" in f.removeprefix(folder or "")] or found
    folders = sorted({f.split("/")[0] for f in found if "/" in f})
    if not found:
        raise UserError(f"{source}: no parquet file there")
    if not folder and len(folders) > 1:
        raise UserError(f"{source} has {len(folders)} folders: name one, as in {name}/{shown(folders[0])} (there "
                        f"are {', '.join(map(shown, folders[:8]))} ...)")
    for f in found:             # only a part is in the cache
        if (of := re.search(r"-of-(\d+)", f)) and len(found) < int(of[1]):
            raise UserError(f"{source}: {len(found)} of its {int(of[1])} files are there: download the rest first")

    def fetch(f):
        try:
            return hub.hf_hub_download(name, f, repo_type="dataset", revision=commit)
        except Exception as e:
            raise UserError(f"{name}/{shown(f)}: download failed ({shown(e)}): run the same command again, what has "
                            f"been downloaded is kept") from None
    return [File(source, f"{name}@{commit}/{f}", sizes[f], lambda f=f: fetch(f)) for f in found]


def check_space(files, out):
    """Refuses before the work what will not fit on the disk: about 4 bytes of text make one id of 2 bytes."""
    need = sum(f.size * EXPANDS.get(Path(f.name).suffix.lower(), 1) for f in files) // 2
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if need > (free := shutil.disk_usage(place).free):
        raise UserError(f"{out} will take about {need:,} bytes, {free:,} are free on its disk: make room, or give "
                        f"another --out")


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
                yield from pieces_of(file, path, met, field, rows_per_document, document_per)
            met["_read"] = before + file.size


def pieces_of(file, path, met, field, rows_per_document, document_per):
    """The Pieces of one file, or of standard input."""
    before, piped = met["_read"], file.name == "-"
    if piped and sys.stdin is None:
        raise UserError("-: standard input is closed")
    with contextlib.nullcontext(sys.stdin.buffer) if piped else rows.opening(path, file.name) as raw:
        for inner, stream, whole in texts_in(file.name, raw, None if piped else path, met):
            if whole and re.match(rows.PARQUET, stream.peek()):
                lines = row_lines(rows.Table(inner, "parquet", None, met, whole), field, rows_per_document, met)
            elif (name := TEXT_NAME.search(inner)) and name["json"] or re.match(JSON, stream.peek()):
                lines = row_lines(rows.Table(inner, "json", stream, met), field, rows_per_document, met)
            else:
                lines = paragraphs(stream, met, file.source)
            lines = watched(lines, inner, None if piped else raw, before, met)
            yield from pieces(shaped(lines, document_per), met)


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


def texts_in(name, raw, path, met):
    """(name, stream, path) of each text in a file.  path: None where it was packed, or is no file of its own."""
    stream, packed = rows.unpacked(name, raw)
    path, start = None if packed else path, stream.peek()
    rows.refuse(name, rows.no_text(start, name))
    if not path and re.match(rows.ZIP + b"|" + rows.PARQUET, start):
        raise UserError(f"{shown(name)} is a .zip or .parquet inside of something packed or a pipe: give it as a "
                        f"file of its own")
    if re.match(rows.TAR, start):
        with reading(name):
            archive = tarfile.open(fileobj=stream, mode="r|", tarinfo=Member)
        yield from members(name, ((m.name, m.isfile() and functools.partial(archive.extractfile, m))
                                  for m in archive if not m.isdir()), met)
    elif re.match(rows.ZIP, start):
        with reading(name):
            archive = zipfile.ZipFile(path)
        with archive:
            if {"[Content_Types].xml", "mimetype"} & set(archive.namelist()):
                raise UserError(f"{shown(name)} is an Office document or an EPUB, not text: {rows.TEXT_FIRST}")
            yield from members(name, ((m.filename, functools.partial(archive.open, m))
                                      for m in archive.infolist() if not m.is_dir()), met)
    elif path and not re.match(rows.PARQUET, start) and re.search(r"\.(gz|tgz|xz|bz2|zip|tar|parquet)$", name, re.I):
        raise UserError(f"{shown(name)} is damaged or not ours (it does not begin as its name says): get it again, "
                        f"or leave it out")
    else:
        yield name, stream, path


def members(name, inside, met):
    """The texts among (a member's name, what opens it or False); what is packed once more is none."""
    found = False
    while True:
        with reading(name):
            if (member := next(inside, None)) is None:
                break
            if hidden(member[0]):
                continue
            stream = member[1] and io.BufferedReader(rows.Full(name, member[1]()), LINE)
            start = stream and stream.peek()
        whole = f"{name}:{member[0]}"
        if not stream or re.match(PACKED, start) or other_than_text(whole, start):
            met["archived_files_left_out"] += 1
            continue
        rows.refuse(whole, rows.no_text(start, whole))
        found = True
        yield whole, stream, None
    if not found:
        raise UserError(f"{shown(name)}: no file to read in it: what is packed once more is to be unpacked first")


def spoilt(met):
    return met["_bad_lines"] > BAD * met["_lines"] and met["_bad_bytes"] >= BAD_BYTES


def watched(lines, name, raw, before, met):
    """The same lines; met["_read"] follows the position in the file on disk; what is no text is refused."""
    old = Counter(met)

    def check(least=0):
        new = Counter(met)
        new.subtract(old)
        if spoilt(new):
            raise UserError(f"{shown(name)}: {new['_bad_lines'] / new['_lines']:.0%} of its lines hold control "
                            f"characters or bytes that are no UTF-8: leave it out if it is no text, convert it first "
                            f"if it is another encoding, as in  iconv -f LATIN1 -t UTF-8")
        if new["bad_rows"] > BAD * max(new["_rows"], least) and new["bad_rows"] >= BAD_ROWS:
            raise UserError(f"{shown(name)}: {new['bad_rows'] / new['_rows']:.0%} of its rows are damaged or have "
                            f"no text in the --field: mend it, or leave it out")

    for i, line in enumerate(lines, 1):
        if raw and i % 256 == 0:
            met["_read"] = max(met["_read"], before + raw.tell())
        if i % 2 ** 16 == 0:
            check(1000)                                                 # rows: of fewer, the first may be the bad ones
        yield line
    check()


def paragraphs(stream, met, source=None):
    """The lines of a binary stream as stripped text; a long one in pieces, so that memory stays bounded.  Of a
    source of prose it is counted how many end as sentences do."""
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
            if piece := rows.decode(line, met).strip():
                yield piece
            continue
        text = rows.decode(line, met).strip()
        if text and source:
            met[f"_lines of {source}"] += 1
            met[f"_ended in {source}"] += text[-4:].rstrip(CLOSING)[-1:] in ENDS
        if text or not inside:                                       # the end of a long line is no blank line
            yield text
        inside = False
    if rest:
        yield rows.decode(rest, met).strip()


def row_lines(table, field, rows_per_document, met):
    """The lines of the texts in column `field`, none blank, and '' after so many rows."""
    if not table.names:                                                 # an empty file
        return
    if field not in table.names:
        raise UserError(f"{shown(table.name)}: no column {field!r}: give --field, one of {rows.quoted(table.names)}")
    texts = (values[0] for _, values, fault in table.pick([table.names.index(field)]) if not fault)
    for i, text in enumerate(texts, 1):
        yield from filter(None, paragraphs(io.BytesIO(text.encode()), met))
        if i % rows_per_document == 0:
            yield ""


def shaped(lines, document_per):
    """The same lines, documents parted by '' as the text's own shape or --document-per says."""
    start = list(itertools.islice(lines, SHAPE))
    lines, first = itertools.chain(start, lines), next(filter(None, start), "")
    if DOC.fullmatch(first):
        lines = ("" if DOC.fullmatch(line) else line for line in lines if line)
    elif TITLE.fullmatch(first) or any(map(SECTION.fullmatch, start)):
        lines = articles(lines)
    if document_per == "line":
        return (part for line in lines if line for part in (line, ""))
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
