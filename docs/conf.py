"""Sphinx configuration: `make docs`."""

import fastopt

project = "fastopt"
author = "The fastopt authors"
project_copyright = author
version = release = fastopt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = f"fastopt {version}"
exclude_patterns = ["_build"]

default_role = "py:obj"  # `SGD` in a docstring is a link
autodoc_typehints = "none"  # the docstrings say it
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False

myst_enable_extensions = ["dollarmath", "substitution"]
myst_heading_anchors = 3


def _row(cls: type[fastopt.Optimizer]) -> str:
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    return f"| {{py:obj}}`{cls.__name__} <fastopt.{cls.__name__}>` | {summary} |"


# A new optimizer is on its page without a word here.
_optimizers = fastopt.Optimizer.registry
myst_substitutions = {
    "optimizer_table": "\n".join(["| | |", "|---|---|", *map(_row, _optimizers.values())]),
    "optimizer_classes": "\n\n".join(
        f"```{{eval-rst}}\n.. autoclass:: fastopt.{name}\n```" for name in _optimizers
    ),
}
