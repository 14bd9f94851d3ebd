"""The key that is a machine's identity: kept, held by one, and named in its certificate."""

import stat
from pathlib import Path

import pytest
from cryptography import x509

from unicluster.errors import InputError, TrustError
from unicluster.trust.cluster import Cluster
from unicluster.trust.identity import machine_id
from unicluster.trust.keyring import Keyring, Membership
from unicluster.trust.machine_key import held_machine_key


def id_of(name: str, folder: Path) -> str:
    with held_machine_key(name, folder) as held:
        return machine_id(held.key.public_key())


def test_a_machine_stays_who_it_is(tmp_path: Path) -> None:
    assert id_of("studio", tmp_path) == id_of("studio", tmp_path)
    assert id_of("studio", tmp_path) != id_of("mini", tmp_path)
    assert id_of("studio", tmp_path) != id_of("studio", tmp_path / "other")


def test_the_key_is_its_owners_alone(tmp_path: Path) -> None:
    id_of("studio", tmp_path)

    assert stat.S_IMODE((tmp_path / "machines/studio.key").stat().st_mode) == 0o600


def test_two_agents_can_not_be_one_machine(tmp_path: Path) -> None:
    with held_machine_key("studio", tmp_path) as held:
        held.serving_at("10.0.0.1:47600")
        with (
            pytest.raises(InputError, match=r"studio is already .* at 10.0.0.1:47600: choose"),
            held_machine_key("studio", tmp_path),
        ):
            pass
        assert id_of("mini", tmp_path)
    assert id_of("studio", tmp_path)


@pytest.mark.parametrize("damage", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\n"])
def test_a_damaged_key_is_named(tmp_path: Path, damage: bytes) -> None:
    id_of("studio", tmp_path)
    (tmp_path / "machines/studio.key").write_bytes(damage)

    with pytest.raises(TrustError, match=r"studio.key is damaged"):
        id_of("studio", tmp_path)


@pytest.mark.parametrize("name", ["", "../token", "a/b"])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError):
        id_of(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_certificate_names_the_machine_through_renewals(tmp_path: Path) -> None:
    with held_machine_key("studio", tmp_path) as held:
        keyring = Keyring.of_member(Membership(Cluster.new()), "studio", held.key)
        expected = machine_id(held.key.public_key())

    for _ in range(2):
        identity = keyring.current
        keyring._renew()
        certificate = x509.load_pem_x509_certificate(identity.cert_pem.encode())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        assert identity.machine == expected
        assert f"{expected}.node.unicluster" in names.value.get_values_for_type(x509.DNSName)
