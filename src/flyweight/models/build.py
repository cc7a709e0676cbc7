"""Config, tokenizer and empty model of a folder, through transformers; nothing is fetched and no code of the folder runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from flyweight.errors import ModelError
from flyweight.models import stream
from flyweight.models.families import FAMILIES

__all__ = ["empty_model", "open_config", "open_tokenizer", "quiet"]

logging: Any = transformers_logging  # its functions carry no types
UNRELATED = ("auto_map", "_name_or_path")  # remote code is never run; where a model lay on its maker's disk is private

# How a tokenizer was opened is private, and its own truncation goes (see `open_tokenizer`).
UNRELATED_TOKENIZER = (
    *("local_files_only", "is_local", "name_or_path"),
    *("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"),
)


def open_config(folder: Path, packed: bool = False) -> Any:
    """The config of a model folder. packed: it may hold a `quantization_config`, which is ours and is left out.

    Raises ModelError: no config.json, unreadable, unknown family (lists the known).
    """
    path = folder / "config.json"
    hint = "name a Hugging Face folder (config.json, model.safetensors, tokenizer.json), a hub id or an artifact"
    if not path.is_file():
        if any(folder.glob("*.gguf")):
            raise ModelError("a Hugging Face folder", f"GGUF in {folder}", "GGUF is not supported yet")
        raise ModelError(f"a model in {folder}", "no config.json there", hint)
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ModelError(f"a readable {path}", f"'{error}'", "fetch the model again") from None
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise ModelError(f"a 'model_type' in {path}", "none", hint)
    if raw["model_type"] not in FAMILIES:
        code = " (its own code is never run)" if "auto_map" in raw else ""
        raise ModelError(
            f"a model of one of the families {', '.join(FAMILIES)}", f"'{raw['model_type']}'{code} in {path}"
        )
    if raw.get("quantization_config") and not packed:
        how = raw["quantization_config"].get("quant_method", "some method")
        raise ModelError(f"float weights in {folder}", f"weights packed by {how}", "start from the original model")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its checks meet
        raise ModelError(f"a valid {path}", f"'{_first_line(error)}'", "fetch the model again") from None
    for name in (*UNRELATED, "quantization_config"):
        if hasattr(config, name):
            delattr(config, name)
    config.dtype = torch.float32
    return config


def open_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder, without the truncation and padding that some carry. Raises ModelError."""
    hint = "save the model with its fast tokenizer (tokenizer.json)"
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # transformers and tokenizers raise bare Exception too
        raise ModelError(f"a tokenizer in {folder}", f"'{_first_line(error)}'", hint) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"a fast tokenizer in {folder}", type(tokenizer).__name__, hint)
    for name in UNRELATED_TOKENIZER:
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def empty_model(config: Any, auto: str) -> PreTrainedModel:
    """The task's model in float32 with weights that nothing has filled; costs no random numbers.

    Buffers that no file carries (positions, rotary frequencies) are computed as usual. Raises ModelError where the
    architecture has no such head.
    """
    try:
        with quiet(), no_init_weights():
            model = getattr(transformers, auto).from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, TypeError) as error:
        raise ModelError(f"a model that {auto} can build", f"'{_first_line(error)}'", "choose another task") from None
    model.tie_weights()
    stream.fit_width(model, FAMILIES[config.model_type])
    return cast(PreTrainedModel, model.eval())


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' notes and bars say what Flyweight says itself (which head is new, what is loaded)."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
