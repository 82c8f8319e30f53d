#!/usr/bin/env python
"""python train.py [GROUP=OPTION] [KEY=VALUE] ...   Trains a model; `--help` lists the options."""

import sys

from llmtrain.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
