"""How a run says what it does: metrics.jsonl, the tracker, the progress line, the curves. No policy."""
