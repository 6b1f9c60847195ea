"""Mutation proof: plant each fault of mutants.py in a copy of the tree, and let the tests of `make test` find it.

    python tests/mutation [--sample N | --only TEXT] [--likely] [--judge check] [--jobs J]

A mutant counts as killed when a test fails that passes on the copy without it. The selection of `make test` is not
changed; the test files most likely to notice come first, so that a kill takes seconds, and a survivor has run the whole
selection. Prints the score; the exit status is 1 when a mutant survives, and 2 when a patch does not apply exactly once
or a kill cannot be told from a broken tree.

With `--judge check`, `tileformer check` of the op in question judges instead of the tests: where kernel and definition
need one rule, a fault in either must show as a difference.
"""

# ruff: noqa: E402, F401
from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before numpy starts threads, which a fork would lose
    os.environ.setdefault(_variable, "1")

import hypothesis.strategies  # this and the rest: imported once, before the forks
import mutants  # this folder is the first place that Python looks in
import numpy.testing
import pytest
import torch._inductor
import torch.export
import triton.runtime.interpreter

ROOT = pathlib.Path(__file__).resolve().parents[2]
LONGEST = 3600  # seconds; a mutant that never ends is killed too
FIRST = {  # the test files to begin with, for a mutant of each file
    "kernels/attention/torch_backend": "test_attention_torch test_semantics test_rounding test_attention test_values test_attention_variants",
    "kernels/attention/hopper": "test_attention_hopper",
    "kernels/attention/__init__": "test_autograd test_fuzz test_attention_variants test_attention",
    "kernels/attention/decode": "test_decode_attention test_fuzz",
    "kernels/attention/": "test_attention_ahead test_rounding test_fuzz test_attention_variants test_attention test_memory test_values",
    "kernels/add_norm": "test_add_norm test_autograd test_layering",
    "kernels/column_sums": "test_layer_norm test_add_norm",
    "decoder/sublayers": "test_add_norm test_decoder_modules test_decoder_parity test_decoder_lm",
    "kernels/layer_norm": "test_add_norm test_layer_norm test_rounding test_rms_norm test_values test_autograd test_memory",
    "kernels/softmax": "test_softmax test_rounding test_values test_autograd test_memory",
    "kernels/linear_cross_entropy": "test_linear_cross_entropy test_autograd test_values",
    "kernels/cross_entropy": "test_cross_entropy test_linear_cross_entropy test_rounding test_values test_memory",
    "kernels/rotary": "test_rotary test_values test_memory",
    "kernels/dropout": "test_bias_activation_dropout test_dropout test_rounding test_values test_memory",
    "kernels/tile_ops": "test_dropout test_attention test_fuzz",
    "kernels/random": "test_dropout test_attention",
    "kernels/rows": "test_layer_norm test_softmax test_cross_entropy test_dropout test_memory",
    "kernels/launch": "test_host test_attention test_softmax",
    "kernels/autograd": "test_host test_autograd",
    "kernels/device": "test_attention test_rounding test_autograd",
    "kernels/": "test_attention test_dropout test_softmax test_autograd",
    "decoder/model": "test_decoder_lm test_decoder_seq2seq test_decoder_heads test_decoder_decodable",
    "decoder/blocks": "test_decoder_lm test_decoder_seq2seq test_decoder_decodable test_decoder_parity",
    "decoder/nn/layer": "test_decoder_modules test_decoder_parity test_convert",
    "decoder/heads": "test_decoder_heads",
    "decoder/generation/step": "test_decoder_step test_decoder_generation test_decoder_decodable test_cached_equals_full",
    "decoder/generation/static": "test_decoder_cache_dtype test_decoder_step test_decoder_generation test_cached_equals_full",
    "decoder/generation/incremental": "test_decoder_incremental",
    "decoder/generation/device": "test_decoder_cache_dtype test_decoder_step test_cached_equals_full",
    "decoder/generation/cache": "test_decoder_decodable test_decoder_seq2seq test_decoder_modules test_decoder_generation",
    "decoder/generation/state": "test_decoder_decodable test_decoder_step test_decoder_generation",
    "decoder/generation/engine": "test_decoder_engine test_decoder_admission test_decoder_engine_faults",
    "decoder/generation/paged": "test_decoder_cache_dtype test_decoder_paged test_decoder_engine",
    "decoder/generation/speculative": "test_decoder_speculative",
    "decoder/generation/hidden_state": "test_recurrent test_marian",
    "decoder/generation/": "test_decoder_search test_decoder_options test_decoder_generation test_decoder_decodable test_decoder_seq2seq",
    "decoder/nn/transformer": "test_decoder_parity test_decoder_modules test_decoder_seq2seq test_convert",
    "decoder/loading": "test_decoder_loading",
    "decoder/export": "test_decoder_export",
    "decoder/nn/convert": "test_convert",
    "decoder/nn/modules": "test_convert test_decoder_modules test_decoder_parity",
    "decoder/gated_mlp": "test_gated_mlp",
    "decoder/huggingface": "test_huggingface_attend test_huggingface",
    "decoder/command": "test_training_generate",
    "decoder/recurrent": "test_recurrent",
    "decoder/causal": "test_causal test_name_maps",
    "decoder/name_maps": "test_name_maps",
    "decoder/gguf": "test_gguf",
    "decoder/marian": "test_marian",
    "decoder/pretrained": "test_decoder_pretrained test_training_own",
    "decoder/chat": "test_decoder_pretrained test_gguf",
    "training/overrides": "test_training_own",
    "training/data/own": "test_training_own",
    "training/measure": "test_training_own",
    "training/finetune/own": "test_training_own",
    "training/recipes/recipe": "test_training_own test_training_recipe",
    "decoder/tokenizer": "test_decoder_tokenizer",
    "decoder/": "test_decoder_parity test_decoder_modules test_decoder_seq2seq",
    "training/data/batches": "test_training_data test_training_stream test_training_own",
    "training/state": "test_training_checkpoint test_training_loop test_training_resume",
    "training/losses": "test_training_loop test_training_own",
    "training/loop": "test_training_loop test_training_checkpoint",
    "training/settings": "test_training_loop test_training_optimizers",
    "training/log": "test_training_loop test_training_checkpoint",
    "src/tileformer/files": "test_training_text test_training_g2p test_training_resume",
    "training/finetune/adversarial": "test_training_methods",
    "training/checkpoint": "test_training_checkpoint test_training_storable test_training_loop test_training_resume",
    "training/finetune/ngrams": "test_training_methods",
}
FAR = ("int64", "padding", "stride")  # kinds that memory which may not be touched shows soonest


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault: in `path`, inside the function `within` if it is given, `old` (which is there once) becomes `new`."""

    path: str
    kind: str
    why: str
    old: str
    new: str
    within: str = ""

    @property
    def name(self) -> str:
        return f"{self.path}{':' + self.within if self.within else ''}: {self.why}"

    def applied(self, text: str) -> str:
        """The text of the file with the fault in it. Raises ValueError where the patch does not fit."""
        start, end = 0, len(text)
        if self.within:
            heads = [m.start() for m in re.finditer(rf"^( *)(?:def|class) {self.within}\b", text, re.MULTILINE)]
            if len(heads) != 1:
                raise ValueError(f"{self.name}: {len(heads)} definitions of {self.within} instead of one")
            start = heads[0]
            indent = text[start:][: len(text[start:]) - len(text[start:].lstrip(" "))]
            after = re.search(rf"^{indent}[@\w]", text[text.index("\n", start) :], re.MULTILINE)
            end = text.index("\n", start) + after.start() if after else end
        count = text.count(self.old, start, end)
        if count != 1:
            raise ValueError(f"{self.name}: the old text occurs {count} times instead of once: {self.old!r}")
        mutated = text[:start] + text[start:end].replace(self.old, self.new) + text[end:]
        try:
            compile(mutated, self.path, "exec")
        except SyntaxError as error:
            raise ValueError(f"{self.name}: the new text is no Python: {error}") from None
        return mutated


def listed() -> list[Mutant]:
    """Every mutant of mutants.py; ValueError for one that is malformed or of a class that the taxonomy does not
    list."""
    found = [Mutant(path, *fields) for path, rows in mutants.MUTANTS.items() for fields in rows]
    for mutant in found:
        if mutant.kind not in mutants.TAXONOMY:
            raise ValueError(f"{mutant.name}: {mutant.kind!r} is not in the taxonomy")
    missing = set(mutants.TAXONOMY) - {mutant.kind for mutant in found}
    if missing:
        raise ValueError(f"classes without a mutant: {sorted(missing)}")
    names = [mutant.name for mutant in found]
    if len(set(names)) < len(names):
        raise ValueError(f"two mutants of one name: {sorted({n for n in names if names.count(n) > 1})}")
    return found


def copy_tree(target: pathlib.Path) -> None:
    """The files that git knows or would take, links as links."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )  # fmt: skip
    for name in filter(None, listing.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def test_files(path: str, kind: str) -> tuple[list[str], list[str]]:
    """The test files most likely to notice a fault of a kind in `path`, and all of them."""
    every = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_*.py"))
    room, *_, stem = path.removesuffix(".py").split("/")  # its own, where no other are likelier
    hint = next((files for start, files in FIRST.items() if path.startswith(start)), f"test_{room}_{stem}").split()
    hint = [*["test_memory"] * (kind in FAR), *hint]
    return [f"tests/{name}.py" for name in dict.fromkeys(hint) if f"tests/{name}.py" in every], every


class Run:
    """pytest in a tree, in a fork of this process, which has imported all that does not belong to the tree."""

    def __init__(self, tree: pathlib.Path, arguments: list[str]) -> None:
        self.cache, self.shown, self.began = tree / ".mutation_cache", tree / ".mutation_output", time.monotonic()
        shutil.rmtree(self.cache, ignore_errors=True)
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        os.chdir(tree)
        with open(self.shown, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ["PYTHONPATH"] = str(tree / "src")
        sys.path[:] = [str(tree / "src"), *(place for place in sys.path if place != str(ROOT / "src"))]
        try:
            status = int(
                pytest.main(
                    [
                        "-q",
                        "-x",
                        "--tb=line",
                        "-W",
                        "ignore:Module already imported",
                        "-o",
                        f"cache_dir={self.cache}",
                        *arguments,
                    ]
                )
            )
        except BaseException:
            traceback.print_exc()
            status = 70
        sys.stdout.flush()
        os._exit(status)

    def ended(self) -> bool:
        """Whether it has; then `status` is pytest's, or negative where it was killed or took too long, and `failed` the
        tests that did."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and time.monotonic() - self.began > LONGEST:
            os.killpg(self.pid, signal.SIGKILL)
            pid, status = os.waitpid(self.pid, 0)
        if not pid:
            return False
        self.status = os.waitstatus_to_exitcode(status)
        last = self.cache / "v" / "cache" / "lastfailed"
        self.failed = [test for test in json.loads(last.read_text()) if "::" in test] if last.exists() else []
        return True


class Check:
    """`tileformer check` in a tree, with the interface of `Run`; what failed is named by its arguments."""

    def __init__(self, tree: pathlib.Path, arguments: list[str]) -> None:
        self.arguments, self.shown = arguments, tree / ".mutation_output"
        environment = dict(os.environ, PYTHONPATH=str(tree / "src"))
        command = [sys.executable, "-m", "tileformer", "check", *arguments]
        with open(self.shown, "wb") as file:
            self.process = subprocess.Popen(command, cwd=tree, env=environment, stdout=file, stderr=file)

    def ended(self) -> bool:
        if self.process.poll() is None:
            return False
        self.status = self.process.returncode
        some = re.search(r"[1-9]\d* failed", self.shown.read_text(errors="replace"))
        self.failed = [shlex.join(self.arguments)] if some else []
        return True


def checked(mutant: Mutant) -> list[str]:
    """What `tileformer check` is asked about a mutant."""
    where = f"{mutant.path}:{mutant.within}:{mutant.new}"
    return list(next(arguments for part, arguments in mutants.CHECKED_BY.items() if part in where))


@dataclasses.dataclass
class Trial:
    """A mutant in a tree: first the likely files, then the whole selection, until a test fails."""

    mutant: Mutant
    only_likely: bool = False
    by_check: bool = False
    result: str = ""  # "killed", "survived" or "unclear"
    killer: str = ""  # the test that failed, or the end of what was shown
    seconds: float = 0.0

    def start(self, tree: pathlib.Path) -> None:
        self.began, self.tree, self.file = time.monotonic(), tree, tree / self.mutant.path
        self.text = self.file.read_text()
        _write(self.file, self.mutant.applied(self.text))
        likely, self.rest = test_files(self.mutant.path, self.mutant.kind)
        self.run: Run | Check = Check(tree, checked(self.mutant)) if self.by_check else Run(tree, likely or self.rest)
        if not likely or self.only_likely or self.by_check:
            self.rest = []

    def ended(self) -> bool:
        if not self.run.ended():
            return False
        if self.run.status == 0 and self.rest:
            self.run, self.rest = Run(self.tree, self.rest), []
            return False
        _write(self.file, self.text)
        self.seconds = time.monotonic() - self.began
        failed = self.run.failed
        if self.run.status == 0:
            self.result = "survived"
        elif self.run.status < 0:  # it never ended, or the process died of a signal: an access out of bounds
            self.result = "killed"
        elif self.run.status == 1 and failed:
            self.result, self.killer = "killed", failed[0]
        else:
            self.result, self.killer = "unclear", " ".join(self.run.shown.read_text(errors="replace").split()[-60:])
        return True


_second = itertools.count(10**9)


def _write(file: pathlib.Path, text: str) -> None:
    file.write_text(text)
    second = next(_second)  # another for each version of the file: Python compares its cached bytecode's time and size
    os.utime(file, (second, second))


def sample(every: list[Mutant], n: int) -> list[Mutant]:
    """n of them, evenly spaced, others each day."""
    n = min(n, len(every))
    first = datetime.date.today().toordinal()
    return [every[(i * len(every) // n + first) % len(every)] for i in range(n)]


def tried(chosen: list[Mutant], trees: list[pathlib.Path], likely: bool, by_check: bool) -> list[Trial]:
    """The verdict on each mutant, printed as it is known."""
    waiting = [Trial(mutant, likely, by_check) for mutant in reversed(chosen)]
    running, done = list[Trial](), list[Trial]()
    free = list(trees)
    while waiting or running:
        while waiting and free:
            running.append(waiting.pop())
            running[-1].start(free.pop())
        time.sleep(0.02)
        for trial in [trial for trial in running if trial.ended()]:
            running.remove(trial)
            free.append(trial.tree)
            done.append(trial)
            killer = f"\n{'':18}{trial.killer}" if trial.killer else ""
            print(
                f"{trial.result:<8} {trial.seconds:5.0f} s  [{trial.mutant.kind}] {trial.mutant.name}{killer}",
                flush=True,
            )
    # What fails without the mutant too has killed nothing.
    killers = sorted({trial.killer for trial in done if trial.result == "killed" and trial.killer})
    for again in [shlex.split(killer) for killer in killers] if by_check else [killers] * bool(killers):
        run: Run | Check = (Check if by_check else Run)(trees[0], again)
        while not run.ended():
            time.sleep(0.02)
        if run.status:
            shown = run.failed or run.shown.read_text(errors="replace")[-2000:]
            print(f"fails without any mutant: {shown}", file=sys.stderr)
            for trial in done:
                trial.result = "unclear" if not run.failed or trial.killer in run.failed else trial.result
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, metavar="N", help="only N mutants, others each day")
    parser.add_argument("--only", metavar="TEXT", help="only mutants whose name or class holds TEXT")
    parser.add_argument("--likely", action="store_true", help="only the likely test files, also for a survivor")
    parser.add_argument("--judge", choices=("tests", "check"), default="tests", help="who has to notice")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="J",
        help="mutants tried at a time (default: the cores)",
    )
    args = parser.parse_args()
    try:
        every = listed()
        for mutant in every:
            mutant.applied((ROOT / mutant.path).read_text())
    except (OSError, ValueError) as error:
        print(f"mutation: error: {error}", file=sys.stderr)
        return 2
    chosen = [m for m in every if not args.only or args.only in m.name or args.only in m.kind]
    chosen = sample(chosen, args.sample) if args.sample else chosen
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trees = [pathlib.Path(folder, str(i)) for i in range(args.jobs)]
        for tree in trees:
            copy_tree(tree)
        done = tried(chosen, trees, args.likely, args.judge == "check")
    killed, unclear = (sum(trial.result == result for trial in done) for result in ("killed", "unclear"))
    print(
        f"{killed} of {len(done)} mutants killed ({100 * killed / max(1, len(done)):.1f} %), of "
        f"{len({trial.mutant.kind for trial in done})} classes, in {time.monotonic() - began:.0f} s; "
        f"{len(mutants.EQUIVALENT)} changes are listed as equivalent"
    )
    for trial in done:
        if trial.result != "killed":
            print(f"{trial.result}: {trial.mutant.name}")
    return 2 if unclear else int(killed < len(done))


if __name__ == "__main__":
    sys.exit(main())
