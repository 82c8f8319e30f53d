"""What ONNX Runtime computes from an exported directory, against transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtrain.errors import UnsupportedModel, UserError
from llmtrain.optimise import gptq
from llmtrain.optimise.onnx_export import export
from llmtrain.optimise.onnx_graph import packed
from llmtrain.serving import onnx_runtime
from tests.unit.optimise.conftest import settings

IDS = [int(number) for number in np.random.default_rng(0).integers(3, 250, 40)]
Exported = Callable[..., Path]


@pytest.fixture(scope="session")
def exported(sources, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A directory of a source and a form with settings, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def directory(source: str, option: str, *overrides: str) -> Path:
        key = (source, option, *overrides)
        if key not in made:
            target = tmp_path_factory.mktemp("made") / "form"
            target.mkdir()
            (target / "config.json").write_bytes((sources(source) / "config.json").read_bytes())
            export(sources(source), target, settings(option, *overrides), (tuple(IDS), tuple(IDS[::-1])), print)
            made[key] = target
        return made[key]

    return directory


def logprobs(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().log_softmax(-1).numpy()


def of_transformers(directory: Path, change: Callable[[torch.nn.Module], None] = lambda model: None) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    change(model)
    with torch.inference_mode():
        return logprobs(model(torch.tensor([IDS])).logits[0].numpy())


def of_onnx(directory: Path) -> np.ndarray:
    """The first 20 at once, the others one by one."""
    runtime = onnx_runtime.load(
        directory, providers=["CPUExecutionProvider"], threads=1, max_sequences=1, context_tokens=64
    )
    rows = [runtime.feed(0, IDS[:20], "all").copy()]
    rows += [runtime.step([0], [token]).copy() for token in IDS[20:]]
    return logprobs(np.concatenate(rows))


@pytest.mark.parametrize("source", ["tied", "untied", "llama"])
def test_fp32_computes_what_transformers_does(sources, exported: Exported, source: str):
    difference = np.abs(of_onnx(exported(source, "onnx_fp32")) - of_transformers(sources(source)))
    assert difference.max() < 1e-4


def rounded_in_place(body_bits: int, head_bits: int) -> Callable[[torch.nn.Module], None]:
    """Each matrix replaced by what its nearest integers give."""

    def change(model: torch.nn.Module) -> None:
        seen = set[int]()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                bits = body_bits if ".layers." in name else head_bits
                parameter.data = gptq.nearest(parameter.data, bits, 32).weights

    return change


@pytest.mark.parametrize("source", ["tied", "untied", "llama"])
@pytest.mark.parametrize(("option", "head_bits"), [("onnx_int8", 8), ("onnx_int4", 8), ("onnx_int4", 4)])
def test_integers_compute_what_the_weights_that_they_give_do(
    sources, exported: Exported, source: str, option: str, head_bits: int
):
    directory = exported(source, option, f"head_bits={head_bits}", "rounding=nearest", "products=fp32")
    expected = of_transformers(sources(source), rounded_in_place(int(option[-1]), head_bits))
    assert np.abs(of_onnx(directory) - expected).max() < 1e-4


def test_gptq_s_integers_are_the_ones_stored(sources, exported: Exported):
    def change(model: torch.nn.Module) -> None:
        gptq.quantise(model, [torch.tensor(IDS), torch.tensor(IDS[::-1])], 4, 32, print)
        model.model.embed_tokens.weight.data = gptq.nearest(model.model.embed_tokens.weight.data, 8, 32).weights

    directory = exported("tied", "onnx_int4", "products=fp32")
    assert np.abs(of_onnx(directory) - of_transformers(sources("tied"), change)).max() < 1e-4


def test_products_of_integers_are_near_those_of_fp32(exported: Exported):
    one, other = exported("tied", "onnx_int8"), exported("tied", "onnx_int8", "products=fp32")
    difference = np.abs(of_onnx(one) - of_onnx(other))
    assert 0 < difference.max() < 0.2


def test_the_embedding_of_a_tied_model_is_stored_once(exported: Exported):
    sizes = {
        source: (exported(source, "onnx_int8") / "model.onnx.data").stat().st_size for source in ("tied", "untied")
    }
    matrix = 512 * 64 * (1 + 5 / 32)  # integers, and 5 bytes of scale and zero a block
    assert abs(sizes["untied"] - sizes["tied"] - matrix) < 4096 * 3  # parts begin at whole pages


def test_batch_and_length_are_free(exported: Exported):
    model = onnx.load(exported("untied", "onnx_int4") / "model.onnx", load_external_data=False)
    shapes = {one.name: [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim]
              for one in model.graph.input}  # fmt: skip
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["past_key_values.0.key"][:3] == ["batch_size", 2, "past_sequence_length"]
    assert {node.op_type for node in model.graph.node} >= {"GroupQueryAttention", "MatMulNBits", "GatherBlockQuantized"}


def test_two_numbers_of_four_bits_are_a_byte():
    assert packed(np.array([[1, 2, 15, 0]], np.uint8), 4).tolist() == [[0x21, 0x0F]]
    assert packed(np.array([[7, 8, 9]], np.uint8), 4).tolist() == [[0x87, 0x09]]
    assert packed(np.array([[200]], np.uint8), 8).tolist() == [[200]]


def test_blocks_that_do_not_fit_are_refused_with_those_that_do(sources, tmp_path: Path):
    with pytest.raises(UserError, match=r"do not divide the model's width of 64: set optimise.block_size=64"):
        export(sources("tied"), tmp_path, settings("onnx_int8", "block_size=128"), (), print)


def test_an_architecture_that_the_builder_lacks_is_refused(sources, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for path in sources("tied").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["BloomForCausalLM"]}))
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(UnsupportedModel, match="serve it with PyTorch or vLLM"):
        export(source, target, settings("onnx_fp32"), (), print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
