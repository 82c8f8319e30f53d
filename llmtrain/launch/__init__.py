"""Frozen runs to job handles: local processes, Slurm, Ray, Kubernetes. Read `submit`, then one engine."""
