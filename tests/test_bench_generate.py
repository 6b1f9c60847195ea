"""`tileformer bench generate`: every provider makes all of its tokens, ratios are those of the seconds, goals are met
by names."""

import json

import pytest
import torch

from tileformer.__main__ import main
from tileformer.bench.speed import generate as bench
from tileformer.decoder import Seq2SeqConfig

TINY = Seq2SeqConfig(12, 9, 16, 2, 1, 2, 32, max_length=8)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "MODELS", {"g2p": (TINY, 5), "base": (TINY, 3)})
    monkeypatch.setattr(bench, "NEW_TOKENS", 8)


def test_a_table_has_each_provider_of_each_job_beside_ours(tiny, tmp_path, capsys):
    file = tmp_path / "generate.json"
    threads = torch.get_num_threads()
    assert main(["bench", "generate", "--rounds", "2", "--only", "batch (1|16) ", "--json", str(file)]) == 0
    figures, printed = json.loads(file.read_text()), capsys.readouterr().out
    names = {row["provider"] for row in figures["rows"]}
    absent = {
        peer for peer in ("transformers", "CTranslate2") if f"skipped: {peer.lower()} is not installed" in printed
    }
    assert names == {"tileformer", "transformers", "torch.nn", "CTranslate2"} - absent
    jobs = [
        f"{model} batch {size} {how}" for model in ("g2p", "base") for size in (1, 16) for how in ("greedy", "5 beams")
    ]
    assert list(dict.fromkeys(row["job"] for row in figures["rows"])) == jobs
    ours = {row["job"]: row for row in figures["rows"] if row["provider"] == "tileformer"}
    for row in figures["rows"]:
        assert len(row["rounds"]) == 2 and row["seconds"] == min(row["rounds"]) > 0
        assert row["rate"] == pytest.approx(8 * (16 if "16" in row["job"] else 1) / row["seconds"])
        if row is not ours[row["job"]]:
            assert row["over_ours"] == pytest.approx(row["seconds"] / ours[row["job"]]["seconds"])
            assert row["must"] or row["provider"] == "CTranslate2"
    assert torch.get_num_threads() == threads


def test_no_row_comes_to_its_end(tiny):
    jobs = [job for jobs in bench.chosen(None, 8).values() for job in jobs]
    assert [len(job.source) for job in jobs] == [1, 1, 16, 16, 64, 64] * 2 and {job.beams for job in jobs} == {1, 5}
    by = bench.providers(TINY)
    assert all(provider(jobs[3]) > 0 for provider in by.values())
    with pytest.raises(RuntimeError, match=r"g2p batch 1 greedy: \[3\] tokens were made, not 8 a row"):
        bench._timed(lambda job: [[5, 6, 2]])(jobs[0])
    with pytest.raises(RuntimeError, match=r"\[\] tokens were made"):
        bench._timed(lambda job: [])(jobs[0])


def test_what_reads_everything_again_is_integrated_over_its_lengths(tiny, monkeypatch):
    """Seconds that grow as 3 + 2n for n tokens make 3 * 8 + 2 * 36, and the encoder's 1 is there once."""
    clock = iter([0, 1] + [t for n in (1, 3, 4, 6, 8) for t in (0, 3 + 2 * n)])
    monkeypatch.setattr(bench.time, "process_time", lambda: next(clock))
    (job,) = bench.chosen("g2p batch 16 5", 8)["g2p"]
    assert bench._recomputing(bench.Seq2Seq(TINY).eval())["torch.nn"](job) == pytest.approx(1 + 3 * 8 + 2 * 36)


def test_jobs_are_chosen_by_a_pattern(tiny, capsys):
    assert [job.name for job in bench.chosen("g2p batch 1 ", 8)["g2p"]] == ["g2p batch 1 greedy", "g2p batch 1 5 beams"]
    assert "base batch 64 5 beams" not in {job.name for job in bench.chosen("base", 8, quick=True)["base"]}
    for pattern, said in (("[", "is no regular expression"), ("huge", "finds none of: g2p batch 1 greedy, ")):
        assert main(["bench", "generate", "--only", pattern]) == 2
        assert said in capsys.readouterr().err


def test_every_goal_is_that_of_a_job():
    names = [job.name for jobs in bench.chosen(None, 8).values() for job in jobs]
    met = {
        (name, peer): bench.goal(name, peer) for name in names for peer in ("transformers", "torch.nn", "CTranslate2")
    }
    assert {(must, aim) for _, _, must, aim in bench.GOALS} <= set(met.values())
    assert met["g2p batch 1 greedy", "transformers"] == (2.8, 3.2) and met["base batch 16 greedy", "torch.nn"] == (
        1.0,
        None,
    )
    assert met["base batch 64 5 beams", "CTranslate2"] == (0.8, 1.0) and met["g2p batch 1 greedy", "CTranslate2"] == (
        None,
        None,
    )


def test_who_is_not_installed_is_named(tiny, monkeypatch, capsys):
    def absent(name):
        raise ValueError(f"{name} is not installed: pip install {name}")

    monkeypatch.setattr(bench, "optional_import", absent)
    assert list(bench.providers(TINY)) == ["tileformer", "torch.nn"]
    assert "skipped: transformers is not installed" in capsys.readouterr().out
