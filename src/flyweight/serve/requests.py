"""What clients send and get: the shapes of Hugging Face's Text Embeddings Inference (TEI), errors included."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["ErrorType", "Refused", "Request", "Text", "read_request"]

Text = tuple[str, str | None]
ErrorType = Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"]


class Refused(Exception):
    """A request that gets no answer; becomes `{"error": text, "error_type": kind}` with `status`."""

    def __init__(self, status: int, kind: ErrorType, text: str) -> None:
        super().__init__(text)
        self.status, self.kind, self.text = status, kind, text


class Request(BaseModel):
    """As TEI reads it: a string is one text, `["a", "b"]` is one pair, and a batch is a list of lists."""

    model_config = ConfigDict(strict=True, use_attribute_docstrings=True)

    inputs: str | list[str] | list[list[str]] = Field(
        examples=["a text", ["a text", "its pair"], [["first text"], ["second text"]]]
    )
    """One text; one pair as a list of two; or a batch as a list of lists of one or two."""
    truncate: bool = False
    """Cut texts that are too long instead of refusing them."""
    raw_scores: bool = False
    """Give logits instead of probabilities."""

    def batch(self, pairs: bool) -> tuple[list[Text], bool]:
        """(the texts, whether the answer is a list of answers).

        pairs: whether `["a", "b"]` is a pair; for embeddings TEI takes it as a batch of two texts.
        """
        if isinstance(self.inputs, str):
            return [(self.inputs, None)], False
        if not self.inputs:
            raise Refused(400, "Empty", "expected at least one input, got an empty list")
        if isinstance(self.inputs[0], str):
            texts = [text for text in self.inputs if isinstance(text, str)]
            if pairs:
                return [_text(texts)], False
            return [(text, None) for text in texts], True
        return [_text(item) for item in self.inputs if isinstance(item, list)], True


def _text(item: list[str]) -> Text:
    if len(item) not in (1, 2):
        raise Refused(
            422,
            "Validation",
            f"expected a text or a pair of texts, got a list of {len(item)}; a batch is a list of lists",
        )
    return item[0], item[1] if len(item) == 2 else None


def read_request(body: bytes) -> Request:
    """Raises Refused(422) with what is wrong; depth and size of the JSON are bounded by the parser and the body limit."""
    try:
        return Request.model_validate_json(body)
    except ValidationError as error:
        raise Refused(422, "Validation", _reason(error)) from None


def _reason(error: ValidationError) -> str:
    first: Any = error.errors(include_input=False, include_url=False)[0]
    if first["type"] == "json_invalid":
        return f"expected a JSON object, got something else: {first['msg']}"
    name = str(first["loc"][0]) if first["loc"] else "the body"
    if name == "inputs" and first["type"] != "missing":
        return "inputs: expected a string, a list of one or two strings, or a list of such lists"
    return f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}"
