"""The command line of every script: flags from a dataclass, a user's mistake as one line.  Read it last.

A script holds one dataclass, one field per line with its default and a trailing comment; `parse` turns each
field into a long flag whose help is that comment (`peak_lr: float = 1e-3  # ...` -> `--peak-lr`), a field of
type `list` into positional arguments.  Abbreviated and unknown flags are errors.

Whatever a user can get wrong is raised as `UserError`: what was wrong, where, and what to do about it.  `run`
prints it as one line on stderr and exits with status 2; any other exception is a bug and keeps its traceback.
"""
import argparse
import dataclasses
import inspect
import re
import signal
import sys
import types
import typing


class UserError(Exception):
    """A mistake in the input: one line that says what is wrong, where, and what to do."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        print(f"{self.prog}: error: {message} (see python {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def parse(cls, doc, argv=None):
    """An instance of the dataclass `cls` from the command line; `doc` (a module's docstring) heads --help."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # inspect, not dataclasses.field(metadata=...): the comment that a reader sees is the help that a user sees
    helps = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), re.M))
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        if isinstance(kind, types.UnionType):                           # `int | None` is read as an int
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        flag, text = "--" + field.name.replace("_", "-"), helps.get(field.name, "").replace("%", "%%")
        if field.default not in (None, dataclasses.MISSING):
            text += f" [{field.default}]"
        if typing.get_origin(kind) is list:
            parser.add_argument(field.name, nargs="+", metavar=field.name.upper(), help=text)
        elif kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            required = field.default is dataclasses.MISSING
            parser.add_argument(flag, type=kind, default=None if required else field.default, required=required,
                                metavar=kind.__name__.upper(), help=text)
    return cls(**vars(parser.parse_args(argv)))


def run(main, cls, doc):
    """main(config) as a program."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main(parse(cls, doc))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
