"""Flags of a script from the fields of a dataclass: one field, one flag, one line of help.

    @dataclass
    class Flags:
        steps: int = flag(400, "optimizer steps", low=1)
        widths: list = flag([1, 2, 4], "beam widths", low=1)

    flags = parse(Flags, __doc__)
"""
import argparse
import dataclasses
import math
from pathlib import Path

from minipav.utils import Fail


def flag(default, help, *, low=0, high=10**9, choices=None, kind=None):
    """A field that is a flag. Numbers, and those of a list, must lie in low..high; kind: its type, if not
    that of the default; a list takes several different values."""
    several = isinstance(default, list)
    meta = dict(help=help, low=low, high=high, choices=choices,
                kind=kind or type(default[0] if several else default))
    return dataclasses.field(**({"default_factory": default.copy} if several else {"default": default}),
                             metadata=meta)


class Words(str):
    """The kind of a flag that is neither a name nor a path: it may be long and have several lines."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Fail(f"{message[:200]}; --help lists all flags")


def named(kind):
    """Text that can be a name, or a path."""
    def convert(text):
        if not text.strip() or any(c in text for c in "\0\n") or max(len(x) for x in text.split("/")) > 200:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no name")
        return kind(text)
    return convert


def few(**counts):
    """Raises Fail if the product of these flags is more rows than memory holds."""
    if math.prod(counts.values()) > 10**8:
        raise Fail(" x ".join(f"--{k} {v}" for k, v in counts.items()) + f": are more than {10**8:,} samples")


def add(parser, cls, new):
    """new: defaults in the place of the fields' own."""
    group = parser.add_argument_group("flags" if cls.__name__ == "Flags" else f"flags of {cls.__name__}")
    for f in dataclasses.fields(cls):
        m, several = f.metadata, f.default is dataclasses.MISSING
        default = new.get(f.name, f.default_factory() if several else f.default)
        if m["kind"] is bool:
            group.add_argument(f"--{f.name}", action="store_true", default=default, help=m["help"])
            continue
        shown = " ".join(map(str, default)) if several else default
        kind = named(m["kind"]) if m["kind"] is not Words and issubclass(m["kind"], str | Path) else m["kind"]
        group.add_argument(f"--{f.name}", type=kind, default=default, choices=m["choices"],
                           nargs="+" if several else None,
                           metavar=None if m["choices"] else m["kind"].__name__.removeprefix("Posix").upper(),
                           help=(m["help"] + (f" ({shown})" if default not in (None, [])
                                              else "")).replace("%", "%%"))


def check(values):
    """Raises Fail if a number of these flags (a dataclass) is out of bounds, or a list has one twice."""
    for f in dataclasses.fields(values):
        value, m = getattr(values, f.name), f.metadata
        several = value if isinstance(value, list) else [value]
        for x in several:
            if isinstance(x, int | float) and not isinstance(x, bool) and not m["low"] <= x <= m["high"]:
                raise Fail(f"--{f.name} {x}: must lie between {m['low']} and {m['high']}")
        if len(set(several)) < len(several):
            raise Fail(f"--{f.name} {' '.join(map(str, several))}: a value stands there twice")
    return values


def parse(cls, doc, more=None, defaults=None):
    """Flags from the command line, checked. more(flags so far): a second dataclass with flags of its own (of
    the task, say); defaults(flags so far): other defaults. -> an instance of cls, or of both. Raises Fail for
    whatever is wrong with them."""
    first, p = Parser(add_help=False, allow_abbrev=False), Parser(
        description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add(first, cls, {})
    known, _ = first.parse_known_args()
    classes, new = [cls, more(known)] if more else [cls], defaults(known) if defaults else {}
    for c in classes:
        add(p, c, new)
    values = vars(p.parse_args())
    made = [check(c(**{f.name: values[f.name] for f in dataclasses.fields(c)})) for c in classes]
    return made if more else made[0]
