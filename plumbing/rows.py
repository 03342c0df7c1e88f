"""Bytes, lines and rows: the one reader behind prepare.py, fine-tuning, --probe and --predict.

bytes    gzip, xz and bzip2 are unpacked; what is cut or damaged, FIFOs, devices and what NO_TEXT names are refused
lines    end in LF or CRLF and hold 64 MB at most, in a corpus 128 MB; a BOM at the start is removed
rows     of CSV (commas, semicolons or tabs), TSV (no quotes), JSON lines or parquet, whose columns have names; a
         blank line, or a row with nothing in any column, is none
text     a string: NUL is removed, a lone surrogate becomes U+FFFD, both are counted.  All else makes a bad row
label    a string, a number, true or false, the same in every format: 1.0 is 1, True is true, NaN is nothing
"""
import bz2
import contextlib
import csv
import decimal
import gzip
import io
import itertools
import json
import lzma
import os
import re
from collections import Counter

from plumbing.cli import NUMBER, UserError, shown
from plumbing.files import parsing

LONGEST = 2 ** 26           # bytes of a line, characters of a field
JSON = rb'(\xef\xbb\xbf)?\s*\{\s*"'
LOOK = 100                  # rows of JSON in whose objects the names of the columns are looked for
CONTROL = bytes({*range(32), 127} - {*b"\t\n\v\f\r\x1b\x1c\x1d\x1e\x1f"})
BAD, BAD_BYTES = 0.05, 20   # share of bad lines above which a text is none, if there are so many bad bytes
KIND = re.compile(r"\.(tsv|csv|jsonl|ndjson|json|parquet)(\.(gz|xz|bz2))?$", re.I)
PACKED = ((rb"\x1f\x8b", gzip.open), (rb"\xfd7zXZ\0", lzma.open), (rb"BZh[1-9](1AY&SY|\x17rE8P)", bz2.open))
ZIP, PARQUET, TAR = rb"PK(\x03\x04|\x05\x06)", rb"PAR1", rb"(?s:.{257})ustar"
ARCHIVE, ENDS = b"|".join((ZIP, PARQUET, TAR)), r"\.(gz|tgz|xz|bz2|zip|tar|parquet)$"
TEXT_FIRST = "take the text out of it first, or leave it out"
NO_UTF8 = "binary or not UTF-8", "convert it first, as in  iconv -f LATIN1 -t UTF-8, or leave it out"
NO_TEXT = (                 # how it begins, what it is, what to do
    (ARCHIVE, "an archive, an Office document or parquet under another name", TEXT_FIRST),
    (rb"%PDF-", "a PDF", "convert it first, as pdftotext does, or leave it out"),
    (rb"\(\xb5/\xfd", "packed by Zstandard", "unpack it first, as in  zstd -dc FILE | python prepare.py -"),
    (rb"\xd0\xcf\x11\xe0|\{\\rtf", "an Office document", TEXT_FIRST),
    (rb"version https://git-lfs", "a Git LFS pointer", "fetch the file itself, as in  git lfs pull"),
    (rb"(\xef\xbb\xbf)?\s*<(?i:!doctype|html|\?xml|svg)", "HTML or XML", TEXT_FIRST),
    (rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff|(?s:(\0{1,3}[^\0]){4}|([^\0]\0{1,3}){4})",        # the last two without a BOM
     "UTF-16 or UTF-32", "convert it first, as in  iconv -f UTF-16 -t UTF-8"),
    (rb"(\xef\xbb\xbf)?\s*\[\s*\{", "one JSON array", "make it one object per line first, as in  jq -c '.[]'"),
    (rb"[^\n]*\r[^\n]*\Z", "text whose lines end in CR alone", r"convert them first, as in  tr '\r' '\n'"))
KINDS = {dict: "an object", bytes: "bytes", type(None): "nothing", bool: "no text", int: "a number", float: "a number"}
SURROGATE = re.compile("[\ud800-\udfff]")
csv.field_size_limit(LONGEST)


class NoText(UserError):
    """A file that holds no text that we can read: refused, or left out and counted where nobody named it."""

    def __init__(self, name, what, todo):
        super().__init__(f"{shown(name)} is {what}: {todo}")
        self.what = what


@contextlib.contextmanager
def reading(name):
    """Turns whatever a file's bytes bring about into one line.  As `parsing`, it wraps calls, never a generator."""
    try:
        with parsing(name):
            yield
    except OSError as e:
        why = shown(e.strerror or e)
        raise UserError(f"{shown(name)} cannot be read ({why}): mend that, or leave it out") from None


def opening(path):
    """The file, open for reading."""
    if os.path.exists(path) and not os.path.isfile(path):               # to open a FIFO may wait for ever
        raise UserError(f"{shown(path)} is a directory, a FIFO or a device: give a file")
    with reading(path):
        return open(path, "rb")


class Full(io.RawIOBase):
    """A stream whose reads are full ones, so that the first look shows as much of a pipe as of a file."""

    def __init__(self, name, stream):
        self.name, self.stream = name, stream

    def readable(self):
        return True

    def readinto(self, buffer):
        n = 0
        with reading(self.name):
            while n < len(buffer) and (part := self.stream.read(len(buffer) - n)):
                buffer[n:n + len(part)] = part
                n += len(part)
        return n


def unpacked(name, raw):
    """What is in the file, without its gzip, xz or bzip2, as a stream whose `peek` shows the first bytes."""
    stream = io.BufferedReader(Full(name, raw), 2 ** 20)
    unpack = next((unpack for begins, unpack in PACKED if re.match(begins, stream.peek())), None)
    if not (unpack or re.match(ARCHIVE, stream.peek())) and re.search(ENDS, str(name), re.I):
        raise UserError(f"{shown(name)} does not begin as its name says (damaged, or a Git LFS pointer): get it again, "
                        f"or leave it out")
    return io.BufferedReader(Full(name, unpack(stream)), 2 ** 20) if unpack else stream


def guarded(name, items):
    """The same items: what goes wrong in making one is the file's fault."""
    def following():
        with reading(name):
            return next(items, None)
    return iter(following, None)


def kind_of(name, start):
    """parquet or json by the first bytes, else csv, tsv or json by the end of the name, else None; or NoText."""
    if re.match(PARQUET, start):
        return "parquet"
    for begins, what, todo in NO_TEXT:
        if re.match(begins, start):
            raise NoText(name, what, todo)
    met = Counter()
    for line in start[:2 ** 16].splitlines():
        decode(line, met)
    if spoilt(met):
        raise NoText(name, *NO_UTF8)
    kind = (found := KIND.search(str(name))) and found[1].lower()
    return "json" if kind in ("jsonl", "ndjson") or re.match(JSON, start) else kind


def spoilt(met):
    return met["_bad_lines"] > BAD * met["_lines"] and met["_bad_bytes"] >= BAD_BYTES


def decode(line, met):
    """A line as text.  `met` counts what is damaged; what begins with _ is for us alone."""
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
        met["nul_lines"] += "\0" in text
    return text.replace("\0", "")


def lines_of(name, stream, met, strict=False, longest=1):
    """(number, text) of each line, of at most `longest` x LONGEST bytes; `strict` refuses what is no UTF-8."""
    longest *= LONGEST
    for number in itertools.count(1):
        if len(line := stream.readline(longest + 1)) > longest:
            raise UserError(f"{shown(name)}, line {number} is longer than {longest >> 20} MB: one row belongs there")
        if not line:
            return
        if number == 1 and line[:3] == b"\xef\xbb\xbf":
            met["boms"] += 1
            line = line[3:]
        text = decode(line, met)
        if strict and met["bad_utf8_lines"]:
            raise UserError(f"{shown(name)}, line {number}: not UTF-8: convert it, as in  iconv -f LATIN1 -t UTF-8")
        yield number, text


class Table:
    """The rows of a stream (parquet: of the open file `raw`), read once: `names` of its columns, in lower case, then
    `cells` or `pick`.  `met` counts what was met, bad rows too; `strict` refuses what is no UTF-8."""

    def __init__(self, name, kind, raw, stream, met, strict=False, header=True):
        self.name, self.kind, self.met, first = name, kind, met, []
        lines = lines_of(name, stream, met, strict)
        if kind == "parquet":
            try:
                import pyarrow.parquet
            except ImportError:
                raise UserError(f"{shown(name)}: parquet takes one more package: pip install pyarrow") from None
            with reading(name):
                self.file = pyarrow.parquet.ParquetFile(raw)
                self.keys, self.rows = self.file.schema_arrow.names, iter(())
        elif kind == "json":        # the names of most of the first objects: one may lack some, or be damaged
            self.rows = json_rows(lines)
            first = list(itertools.islice(self.rows, LOOK))
            objects = [row for _, row in first if row is not None]
            if first and not objects:
                raise NoText(name, "no JSON lines", "make it one object per line first, as in  jq -c .")
            count = Counter(key for row in objects for key in row)
            self.keys = [key for key, n in count.items() if 2 * n >= len(objects)]
        else:
            self.rows = csv_rows(name, lines) if kind == "csv" else (   # without quotes: GLUE's files have some in text
                (f"line {at}", text.split("\t") if (text := line.rstrip("\r\n")) else []) for at, line in lines)
            place, self.keys = next((row for row in self.rows if any(map(str.strip, row[1]))), ("", []))
            if not header:
                first, self.keys = [(place, self.keys)], [f"column {i + 1}" for i in range(len(self.keys))]
        self.rows = itertools.chain(first, self.rows)
        self.names = [key.strip().lower() for key in self.keys]
        if not self.names:
            raise NoText(name, "empty", "a header, such as sentence<tab>label, and examples belong there")
        if kind in ("csv", "tsv") and (numbers := [*filter(NUMBER.fullmatch, self.names)]):
            raise NoText(name, f"without a header (line 1 holds {numbers[-1]})", "names such as sentence<tab>label "
                         "belong above the examples")

    def positions(self, wanted, whose="--columns"):
        """Where the columns of these names are: each must be there, once."""
        if missing := [name for name in wanted if name not in self.names]:
            raise NoText(self.name, f"without the column {missing[0]!r} of {whose}", f"it has {quoted(self.names)}")
        if any(self.names.count(name) > 1 for name in wanted):
            raise UserError(f"{self.name}, line 1: two columns have one name: {quoted(self.names)}")
        return [self.names.index(name) for name in wanted]

    def cells(self, wanted):
        """(place, what stands in the columns at the positions `wanted`) of each row, or (place, what is wrong)."""
        keys, width = [self.keys[i] for i in wanted], len(self.keys)
        rows = self.rows
        if self.kind == "parquet":
            batches = guarded(self.name, (batch.to_pylist() for batch in self.file.iter_batches(256, columns=keys)))
            rows = ((f"row {at}", row) for at, row in enumerate(itertools.chain.from_iterable(batches), 1))
        for place, row in rows:
            if row is None:
                yield place, "is no JSON object"
            elif isinstance(row, dict):
                yield place, [row.get(key) for key in keys]
            elif any(map(str.strip, row)) or row and width == 1:        # else a blank one
                fits = len(row) >= width and not any(row[width:])       # with delimiters at the end, or without
                yield place, [row[i] for i in wanted] if fits else f"has {len(row)} fields, not {width}"

    def look(self, column):
        """What stands in the column at this position in the first LOOK rows, which are read again."""
        again, self.rows = itertools.tee(self.rows)
        found = [str(cells) for _, cells in itertools.islice(self.cells([column]), LOOK)]
        self.rows = again
        return found

    def pick(self, text, label=None):
        """(place, values, what is wrong or None) of each row: the texts at positions `text`, the label at `label`."""
        columns = [(i, text_of) for i in text] + [(label, label_of)] * (label is not None)
        for place, cells in self.cells([i for i, _ in columns]):
            values, fault = [], cells if isinstance(cells, str) else None
            for (i, read), cell in () if fault else zip(columns, cells, strict=True):
                try:
                    values.append(read(cell, self.met))
                except ValueError as e:
                    fault = f"has {e} in {self.names[i][:40]!r}"
                    break
            self.met["_rows"] += 1
            self.met["bad_rows"] += bool(fault)
            yield place, tuple(values), fault


@contextlib.contextmanager
def table(path, met, header=True):
    """The Table of labelled text in a file."""
    with opening(path) as raw:
        stream = unpacked(path, raw)
        if not (kind := kind_of(path, stream.peek())):
            raise UserError(f"{shown(path)}: one of .tsv, .csv, .jsonl, .ndjson, .json (each also .gz, .xz, .bz2) or "
                            f".parquet can be read, by the end of its name")
        yield Table(path, kind, raw, stream, met, strict=True, header=header)


def csv_rows(name, lines):
    """Fields are parted by , ; or tab: by what stands in the header most often."""
    start, header = next(((at, line) for at, line in lines if line.strip()), (1, ""))
    reader = csv.reader(itertools.chain([header], (line for _, line in lines)), strict=True,
                        delimiter=max(",;\t", key=header.count))
    try:
        for row in reader:
            yield f"line {start + reader.line_num - 1}", row
    except csv.Error as e:
        raise UserError(f"{shown(name)}, line {start + reader.line_num - 1}: no CSV ({e}): quotes in a field stand "
                        f"twice, and the field in quotes; a CR inside a line is one too") from None


def json_rows(lines):
    """Objects, or None for what is none."""
    for at, line in lines:
        if line := line.strip("\ufeff \t\r\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield f"line {at}", row if isinstance(row, dict) else None


def text_of(value, met):
    """The text in a cell; ValueError says, in words, what else is there."""
    if not isinstance(value, str):
        raise ValueError("nothing" if value != value else KINDS.get(type(value), f"a {type(value).__name__}"))
    value, n = SURROGATE.subn("\ufffd", value)
    met["lone_surrogates"] += n
    met["nul_lines"] += "\0" in value
    return value.replace("\0", "")


def label_of(value, met):
    """The label in a cell, as the same text from every format; ValueError says what else is there."""
    text = text_of(str(value) if isinstance(value, int | float | decimal.Decimal) else value, met).strip()
    if NUMBER.fullmatch(text) and (number := float(text)).is_integer() and abs(number) < 2 ** 53:
        return str(int(number))
    if text.lower() in ("", "nan"):
        raise ValueError("nothing")
    return text.lower() if text.lower() in ("true", "false") else text


def quoted(names):
    return ", ".join(repr(name[:40]) for name in names)
