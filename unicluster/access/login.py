"""`unicluster login`: keeps the access to a cluster's chat that a client token gives."""

from unicluster.access.token_input import CLIENT_VARIABLE, read_client_token
from unicluster.command_line import Command, Option
from unicluster.trust.role import audit
from unicluster.trust.store import Store


def run(token_file: str | None) -> int:
    store = Store()
    access = store.login(read_client_token(token_file))
    audit.info("logged in to cluster %s", access.fingerprint)
    print(
        f"Logged in to cluster {access.fingerprint}: `unicluster chat` and `unicluster status` "
        f"work now. The token is kept in {store.client_path}; deleting it logs out."
    )
    return 0


command = Command(
    run,
    sections={
        "Access": [
            Option(
                "--token-file",
                f"read the client token from this file (default: {CLIENT_VARIABLE} in the "
                "environment, else standard input)",
                metavar="FILE",
            ),
        ],
    },
    examples=[
        "unicluster login                           # asks for the token",
        "unicluster login --token-file client.txt",
    ],
)
