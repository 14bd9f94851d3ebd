"""All that is relied on of huggingface_hub beyond its documented interface.

A contract test for each piece: tests/unit/test_hub_compat.py.
"""

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name

# The base error of the HTTP library that huggingface_hub uses, for connections that fail. Which
# library that is has changed between its versions.
HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]


def repository_folder(repo: str) -> str:
    """The folder of a model's repository in the Hugging Face cache, by its name."""
    return repo_folder_name(repo_id=repo, repo_type="model")
