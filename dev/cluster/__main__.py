"""The command line: ``python -m dev.cluster COMMAND``, from the root of the repository."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dev.cluster import controlplane, prepare, state
from dev.cluster.lifecycle import Cluster
from dev.cluster.state import Paths
from dev.cluster.steps import ClusterError, Steps, UnsupportedError

NODES = 3
DNS_CACHE_SECONDS = 5


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m dev.cluster", description="A Kubernetes cluster on this machine.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start the cluster; quick when it is up already")
    up.add_argument("--nodes", type=int, default=NODES, help="worker nodes, default %(default)s")
    up.add_argument(
        "--dns-cache",
        type=int,
        default=DNS_CACHE_SECONDS,
        metavar="SECONDS",
        help="how long DNS answers are kept, default %(default)s; most real clusters have 30",
    )
    commands.add_parser("down", help="end the cluster and remove all of it")
    commands.add_parser("kubeconfig", help="print the path of the administrator's kubeconfig")
    load = commands.add_parser("load-image", help="give every node the images in docker archives")
    load.add_argument("archives", nargs="+", type=Path, metavar="FILE")
    commands.add_parser("build", help="build the binaries into the cache, start nothing")
    commands.add_parser("images", help="build the project's images, and load them into the cluster if one is up")
    commands.add_parser("status", help="say what runs")
    commands.add_parser("leftovers", help="list what is on this machine of the cluster; status 1 unless nothing is")
    kill = commands.add_parser("node-kill", help="lose a node as a power cut would")
    kill.add_argument("name")
    start = commands.add_parser("node-start", help="bring a lost node back")
    start.add_argument("name")
    kill = commands.add_parser("daemon-kill", help="lose a part of the control plane")
    kill.add_argument("name", choices=controlplane.ROLES)
    start = commands.add_parser("daemon-start", help="bring it back")
    start.add_argument("name", choices=controlplane.ROLES)
    return top


def execute(arguments: argparse.Namespace, paths: Paths, steps: Steps) -> int:
    if arguments.command == "kubeconfig":
        print(paths.kubeconfig)
        return 0
    prepare.check_machine()
    cluster = Cluster(paths, steps)
    if arguments.command == "status":
        print("\n".join(cluster.status()))
        return 0
    if arguments.command == "leftovers":
        found = cluster.leftovers()
        print("\n".join(found), end="\n" if found else "")
        return 1 if found else 0
    with state.lock():
        match arguments.command:
            case "up":
                prepare.build_binaries(paths, steps)
                cluster.up(arguments.nodes, dns_cache_seconds=arguments.dns_cache)
                steps.say(f"ready: export KUBECONFIG={paths.kubeconfig}")
            case "down":
                with steps("take the cluster down"):
                    cluster.down()
                steps.say("done")
            case "build":
                prepare.build_binaries(paths, steps)
            case "images":
                names = prepare.build_images(paths, steps)
                print("\n".join(names))
                if cluster.exists():
                    with steps("load the images into the nodes"):
                        cluster.load(names)
            case "load-image":
                with steps(f"load {', '.join(file.name for file in arguments.archives)} into the nodes"):
                    cluster.load_archives(arguments.archives)
            case "node-kill":
                cluster.kill_node(arguments.name)
            case "node-start":
                cluster.start_node(arguments.name)
            case "daemon-kill":
                cluster.kill_daemon(arguments.name)
            case "daemon-start":
                cluster.start_daemon(arguments.name)
    return 0


def main() -> int:
    steps = Steps()
    try:
        return execute(parser().parse_args(), state.paths(os.environ), steps)
    except ClusterError as error:
        print(f"dev.cluster: {error}", file=sys.stderr)
        return 2 if isinstance(error, UnsupportedError) else 1
    except KeyboardInterrupt:
        print("dev.cluster: interrupted; `python -m dev.cluster down` removes what was started", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
