"""Which requests reach the model: those with valid fields, for the model that is served, with a prompt that may fit.

The gate (serving/guard.py) asks for this before transformers' handlers see a request.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from transformers import GenerationConfig

from hf_flash.errors import ConfigError
from hf_flash.serving import fields
from hf_flash.serving.context import check_length, context_length, count_tokens
from hf_flash.serving.guard import texts
from hf_flash.serving.transformers_serving import TEMPLATE_NAMES, OneModel

_SHORT: Final = 16 << 10  # characters that any tokenizer takes in no time


class Admission:
    """Checks requests. What takes long is done on a thread: transformers' handlers run in the event loop.

    Long prompts wait for one another, and no other request waits for them.
    """

    def __init__(self, models: OneModel) -> None:
        self._models = models
        self._thread = ThreadPoolExecutor(1, "hf-flash-admission")

    async def admit(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body of a request that may go on; the model is loaded then.

        Raises:
            ConfigError: the request is refused.
            HfFlashError: the model cannot be loaded again.
        """
        body = fields.check(path, body)
        if path == "/load_model":
            self._models.check_name(body["model"])
            return body
        model, processor = self._models.loaded() or await self._on_thread(self._models.load)
        _check_settings(fields.used(path, body), model, processor)
        words = texts(body)
        if sum(map(len, words)) > _SHORT:
            length = await self._on_thread(count_tokens, processor, words)
            check_length(length - len(words), context_length(model))
        return body

    def close(self) -> None:
        """End the thread once it has done what it is at."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _on_thread(self, work: Any, *args: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._thread, work, *args)


def _check_settings(body: Mapping[str, Any], model: Any, processor: Any) -> None:
    """Check the fields whose bounds depend on the model.

    Raises:
        ConfigError: a field asks for what the model does not have, or for what transformers itself sets.
    """
    if config := body.get("generation_config"):
        usual = GenerationConfig().to_dict() | model.generation_config.to_dict()
        fields.check_generation(config, usual, model.config.vocab_size)
    fields.check_tokens([int(token) for token in body.get("logit_bias", {})], model.config.vocab_size, "logit_bias")
    reserved = {*inspect.signature(processor.apply_chat_template).parameters, *TEMPLATE_NAMES}
    if taken := sorted(reserved & body.get("chat_template_kwargs", {}).keys()):
        raise ConfigError("chat_template_kwargs: not yours to set", expected="variables of the chat template", got=taken)
