"""The limit of open files: each connection, also of a stranger who says nothing, takes one."""

import resource

# A stranger's address has 64 Ki ports from which it can connect to one of ours.
WANTED = 1 << 17


def raise_file_limit() -> int:
    """Raises this process's soft limit of open files towards WANTED; returns what it is then.

    Many systems give 1024 (macOS 256), which some hundred silent connections use up, and let a
    process have more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    # macOS refuses more than kern.maxfilesperproc, whatever the hard limit says.
    for limit in (wanted, 1 << 14, 10240, 4096):
        if soft != resource.RLIM_INFINITY and soft < limit <= wanted:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            except (OSError, ValueError):
                continue
            return limit
    return soft
