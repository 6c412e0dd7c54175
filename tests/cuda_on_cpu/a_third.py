"""A plugin of pytest, which takes a third of the cases on a GPU of each test, spread over them.

It is what every commit can afford: `pytest -p tests.cuda_on_cpu.a_third -k cuda`. The gate runs all.
"""

import collections


def pytest_collection_modifyitems(items: list) -> None:
    before = collections.Counter()
    chosen = []
    for item in items:
        test, _, case = item.nodeid.partition("[")
        if "cuda" not in case or before[test] % 3 == 0:
            chosen.append(item)
        before[test] += "cuda" in case
    items[:] = chosen
