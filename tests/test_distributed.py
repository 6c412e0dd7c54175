"""toolkit/distributed.py: what two processes do together, beside training (tests/test_processes.py)."""

import functools
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from children import together

from moco import pretrain
from toolkit import distributed


def impatient() -> None:
    """An exchange may take a second; the first process takes three for its download, and the others see its end."""
    dist.init_process_group = functools.partial(dist.init_process_group, timeout=timedelta(seconds=1))

    def main(argv):
        folder = Path(argv[0])
        distributed.join(torch.device("cpu"))
        for turn in range(2):
            with distributed.main_first():
                if distributed.is_main():
                    time.sleep(3)
                    (folder / f"download {turn}").touch()
                assert (folder / f"download {turn}").exists()
        assert distributed.all_sum(1) == [2]
        (folder / f"done {distributed.rank()}").touch()

    pretrain.main = main


@pytest.mark.slow
def test_others_wait_for_a_download_longer_than_an_exchange_may_take(tmp_path):
    children = together("moco.pretrain", str(tmp_path), tmp_path / "log", before=impatient)
    assert [child.wait(120) for child in children] == [0, 0], [child.output for child in children]
    assert (tmp_path / "done 0").exists() and (tmp_path / "done 1").exists()


def fail_first() -> None:
    def main(argv):
        distributed.join(torch.device("cpu"))
        try:
            with distributed.main_first():
                if distributed.is_main():
                    raise ValueError("no network")
        finally:
            Path(argv[0], f"left {distributed.rank()}").touch()
            distributed.all_sum(0)

    pretrain.main = main


@pytest.mark.slow
def test_a_download_that_fails_lets_the_others_go_on(tmp_path):
    """They then try it themselves, and all report the same."""
    children = together("moco.pretrain", str(tmp_path), tmp_path / "log", before=fail_first)
    codes = [child.wait(120) for child in children]
    assert codes[0] != 0 and "no network" in children[0].output
    assert (tmp_path / "left 0").exists() and (tmp_path / "left 1").exists()


def test_one_process_waits_for_nobody():
    with distributed.main_first():
        inside = distributed.world_size()
    assert inside == 1  # and it came to an end
