"""The documentation as a static site: `pip install -e ".[docs]" && sphinx-build -W -b html docs build/site`."""

import auglocal_ext

project = "auglocal_ext"
author = "The auglocal_ext authors"
release = auglocal_ext.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_title = f"auglocal_ext {release}"
html_show_copyright = False
exclude_patterns = ["pictures"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings tell what is taken, in words
napoleon_use_rtype = False
default_role = "code"
