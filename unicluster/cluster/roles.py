"""Roles of a cluster's certificates, and the methods that each role may call.

A role is the authority that issued a certificate. It is read from the issuer's name, which TLS
has proven by then: a certificate verifies only against the authority that it names.
"""

from typing import Any

import grpc
from cryptography import x509
from cryptography.x509.oid import NameOID

from unicluster.cluster.handlers import Context, Handler, Interceptor, checked
from unicluster.trust.identity import machine_id
from unicluster.trust.role import Role, audit
from unicluster.v1 import chat_pb2, control_pb2, node_pb2, stage_pb2, weights_pb2

MEMBERS = frozenset({Role.MEMBER})
CLIENTS = frozenset({Role.MEMBER, Role.CLIENT})

# Metrics have a port of their own, over HTTPS: no gRPC method is for scrapers.
_BY_SERVICE = {
    node_pb2.DESCRIPTOR.services_by_name["Node"]: MEMBERS,
    weights_pb2.DESCRIPTOR.services_by_name["Weights"]: MEMBERS,
    stage_pb2.DESCRIPTOR.services_by_name["Stage"]: MEMBERS,
    chat_pb2.DESCRIPTOR.services_by_name["Head"]: MEMBERS,
    chat_pb2.DESCRIPTOR.services_by_name["Chat"]: CLIENTS,
    control_pb2.DESCRIPTOR.services_by_name["Control"]: MEMBERS,
}

WHO_MAY_CALL: dict[str, frozenset[Role]] = {
    f"/{service.full_name}/{method.name}": roles
    for service, roles in _BY_SERVICE.items()
    for method in service.methods
}


def roles_for(method: str) -> frozenset[Role]:
    """Roles that may call the gRPC method "/package.Service/Method"; members, if it is unknown."""
    return WHO_MAY_CALL.get(method, MEMBERS)


def role_of(context: Context) -> Role | None:
    """Role of the caller; None without certificates that name one, and only one.

    All that the caller shows must be of that role: whoever has a client token has the key of an
    authority, and can sign with it one that calls itself an authority of members. TLS libraries
    differ in whether they heed that an anchor may sign no authorities.
    """
    shown = context.auth_context()
    pems = [*shown.get("x509_pem_cert", []), *shown.get("x509_pem_cert_chain", [])]
    certificates = [each for pem in pems for each in x509.load_pem_x509_certificates(pem)]
    roles = {_role_of_issuer(certificate) for certificate in certificates}
    return roles.pop() if len(roles) == 1 else None


def caller_of(context: Context) -> tuple[str, str]:
    """Name and machine id of the caller: of its certificate, and of the key that it proved."""
    pems = list(context.auth_context().get("x509_pem_cert", []))
    if not pems:
        return "", ""
    certificate = x509.load_pem_x509_certificate(pems[0])
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else "", machine_id(certificate.public_key())


def _role_of_issuer(certificate: x509.Certificate) -> Role | None:
    for attribute in certificate.issuer.get_attributes_for_oid(NameOID.COMMON_NAME):
        _, role, *_ = [*str(attribute.value).split(" "), ""]
        if role in list(Role):
            return Role(role)
    return None


class RoleCheck(Interceptor):
    """Refuses calls that the caller's role does not allow, before anything is read of them."""

    def wrapped(self, handler: Handler, method: str) -> Handler:
        return _checked(handler, method, roles_for(method))


def _checked(handler: Handler, method: str, allowed: frozenset[Role]) -> Handler:
    """`handler`, which first looks at who calls."""

    async def check(request: Any, context: Context) -> None:
        role = role_of(context)
        if role in allowed:
            return
        audit.warning("refused %s to %s, whose role is %s", method, context.peer(), role)
        needed = " or ".join(sorted(allowed))
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED,
            f"{method} is for the role {needed}, and this certificate's role is {role or 'none'}",
        )

    return checked(handler, check)


def who_may_call() -> str:
    """The table of docs/security.md, in Markdown: each gRPC method, and the roles that may."""
    rows = [
        f"| `{method.removeprefix('/unicluster.v1.')}` | "
        + " | ".join("yes" if role in roles else "no" for role in Role)
        + " |"
        for method, roles in WHO_MAY_CALL.items()
    ]
    head = "| method | " + " | ".join(Role) + " |"
    return "\n".join([head, "|---" * (len(Role) + 1) + "|", *rows])
