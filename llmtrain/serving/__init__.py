"""Engines: vLLM as a child process, and LitServe with a runtime of PyTorch or of ONNX Runtime."""
