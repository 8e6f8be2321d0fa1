"""Finds every barrier and every bound of CUDA source text, and what each becomes when it is removed or shifted by one.

Read by tokens, in the layout that clang-format leaves: a comparison has blanks on both sides, a template's angle
brackets do not. Mutated is the code of functions; declarations, ``static_assert``, template arguments and the
preprocessor are not. What is met and left out is returned too, with the reason, so that nothing is passed over unseen.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

TOKEN = re.compile(
    r"(?P<number>(?:0[xX][\da-fA-F.]+(?:[pP][+-]?\d+)?|\.?\d[\d.]*(?:[eE][+-]?\d+)?)\w*)"
    r"|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<sign><<=|>>=|\+\+|--|->|::|&&|\|\||[-+*/%&|^=!<>]=|<<|>>|\S)"
)
# Not code: blanked before the text is read, so that positions stay.
NOT_CODE = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*', re.M | re.S
)

# What a comparison becomes: one bound looser and one tighter. "1 +" and "-1 +" shift whatever follows.
SHIFTS = {
    "<": ("<=", "< -1 +"),
    "<=": ("<", "<= 1 +"),
    ">": (">=", "> 1 +"),
    ">=": (">", ">= -1 +"),
    "==": ("== 1 +", "== -1 +"),
    "!=": ("!= 1 +", "!= -1 +"),
}
EQUAL_AT_THE_BOUND = ("<=", "<", ">=", ">")  # the first two of their kind differ only where both sides are equal
VOTES = ("__syncthreads_or", "__syncthreads_and", "__syncthreads_count")
FLOATING_TYPES = {"float", "double", "T", "compute_t"}
STOPS = {";", ",", "{", "}", "=", "+=", "-=", "*=", "/=", "&&", "||", "?", ":", "&", "|", "^", "return"}
OPENING, CLOSING = {"(": ")", "[": "]", "{": "}"}, {")", "]", "}"}


class Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Mutant:
    """One change of one file. ``line`` and ``becomes`` are the source line before and after, without indentation."""

    file: str
    function: str
    kind: str  # barrier, comparison, minmax, start, literal, size
    line: str
    becomes: str
    occurrence: int  # among equal changes of equal lines in the function, from 1
    line_number: int
    start: int
    end: int
    text: str  # stands in place of source[start:end]

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What names the mutant however the lines around it move."""
        return self.file, self.function, self.line, self.becomes, self.occurrence

    def apply(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line_number} {self.function}: {self.line}  →  {self.becomes}"


@dataclass(frozen=True)
class LeftOut:
    """A comparison or number that is no bound of the kernels' code, and why."""

    file: str
    line_number: int
    line: str
    sign: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line_number}: {self.sign}  ({self.reason})  {self.line}"


class Function(NamedTuple):
    name: str
    head: str  # from the end of what comes before to the opening brace
    first: int  # token after the opening brace
    last: int  # the closing brace


def blank(source: str) -> str:
    """The source with comments, strings and preprocessor lines as blanks."""
    return NOT_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), source)


class Source:
    """The tokens of a file and what they say about each other."""

    def __init__(self, file: str, source: str):
        self.file = file
        self.source = source
        self.code = blank(source)
        self.tokens = [Token(m.lastgroup, m[0], m.start(), m.end()) for m in TOKEN.finditer(self.code)]
        self.partner = self._match_brackets()
        self.comparisons = {i for i, token in enumerate(self.tokens) if self._is_comparison(i, token)}
        self.functions = self._find_functions()

    def _match_brackets(self) -> dict[int, int]:
        partner, opened = {}, []
        for i, token in enumerate(self.tokens):
            if token.text in OPENING:
                opened.append(i)
            elif token.text in CLOSING:
                if not opened or OPENING[self.tokens[opened[-1]].text] != token.text:
                    raise ValueError(f"{self.file}:{self.line_number(token.start)}: '{token.text}' closes nothing")
                partner[i] = opened.pop()
                partner[partner[i]] = i
        if opened:
            raise ValueError(f"{self.file}:{self.line_number(self.tokens[opened[-1]].start)}: never closed")
        return partner

    def _is_comparison(self, i: int, token: Token) -> bool:
        if token.text in ("<=", ">=", "==", "!="):
            return True
        if token.text not in "<>" or (i > 0 and self.tokens[i - 1].text == "template"):
            return False
        before, after = self.code[token.start - 1], self.code[token.end]
        if before.isspace() and after.isspace():
            return True
        # Without blanks it is one unless it is part of a list that could be template arguments.
        around = re.compile(r"<(?:[\w\s:,*]|&(?!&)|<[\w\s:,*<>]*>)*>")
        return not any(
            m.start() <= token.start < m.end() for m in around.finditer(self.code, max(0, token.start - 200))
        )

    def _find_functions(self) -> list[Function]:
        functions, i = [], 0
        while i < len(self.tokens):
            if self.tokens[i].text == "{":
                before = i - 1
                while self.tokens[before].text in ("const", "noexcept", "override"):
                    before -= 1
                if self.tokens[before].text == ")":
                    name = self.tokens[self.partner[before] - 1].text
                    head_start = max((t.end for t in self.tokens[:i] if t.text in (";", "}", "{")), default=0)
                    head = self.code[head_start : self.tokens[i].start]
                    functions.append(Function(name if name != "]" else "operator[]", head, i + 1, self.partner[i]))
                    i = self.partner[i]
            i += 1
        return functions

    def line_number(self, position: int) -> int:
        return self.source.count("\n", 0, position) + 1

    def line_span(self, position: int) -> tuple[int, int]:
        start = self.source.rfind("\n", 0, position) + 1
        end = self.source.find("\n", position)
        return start, len(self.source) if end < 0 else end

    def operand(self, i: int, step: int) -> list[Token]:
        """The operand of the operator at token ``i``, to its left (step -1) or right (step 1)."""
        tokens, at = [], i + step
        while 0 <= at < len(self.tokens):
            text = self.tokens[at].text
            opens, closes = (text in OPENING, text in CLOSING) if step > 0 else (text in CLOSING, text in OPENING)
            if closes or text in STOPS or at in self.comparisons:
                break
            until = self.partner[at] if opens else at
            tokens += self.tokens[min(at, until) : max(at, until) + 1][::step]
            at = until + step
        return tokens[::step]

    def is_floating(self, tokens: list[Token]) -> bool:
        """Whether an expression is of floating type, as far as its text and the declarations before it say."""
        if len(tokens) > 2 and tokens[0].text == "static_cast":
            return tokens[2].text in FLOATING_TYPES
        inside: list[
            bool
        ] = []  # of the open brackets, which are an index's or a call's: they say nothing of the result
        for i, token in enumerate(tokens):
            following = tokens[i + 1].text if i + 1 < len(tokens) else ""
            if token.text in OPENING:
                inside.append(
                    token.text == "[" or (i > 0 and (tokens[i - 1].kind == "name" or tokens[i - 1].text == ">"))
                )
            elif token.text in CLOSING:
                inside.pop()
            if any(inside):
                continue
            if token.kind == "number" and not re.match(r"0[xX]", token.text) and re.search(r"[.eEfF]", token.text):
                return True
            if token.kind == "name" and following != "::" and self._floating_name(token, following):
                return True
        return False

    def _floating_name(self, token: Token, following: str) -> bool:
        if token.text in FLOATING_TYPES:
            return following == "("
        if following == "(":  # a call: what it returns is not looked up
            return False
        member = token.start > 0 and self.code[token.start - 1] in ".>"
        ends = r"\s*[=;{]" if member else r"\s*(?:[=;,)({:]|\[)"
        declaration = re.compile(
            rf"\b([A-Za-z_]\w*)(?:<[^;{{}}()]*>)?[\s&*]+(?:const\s+)?\(?&?\s*\b{token.text}\b\)?(?={ends})"
        )
        declared = [
            found[1]
            for found in declaration.finditer(self.code, 0, len(self.code) if member else token.start)
            if found[1] not in ("return", "else", "case") and not (member and self.in_function(found.start()))
        ]
        return bool(declared) and declared[-1] in FLOATING_TYPES

    def in_function(self, position: int) -> bool:
        tokens = self.tokens
        return any(tokens[f.first - 1].start < position < tokens[f.last].end for f in self.functions)


def without_casts(tokens: list[Token]) -> str:
    text = "".join(token.text for token in tokens)
    return re.sub(r"^static_cast<[\w:]+>\((.*)\)$", r"\1", text)


class Finder:
    """Collects the mutants of one file."""

    def __init__(self, file: str, source: str, called_names: set[str] | None = None):
        self.source = Source(file, source)
        self.called_names = called_names
        self.mutants: list[Mutant] = []
        self.left_out: list[LeftOut] = []
        self.seen: Counter = Counter()

    def find(self) -> None:
        bodies: dict[int, Function] = {}
        for function in self.source.functions:
            for i in range(function.first, function.last):
                bodies[i] = function
        static_asserts = self._spans("static_assert")
        compile_time = self._spans("constexpr")  # if constexpr (…)
        for i, token in enumerate(self.source.tokens):
            function = bodies.get(i)
            if function is None:
                if i in self.source.comparisons:
                    self._leave(token, "not in a function")
            elif i in self.source.comparisons and i in static_asserts | compile_time:
                self._leave(token, "decided at compile time")
            elif not self._runs_in_kernels(function):
                if i in self.source.comparisons:
                    self._leave(token, f"{function.name} is host code that no kernel and no emulator module calls")
            else:
                self._mutate(i, token, function)

    def _spans(self, name: str) -> set[int]:
        """Tokens between the brackets that follow a name."""
        inside: set[int] = set()
        for i, token in enumerate(self.source.tokens[:-1]):
            if token.text == name and self.source.tokens[i + 1].text == "(":
                inside |= set(range(i + 1, self.source.partner[i + 1]))
        return inside

    def _runs_in_kernels(self, function: Function) -> bool:
        on_device = re.search(r"__global__|__device__|\bRNX_HD\b", function.head)
        return bool(on_device) or self.called_names is None or function.name in self.called_names

    def _mutate(self, i: int, token: Token, function: Function) -> None:
        if token.text in ("__syncthreads", "__syncwarp"):
            self._add("barrier", function, token.start, self._call_end(i), "")
        elif token.text in VOTES:
            arguments = self.source.code[token.end : self._call_end(i)]
            self._add("barrier", function, token.start, self._call_end(i), f"int({arguments} != 0)")
        elif i in self.source.comparisons:
            self._compare(i, token, function)
        elif token.text in ("min", "max") and self.source.tokens[i + 1].text == "(":
            self._minmax(i, function)
        elif token.text == "for":
            self._loop_start(i, function)
        elif token.text in ("+", "-"):
            self._literal(i, token, function)
        elif token.text == "RNX_SHARED":
            # (type, name, size): one element less.
            commas = [t.end for t in self.source.tokens[i : self.source.partner[i + 1]] if t.text == ","]
            self._add("size", function, commas[1], commas[1], " -1 +")

    def _compare(self, i: int, token: Token, function: Function) -> None:
        left, right = self.source.operand(i, -1), self.source.operand(i, 1)
        words = {t.text for t in left + right}
        if "sizeof" in words:
            return self._leave(token, "decided at compile time")
        if words & {"nullptr", "true", "false"}:
            return self._leave(token, "asks whether, not how far")
        if self.source.is_floating(left) or self.source.is_floating(right):
            return self._leave(token, "floating point: mathematics")
        if token.text == "!=" and [t.text for t in right] == ["0"]:
            return self._leave(token, "asks whether, not how far")
        if token.text in ("==", "!=") and re.search(r"\w ?:: ?k[A-Z]", " ".join(t.text for t in left + right)):
            return self._leave(token, "an enumerator")
        for shifted in SHIFTS[token.text]:
            if shifted in EQUAL_AT_THE_BOUND and self._chooses_between(i, left, right):
                self._leave(token, f"minimum or maximum: '{shifted}' is the same")
            else:
                self._add("comparison", function, token.start, token.end, shifted)

    def _chooses_between(self, i: int, left: list[Token], right: list[Token]) -> bool:
        """Whether ``a < b ? a : b``, in either order."""
        tokens = self.source.tokens
        question = tokens.index(right[-1], i) + 1
        if tokens[question].text != "?":
            return False
        first = self.source.operand(question, 1)
        colon = tokens.index(first[-1], question) + 1 if first else question
        if tokens[colon].text != ":":
            return False
        sides = {without_casts(left), without_casts(right)}
        return {without_casts(first), without_casts(self.source.operand(colon, 1))} == sides

    def _minmax(self, i: int, function: Function) -> None:
        tokens = self.source.tokens
        close = self.source.partner[i + 1]
        if self.source.is_floating(tokens[i + 2 : close]):
            return self._leave(tokens[i], "floating point: mathematics")
        start = tokens[i - 2].start if tokens[i - 1].text == "::" else tokens[i].start
        call = self.source.source[start : tokens[close].end]
        for shift in ("1", "-1"):
            self._add("minmax", function, start, tokens[close].end, f"({shift} + {call})")

    def _loop_start(self, i: int, function: Function) -> None:
        tokens = self.source.tokens
        close = self.source.partner[i + 1]
        at = i + 2
        while at < close and tokens[at].text not in (";", ":", "="):
            at += 1
        if tokens[at].text != "=" or tokens[i + 2].text in FLOATING_TYPES:
            return
        for shift in (" 1 +", " -1 +"):
            self._add("start", function, tokens[at].end, tokens[at].end, shift)

    def _literal(self, i: int, token: Token, function: Function) -> None:
        tokens = self.source.tokens
        number = tokens[i + 1]
        binary = tokens[i - 1].kind in ("name", "number") or tokens[i - 1].text in (")", "]")
        binary |= tokens[i - 1].text == ">" and i - 1 not in self.source.comparisons  # of a template
        if not binary or not re.fullmatch(r"\d+[uUlL]*", number.text) or tokens[i - 1].text == "return":
            return
        if self.source.is_floating(self.source.operand(i, -1)):
            return self._leave(token, "floating point: mathematics")
        if tokens[i + 2].text in ("*", "/", "%"):
            return self._leave(token, "a factor, not an offset")
        if any(
            token in self.source.operand(j, step) and self._outermost(token, j, step)
            for j in self.source.comparisons
            for step in (-1, 1)
            if abs(j - i) < 200
        ):
            return self._leave(token, "shifted with its comparison")
        digits = re.match(r"\d+", number.text)[0]
        for shifted in (int(digits) + 1, int(digits) - 1):
            self._add("literal", function, number.start, number.start + len(digits), str(shifted))

    def _outermost(self, token: Token, comparison: int, step: int) -> bool:
        """Whether a token of the comparison's operand is in no bracket of it."""
        depth = 0
        for other in self.source.operand(comparison, step):
            depth += (other.text in OPENING) - (other.text in CLOSING)
            if other == token:
                return depth == 0
        return False

    def _call_end(self, i: int) -> int:
        return self.source.tokens[self.source.partner[i + 1]].end

    def _add(self, kind: str, function: Function, start: int, end: int, text: str) -> None:
        code = self.source.code  # without comments: they may be reworded
        line_start, line_end = self.source.line_span(start)
        line_end = max(line_end, self.source.line_span(end)[1])
        line = " ".join(code[line_start:line_end].split())
        becomes = " ".join((code[line_start:start] + text + code[end:line_end]).split())
        self.seen[function.name, line, becomes] += 1
        self.mutants.append(
            Mutant(
                self.source.file, function.name, kind, line, becomes, self.seen[function.name, line, becomes],
                self.source.line_number(start), start, end, text,
            )
        )  # fmt: skip

    def _leave(self, token: Token, reason: str) -> None:
        start, end = self.source.line_span(token.start)
        line = " ".join(self.source.source[start:end].split())
        self.left_out.append(LeftOut(self.source.file, self.source.line_number(token.start), line, token.text, reason))


def find_mutants(file: str, source: str, called_names: set[str] | None = None) -> tuple[list[Mutant], list[LeftOut]]:
    """Every mutant of a file, and what was met and left out.

    ``called_names``: host functions with these names are mutated too (None: every host function); code for the device
    always is.
    """
    finder = Finder(file, source, called_names)
    finder.find()
    return finder.mutants, finder.left_out
