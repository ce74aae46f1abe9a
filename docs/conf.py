"""Sphinx configuration: `make docs`."""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

import fastopt

sys.path.insert(0, str(Path(__file__).parent))
import formulas

project = "fastopt"
author = "The fastopt authors"
project_copyright = author
version = release = fastopt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_math_renderer = "mathml"
add_function_parentheses = False
html_title = f"fastopt {version}"
exclude_patterns = ["_build"]
html_static_path = ["_static"]
html_css_files = ["tables.css"]

default_role = "py:obj"  # `SGD` in a docstring is a link
autodoc_typehints = "none"  # the docstrings say it
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_rtype = False

myst_enable_extensions = ["dollarmath", "substitution"]
myst_heading_anchors = 3


# What rules of more than one pass move of an element in float32, in bytes; Muon's time is that of
# its products.
_MOVED = {
    "Adafactor": "24",
    "LAMB": "40",
    "LARS": "20",
    "Muon": "",
    "Prodigy": "56",
    "StableAdamW": "36",
}


_PAPER = re.compile(r"(arXiv|doi):([\w./()-]+\w)|(https:[^\s;]+)")


def _linked(paper: re.Match[str], link: str) -> str:
    kind, number, url = paper.groups()
    host = {"arXiv": "https://arxiv.org/abs", "doi": "https://doi.org"}
    return link.format(paper[0], url or f"{host[kind]}/{number}")


def _drawn(name: str) -> Iterator[str]:
    """Links to the gallery's pictures that this optimizer has a part in, but for those of all."""
    here = Path(__file__).parent
    for title, script in re.findall(r"## (.+)\n`(\w+)\.py`", (here / "gallery.md").read_text()):
        text = (here.parent / "examples" / f"{script}.py").read_text()
        if f"fastopt.{name}(" in text and "fastopt.Optimizer" not in text:
            anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            yield f"[{script}](gallery.md#{anchor})"


def _row(cls: type[fastopt.Optimizer]) -> str:
    name = cls.__name__
    doc = inspect.getdoc(cls) or ""
    use = " ".join(doc.split("\n\n")[1].split())
    paper = _PAPER.search(doc, doc.index("References"))
    links = ", ".join([_linked(paper, "[paper]({1})") if paper else "", *_drawn(name)])
    rule = cls()._rule(cls().defaults)
    states, _, adds_up = fastopt._core.rules()[rule]
    moved = _MOVED.get(name, "" if adds_up else str(4 * (3 + 2 * len(states))))
    kept = [state for state in states if cls()._declared(state).shape == "like"]
    shown = ", ".join(f"`{state}`" for state in states)
    about = f"{{py:obj}}`{name} <fastopt.{name}>`: {links}<br>{use}"
    about += f" Keeps {shown}." if states else ""
    return f"| {about} | {4 * len(kept)} | {moved} |"


# A new optimizer is on its page without a word here.
_optimizers = fastopt.Optimizer.registry
_header = ["| | kept | moved |", "|---|---|---|"]
myst_substitutions = {
    "optimizer_table": "\n".join([*_header, *map(_row, _optimizers.values())]),
    "optimizer_classes": "\n\n".join(
        f"```{{eval-rst}}\n.. autoclass:: fastopt.{name}\n```" for name in _optimizers
    ),
    "optimizer_references": "\n\n".join(
        f"```{{eval-rst}}\n.. autofunction:: fastopt.reference.{rule.__name__}\n```"
        for rule in fastopt.reference.OPTIMIZERS.values()
    ),
}


def _mathml(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """MathML, which browsers draw themselves: no script, and nothing to load."""
    block = isinstance(node, nodes.math_block)
    tex = node.astext()
    try:
        if re.search(r"frac\s*\d", tex):
            raise MathError(r"\frac12 would be drawn as 12 over what follows; write \frac{1}{2}")
        formula = tex2mathml(tex, as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("%s: %s", error, tex, location=node)
        formula = translator.encode(tex)
    if block:
        formula = f'<div style="margin: 1rem 0; overflow: auto hidden">{formula}</div>'
    translator.body.append(formula)
    raise nodes.SkipNode


def _typeset(app: Sphinx, what: str, name: str, obj: object, *rest: Any) -> None:
    """Formulas, the blocks behind a ``::`` of its own line, as such, and papers as links."""
    lines = rest[-1]
    text = re.sub(
        r"^::\n\n((?: +.+\n)+)",
        lambda block: "\n".join(formulas.line_block(block[1].splitlines())) + "\n",
        "\n".join(lines),
        flags=re.M,
    )
    lines[:] = _PAPER.sub(lambda paper: _linked(paper, "`{0} <{1}>`__"), text).split("\n")


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _typeset)
    app.add_html_math_renderer("mathml", (_mathml, None), (_mathml, None))
