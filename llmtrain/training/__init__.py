"""From a checked config to a registered model: losses, modules, checkpoints, the run."""
