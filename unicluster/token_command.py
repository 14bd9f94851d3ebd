"""`unicluster token show|rotate`."""

import argparse

from unicluster.trust import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("show", "rotate"),
        help="show: print the join token. rotate: make a new one; machines must join again",
    )


def run(args: argparse.Namespace) -> int:
    store = Store()
    if args.action == "rotate":
        cluster = store.rotate()
        print(cluster.token)
        print(
            "The old token is void here. On every machine of the cluster: stop the agent, then\n"
            f"  unicluster join --replace --token {cluster.token}"
        )
        return 0
    print(store.require().token)
    return 0
