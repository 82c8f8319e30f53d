"""ONNX Runtime's execution providers: those of the config that this machine has."""

from collections.abc import Callable, Sequence

import onnxruntime

from llmtrain.errors import UserError


def available(wanted: Sequence[str], say: Callable[[str], None]) -> tuple[str, ...]:
    """`wanted` without those that ONNX Runtime has not here; which are left and which are not is said.

    Raises UserError for a name that ONNX Runtime does not know.
    """
    known, here = onnxruntime.get_all_providers(), onnxruntime.get_available_providers()
    if unknown := sorted(set(wanted) - set(known)):
        raise UserError(f"optimise.providers: ONNX Runtime knows no {', '.join(unknown)}; it knows {', '.join(known)}")
    found = tuple(name for name in wanted if name in here)
    missing = [name for name in wanted if name not in here]
    left_out = f"; not here: {', '.join(missing)} (in the package onnxruntime-gpu)" if missing else ""
    say(f"ONNX Runtime computes with {', '.join(found)}{left_out}")
    return found
