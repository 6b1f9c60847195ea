"""Recipes: one file a task, plain Python over `fit`, each with its measured result in its first lines.

A recipe module has `run(options, device, output)` for `tileformer train` and `lines(path, words, device)` for
`tileformer generate`, with a ValueError in place of what cannot be read; `DATA`, in words, where it takes `--data`. One
for `tileformer finetune` also has `parts`, `make_tokenizer`, `make_config`, `to_rows`, `load` and `save_classifier`.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
RECIPES = ("g2p", "poems", "reviews")
FINETUNED = ("reviews",)


def answers(
    words: Sequence[str], read: Callable[[str], T], answer: Callable[[list[T]], list[str]]
) -> list[str | ValueError]:
    """What `answer` makes of all words that `read` takes, in order; in place of each other one the ValueError of `read`."""
    readable: list[T] = []
    found: list[str | ValueError] = []
    for word in words:
        try:
            readable.append(read(word))
            found.append("")
        except ValueError as error:
            found.append(error)
    told = iter(answer(readable) if readable else [])
    return [next(told) if isinstance(one, str) else one for one in found]
