"""Recipes: one file a task, plain Python over `fit`, each with its measured result in its first lines.

A recipe module has `run(options, device, output)` for `tileformer train` and `lines(path, words, device)` for
`tileformer generate`; `DATA`, in words, where it takes `--data`. One for `tileformer finetune` also has `parts`,
`make_tokenizer`, `make_config`, `to_rows`, `load` and `save_classifier`.
"""

RECIPES = ("g2p", "poems", "reviews")
FINETUNED = ("reviews",)
