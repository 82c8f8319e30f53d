"""report.html of a run: what was trained, how well, and from what, in one file made from the run's others."""
