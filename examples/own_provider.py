"""A provider of your own in the benchmarks: judged against float64 like everybody's, then timed. Needs `bench`.

python examples/own_provider.py
"""

from unittest import mock

import torch

from tileformer.bench.calls import Call, Function
from tileformer.bench.calls.providers import Unavailable, providers
from tileformer.bench.calls.workloads import WORKLOADS
from tileformer.bench.speed.measure import Bench, Result


def by_hand(call: Call) -> Function:
    """Softmax in three lines. A provider gets a call once, and gives the function that is timed."""
    if call.options.get("causal"):
        raise Unavailable("knows no mask")  # printed instead of a time

    def function(tensors: dict, options: dict) -> torch.Tensor:
        x = tensors["x"]
        exponentials = (x - x.amax(-1, keepdim=True)).exp()
        return exponentials / exponentials.sum(-1, keepdim=True)

    return function


def careless(call: Call) -> Function:
    """The same, summed in bfloat16: fast, and never timed."""
    return lambda tensors, options: tensors["x"].bfloat16().softmax(-1).float()


def main() -> list[Result]:
    bench = Bench(torch.device("cpu"), torch.float32)  # on a GPU: torch.device("cuda"), torch.bfloat16
    call = next(call for call in WORKLOADS if call.op == "softmax")
    with mock.patch.dict(providers("softmax"), {"by hand": by_hand, "careless": careless}):
        results = list(bench.measure(call, ["tileformer", "by hand", "careless"], ["forward"]))
    for result in results:
        judged = f"{result.over_budget:.2f} of the error budget" if result.over_budget is not None else "not judged"
        timed = f"{result.median_ms:.3f} ms" if result.median_ms is not None else f"not timed: {result.reason}"
        print(f"{result.provider:<12} {judged}, {timed}")
    ours, right, wrong = results
    assert ours.median_ms and right.median_ms and not right.failed
    assert wrong.failed and wrong.median_ms is None
    return results


if __name__ == "__main__":
    main()
