"""The API reference, from the docstrings; built with every warning as an error.

sphinx-build -W --keep-going -b html .ci/reference .ci/cache/reference
"""

from __future__ import annotations

from pathlib import Path
import sys


sys.path.insert(0, str(Path(__file__).parents[2]))

from optuna_quota import __version__


project = "optuna_quota"
author = "The optuna_quota authors"
release = version = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_show_copyright = False
add_module_names = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Attributes are described in the class and, where they are properties, once more by themselves.
napoleon_use_ivar = True
