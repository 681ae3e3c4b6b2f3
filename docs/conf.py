"""Sphinx's settings; `make docs` builds, and any warning fails the build."""

from importlib.metadata import version as _version

project = "ramblock"
copyright = "the ramblock authors"
version = release = _version("ramblock")

# MyST: ARCHITECTURE.md and its like are pages here too, without a second copy.
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"{project} {release}"

# The conformance kit draws examples with it; the reference needs none.
autodoc_mock_imports = ["hypothesis"]
# The signature already has the types; the field lists say what types cannot.
autodoc_typehints = "signature"
# A default is documented as written, not as the repr of its value.
autodoc_preserve_defaults = True
autodoc_default_options = {
    "members": True,
    # A public name without a docstring is still public; that it has one is the linter's business.
    "undoc-members": True,
    "show-inheritance": True,
}
# One parameter a line where a signature would not fit on one.
python_maximum_signature_line_length = 88
# Each section of the reference is one module, so its heading has already said which.
add_module_names = False
