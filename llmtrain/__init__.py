"""llmtrain: one composed config takes a language model from raw documents to a served endpoint."""

__version__ = "0.1.0"
