"""From files, directories, archives and standard input to documents: docs/data.md says what can be read.

How a file is read follows from its first bytes, its name comes second.  What is no text is refused where it was given
by name, else left out and counted, but for dot files and __MACOSX.  What is mended is counted in manifest.json: bytes
that are no UTF-8 and lone surrogates become U+FFFD, which BERT's normaliser drops; a BOM at the start and NUL are
removed; a line over 65,536 characters is cut at whitespace (the ids stay the same), a document over 262,144 at a line.
"""
import ast
import contextlib
import importlib.metadata
import inspect
import itertools
import os
import re
import sys
import sysconfig
import tarfile
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from plumbing import glue, rows
from plumbing.cli import UserError, shown
from plumbing.rows import NoText, reading

# Characters of a line at most: tokenizers takes some 150 bytes of memory for each
CUT = re.compile(r"\S.{0,65534}(?=\s|$)|\S.{0,65534}")
DOCUMENT = 2 ** 18         # characters after which a document is cut: whole books would be most of the memory
BAD, BAD_ROWS = 0.05, 10    # share of bad rows above which a file is refused, if there are so many
ENDS, CLOSING = (*".!?:…。！？：",), "\"')]}»”’*_`"                       # of a sentence


class File(NamedTuple):
    source: str                     # where it was found
    path: Path
    found: bool = False             # in a directory, not given by name

    def size(self):
        return self.path.stat().st_size if self.path.is_file() else 0


def find_files(source, met):
    """The files of one source, in an order that depends on their names alone.  `met` counts what is left out."""
    path = Path(source)
    if source in ("docstrings", "-"):
        return [File(source, path)]
    with reading(source):
        if path.is_dir():
            return [File(source, p, True) for p in sorted(files_below(path, met))]
        if path.exists():
            return [File(source, path)]
    raise UserError(f"{source}: no such file: give files, directories or the word docstrings; what is on the Hub comes "
                    f"by  hf download OWNER/NAME --repo-type dataset --local-dir DIRECTORY")


def files_below(top, met):
    """The files in a directory and in those in it."""
    def cannot(e):
        met[f"left out: {e.filename} ({e.strerror})"] += 1

    for folder, folders, names in os.walk(top, onerror=cannot):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        folders[:] = [name for name in folders if not hidden(name)]
        for path in (Path(folder, name) for name in (*names, *links) if not hidden(name)):
            if path.is_file():
                yield path
            else:
                met[f"left out: {path} (no file)"] += 1         # but a linked folder, a FIFO, a link to nowhere


def hidden(name):
    return any(part[0] == "." and part != ".." or part == "__MACOSX" for part in PurePosixPath(name).parts)


class Piece(NamedTuple):
    """A document, or a part of one that is too long."""
    text: str                       # one paragraph per line
    source: str
    begins: bool = True             # it does not go on with the document of the piece before


def read_documents(files, met, columns=None, document_per="blank-line"):
    """The documents of files, as Pieces.  `met` counts what was met; what begins with _ is for us alone."""
    def lines_of(name, raw, stream):
        if not (kind := rows.kind_of(name, stream.peek())):
            return prose(rows.lines_of(name, stream, met, longest=2), file.source, met, document_per == "line")
        table = rows.Table(name, kind, raw, stream, met)
        return row_lines(table, glue.text_columns(table, columns))

    for file in files:
        if file.source == "docstrings":
            yield from (Piece(text, file.source) for _, text in docstrings())
            continue
        before = met["_read"]
        with contextlib.nullcontext(sys.stdin.buffer) if file.source == "-" else rows.opening(file.path) as raw:
            for name, lines in texts_in(str(file.path), raw, met, lines_of, file.found):
                lines = watched(lines, name, met)
                for piece in pieces(filter(None, lines) if document_per == "file" else lines, file.source, met):
                    if met[f"_full {file.source}"]:                     # --at-most
                        break
                    met["_read"] = before + (raw.tell() if raw.seekable() else 0)
                    yield piece
        met["_read"] = before + file.size()


class Member(tarfile.TarInfo):
    """tarfile takes a header that is cut or damaged for the archive's end: here it is an error."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as e:
            raise tarfile.ReadError(str(e)) from None


def texts_in(name, raw, met, lines_of, found, inside=False):
    """(name, lines) of each text in a file, or in the archive that it is.  What is no text is refused, or counted where
    it was `found`; `inside` an archive no other one is opened."""
    archive = None
    try:
        if raw is None:
            raise NoText(name, "a link or a device", rows.TEXT_FIRST)
        stream = rows.unpacked(name, raw)
        start = stream.peek()
        if inside and re.match(rows.ARCHIVE, start):
            raise NoText(name, "an archive inside of another one", "unpack it first")
        with reading(name):
            if re.match(rows.TAR, start):
                archive = tarfile.open(fileobj=stream, mode="r|", tarinfo=Member)
                members = ((m.name, archive.extractfile(m) if m.isfile() else None) for m in archive if not m.isdir())
            elif re.match(rows.ZIP, start):
                archive = zipfile.ZipFile(raw)
                names = [name for name in archive.namelist() if name[-1] != "/"]
                members = zip(names, map(archive.open, names), strict=True)
                if {"[Content_Types].xml", "mimetype"} & set(names):
                    raise NoText(name, "an Office document or an EPUB", rows.TEXT_FIRST)
        if not archive:
            yield name, lines_of(name, raw, stream)
            return
    except NoText as e:
        if not found:
            raise
        met[f"left out: {PurePosixPath(name).suffix.lower() or 'without suffix'} ({e.what})"] += 1
        return
    for member, opened in rows.guarded(name, members):
        if not hidden(member):
            yield from texts_in(f"{name}:{member}", opened, met, lines_of, True, True)


def watched(lines, name, met):
    """The same lines; a file with too many bad lines or rows is refused at its end."""
    before = Counter(met)
    yield from lines
    new = Counter(met)
    new.subtract(before)
    if rows.spoilt(new):
        raise NoText(name, *rows.NO_UTF8)
    if new["bad_rows"] > BAD * new["_rows"] and new["bad_rows"] >= BAD_ROWS:
        raise UserError(f"{shown(name)}: {new['bad_rows'] / new['_rows']:.0%} of its rows are damaged or have no text "
                        f"in the column: mend it, or leave it out")


def prose(lines, source, met, apart):
    """The same lines, cut, with '' after each if they are to stand `apart`.  It is counted how many of the source's
    end as sentences do."""
    for _, line in lines:
        met[f"_lines of {source}"] += bool(line.strip())
        met[f"_ended in {source}"] += line.rstrip().rstrip(CLOSING)[-1:] in ENDS
        yield from (*cut(line, met), *[""] * apart)


def cut(line, met):
    """A line without the space around it, in pieces where it is too long."""
    line = line.strip()
    found = [piece[0] for piece in CUT.finditer(line)] or [""]
    met["long_lines"] += len(found) > 1
    return found


def row_lines(table, columns):
    """The lines of the texts in these columns, none blank, and '' after each row."""
    for _, values, fault in table.pick(columns):
        for line in filter(str.strip, "\n".join(values).split("\n") if not fault else ()):
            yield from cut(line, table.met)
        yield ""


def pieces(lines, source, met):
    piece, size, begins = [], 0, True
    for line in itertools.chain(lines, [""]):
        if line:
            piece.append(line)
            size += len(line)
        if piece and (not line or size >= DOCUMENT):
            yield Piece("\n".join(piece), source, begins)
            met["long_documents"] += begins and bool(line)
            piece, size, begins = [], 0, False
        begins = begins or not line


def docstrings():
    """(package, docstring) of the standard library and the packages that requirements.txt brings, sorted; read by
    `ast`, never imported."""
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
        nodes = [*ast.walk(ast.parse(path.read_bytes()))]
    except (SyntaxError, ValueError, OSError):                         # templates, and files of other Pythons
        return
    texts = [ast.get_docstring(n) for n in nodes
             if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    if path.parent.name == "pydoc_data":                                # one dict: topic -> text
        texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    for text in texts:
        lines = [line.strip() for line in inspect.cleandoc(text or "").splitlines() if line.strip()]
        if sum(map(len, lines)) >= 20:
            yield "\n".join(lines)


def required_packages():
    """The packages that requirements.txt names, with what they require in turn: no other installed one."""
    from packaging.requirements import Requirement  # comes with tokenizers, through huggingface_hub
    from packaging.utils import canonicalize_name
    text = (Path(__file__).parents[1] / "requirements.txt").read_text(encoding="utf-8")
    todo, found = re.findall(r"^\w[^#\n]*", text, re.M), set()
    while todo:
        need = Requirement(todo.pop())
        name = canonicalize_name(need.name)
        if name in found or need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        todo += importlib.metadata.requires(name) or []
        found.add(name)
    return found
