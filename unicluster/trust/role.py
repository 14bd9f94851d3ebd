"""Roles of a cluster's certificates."""

import logging
from enum import StrEnum

# Who joined, loaded, drained, or was refused.
audit = logging.getLogger("unicluster.audit")


class Role(StrEnum):
    """MEMBER: agents, coordinators, workers. CLIENT: chat and status. SCRAPER: metrics."""

    MEMBER = "member"
    CLIENT = "client"
    SCRAPER = "scraper"

    def authority_name(self, fingerprint: str) -> str:
        """Common name of this role's authority in the cluster of that fingerprint."""
        return f"unicluster {self} {fingerprint}"
