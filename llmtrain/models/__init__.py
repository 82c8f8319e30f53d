"""Networks: built from config, read and written as Hugging Face directories, and their log-probabilities."""
