"""The site: `make docs` builds it into site/, and fails at a warning, such as a link that leads nowhere."""

from typing import Any

from sphinx.application import Sphinx

import vitlit

project, author, release = "vitlit", "The vitlit authors", vitlit.__version__
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
html_theme, html_title = "furo", f"vitlit {release}"
html_show_sphinx = html_show_sourcelink = html_copy_source = False
default_role = "code"  # docstrings are Markdown
autodoc_member_order, autodoc_typehints, autoclass_content = "bysource", "signature", "class"
autodoc_default_options = {"exclude-members": "count, index"}  # of named tuples
napoleon_use_ivar = True
suppress_warnings = ["ref.python"]  # names that two classes share
PAGES = {"../benchmarks/README.md": "benchmarks.md", "../CONTRIBUTING.md": "contributing.md"}  # included here


def in_site(app: Sphinx, name: str, text: list[str]) -> None:
    """Let links to files of the repository that are pages of the site lead to these."""
    for path, page in PAGES.items():
        text[0] = text[0].replace(f"]({path}", f"]({page}")


def as_markdown(app: Sphinx, kind: str, name: str, what: Any, options: Any, lines: list[str]) -> None:
    """Let docstrings say *args, **options and |x|, which mean something else in reStructuredText."""
    lines[:] = [line.replace("*", r"\*").replace("|", r"\|") for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("source-read", in_site)
    app.connect("autodoc-process-docstring", as_markdown, priority=0)  # before napoleon's markup
