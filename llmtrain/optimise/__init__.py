"""Models in other forms: ONNX, quantised; measured where they were made."""
