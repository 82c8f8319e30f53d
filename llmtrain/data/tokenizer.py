"""Tokenizers: trained here or published, loaded, and named by what they do."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmtrain.config.base import content_hash
from llmtrain.errors import DataError, TokenizerMismatch

# As in Qwen2 and Qwen3: contractions, words, single digits, punctuation with its newlines, white space.
PRE_TOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"
UNKNOWN_CHARACTER = "\N{REPLACEMENT CHARACTER}"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments ' }}
    {{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception("role '" + message.role + "' is none of system, user, assistant, tool") }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if message.content or not loop.first }}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments if call.function.arguments is string else call.function.arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
"""ChatML with tools, equal to Qwen3's template where nothing is thought and the last turn is the user's or a tool's.
Qwen3's own puts an empty thinking block before the last answer, this one does not; it leaves out what was thought
before the last question, this one keeps it. Tokenizers trained before there were tools keep the template they have."""

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def train_bpe(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Train a byte-level BPE and write it to `directory`, to be read by `load_tokenizer` or `AutoTokenizer`.

    Normaliser, pre-tokeniser and decoder are Qwen3's. `vocab_size` includes all 256 bytes and the special tokens, which
    come last; texts with too few different words give fewer entries. The same texts give the same bytes.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    byte_level: dict[str, Any] = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(**byte_level),
        ]
    )
    bpe.post_processor = processors.ByteLevel(**byte_level)
    bpe.decoder = decoders.ByteLevel(**byte_level)
    num_added = len(SPECIAL_TOKENS) + len(MARKUP_TOKENS)
    trainer = BpeTrainer(
        vocab_size=vocab_size - num_added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    bpe.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKUP_TOKENS])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)


def collect_characters(texts: Iterable[str], directory: Path) -> None:
    """Write a tokenizer of the characters (code points) of `texts` to `directory`, to be read by `load_tokenizer`.

    Ids follow the order of the code points; after them come the token of every other character, which is decoded as
    U+FFFD, and the end-of-text token. Nothing is normalised: text of known characters comes back as it was.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = sorted(set[str]().union(*texts))
    vocabulary = {character: index for index, character in enumerate(dict.fromkeys([*known, UNKNOWN_CHARACTER]))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_CHARACTER))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")  # `.` is no line end
    characters.decoder = decoders.Fuse()
    characters.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=UNKNOWN_CHARACTER,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)


def load_tokenizer(path_or_hub_id: str | Path, *, fetch: bool = True) -> Any:
    """The `PreTrainedTokenizerFast` of a directory or of the Hugging Face hub, without `fetch` of its cache only.

    Raises DataError where there is no such directory and no such repository can be reached, or a file is damaged, and
    TokenizerMismatch for a tokenizer that has no tokenizer.json or no end-of-text token.
    """
    from transformers import AutoTokenizer

    name = str(path_or_hub_id)
    directory = Path(name).expanduser()
    if directory.is_dir():
        if not (directory / "tokenizer.json").exists():
            raise DataError(
                f"{directory} has no tokenizer.json; name the directory of a published or trained tokenizer"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # the Rust library has no class of its own
            raise DataError(f"{directory} holds no tokenizer that loads: {error}; restore its files") from error
    elif isinstance(path_or_hub_id, Path) or not HUB_ID.fullmatch(name):
        raise DataError(f"no tokenizer at {directory.absolute()}: no such directory; correct model.tokenizer.path")
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=not fetch)
        except OSError as error:
            raise DataError(
                f"tokenizer '{name}': there is no such directory here, and the Hugging Face hub gave none either "
                f"({str(error).splitlines()[0]}); set model.tokenizer.path to a directory with tokenizer.json, or "
                f"check the network, HF_HUB_OFFLINE and HF_TOKEN"
            ) from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        lacks = "an end-of-text token" if tokenizer.is_fast else "a tokenizer.json"
        raise TokenizerMismatch(f"tokenizer '{name}' lacks {lacks}; choose another model.tokenizer.path")
    return tokenizer


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of all that decides ids and text: vocabulary, merges, normaliser, pre-tokeniser, decoder, added and special
    tokens, chat template. Where the tokenizer was loaded from does not matter.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    for state_of_a_call in ("truncation", "padding", "version"):
        del parts[state_of_a_call]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return content_hash({"tokenizer": parts, "special": special, "chat_template": tokenizer.chat_template})


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, nothing added.

    What looks like a special token in a text is text: documents and prompts have no control over the model.
    """
    return _encode(tokenizer, texts, split_special_tokens=True)


def encode_rendered_chats(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that a chat template wrote: its special tokens are special."""
    return _encode(tokenizer, texts, split_special_tokens=False)


def encode_with_offsets(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """As `encode_rendered_chats`, with the characters of its text, start to stop, that each token stands for."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def special_token_in(tokenizer: Any, text: str) -> str | None:
    """A special token that a text spells out: in a chat it would end the turn, or open another."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return next((token for token in special if token in text), None)


def decode_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids. Byte-level tokenizers give back the encoded text in the form their normaliser left it in."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _encode(tokenizer: Any, texts: Sequence[str], split_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=split_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids
