"""The site: ``make docs`` builds it, executing every code cell; a warning is an error."""

import os
import shutil
from importlib.metadata import version as installed
from pathlib import Path

project = "vitxr"
author = "the vitxr developers"
copyright = "2026, the vitxr developers"  # noqa: A001 (Sphinx's name)
release = version = installed("vitxr")

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_design",
]
templates_path = ["_templates"]
exclude_patterns = ["conf.py", "_build", "jupyter_execute"]
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "pydata_sphinx_theme"
html_title = "vitxr"
html_static_path = ["_static"]
html_css_files = ["vitxr.css"]
html_show_sourcelink = False
html_sidebars = {"index": [], "getting-started": []}
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove-warn"
# transformers asks for a widget that no page needs.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress"
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
# Each page in a folder of its own, which is deleted.
nb_execution_in_temp = True

autosummary_generate = True
autodoc_typehints = "none"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(xarray|numpy|scipy|torch|pathlib|dask|holoviews|matplotlib)\..*")
]

# Examples with cells are pages too; Sphinx reads none from outside its folder.
HERE = Path(__file__).parent
pages = HERE / "generated" / "examples"
shutil.rmtree(pages, ignore_errors=True)
pages.mkdir(parents=True)
for script in sorted((HERE.parent / "examples").glob("*.py")):
    if "# %% [markdown]" in script.read_text("utf-8"):
        shutil.copy(script, pages)
