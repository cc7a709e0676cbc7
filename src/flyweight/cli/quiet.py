"""Keep the libraries below us from talking to the user, and from talking home.

Environment variables are set before anything heavy is imported; what the user has set stays.
"""

from __future__ import annotations

import logging
import os
import warnings

PRIVACY = {"HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
CHATTER = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "true",  # said explicitly, else the library warns after every fork
}
LOGGERS = ("transformers", "torch", "torch.onnx", "accelerate", "datasets", "huggingface_hub", "onnx", "onnxscript")


def no_telemetry() -> None:
    for name, value in PRIVACY.items():
        os.environ.setdefault(name, value)


def no_chatter() -> None:
    for name, value in CHATTER.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
