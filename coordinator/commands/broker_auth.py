"""Who may come in to `unicluster broker`: loaded by amqtt, by its name."""

import hmac
from dataclasses import dataclass, field

from amqtt.plugins.base import BaseAuthPlugin
from amqtt.session import Session


class PasswordPlugin(BaseAuthPlugin):
    """One user, one password."""

    @dataclass
    class Config:
        """Given by `unicluster broker`."""

        user: str
        password: str = field(repr=False)

    async def authenticate(self, *, session: Session) -> bool:
        given = f"{session.username}:{session.password}".encode()
        wanted = f"{self.config.user}:{self.config.password}".encode()
        return hmac.compare_digest(given, wanted)
