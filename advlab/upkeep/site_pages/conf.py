"""Sphinx's settings of the site, which `advlab site` builds."""

import tomllib
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

from advlab import files
from advlab.classroom.page import formula
from advlab.upkeep import site

about = tomllib.loads((files.home() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
urls = about.get("urls", {})  # none before the repository is public: the pages do without

project = author = about["name"]
release = about["version"]
html_title = f"{project}: how neural networks are fooled and defended"
html_baseurl = urls.get("Documentation", "")
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = [f"{name}/README.md" for name in site.SOURCES]  # parts of pages
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4
html_math_renderer = "mathml"

# Single backticks, as in the docstrings, name what the package has; else they are code.
default_role = "py:obj"
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_use_unqualified_type_names = True

html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_context = {"default_mode": "auto"}  # dark where the reader's system is
html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = False  # it would be fetched, which a page opened from a disk may not
html_sidebars: dict[str, list[str]] = {
    name: [] for name in ("index", "notebooks/assignments/README")
}
html_theme_options: dict[str, Any] = {
    "logo": {"text": project},
    "header_links_before_dropdown": 7,
    "navigation_depth": 2,
    "show_toc_level": 2,
    "search_bar_text": "Search",
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": [],
    "footer_end": [],
}
if "Repository" in urls:
    html_theme_options["icon_links"] = [
        {"name": "Repository", "url": urls["Repository"], "icon": "fa-solid fa-code-branch"}
    ]


def _inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(formula(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.math_block) -> None:
    # What is wider than the page is scrolled, by keyboard too.
    drawn = formula(node.astext(), "block")
    writer.body.append(f'<div class="formula" tabindex="0">{drawn}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Draw formulas as MathML, which browsers know without a script."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
