r"""When are two final answers the same? Text from a language model, so anything: no eval, and bounded time.

    same("\\frac12", "0.5"), same("1,000", "1000"), same("10\\%", "10"), same("x=\\sqrt3", "\\sqrt{3}")

First as text in a normal form, then as numbers, then, if math-verify is installed, as expressions: in a
process of its own, which forks for every question, so that a hostile one only ends its fork.
"""
import importlib.util
import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from functools import lru_cache

LONGEST = 200                           # characters of an answer that is looked into; longer ones are texts
SECONDS = 0.6, 5.0                      # of an expression: of processor time, and in all
UNIT = re.compile(r"(?<=[\d}])(?:\\[,;! ]|[\s~])*(?:\\(?:text|mbox|mathrm)\{(?!\s*[ap]\.?m)[^{}\d]*\}"
                  r"(?:\^\{?[23]\}?)?|(?<=\d)\s+(?!and\b)(?:[a-zA-Z]{3,}|(?:[cmk]m|[mk]g|m[lL]|ft|in|oz|lb)"
                  r"\b)[a-zA-Z .]*)$")                          # 5\text{ cm}^2, 5 clips; not 5 xy, 3 pm
WORDS = re.compile(r"\\(?:text|mbox|mathrm|textbf|textit)\{([^{}]*)\}")
MIXED = re.compile(r"(?<![\d.])(\d+)\s+(\d+)/(\d+)$")
DROPPED = re.compile(r"\\(?:left|right|q?quad|displaystyle)(?![a-z])|(?<!\\)\\[!,;:\s$%]|[\s$~%]"
                     r"|\^\{?\\circ\}?|\\degree|^\\?[a-zA-Z]=|\.$")
SHORT = [(re.compile(r"\\[dtc]frac"), r"\\frac"), (re.compile(r"\\frac(\d)(\d)"), r"\\frac{\1}{\2}"),
         (re.compile(r"\\frac(\d)\{"), r"\\frac{\1}{"),
         (re.compile(r"\\frac\{([^{}]*)\}(\d)"), r"\\frac{\1}{\2}"),
         (re.compile(r"\\sqrt(\w)"), r"\\sqrt{\1}"), (re.compile(r"(?<![\d.])\.(?=\d)"), "0.")]
NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?"


def boxed(text):
    r"""What the last \boxed{...} of a text holds, or None."""
    at = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    m = re.compile(r"\\f?box(?:ed)?\s*(\{|[^\s{}])").match(text, max(at, 0)) if at >= 0 else None
    if m is None or m[1] != "{":
        return m and m[1]
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.S).finditer(text, m.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[m.end():brace.start()]
    return None


def normal(text):
    """An answer in a normal form: without spaces, units, signs of currency and percent."""
    if len(text) > LONGEST:
        return text
    out = WORDS.sub(r"\1", UNIT.sub("", text.strip().rstrip(". ")))
    out = re.sub(r"(?<=\d)\s+(?=\d)", ";", MIXED.sub(r"\1\\frac{\2}{\3}", out))         # 5 6 is not 56
    out = DROPPED.sub("", out)
    for pattern, new in SHORT:
        out = pattern.sub(new, out)
    return out


def number(text):
    """The Fraction that an answer in normal form is, or None."""
    if len(text) > LONGEST:
        return None
    if re.fullmatch(NUMBER, text, re.ASCII):
        return Fraction(text.replace(",", "").rstrip("."))
    m = (re.fullmatch(rf"(-?)()({NUMBER})/({NUMBER})", text, re.ASCII)
         or re.fullmatch(rf"(-?)(\d*)\\frac\{{({NUMBER})\}}\{{({NUMBER})\}}", text, re.ASCII))
    if m:
        sign, whole, a, b = m.groups()
        a, b = (Fraction(x.replace(",", "").rstrip(".")) for x in (a, b))
        return (int(whole or 0) + a / b) * (-1 if sign else 1) if b else None
    return None


def same(answer, gold, symbolic=True):
    """Whether an answer (or None) is the right one."""
    if answer is None:
        return False
    a, b = normal(answer), normal(gold)
    if a == b:
        return a != ""
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return x == y
    if not (symbolic and a and b and max(len(a), len(b)) <= LONGEST):
        return False
    opened, closed = (sum(map(a.count, x)) for x in ("([", ")]"))
    if "boxed" in a + b or a.count("{") != a.count("}") or opened != closed:
        return False                # in such texts math-verify may see an answer of its own
    lists = [re.fullmatch(r"(\(|\[|\\\{)[^()\[\]]*,[^()\[\]]*(\)|\]|\\\})", x) for x in (a, b)]
    if all(lists) and len({m.groups() for m in lists}) == 2:    # (1,2) is not {1,2}, [0,1) not (0,1)
        return False
    return bool(re.search(r"[\\^()\[\]{},+*/<>-]", a + b)) and expressions(a, b)


@lru_cache(1 << 16)
def expressions(a, b):
    """Whether math-verify says that two LaTeX expressions are equal; False where it is not installed."""
    server = _server()
    if server is None:
        return False
    try:
        server.stdin.write(json.dumps([a, b]) + "\n")
        server.stdin.flush()
        said = server.stdout.readline()
    except BrokenPipeError:
        said = ""
    if not said:
        from minipav.utils import Fail  # not above: that process loads no torch
        raise Fail("the process of math-verify is dead: does `python -c 'import math_verify'` work?")
    return said == "1\n"


@lru_cache(1)
def _server():
    if importlib.util.find_spec("math_verify") is None:
        return None
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True, stderr=subprocess.DEVNULL)


def serve():
    """Answer questions on stdin, a line each, in forks that live for SECONDS and have 2 GB: their ends are
    the default ones of the timers' signals."""
    import resource
    import signal

    from math_verify import LatexExtractionConfig, parse, verify
    how = dict(extraction_config=[LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    verify(parse("$(x+1)^2$"), parse("$x^2+2x+1$"))  # what it imports at first use, forks have then
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            for timer, seconds in zip((signal.ITIMER_PROF, signal.ITIMER_REAL), SECONDS):
                signal.setitimer(timer, seconds)
            resource.setrlimit(resource.RLIMIT_AS, (2 << 30,) * 2)
            equal = False
            try:
                a, b = (parse(f"${x}$", **how) for x in json.loads(line))
                equal = verify(b, a, timeout_seconds=None)
            finally:
                os._exit(0 if equal else 1)
        print(int(os.waitpid(pid, 0)[1] == 0), flush=True)


if __name__ == "__main__":
    serve()
