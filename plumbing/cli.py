"""The command line of every script: flags from a dataclass, a user's mistake as one line.  Read it last.

A script holds one dataclass, one field per line with its default and a trailing comment; `parse` turns each field into
a long flag whose help is that comment (`peak_lr: float = 1e-3  # ...` -> `--peak-lr`), a field of type `list` into
positional arguments (at least one, unless it has a default).  Abbreviated and unknown flags are errors.

What a field allows stands in its annotation, and a dataclass that inherits from `Checked` cannot be made with
anything else, whether by a command line or in code:

    Literal["random", "teacher"]        one of these words
    Annotated[str, STRATEGIES]   one of these words, from elsewhere
    Annotated[float, "[0, 1)"]          a number in this interval: 0 is, 1 is not; infinity and NaN never are
    Annotated[str, float, "(0, 1)"]     several of them, separated by commas (`numbers` reads them)

Whatever a user can get wrong is raised as `UserError`: what was wrong, where, and what to do about it.  `run`
prints it as one line on stderr and exits with status 2; any other exception is a bug and keeps its traceback.
"""
import argparse
import dataclasses
import difflib
import errno
import functools
import inspect
import os
import re
import signal
import sys
import tempfile
import types
import typing
from pathlib import Path
from typing import Annotated, Literal

# Every interval ends where a number is absurd, so that none is found out by an allocation or an overflow
Count = Annotated[int, "[1, 1e15]"]             # a whole number may be written 1e6
Counts = Annotated[str, int, "[1, 1e15]"]
Times = Annotated[int, "[1, 1000]"]             # what is done again and again: seeds, epochs, processes
Positive = Annotated[float, "[1e-9, 1e5]"]
Positives = Annotated[str, float, "[1e-9, 1e5]"]
Natural = Annotated[int, "[0, 1e4]"]
NotNegative = Annotated[float, "[0, 1e5]"]
Share = Annotated[float, "[0, 1)"]
Fraction = Annotated[float, "[1e-9, 1)"]
Seed = Annotated[int, "[0, 1e18]"]
Length = Annotated[int, "[4, 8192]"]            # of a block: [CLS], [SEP] and two ids, of which one is masked
MANY = 64                                       # values in a list
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.I)   # no 1_0, no digits but these
# The signals that ask a process to end: a hang-up not under nohup, nor on Windows
ENDING = [s for s in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) if s and signal.getsignal(s) != signal.SIG_IGN]


class UserError(Exception):
    """A mistake in the input: one line that says what is wrong, where, and what to do."""


def shown(what, length=200):
    """A name out of a file or an archive, or an exception's words, as a terminal may see it: the first line,
    of at most `length` characters, with no escape and no control character in it."""
    return one_line((str(what).strip() or type(what).__name__).splitlines()[0], length)


def one_line(text, length):
    """The same of a whole text: its line ends are escaped too."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return line if len(line) <= length else line[:length - 4] + " ..."


class Checked:
    """A dataclass whose fields hold what their annotations allow; text is read as the number that belongs there."""

    def __post_init__(self):
        for field, kind in annotated(type(self)):
            value = getattr(self, field.name)
            if value != field.default:
                setattr(self, field.name, checked(flag_of(field.name), value, kind))


@functools.cache
def annotated(cls):
    """[(field, annotation)] of a dataclass; of `int | None` the annotation is int, since None is a default."""
    hints, found = typing.get_type_hints(cls, include_extras=True), []
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        found.append((field, kind))
    return found


def flag_of(name):
    return "--" + name.replace("_", "-")


def allowed(kind):
    """(type, whether several are, interval or words or None) of an annotation."""
    if typing.get_origin(kind) is Literal:
        return str, False, typing.get_args(kind)
    if typing.get_origin(kind) is Annotated:
        *how, of, limit = typing.get_args(kind)
        return of, bool(how), limit
    return kind, False, None


def checked(flag, value, kind):
    """The value, held against its annotation; of a list the text as it is."""
    of, several, limit = allowed(kind)
    if not (limit or of in (int, float)):
        for text in value if isinstance(value, list) else [value]:
            if not str(text).strip():
                raise UserError(f"{flag} is empty: say what belongs there, or leave it out")
            if any("\ud800" <= c <= "\udfff" for c in str(text)):
                raise UserError(f"{flag} {one_line(text, 100)}: is not UTF-8, or the locale is not (PYTHONUTF8=1)")
        return value
    try:
        found = numbers(value, of) if several else [read(value, of)]
        good = len(set(found)) == len(found) > 0 and all(inside(v, limit) for v in found)
    except ValueError:
        good = False
    if not good or len(found) > MANY:
        raise UserError(f"{flag} {one_line(value, 100)}: must be {wanted(of, several, limit)}"
                        + f", at most {MANY} of them" * good)
    return value if several else found[0]


def numbers(text, of=float):
    """The values of a list such as "1,2,4"; none of an empty text."""
    return [read(part, of) for part in str(text).split(",") if text]


def read(value, of):
    """A name, or a number as people write it: 12, 1e6, .5; nothing else that Python's int and float take."""
    text = str(value)
    if of is str:
        return text
    if not NUMBER.fullmatch(text) or text[0] == "-" and not float(text):                    # -0
        raise ValueError(text)
    if of is int and not text.isdigit():                                # 1e6; a float has 53 bits
        if not float(text).is_integer():
            raise ValueError(text)
        return int(float(text))
    return of(text)


def inside(value, limit):
    if not isinstance(limit, str):
        return limit is None or value in limit
    low, high = map(float, limit[1:-1].split(","))
    return low < value < high or limit[0] == "[" and value == low or limit[-1] == "]" and value == high


def wanted(of, several, limit):
    """What is allowed, in words."""
    if limit and not isinstance(limit, str):
        text = ("names out of " if several else "one of " if len(limit) > 1 else "") + ", ".join(limit)
    else:
        text = "a " * (not several) + "whole " * (of is int) + "number" + "s" * several
        if limit:
            (low, high), said = limit[1:-1].split(", "), {"[": "at least", "(": "above", "]": "at most", ")": "below"}
            text += f", {said[limit[0]]} {low} and {said[limit[-1]]} {high}"
    return text + ", separated by commas, none twice" * several


def writable(path, flag="--out"):
    """The Path, if it is a directory, or can be made one, in which files can be written.  It makes nothing."""
    path = Path(path)
    there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as e:
        raise UserError(f"{flag} {path}: no directory to write in: {there}: {e.strerror}") from None
    return path


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")


def parse(cls, doc, argv=None):
    """An instance of the dataclass `cls` from the command line; `doc` (a module's docstring) heads --help."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # inspect, not dataclasses.field(metadata=...): what a reader sees, comments and headings, is what a user sees
    helps, heading = {}, {}
    for base in (c for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)):
        title = ""
        for above, name, text in re.findall(r"^    (?:# (\w+)|(\w+):.*?  # (.*))$", inspect.getsource(base), re.M):
            title = above or title
            if name:
                helps[name], heading[name] = text, title
    groups = {title: parser.add_argument_group(title) if title else parser for title in heading.values()}
    flags, valued, words = {"--help"}, set(), []
    for field, kind in annotated(cls):
        of, several, _ = allowed(kind)
        flag, text = flag_of(field.name), helps.get(field.name, "").replace("%", "%%")
        group = groups.get(heading.get(field.name), parser)
        flags |= {flag, f"--no-{flag[2:]}"}
        if field.default not in (None, dataclasses.MISSING):
            text += f" [{field.default}]"
        if typing.get_origin(kind) is list:
            nargs = "+" if field.default_factory is dataclasses.MISSING else "*"
            group.add_argument(field.name, nargs=nargs, metavar=field.name.upper(), help=text)
        elif kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            group.add_argument(flag, default=field.default, required=field.default is dataclasses.MISSING,
                               metavar=of.__name__.upper() + ",..." * several, help=text)
            valued.add(flag)
    for word in sys.argv[1:] if argv is None else argv:
        flag = word.partition("=")[0]
        if words and words[-1] in valued and not word.startswith("--"):
            words[-1] += "=" + word                             # argparse takes a value such as -1e-3 for a flag
            continue
        if flag.startswith("--") and flag not in flags:         # it would first name another that is missing
            close = difflib.get_close_matches(flag, flags, 1)
            parser.error(f"unknown flag {flag}" + (f": is {close[0]} meant?" if close else ""))
        words.append(word)
    return cls(**vars(parser.parse_args(words)))


def run(main, cls, doc):
    """main(config) as a program."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:          # closed (>&-): the next file would get its number, and its output
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
            os.set_inheritable(getattr(sys, name).fileno(), True)
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for number in ENDING:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main(parse(cls, doc))
    except UserError as e:
        fail(e)
    except BrokenPipeError:     # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as e:        # a file or folder that may not be read or written, a full disk
        if e.filename is None and e.errno != errno.ENOSPC:
            raise
        fail(f"{e.filename or 'the disk'}: {e.strerror}")
    except (MemoryError, RuntimeError) as e:    # numpy's, and torch's on a CPU
        if not isinstance(e, MemoryError) and "can't allocate memory" not in str(e):
            raise
        fail(f"there is not enough memory for these sizes ({shown(e)}): give smaller ones")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message):
    print(f"error: {one_line(message, 4000)}", file=sys.stderr)
    sys.exit(2)
