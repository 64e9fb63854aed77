"""What the fields of a request to `hf-flash serve` may hold: one table for each route.

transformers' server takes most fields unchecked, and then fails in the middle of an answer or generates for an hour. A field
that is in no table is one that it refuses by name, or accepts and ignores. `null` counts as a missing field.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from hf_flash.errors import ConfigError

MOST_MESSAGES: Final = 2048
MOST_STOPS: Final = 4
STOP_LENGTH: Final = 256
MOST_TOOLS: Final = 128
MOST_BIASES: Final = 1024
_SEEDS: Final = (-(1 << 63), (1 << 64) - 1)
_CONFIG_LENGTH: Final = 1 << 16


class Rule(NamedTuple):
    """What a value may be, and how to say it."""

    fits: Callable[[Any], bool]
    expected: str

    def __or__(self, other: Rule) -> Rule:
        return Rule(lambda value: self.fits(value) or other.fits(value), f"{self.expected}, or {other.expected}")


def whole(low: int, high: int | None = None) -> Rule:
    """A whole number."""
    return Rule(
        lambda value: type(value) is int and low <= value and (high is None or value <= high),
        f"a whole number from {low}" + ("" if high is None else f" to {high}"),
    )


def number(low: float, high: float, *, above: bool = False) -> Rule:
    """A number; `above`: more than `low`."""
    return Rule(
        lambda value: type(value) in (int, float) and low <= value <= high and not (above and value == low),
        f"a number {'above' if above else 'from'} {low:g} to {high:g}",
    )


def text(least: int = 0, most: int | None = None) -> Rule:
    """Text of so many characters."""
    words = "text" if most is None else f"text of {least} to {most} characters"
    return Rule(lambda value: isinstance(value, str) and least <= len(value) and (most is None or len(value) <= most), words)


def only(*values: Any) -> Rule:
    """One of these values, of their types."""
    fits = lambda value: any(type(value) is type(known) and value == known for known in values)  # noqa: E731
    return Rule(fits, " or ".join(json.dumps(value) for value in values))


def many(rule: Rule, least: int, most: int) -> Rule:
    """A list."""
    return Rule(
        lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(rule.fits, value)),
        f"a list of {least} to {most}, each {rule.expected}",
    )


def table(needed: Mapping[str, Rule], also: Mapping[str, Rule] | None = None) -> Rule:
    """An object with certain fields; others are free."""
    known = dict(also or {}) | dict(needed)
    names = [f"{name}: {rule.expected}" for name, rule in known.items()]
    return Rule(
        lambda value: (
            isinstance(value, dict)
            and needed.keys() <= value.keys()
            and all(rule.fits(value[name]) for name, rule in known.items() if name in value)
        ),
        f"an object with {'; '.join(names)}" if names else "an object",
    )


def _is_arguments(value: Any) -> bool:
    try:
        return isinstance(json.loads(value), dict)
    except (ValueError, RecursionError, TypeError):
        return False


def _is_bias(value: Any) -> bool:
    strength = number(-100, 100)
    return (
        isinstance(value, dict)
        and len(value) <= MOST_BIASES
        and all(re.fullmatch(r"[0-9]{1,9}", token, re.ASCII) and strength.fits(bias) for token, bias in value.items())
    )


FLAG: Final = Rule(lambda value: isinstance(value, bool), "true or false")
_STOP: Final = text(1, STOP_LENGTH)
_STOPS: Final = _STOP | many(_STOP, 0, MOST_STOPS)
_TEMPERATURE: Final = only(0) | number(1e-6, 100)
_PART: Final = table({"type": only("text", "input_text", "output_text"), "text": text()})
_CONTENT: Final = text() | many(_PART, 0, MOST_MESSAGES)
_ARGUMENTS: Final = Rule(lambda value: isinstance(value, dict) or _is_arguments(value), "a JSON object, or its text")
_CALLS: Final = many(table({"function": table({"name": text(1), "arguments": _ARGUMENTS})}), 0, MOST_TOOLS)
_MESSAGE: Final = table({"role": text(1, 64)}, {"content": _CONTENT, "tool_calls": _CALLS, "tool_call_id": text()})
_TOOLS: Final = many(table({}), 0, MOST_TOOLS)
_COUNT: Final = whole(1)

_REASONING: Final = table({"type": only("reasoning")}, {"content": many(table({"text": text()}), 0, MOST_MESSAGES)})
_CALL: Final = table({"type": only("function_call"), "call_id": text(), "name": text(1), "arguments": _ARGUMENTS})
_RESULT: Final = table({"type": only("function_call_output"), "call_id": text(), "output": _CONTENT})
_TURN: Final = Rule((_REASONING | _MESSAGE | _CALL | _RESULT).fits, "a message, a call of a function or its output")
_TURNS: Final = Rule(
    lambda value: many(_TURN, 1, MOST_MESSAGES).fits(value) and "role" in value[0],
    f"a list of 1 to {MOST_MESSAGES} messages, calls of functions and their outputs, the first a message",
)

_SAMPLING: Final = {
    "model": text(1),
    "temperature": _TEMPERATURE,
    "top_p": number(0, 1),
    "seed": whole(*_SEEDS),
    "generation_config": text(2, _CONFIG_LENGTH),
    "stream": FLAG,
}
_ONE_ANSWER: Final = {"n": only(1), "best_of": only(1), "frequency_penalty": number(-1, 2, above=True)}
_CHAT: Final = {"tools": _TOOLS, "chat_template_kwargs": table({})}
_LIMIT: Final = {"max_tokens": _COUNT, "stop": _STOPS}

ROUTES: Final[Mapping[str, tuple[Mapping[str, Rule], Mapping[str, Rule]]]] = {
    "/v1/chat/completions": (
        {"messages": many(_MESSAGE, 1, MOST_MESSAGES)},
        _SAMPLING | _ONE_ANSWER | _CHAT | _LIMIT | {
            "max_completion_tokens": _COUNT, "logprobs": only(False), "top_logprobs": only(0),
            "logit_bias": Rule(_is_bias, f"an object of at most {MOST_BIASES} token ids, each with a number from -100 to 100"),
        },
    ),
    "/v1/completions": (
        {"prompt": text()},
        _SAMPLING | _ONE_ANSWER | _LIMIT | {"suffix": text(), "echo": only(False), "logprobs": only(0)},
    ),
    "/v1/responses": (
        {"input": text() | many(_PART, 1, MOST_MESSAGES) | _TURNS},
        _SAMPLING | _CHAT | {
            "instructions": text(), "max_output_tokens": _COUNT, "parallel_tool_calls": FLAG, "top_logprobs": only(0),
            "background": only(False),
        },
    ),
    "/v1/systemone": ({"state": text() | table({}) | many(Rule(lambda _: True, "anything"), 0, MOST_MESSAGES)},
                      {"model": text(1), "questions": table({}), "assets": table({})}),
    "/load_model": ({"model": text(1)}, {}),
}  # fmt: skip
"""Fields that a request must have, and fields that it may have."""

_TOKEN: Final = whole(0, 1 << 31)
_TOKENS: Final = _TOKEN | many(_TOKEN, 0, MOST_BIASES)
GENERATION: Final[Mapping[str, Rule]] = {
    "max_new_tokens": _COUNT, "max_length": _COUNT, "min_new_tokens": whole(0), "min_length": whole(0),
    "do_sample": FLAG, "temperature": _TEMPERATURE, "top_k": whole(0, 1 << 20), "top_p": number(0, 1), "min_p": number(0, 1),
    "typical_p": number(0, 1, above=True), "epsilon_cutoff": number(0, 0.99), "eta_cutoff": number(0, 0.99),
    "repetition_penalty": number(0, 100, above=True), "no_repeat_ngram_size": whole(0, 64), "num_beams": only(1),
    "num_return_sequences": only(1), "use_cache": FLAG, "bos_token_id": _TOKEN, "pad_token_id": _TOKEN, "eos_token_id": _TOKENS,
    "suppress_tokens": _TOKENS, "begin_suppress_tokens": _TOKENS, "stop_strings": _STOPS, "transformers_version": text(0, 64),
    "_from_model_config": FLAG,
}  # fmt: skip
"""What `generation_config`, the field in which `transformers chat` sends its settings, may hold."""


def check(route: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a request whose fields are valid, without the nulls in its messages.

    Raises:
        ConfigError: a field is not valid, or is missing.
    """
    needed, also = ROUTES[route]
    for name in ("messages", "input"):
        if isinstance(body.get(name), list):
            body = body | {name: [_without_nulls(item) for item in body[name]]}
    if body.get("stream", False) is None:
        body = body | {"stream": False}
    for name, rule in needed.items():
        if name not in body:
            raise ConfigError(f"{name} is missing", where=route, expected=rule.expected)
    for name, rule in (dict(also) | dict(needed)).items():
        if name in body and not rule.fits(body[name]):
            raise ConfigError(f"{name} is not valid", where=route, expected=rule.expected, got=reprlib.repr(body[name]))
    return body


def used(route: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a checked body that the route uses."""
    needed, also = ROUTES[route]
    return {name: value for name, value in body.items() if name in needed or name in also}


def check_generation(config: str, usual: Mapping[str, Any], vocabulary: int) -> None:
    """Refuse settings of generation that this server does not accept.

    Args:
        config: the JSON text.
        usual: the model's own values; these are accepted for any name.
        vocabulary: tokens that the model has.

    Raises:
        ConfigError: it is no JSON object, or a setting is not accepted.
    """
    try:
        found = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise ConfigError("generation_config is no JSON", got=error) from error
    if not isinstance(found, dict):
        raise ConfigError("generation_config is not valid", expected="a JSON object", got=reprlib.repr(found))
    for name, value in found.items():
        if value is None or (name in usual and type(usual[name]) is type(value) and usual[name] == value):
            continue
        if (rule := GENERATION.get(name)) is None:
            raise ConfigError(f"generation_config: this server does not take {name[:64]!r}", expected=", ".join(GENERATION))
        if not rule.fits(value):
            raise ConfigError(f"generation_config: {name} is not valid", expected=rule.expected, got=reprlib.repr(value))
        if name.endswith(("token_id", "suppress_tokens")):
            check_tokens(value if isinstance(value, list) else [value], vocabulary, f"generation_config: {name}")


def check_tokens(tokens: list[int], vocabulary: int, where: str) -> None:
    """Refuse tokens that the model does not have."""
    if max(tokens, default=0) >= vocabulary:
        raise ConfigError("no such token", where=where, expected=f"token ids below {vocabulary}", got=max(tokens))


def _without_nulls(item: Any) -> Any:
    return {name: value for name, value in item.items() if value is not None} if isinstance(item, dict) else item
