"""What differs between two configs in terms of what they do: quantities derived from them, and pull requests."""
