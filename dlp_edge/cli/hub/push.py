"""`dlp-edge push BUNDLE HUB_ID`: publishes a bundle."""

from __future__ import annotations

import argparse

from dlp_edge.cli import options, output


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "push",
        help="publish a bundle on the hub, with a model card",
        description="Checks a bundle and uploads it to the Hugging Face hub with a model card. "
        "Needs the extra `hub`, and HF_TOKEN or a login of huggingface_hub.",
    )
    options.add_bundle(parser)
    parser.add_argument("repository", metavar="HUB_ID", help="user/bundle; made if there is none")
    parser.add_argument("--private", action="store_true", help="if it has to be made")
    parser.add_argument("--license", metavar="ID", help="for the model card: apache-2.0, ...")
    parser.add_argument("--base-model", metavar="HUB_ID", help="for the model card")
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from dlp_edge.hub.push import push_bundle

    url = push_bundle(
        arguments.bundle,
        arguments.repository,
        arguments.private,
        arguments.license,
        arguments.base_model,
    )
    if arguments.json:
        output.print_json({"repository": arguments.repository, "commit": url})
    else:
        print(url)
    return 0
