"""Versions and their lineage, on MLflow's model registry. It judges evidence and never computes any."""
