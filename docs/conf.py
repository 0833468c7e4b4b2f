"""Sphinx configuration: guide and API in one, the examples run at build."""

import sk_ebm

project = "sk_ebm"
author = "The sk_ebm developers"
release = version = sk_ebm.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]
nitpicky = False
html_theme = "furo"
html_show_copyright = False
html_title = f"sk_ebm {release}"

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

numpydoc_show_class_members = True
numpydoc_show_inherited_class_members = False
numpydoc_class_members_toctree = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"plot_",
    "parallel": 2,
    "abort_on_example_error": True,
    "download_all_examples": False,
    "min_reported_time": 0,
    "capture_repr": (),
}
