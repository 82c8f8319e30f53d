#!/usr/bin/env python
"""python serve.py version=NAME@VERSION [GROUP=OPTION] [KEY=VALUE] ...   Serves a model; `--help` lists the options."""

import sys

from llmtrain.cli.serve import main

if __name__ == "__main__":
    sys.exit(main())
