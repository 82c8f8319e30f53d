"""The one HTTP client of engines and gateway, and the words that both sides of the wire use."""
