"""`tileformer bench gpu-day`: fits its minutes, goes on where a call stopped, loses nothing, fits its archive."""

import json
import os
import signal
import tarfile
import threading
import time
from pathlib import Path

import pytest

from tileformer.__main__ import main
from tileformer.bench.speed import gpu_day
from tileformer.bench.speed.gpu_day import Part

TALKS = """
import pathlib, sys, time
name, what, folder = sys.argv[1:4]
ran = pathlib.Path(__file__).with_name("ran")
first = name not in (ran.read_text() if ran.exists() else "")
with ran.open("a") as file:
    file.write(name + " ")
pathlib.Path(folder, name + ".json").write_text(name)
print("this is", name, *sys.argv[4:])
if what == "fails":
    sys.exit(3)
if what == "is cut" and first:
    print("time is up: nothing from here on was measured")
if what == "hangs" and first:
    time.sleep(60)
"""


def _part(name: str, what: str, seconds: int = 30, least: int = 0) -> Part:
    return Part(name, seconds, ("talks", name, what, "{folder}"), least=least)


@pytest.fixture
def day(tmp_path, monkeypatch):
    """Run gpu-day with these parts: its exit status; and what has run so far, in order."""
    (tmp_path / "talks.py").write_text(TALKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(parts: list[Part], *options: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(gpu_day, "PARTS", tuple(parts))
        code = main(["bench", "gpu-day", "--dry", "--output", str(tmp_path / "day"), *options])
        return code, (tmp_path / "ran").read_text().split()

    return run


def _statuses(tmp_path: Path) -> dict[str, str]:
    """Of every part, as the archive tells them."""
    with tarfile.open(tmp_path / "day.tar.gz") as tar:
        assert "day/report.md" in tar.getnames()
        kept = json.load(tar.extractfile("day/parts.json"))
    return {row["part"]: row["status"] for row in kept["parts"]}


def test_a_call_goes_on_where_one_stopped(day, tmp_path, capsys):
    parts = [_part("breaks", "fails"), _part("good", "is right"), _part("long", "is cut", least=20)]
    assert day(parts) == (1, ["breaks", "good", "long"])
    assert _statuses(tmp_path) == {"breaks": "FAILED (3)", "good": "done", "long": "cut short"}
    assert "the same command goes on" in capsys.readouterr().out
    assert day(parts) == (1, ["breaks", "good", "long", "long", "breaks"]), "what failed comes last, what is done never"
    assert _statuses(tmp_path)["long"] == "done"
    log = (tmp_path / "day" / "logs" / "long.log").read_text()
    assert log.count("this is long --seconds 75") == 2, "three times 30 seconds in a dry run, less those of a start"
    assert day(parts, "--again", "--only", "good")[1][-2:] == ["breaks", "good"]
    assert [path.read_text() for path in (tmp_path / "day").glob("good*.json")] == ["good", "good"]


def test_minutes_are_filled_with_what_fits(day, tmp_path, capsys):
    parts = [_part("whole", "is right", 40), _part("scales", "is right", 400, least=10), _part("small", "is right", 5)]
    assert day(parts, "--minutes", "1")[1] == ["scales", "small"]
    assert "left for a later call: it takes 40 s, there are" in capsys.readouterr().out
    assert "--seconds 2" in (tmp_path / "day" / "logs" / "scales.log").read_text(), "40 seconds, less those of a start"
    assert _statuses(tmp_path) == {"whole": "left", "scales": "done", "small": "done"}
    assert day(parts)[1] == ["scales", "small", "whole"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_day_is_packed_and_goes_on(day, tmp_path, number):
    def stop() -> None:
        while not (tmp_path / "ran").exists() or "hang" not in (tmp_path / "ran").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    parts = [_part("first", "is right"), _part("hang", "hangs"), _part("last", "is right")]
    before = signal.getsignal(number)
    thread = threading.Thread(target=stop)
    thread.start()
    assert day(parts) == (130, ["first", "hang"])
    thread.join()
    assert signal.getsignal(number) == before
    assert _statuses(tmp_path) == {"first": "done", "hang": "interrupted"}
    assert day(parts) == (0, ["first", "hang", "hang", "last"])


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ('{"device": "NVIDIA H100", "parts": []}', "has results of device NVIDIA H100, this is dry run"),
        ('{"device": 1', "parts.json is damaged"),
        ("[]", "parts.json is damaged"),
        ('{"device": "x", "parts": [{"part": "softmax", "seconds": null}]}', "parts.json is damaged"),
    ],
)
def test_other_results_are_not_mixed_in(tmp_path, capsys, kept, said):
    (tmp_path / "parts.json").write_text(kept)
    assert main(["bench", "gpu-day", "--dry", "--output", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_the_archive_leaves_out_the_largest_logs_first(tmp_path):
    folder = tmp_path / "day"
    (folder / "logs").mkdir(parents=True)
    sizes = {"logs/large.log": 60_000, "logs/small.log": 20_000, "picture.png": 50_000, "report.md": 100}
    for name, size in sizes.items():
        (folder / name).write_bytes(os.urandom(size))
    archive = tmp_path / "day.tar.gz"
    for most, dropped in (
        (200_000, []),
        (100_000, ["logs/large.log"]),
        (30_000, ["logs/large.log", "logs/small.log", "picture.png"]),
    ):
        assert gpu_day._pack(folder, archive, most) == dropped
        assert archive.stat().st_size <= most
        with tarfile.open(archive) as tar:
            assert set(tar.getnames()) == {f"day/{name}" for name in sizes if name not in dropped}
