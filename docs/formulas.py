"""The formulas of docstrings as TeX: there they are plain text, which `help` shows as it is."""

from __future__ import annotations

import itertools
import re

_GREEK = {"alpha", "beta", "gamma", "eta", "mu", "rho", "sigma"}
_SYMBOLS = {"eps": r"\varepsilon", "inf": r"\infty", "sum": r"\sum"}
_FUNCTIONS = {"abs", "clip", "log", "max", "mean", "min", "rms", "sign", "softmax", "sum"}
_OPERATORS = {symbol: symbol for symbol in ("=", "+=", "+", "-", "<", ">")} | {
    "*": r"\cdot",
    ".": r"\cdot",
    "+-": r"\pm",
    "<=": r"\le",
    ",": r",\;",
    ";": r";\;",
    ":": r":\;",
}
_BRACKETS = {"(": ")", "[": "]", "|": "|", "||": "||"}
_TOKEN = re.compile(r"[A-Za-z]\w*(?:'s\b)?|\d+(?:\.\d+)?|`.*?`|\|\||\+-|\+=|<=|\^T\b|\S")


def line_block(formulas: list[str]) -> list[str]:
    """Return lines of reStructuredText, which break where two spaces or more are."""
    parts = (re.split(r"\s{2,}", formula.strip()) for formula in formulas)
    return ["| " + " ".join(f":math:`{tex(part)}`" for part in line) for line in parts]


def tex(formula: str) -> str:
    return _terms(_TOKEN.findall(formula)[::-1])


def _terms(tokens: list[str], closing: str = "") -> str:
    """Take products and the operators between them, up to what closes them."""
    parts: list[str] = []
    changed = tokens[-1]
    while tokens and tokens[-1] != closing:
        if tokens[-1] not in _OPERATORS:
            changed = tokens[-1]
            parts.append(_product(tokens, closing))
        elif (operator := tokens.pop()) == "=" and changed in tokens:
            parts.append(r"\leftarrow")
        else:
            parts.append(_OPERATORS[operator])
    if closing:
        tokens.pop()
    return " ".join(parts)


def _product(tokens: list[str], closing: str) -> str:
    """Take factors; a slash divides all that is before it by the one behind it."""
    factors: list[str] = []
    while tokens and tokens[-1] not in (closing, *_OPERATORS):
        if tokens[-1] == "/":
            tokens.pop()
            above = _bare(*factors) if len(factors) == 1 else _joined(factors)
            factors = [rf"\frac{{{above}}}{{{_bare(_factor(tokens))}}}"]
        else:
            factors.append(_factor(tokens))
    return _joined(factors)


def _joined(factors: list[str]) -> str:
    """Words keep their distance."""
    groups = []
    for words, group in itertools.groupby(factors, key=lambda factor: factor.startswith(r"\text")):
        groups.append(" ".join(group))
        if words:
            groups[-1] = groups[-1].replace(r"} \text{", " ")
    return r"\ ".join(groups)


def _factor(tokens: list[str]) -> str:
    token = tokens.pop()
    if token in _BRACKETS:
        inner = _terms(tokens, _BRACKETS[token])
        left, right = ("\\|" if side == "||" else side for side in (token, _BRACKETS[token]))
        if "frac" in inner or token == "|":
            left, right = rf"\left{left}", rf"\right{right}"
        factor = f"{left} {inner} {right}"
    elif token == "sqrt":
        factor = rf"\sqrt{{{_bare(_factor(tokens))}}}"
    elif token in _FUNCTIONS and tokens[-1:] == ["("]:
        factor = f"{_name(token)} {_factor(tokens)}"
    elif token.endswith("_"):
        factor = f"{_name(token[:-1])}_{{{_bare(_factor(tokens))}}}"
    else:
        factor = _name(token)
    if tokens[-1:] == ["'"]:
        factor += tokens.pop()
    if tokens[-1:] == ["^"]:
        tokens.pop()
        factor += f"^{{{_bare(_factor(tokens))}}}"
    if tokens[-1:] == ["^T"]:
        tokens.pop()
        factor += r"^\top"
    return factor


def _bare(factor: str) -> str:
    """Return a factor without the brackets around the whole of it."""
    return re.sub(r"^(?:\\left)?\( (.*) (?:\\right)?\)$", r"\1", factor)


def _name(name: str) -> str:
    """Return a symbol, with a hat or an index, or a word."""
    name = name.strip("`")
    if not name[:1].isalpha():
        return name
    if hat := re.fullmatch(r"(\w+?)_?hat", name):
        return rf"\hat{{{_name(hat[1])}}}"
    if derivative := re.fullmatch(r"d([A-Za-z]|beta|gamma)", name):
        return f"d{_name(derivative[1])}"
    base, number, index = re.findall(r"^([^\W\d_]*)(\d*)_?(.*)", name)[0]
    symbol = rf"\{base}" if base in _GREEK else _SYMBOLS.get(base, base if len(base) < 2 else "")
    if symbol and not (number and len(index) > 1):
        below = number + (_name(index) if index else "")
        return f"{symbol}_{{{below}}}" if below else symbol
    if len(index) == 1:
        return rf"\text{{{base}}}_{index}"
    return rf"\text{{{name}}}"
