"""Text to tokens and back, and the chat template, of a checkpoint."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer
from tokenizers.pre_tokenizers import Sequence as Steps

from ..errors import InputError, ModelError
from .weights import Checkpoint

SEPARATORS = frozenset(".,?!;: \t\n")
"""SepLLM's (arXiv 2412.12094): a token made of these alone is a separator."""

_CONTROL = 3  # of GGUF's token types


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


class TextTokenizer:
    """Attributes:
    ends: tokens that end an answer.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str | None, special: Mapping[str, str], ends: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._special = dict(special)
        self.ends = frozenset(ends)
        self._controls = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Special tokens in the text are taken as such."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens))

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """A conversation up to where the assistant answers.

        Raises:
            ModelError: the model has no chat template, or a bad one.
            InputError: a message holds a special token, which could end its turn and speak for another role.
        """
        for message in messages:
            found = next((token for token in self._controls if token in message["content"]), None)
            if found is not None:
                raise InputError(f"a message may not hold {found!r}, which means something to the model; leave it out")
        if self._template is None:
            raise ModelError("this model has no chat template; it is no instruction model")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            text = environment.from_string(self._template).render(
                messages=list(messages), add_generation_prompt=True, **self._special
            )
        except _RefusedError as error:
            raise InputError(f"the model's chat template refuses this conversation: {error}") from error
        except TemplateError as error:
            raise ModelError(f"the model's chat template fails: {error}") from error
        return self.encode(text)

    @functools.cached_property
    def separators(self) -> torch.Tensor:
        """(vocabulary,) bool: which tokens are separators."""
        texts = (self.decode([token]) for token in range(len(self)))
        return torch.tensor([bool(text) and SEPARATORS.issuperset(text) for text in texts])


class TextStream:
    """Text of tokens that come one by one; a character of several tokens waits for its last.

    Args:
        decode: tokens to text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []  # since the last whole character
        self._known = ""  # of them

    def push(self, token: int) -> str:
        """What is new and whole."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._known) :]
        self._tokens, self._known = [token], self._decode([token])
        return new

    def rest(self) -> str:
        """What never became whole."""
        return self._decode(self._tokens)[len(self._known) :]


class _RefusedError(TemplateError):
    """By the template itself, such as of roles that do not alternate."""


def _refuse(message: str) -> None:
    raise _RefusedError(message)


def tokenizer_of(checkpoint: Checkpoint) -> TextTokenizer:
    """Raises ModelError: there is none, or one of a kind that is not known here."""
    return _from_gguf(checkpoint.metadata) if checkpoint.metadata else _from_directory(checkpoint.path)


def _from_gguf(fields: Mapping[str, Any]) -> TextTokenizer:
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    splitters: dict[str, list[PreTokenizer]] = {
        "smollm": [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)],
        "gpt-2": [ByteLevel(add_prefix_space=False)],
    }
    if kind != "gpt2" or split not in splitters:
        raise ModelError(
            f"the GGUF file's tokenizer is {kind!r} split as {split!r}; known are gpt2 split as {' or '.join(splitters)}. Give "
            "the model's directory with tokenizer.json instead"
        )
    lacking = [name for name in ("tokens", "merges", "token_type") if not fields.get(f"tokenizer.ggml.{name}")]
    if lacking:
        raise ModelError(
            f"the GGUF file's tokenizer lacks its {' and '.join(lacking)}; give the model's directory with tokenizer.json instead"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, merges))  # pyright: ignore[reportArgumentType]
    tokenizer.pre_tokenizer = Steps(splitters[split])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = ByteLevelDecoder()  # pyright: ignore[reportAttributeAccessIssue]
    kinds = fields["tokenizer.ggml.token_type"]
    controls = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    numbers = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    special = {f"{name}_token": tokens[number] for name, number in numbers.items() if number is not None}
    ends = [number for number in (numbers["eos"],) if number is not None]
    return TextTokenizer(tokenizer, fields.get("tokenizer.chat_template"), special, ends)


def _from_directory(path: Path) -> TextTokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise ModelError(f"cannot read {path / 'tokenizer.json'}: {error}") from error
    settings = {**_json(path / "config.json"), **_json(path / "generation_config.json")}
    described = _json(path / "tokenizer_config.json")
    beside = path / "chat_template.jinja"
    template = beside.read_text() if beside.is_file() else _default(described.get("chat_template"))
    special = {name: _text(described[name]) for name in ("bos_token", "eos_token") if described.get(name)}
    ends = settings.get("eos_token_id")
    return TextTokenizer(tokenizer, template, special, [ends] if isinstance(ends, int) else ends or [])


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error


def _default(template: str | list[Mapping[str, str]] | None) -> str | None:
    """Of several templates with names, as transformers writes them, the one named `default`."""
    if not isinstance(template, list):
        return template
    return next((one["template"] for one in template if one.get("name") == "default"), None)


def _text(token: str | Mapping[str, str]) -> str:
    return token if isinstance(token, str) else token["content"]
