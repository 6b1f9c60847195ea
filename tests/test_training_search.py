"""Search and cross-validation: every choice once, resumed where it stopped, and folds that share no row."""

import math
import sys

import pytest

from tileformer.training.search import Trial, cross_validate, grid_search, random_search

GRID = {"lr": [0.1, 0.2, 0.4], "layers": [1, 2]}


class TestSearch:
    @pytest.fixture(autouse=True)
    def needs_optuna(self):
        pytest.importorskip("optuna", reason="the finetune extra is not installed")

    def test_a_grid_tries_every_combination_once_and_the_best_comes_first(self):
        tried = []

        def objective(parameters):
            tried.append(tuple(parameters.values()))
            return abs(parameters["lr"] - 0.2) + parameters["layers"]

        trials = grid_search(objective, GRID)
        assert sorted(tried) == [(lr, layers) for lr in (0.1, 0.2, 0.4) for layers in (1, 2)]
        assert trials[0] == Trial({"lr": 0.2, "layers": 1}, 1.0) and len(trials) == 6
        assert [trial.value for trial in trials] == sorted(trial.value for trial in trials)

    @pytest.mark.parametrize("kind", ["grid", "random"])
    def test_a_stopped_search_goes_on_from_its_file(self, kind, tmp_path):
        def search(objective, storage):
            if kind == "grid":
                return grid_search(objective, GRID, storage=storage)
            return random_search(objective, {"lr": (1e-4, 1e-1, "log")}, 5, seed=3, storage=storage)

        tried = []

        def objective(parameters):
            if len(tried) == 3 and kind not in tried:
                tried.append(kind)
                raise KeyboardInterrupt
            tried.append(parameters)
            return parameters["lr"]

        with pytest.raises(KeyboardInterrupt):
            search(objective, tmp_path / "search.db")
        found = search(objective, tmp_path / "search.db")
        tried.remove(kind)
        assert len(tried) == len(found) == (6 if kind == "grid" else 5)  # what was finished did not run again
        whole = search(lambda parameters: parameters["lr"], None)
        assert sorted(trial.value for trial in found) == sorted(trial.value for trial in whole)
        search(lambda _: pytest.fail("a finished search ran again"), tmp_path / "search.db")

    def test_random_choices_stay_in_their_ranges_and_follow_the_seed(self):
        space = {"lr": (1e-4, 1e-1, "log"), "dropout": (0.0, 0.5), "layers": (1, 4), "schedule": ["wsd", "cosine"]}
        first = random_search(lambda parameters: parameters["lr"], space, 40, seed=0)
        assert first == random_search(lambda parameters: parameters["lr"], space, 40, seed=0)
        assert first != random_search(lambda parameters: parameters["lr"], space, 40, seed=1)
        columns = {name: [trial.parameters[name] for trial in first] for name in space}
        assert all(1e-4 <= lr <= 1e-1 for lr in columns["lr"]) and all(0 <= p <= 0.5 for p in columns["dropout"])
        assert set(columns["layers"]) == {1, 2, 3, 4} and set(columns["schedule"]) == {"wsd", "cosine"}
        assert 10 <= sum(lr < 10**-2.5 for lr in columns["lr"]) <= 30  # evenly in the logarithm

    def test_one_file_keeps_several_searches_apart(self, tmp_path):
        tried, file = [], tmp_path / "search.db"

        def objective(parameters):
            tried.append(parameters)
            return 0.0

        for space in ({"lr": [0.1]}, {"lr": [0.1, 0.2]}):
            assert len(grid_search(objective, space, storage=file)) == len(space["lr"])
        for space, seed in (({"lr": (0.0, 1.0)}, 0), ({"lr": (0.0, 2.0)}, 0), ({"lr": (0.0, 2.0)}, 1)):
            assert len(random_search(objective, space, 2, seed=seed, storage=file)) == 2
        assert len(tried) == 1 + 2 + 3 * 2

    def test_a_run_that_diverges_is_last(self):
        def objective(parameters):
            if parameters["lr"] == 0.4:
                raise FloatingPointError("step 3: loss nan")
            return math.nan if parameters["lr"] == 0.2 else 1.0

        trials = grid_search(objective, {"lr": GRID["lr"]})
        assert [trial.value for trial in trials] == [1.0, math.inf, math.inf]

    @pytest.mark.parametrize("space", [{}, {"lr": []}], ids=str)
    def test_nothing_to_try_is_refused(self, space):
        with pytest.raises(ValueError, match="expected names with at least one value"):
            grid_search(lambda _: 0.0, space)


class TestFolds:
    @pytest.fixture(autouse=True)
    def needs_sklearn(self):
        pytest.importorskip("sklearn", reason="the finetune extra is not installed")

    def test_every_row_is_tested_once_and_classes_are_spread(self):
        labels = ["good"] * 20 + ["bad"] * 10
        tested = []

        def score(train, test):
            assert not set(train) & set(test) and len(train) + len(test) == 30
            assert sum(labels[row] == "bad" for row in test) == 2
            tested.extend(test)
            return len(test) / 30

        assert cross_validate(score, labels, 5) == pytest.approx([0.2] * 5)
        assert sorted(tested) == list(range(30)) != tested
        folds = []
        for seed in (0, 0, 1):
            cross_validate(lambda _, test: folds.append(test) or 0.0, labels, 5, seed=seed)
        assert folds[:5] == folds[5:10] != folds[10:]
        assert len(cross_validate(lambda *_: 0.0, [0] * 9 + [1] * 3, 3)) == 3  # as many rows as folds are enough

    @pytest.mark.parametrize(
        "labels, k, message",
        [
            ([0] * 9 + [1], 3, "class 1 has 1 rows, fewer than the 3 folds"),
            ([0] * 9, 3, "2 classes, got k=3"),
            ([0, 1] * 5, 1, "at least 2 folds"),
        ],
        ids=["rare", "one class", "one fold"],
    )
    def test_data_that_cannot_be_folded_are_refused(self, labels, k, message):
        with pytest.raises(ValueError, match=message):
            cross_validate(lambda *_: 0.0, labels, k)


@pytest.mark.parametrize("package", ["optuna", "sklearn.model_selection"])
def test_a_missing_package_names_the_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r'pip install "tileformer\[finetune\]"'):
        if package == "optuna":
            grid_search(lambda _: 0.0, GRID)
        else:
            cross_validate(lambda *_: 0.0, [0, 1] * 4, 2)
