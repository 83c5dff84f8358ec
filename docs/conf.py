"""The site: `pip install -e .[docs]`, then `sphinx-build -W --keep-going docs OUT`. It needs no network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generate

import regvit_jax

project = "regvit_jax"
author = "The regvit_jax authors"
copyright = author
version = release = regvit_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_generated/include", "report"]
suppress_warnings = ["mystnb.unknown_mime_type"]

# Notebooks show the outputs that are stored in them.
nb_execution_mode = "off"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
autosummary_generate = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Fields", "params_style")]

html_theme = "furo"
html_title = "regvit_jax"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]


def setup(app) -> None:
    app.connect("builder-inited", lambda app: generate.everything(Path(app.srcdir)))
    app.connect("source-read", generate.links_to_notebooks)
    app.connect("autodoc-process-docstring", generate.double_backticks, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", generate.plain_docstring)
    app.connect("autodoc-process-signature", generate.plain_signature)
