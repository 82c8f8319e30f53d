"""One optimizer step of a run, traced: the network, the loss and the optimizer of training on fake tensors."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.utils import clip_grad_norm_
from transformers import AttentionInterface, PreTrainedModel

from llmtrain.config.adapter import QLoRAAdapter
from llmtrain.config.hardware import MeasuredHardware
from llmtrain.config.infra import Infra
from llmtrain.config.root import TrainConfig
from llmtrain.config.trainer import DistillTrainer, DPOTrainer
from llmtrain.models import attention, logit_kernels
from llmtrain.models.head import chunks_of, loss_of_logits, loss_of_sums, loss_of_tokens
from llmtrain.models.packed import Packed
from llmtrain.plan.heap import Heap
from llmtrain.plan.trace import PARTS, Op, Part, Trace, Tracer
from llmtrain.plan.workload import Row

CUDA_ATTENTION = "llmtrain_planned"
DEEP, DEEP_ON_CPU = 4, 32
"""Blocks above which a network is traced in two shallow ones."""
_SIZES = (
    "weights", "gradients", "optimizer", "num_parameters", "num_trained", "hidden_by_layers", "attention_width",
    "linear_weights", "frozen_linear_weights",
)  # fmt: skip
"""What grows with the number of blocks."""


@dataclass(frozen=True)
class Recipe:
    """How training makes what a step needs; given by the caller, so that a plan runs what training runs."""

    network: Callable[[int | None], PreTrainedModel]
    """The starting network, in training or evaluation mode as training has it, without adapter; with so many blocks,
    where a number is given"""
    num_layers: int
    """Blocks that it really has"""
    attach: Callable[[PreTrainedModel], PreTrainedModel]
    """Puts the adapter in, if there is one"""
    prepare: Callable[[PreTrainedModel], None]
    """Recomputation of activations, block by block"""
    optimizer: Callable[[PreTrainedModel], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepTrace:
    """What the parts of a step do, on one rank that holds everything."""

    row: Row
    """The micro-batch that was traced"""
    setup: Trace
    first: Trace
    """A micro-batch that finds no gradients"""
    more: Trace
    """One that adds to gradients"""
    update: Trace
    """Clipping, the optimizer, and the release of the gradients"""
    weights: int
    """Bytes of weights and buffers"""
    gradients: int
    """Bytes of the gradients of what is trained"""
    optimizer: int
    """Bytes of the optimizer's state"""
    blocks: int
    """Bytes of the weights of the largest decoder block"""
    outside_blocks: int
    """Bytes of the weights outside the blocks"""
    num_parameters: int
    num_trained: int
    num_embedding: int
    """Parameters of embedding and output layer, tied ones once"""
    hidden_by_layers: int
    """Layers * width of the residual stream"""
    attention_width: int
    """Layers * query heads * head width: what attention's cost per pair of tokens is proportional to"""
    linear_weights: int
    """Parameters of all matrices that a token is multiplied with, the output layer excepted"""
    frozen_linear_weights: int
    """Those of them that are not trained: they need no gradient"""
    head_weights: int
    head_is_trained: bool
    shallow: "StepTrace | None" = None
    """The network of fewer blocks that was traced in this one's place, where one was"""

    def peak(self, num_micro_batches: int) -> dict[Part, int]:
        """Bytes alive, by part, at the fullest moment of a step of so many micro-batches."""
        traces = [self.first, self.update] + ([self.more] if num_micro_batches > 1 else [])
        return max((trace.peak for trace in traces), key=lambda parts: sum(parts.values()))

    def heap_peak(self, num_micro_batches: int) -> int:
        """Bytes that a CPU process with glibc's malloc takes for it, after a few steps."""
        if self.shallow is not None:
            fullest, shallow = (sum(step.peak(num_micro_batches).values()) for step in (self, self.shallow))
            return round(self.shallow.heap_peak(num_micro_batches) * fullest / shallow)
        simulated = Heap()
        simulated.replay(self.setup.events)
        lasting = {block for trace in (self.setup, self.first, self.update) for block, size in trace.events if size}
        lasting -= {block for trace in (self.first, self.more, self.update) for block, size in trace.events if not size}
        parts = [self.first, *[self.more] * min(2, num_micro_batches - 1), self.update]
        for step in range(3):
            for trace in parts:
                simulated.replay(_renamed(trace.events, step, lasting))
        return simulated.high_water


def _renamed(events: Iterable[tuple[int, int]], step: int, lasting: set[int]) -> Iterable[tuple[object, int]]:
    """The same in step number `step`; what lives on from step to step is allocated once."""
    for block, size in events:
        if block < 0:
            yield block, size
        elif block not in lasting:
            yield (block, step), size
        elif not step:
            yield block, size


def trace_step(config: TrainConfig, recipe: Recipe, row: Row) -> StepTrace:
    """Trace a step of `row` twice over, then the optimizer. Computes nothing and allocates nothing.

    Blocks are alike: in place of a deep network two shallow ones are traced, and what they differ by is counted for
    each further block, which is exact as long as a block is like the other. What a CPU's heap does with them is not.
    """
    if recipe.num_layers <= (DEEP if config.infra.accelerator == "cuda" else DEEP_ON_CPU):
        return _traced(config, recipe, row, None)
    low, high = (_traced(config, recipe, row, layers) for layers in (DEEP - 2, DEEP - 1))
    return _deeper(low, high, recipe.num_layers - (DEEP - 2))


def _deeper(low: StepTrace, high: StepTrace, blocks: int) -> StepTrace:
    """What a network does that has `blocks` more blocks than the one of `low`; `high` has one more."""

    def number(a: int, b: int) -> int:
        return a + (b - a) * blocks

    def trace(a: Trace, b: Trace, share: float) -> Trace:
        """Kernels over lists of tensors are different ones in each network: of `b`, they are counted more often."""
        ops: Counter[Op] = Counter()
        for op in a.ops.keys() | b.ops.keys():
            ops[op] = b.ops[op] * share if op.phase == "optimizer" else number(a.ops[op], b.ops[op])  # type: ignore[assignment]
        calls = Counter({phase: number(a.num_calls[phase], b.num_calls[phase]) for phase in b.num_calls})
        peaks = {
            phase: {part: number(a.peaks[phase][part], b.peaks[phase][part]) for part in PARTS} for phase in b.peaks
        }
        return Trace(ops=ops, num_calls=calls, peaks=peaks, events=b.events)

    sizes = {name: number(getattr(low, name), getattr(high, name)) for name in _SIZES}
    share = sizes["num_trained"] / high.num_trained
    parts = {
        name: trace(getattr(low, name), getattr(high, name), share) for name in ("setup", "first", "more", "update")
    }
    changes: dict[str, Any] = {**parts, **sizes, "shallow": high}
    return replace(high, **changes)


def _traced(config: TrainConfig, recipe: Recipe, row: Row, layers: int | None) -> StepTrace:
    with torch.device("meta"):
        model = recipe.network(layers)
        linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        blocks = _bytes_of_blocks(model)
        model = recipe.attach(model)
    with FakeTensorMode():
        _make_fake(model)
        vocab_rows = model.get_output_embeddings().weight
        recipe.prepare(model)
        on_cuda = config.infra.accelerator == "cuda"
        model.set_attn_implementation(CUDA_ATTENTION if on_cuda else attention.IMPLEMENTATION["segments"])
        adapted = {id(p): p for layer in _linear(model) for p in [layer.weight] if p is not vocab_rows}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = recipe.optimizer(model)
        tracer = Tracer(keeps_logits=not on_cuda)
        parts: list[Trace] = []

        def part_ends() -> None:
            parts.append(tracer.trace)
            tracer.trace = Trace()

        with tracer:
            for tensor in [*model.parameters(), *model.buffers()]:
                tracer.declare(tensor, "weights")
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # makes its state: from the second step on it is there all the time
            optimizer.zero_grad(set_to_none=True)
            states = [value for state in optimizer.state.values() for value in state.values()]
            for value in states:
                if isinstance(value, Tensor):
                    tracer.declare(value, "optimizer")
            part_ends()
            for _ in range(2):
                _micro_batch(config, model, row, tracer)
                for parameter in trained:
                    if parameter.grad is not None:
                        tracer.declare(parameter.grad, "gradients")
                part_ends()
            tracer.begin("optimizer")
            gradients = sum(_bytes(p.grad) for p in trained if p.grad is not None)
            clip_grad_norm_(trained, config.trainer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            part_ends()
        setup, first, more, update = parts
        text = model.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        embeddings = {id(w): w.numel() for w in (vocab_rows, model.get_input_embeddings().weight)}
        return StepTrace(
            row=row,
            setup=setup,
            first=first,
            more=more,
            update=update,
            weights=_weights_bytes(config, model, linear),
            gradients=gradients,
            optimizer=sum(_bytes(value) for value in states if isinstance(value, Tensor)),
            blocks=blocks,
            outside_blocks=sum(embeddings.values()) * 4,
            num_parameters=sum(p.numel() for p in model.parameters()),
            num_trained=sum(p.numel() for p in trained),
            num_embedding=sum(embeddings.values()),
            hidden_by_layers=text.num_hidden_layers * text.hidden_size,
            attention_width=text.num_hidden_layers * text.num_attention_heads * head_dim,
            linear_weights=sum(p.numel() for p in adapted.values()),
            frozen_linear_weights=sum(p.numel() for p in adapted.values() if not p.requires_grad),
            head_weights=vocab_rows.numel(),
            head_is_trained=vocab_rows.requires_grad,
        )


def _micro_batch(config: TrainConfig, model: PreTrainedModel, row: Row, tracer: Tracer) -> None:
    """Forward and backward pass of one micro-batch, as `llmtrain.training.module` does them."""
    owners = torch.zeros(row.num_targets, dtype=torch.int64)
    tokens, places = (torch.zeros(n, dtype=torch.int64) for n in (row.num_tokens, row.num_targets))
    targets = torch.zeros(row.num_targets, dtype=torch.int64)
    kernel = {} if config.infra.accelerator == "cuda" else _mask_arguments(row)
    bf16 = config.infra.precision == "bf16"
    weight = model.get_output_embeddings().weight
    tracer.begin("forward")
    with (
        logit_kernels.using(_loss_kernel(config.infra)),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
    ):
        states = model.base_model(
            input_ids=tokens[None], position_ids=tokens[None], use_cache=False, **kernel
        ).last_hidden_state
        hidden = states[0].index_select(0, places)
        del states
        tracer.begin("head")
        loss = _loss(config, hidden, weight, targets, owners, row)
        del hidden
    tracer.begin("backward")
    loss.backward(gradient=torch.tensor(1.0))  # type: ignore[no-untyped-call]
    del loss
    tracer.begin("setup")


def _loss_kernel(infra: Infra) -> logit_kernels.Kernel:
    """What `infra.loss_kernel` will mean: `auto` is Liger's where the device is this machine's and Liger is here."""
    here = isinstance(infra.hardware, MeasuredHardware) and logit_kernels.is_installed()
    by_auto = infra.loss_kernel == "auto" and infra.accelerator == "cuda" and here
    return "liger" if by_auto or infra.loss_kernel == "liger" else "torch"


def _loss(config: TrainConfig, hidden: Tensor, weight: Tensor, targets: Tensor, owners: Tensor, row: Row) -> Tensor:
    chunk = config.infra.loss_chunk_tokens
    match config.trainer:
        case DPOTrainer():
            group = 1 if config.trainer.loss == "kto" else 2
            chunks = chunks_of(row.owners, group, chunk)
            return loss_of_sums(hidden, weight, targets, owners, chunks, lambda sums, _: sums.sigmoid().sum(), chunk)
        case DistillTrainer():
            return loss_of_logits(hidden, weight, lambda logits, _: -logits.log_softmax(dim=-1).sum(), chunk)
        case _:
            return loss_of_tokens(hidden, weight, targets, 1 / max(1, row.num_targets), chunk)


def _mask_arguments(row: Row) -> dict[str, Any]:
    """What `attention.mask_arguments` gives for the row; its tensors fake."""
    borders = []
    start = root = 0
    for length, context in row.segments:
        root = root if context else start
        borders.append((start, start + length, root, root + context))
        start += length
    nothing = torch.zeros(0, dtype=torch.int64)
    with unset_fake_temporarily():
        segments = torch.tensor(borders, dtype=torch.int64).reshape(-1, 4)
        ids, empty = torch.zeros(row.num_tokens, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        packed = Packed(ids, ids, segments, empty, empty, empty, counts=[])
        arguments = attention.mask_arguments("segments", packed)
    return {
        name: nothing.new_zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def _planned_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: object
) -> tuple[Tensor, None]:
    """What FlexAttention keeps: queries, ungrouped keys and values, output and the logarithm of the sums."""
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return found.transpose(1, 2), None


AttentionInterface.register(CUDA_ATTENTION, _planned_attention)


def _make_fake(model: nn.Module) -> None:
    """Replace what stands on the meta device by fake tensors of a CPU; tied weights stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def _linear(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def _matrix(layer: nn.Module) -> Tensor:
    """A layer's own weight, adapted or not."""
    found = getattr(layer, "base_layer", layer).weight
    assert isinstance(found, Tensor)
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _bytes_of_blocks(model: PreTrainedModel) -> int:
    names = set(model._no_split_modules or ())
    sizes = [sum(map(_bytes, module.parameters())) for module in model.modules() if type(module).__name__ in names]
    return max(sizes, default=0)


def _weights_bytes(config: TrainConfig, model: PreTrainedModel, linear: list[str]) -> int:
    """Weights and buffers; under QLoRA frozen matrices take half a byte an entry and their blocks' scales."""
    found = {tensor.untyped_storage()._cdata: _bytes(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    total = sum(found.values())
    if isinstance(config.adapter, QLoRAAdapter):
        scale = (1 + 4 / 256) / 64 if config.adapter.double_quantization else 4 / 64
        output = model.get_output_embeddings()
        layers = [model.get_submodule(name) for name in linear]
        frozen = [_matrix(layer) for layer in layers if layer is not output]
        total -= sum(_bytes(w) - round(w.numel() * (0.5 + scale)) for w in frozen)
    return total
