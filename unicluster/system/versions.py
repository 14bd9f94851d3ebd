"""Versions of the libraries that compute: those installed here, and those unicluster is for."""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


def installed(package: str) -> str:
    """`mlx-lm 0.32.2`, or the name alone where its version is not known."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


def advice(package: str) -> str:
    """Where a library lacks something: `install mlx-lm>=0.32.2,<0.33`, if another one is here, or a
    later unicluster, if it is the right one.
    """
    try:
        here, wanted = version(package), _wanted(package)
    except PackageNotFoundError:
        here, wanted = "", SpecifierSet()
    if here and not wanted.contains(here, prereleases=True):
        named = ",".join(sorted(map(str, wanted), reverse=True))
        return f"install {package}{named} there"
    return f"it needs a later unicluster, with a later {package}"


def _wanted(package: str) -> SpecifierSet:
    """The versions in unicluster's own metadata."""
    named = map(Requirement, requires("unicluster") or ())
    return next((each.specifier for each in named if each.name == package), SpecifierSet())
