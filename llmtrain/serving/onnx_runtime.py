"""ONNX Runtime behind the four verbs: a model that onnxruntime-genai's builder made, in fp32 or quantised.

Keys and values stay in one place: what the graph reads as past and writes as present is the same memory. Its
GroupQueryAttention takes each row's length from the attention mask, so rows of different lengths go in one batch. They
lie in host memory, so a provider of an accelerator (not tried) would copy them in each run.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from llmtrain.errors import CheckpointMismatch, UnsupportedModel, UserError
from llmtrain.serving.runtime import Logits, Want
from llmtrain.serving.slots import Slots

FILE = "model.onnx"
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
Ints = NDArray[np.int64]
ELEMENTS: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
FED_TOKENS = 256
"""Most tokens fed at a time, which bounds the memory of logits."""
WANTED = "wanted_places"
"""An input that `load` adds to the graph: the places whose logits are computed."""


def load(
    directory: Path, *, providers: Sequence[str], threads: int, max_sequences: int, context_tokens: int
) -> "OnnxRuntime":
    """The `model.onnx` of a directory, with its `config.json`. `providers` as ONNX Runtime names them, best first.

    Raises CheckpointMismatch where there is none that loads, UnsupportedModel where the graph is of another form, and
    UserError for providers that are missing or a context that the model has not.
    """
    if missing := sorted(set(providers) - set(ort.get_available_providers())):
        raise UserError(
            f"ONNX Runtime has no {', '.join(missing)} here, only {', '.join(ort.get_available_providers())}: choose "
            f"among these, or install the package that has it (onnxruntime-gpu for CUDA and TensorRT)"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        config = json.loads((directory / "config.json").read_bytes())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
        session = ort.InferenceSession(_with_wanted_places(directory / FILE), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's own errors have no common base
        raise CheckpointMismatch(
            f"{directory} holds no {FILE} that loads: {error}; `llmtrain optimise` makes one"
        ) from error
    longest = config["max_position_embeddings"]
    if context_tokens > longest:
        raise UserError(
            f"a context of {context_tokens} tokens is asked for, and the model has {longest}: serve with at most that"
        )
    return OnnxRuntime(session, config, max_sequences=max_sequences, context_tokens=context_tokens)


class OnnxRuntime:
    """See `Runtime`. Logits of a step lie in memory that the next step writes again."""

    def __init__(self, session: Any, config: dict[str, Any], *, max_sequences: int, context_tokens: int) -> None:
        inputs = {one.name: one for one in session.get_inputs()}
        self._past = [name for name in inputs if PAST.fullmatch(name)]
        self._present = [name.replace("past_key_values", "present") for name in self._past]
        outputs = {one.name: one for one in session.get_outputs()}
        _check_form(inputs, outputs, self._past, self._present)
        self._with_positions = "position_ids" in inputs
        self._with_wanted = WANTED in inputs
        self._element = ELEMENTS[inputs[self._past[0]].type]
        self._logits_element = ELEMENTS[outputs["logits"].type]
        self.vocab_size: int = config["vocab_size"]
        self.context_tokens, self.max_sequences = context_tokens, max_sequences
        heads = config["num_key_value_heads"]
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]

        def allocate(rows: int, capacity: int) -> NDArray[Any]:
            return np.zeros((rows, heads, capacity, width), self._element)  # pages cost nothing before they are written

        self._slots = Slots(allocate, len(self._past), max_sequences=max_sequences, context_tokens=context_tokens)
        self._session, self._binding = session, session.io_binding()
        self._bound: tuple[int, int, int] | None = None
        self._stepped = np.empty((max_sequences, 1, self.vocab_size), self._logits_element)

    def feed(self, slot: int, ids: Sequence[int], want: Want) -> Logits:
        row = self._slots.row(slot, len(ids))
        start = int(self._slots.lengths[row])
        kept: list[NDArray[Any]] = []
        for begin in range(0, len(ids), FED_TOKENS):
            part = np.array([ids[begin : begin + FED_TOKENS]], np.int64)
            places = np.arange(start + begin, start + begin + part.shape[1])
            mask = np.ones((1, int(places[-1]) + 1), np.int64)
            wanted = np.arange(part.shape[1])[None if want == "all" or not self._with_wanted else -1 :]
            logits = np.empty((1, len(wanted), self.vocab_size), self._logits_element)
            self._run(row, part, mask, places[None], wanted, logits)
            kept = [*kept, logits[0]] if want == "all" else [logits[0, -1:]]
        self._slots.lengths[row] = start + len(ids)
        found: Logits = np.concatenate(kept).astype(np.float32, copy=False)
        return found[:0] if want == "none" else found

    def feed_each(self, parts: Sequence[tuple[int, Sequence[int], Want]]) -> list[Logits]:
        return [self.feed(*part) for part in parts]  # the graph has no rows of different lengths but in a step

    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Logits:
        rows = self._slots.front(slots)
        in_order = np.empty((len(rows), 1), np.int64)  # the graph sees the rows as they lie
        in_order[rows, 0] = ids
        lengths = self._slots.lengths[: len(rows), None].copy()
        mask = (np.arange(int(lengths.max()) + 1) <= lengths).astype(np.int64)
        logits = self._stepped[: len(rows)]
        self._run(0, in_order, mask, lengths, np.zeros(1, np.int64), logits)
        self._slots.lengths[rows] += 1
        found: Logits = logits[:, 0].astype(np.float32, copy=False)
        return found[rows] if (rows[1:] < rows[:-1]).any() else found

    def drop(self, slot: int) -> None:
        self._slots.drop(slot)

    def _run(self, row: int, ids: Ints, mask: Ints, places: Ints, wanted: Ints, logits: NDArray[Any]) -> None:
        """One run over the rows from `row` on: ids and places [rows, tokens], mask [rows, seen]; logits are filled."""
        binding = self._binding
        self._bind_rows(row, len(ids))
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        if self._with_positions:
            binding.bind_cpu_input("position_ids", places)
        if self._with_wanted:
            binding.bind_cpu_input(WANTED, wanted)
        binding.bind_output("logits", "cpu", 0, self._logits_element, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)

    def _bind_rows(self, row: int, num_rows: int) -> None:
        """Let past and present be these rows, where they lie; nothing to do where they are already."""
        wanted = (row, num_rows, self._slots.generation)
        if self._bound == wanted:
            return
        for past, present, array in zip(self._past, self._present, self._slots.arrays, strict=True):
            shape, place = (num_rows, *array.shape[1:]), array[row:].ctypes.data
            self._binding.bind_input(past, "cpu", 0, self._element, shape, place)
            self._binding.bind_output(present, "cpu", 0, self._element, shape, place)
        self._bound = wanted


def _with_wanted_places(path: Path) -> bytes:
    """The graph with the input `WANTED`, where its last product gives the logits; as it is where it does not.

    That product is a quarter of a small model's work, and all but one of a prompt's logits are for nothing.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    place, head = next(((at, node) for at, node in enumerate(graph.node) if "logits" in node.output), (0, None))
    if head is not None and head.op_type in ("MatMul", "MatMulNBits"):
        chosen = f"{head.input[0]}/{WANTED}"
        gather = onnx.helper.make_node("Gather", [head.input[0], WANTED], [chosen], name=WANTED, axis=1)
        head.input[0] = chosen
        graph.node.insert(place, gather)
        graph.input.append(onnx.helper.make_tensor_value_info(WANTED, onnx.TensorProto.INT64, ["num_wanted"]))
        logits = next(output for output in graph.output if output.name == "logits")
        logits.type.tensor_type.shape.dim[1].dim_param = "num_wanted"
    found: bytes = model.SerializeToString()
    return found


def _check_form(inputs: dict[str, Any], outputs: dict[str, Any], past: list[str], present: list[str]) -> None:
    """Raises UnsupportedModel where the graph is none of the builder's."""
    known = {"input_ids", "attention_mask", "position_ids", WANTED, *past}
    wrong = sorted(inputs.keys() - known) + sorted({"input_ids", "attention_mask"} - inputs.keys())
    wrong += sorted({"logits", *present} - outputs.keys()) + ([] if past else ["past_key_values"])
    wrong += [name for name in past if inputs[name].type not in ELEMENTS]
    if wrong:
        raise UnsupportedModel(
            f"{FILE} is not of the form that onnxruntime-genai's builder makes ({', '.join(wrong[:5])}): make it by "
            f"`llmtrain optimise`"
        )
