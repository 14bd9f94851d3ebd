"""The private part of transformers that chat templates are rendered with.

Its public function rebuilds the messages before a template sees them, so that no reading of them
could be noticed. Contract tests: tests/unit/test_templates.py; pyproject.toml has the versions that
passed.
"""

from jinja2 import Template
from transformers.utils.chat_template_utils import _compile_jinja_template


def compiled(template: str) -> Template:
    """A chat template in transformers' sandbox, with its filters and functions.

    Raises jinja2.TemplateError for what is none.
    """
    made: Template = _compile_jinja_template(template)
    return made
