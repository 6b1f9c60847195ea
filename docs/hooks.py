"""What mkdocs adds to the pages that are written: the file map, the contributing guide and the changelog."""

import ast
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "decoder", "training", "bench", "examples", "src")


def file_map(repository: str = "") -> str:
    """A page with one line for each file of the package and the examples: how its docstring begins."""
    arrows = "Imports point down: `kernels` <- `decoder` <- `training` <- `bench`"
    page = ["# File map", "", f"{arrows}. The reasons: [architecture](architecture.md)."]
    for top in FOLDERS:
        for folder, below, names in os.walk(ROOT / top):
            below[:] = sorted(set(below) - {"__pycache__"})
            files = sorted(Path(folder, name) for name in names if name.endswith(".py"))
            if files:
                place = Path(folder).relative_to(ROOT).as_posix()
                page += ["", f"## {place}/", "", "| file | what it holds |", "|---|---|"]
            for file in files:
                words = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
                line = " ".join(words.split()).rstrip(".").replace("|", chr(92) + "|")
                name = f"`{file.name}`"
                link = f"[{name}]({repository}/blob/main/{place}/{file.name})" if repository else name
                page.append(f"| {link} | {line} |")
    return "\n".join(page) + "\n"


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    files.append(File.generated(config, "map.md", content=file_map(config.repo_url.rstrip("/"))))
    for name in ("CHANGELOG", "CONTRIBUTING"):
        files.append(File.generated(config, f"{name.lower()}.md", abs_src_path=str(ROOT / f"{name}.md")))
    return files
