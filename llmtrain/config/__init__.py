"""Schemas, composition, preflight. Imports no ML library, so that `--help` and a typo answer at once."""
