"""The environment in which a worker is started."""

import pytest

from node.worker.environment import SECRETS, TUNABLES, worker_environment


@pytest.mark.parametrize(
    ("stated", "used"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=3", "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        (
            "glibc.malloc.hugetlb=2:glibc.malloc.check=3",
            "glibc.malloc.hugetlb=2:glibc.malloc.check=3",
        ),
    ],
)
def test_large_pages_are_asked_for_unless_somebody_has_stated_otherwise(
    stated: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TUNABLES, raising=False)
    if stated is not None:
        monkeypatch.setenv(TUNABLES, stated)

    assert worker_environment({})[TUNABLES] == used


def test_stated_settings_take_precedence_over_those_of_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")

    made = worker_environment({"GOMP_SPINCOUNT": "7"})

    assert (made["OMP_WAIT_POLICY"], made["GOMP_SPINCOUNT"]) == ("active", "7")


def test_secrets_stay_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "secret")

    assert not SECRETS & worker_environment({}).keys()
