"""`llmtrain models`: the registered models and where each came from."""

import argparse
import json
from pathlib import Path

from llmtrain.registry.registry import Registry
from llmtrain.registry.tree import tree


def main(argv: list[str]) -> int:
    """Print the tree of registered models, or with `--json` their records, oldest first. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="llmtrain models", description="Registered models and their lineage.")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="outputs_dir of the runs (%(default)s)")
    parser.add_argument("--json", action="store_true", help="the records, oldest first, as one JSON list")
    arguments = parser.parse_args(argv)
    versions = Registry(arguments.outputs).versions()
    if arguments.json:
        print(json.dumps([version.model_dump(mode="json") for version in versions], indent=2))
    elif versions:
        print(tree(versions))
    elif not arguments.outputs.is_dir():
        print(f"There is no directory {arguments.outputs}: no model was trained here; --outputs names another place.")
    else:
        print(f"No model is registered in {arguments.outputs}: a finished run registers its model.")
    return 0
