"""What processes of a loader work on can be sent to them, as Python 3.14 does on Linux and others do always."""

import multiprocessing
import pickle

import children  # noqa: F401 - the server of forks has then imported the scripts
import pytest

import deploy_lora
from moco import pretrain
from toolkit.images.data import OPEN_LOADERS, Transformed, build_loader, end_workers
from toolkit.images.sources import load_splits
from toolkit.images.transforms import eval_transform

LISTED = "--data-dir {hospital} --group-by Patient --data-list {hospital}/"
RUNS = {
    "images in folders": "--augmentation trivial",
    "images without labels": "--labels-per-class 5 --unlabelled {images}/train",
    "several labels": f"--task multilabel {LISTED}labels.csv",
    "numbers": f"--task regression {LISTED}numbers.csv",
    "masks": "--task segmentation --data-dir {pairs} --augmentation crop",
    "cached features": "--adapt-last 1 --cache-features disk",
}


@pytest.fixture(autouse=True)
def features_here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("name", RUNS)
def test_what_loaders_of_a_run_hold_can_be_pickled(start, hospital, pairs, images, name):
    OPEN_LOADERS.clear()  # of other tests
    loaders = start(RUNS[name].format(hospital=hospital, pairs=pairs, images=images)).loaders
    opened = list(OPEN_LOADERS)
    for loader in opened:
        pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn))
    assert loaders.train in opened and len(opened) >= 3


def test_processes_that_wait_for_the_next_pass_end():
    before = set(multiprocessing.active_children())
    loader = build_loader(Transformed(load_splits("digits").val.at_most(4), eval_transform(8)), 2, workers=1)
    assert len(list(loader)) == 2
    assert len(set(multiprocessing.active_children()) - before) == 1
    end_workers()
    assert set(multiprocessing.active_children()) <= before


@pytest.fixture
def forkserver():
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
def test_scripts_read_images_by_processes_that_are_not_forked(forkserver, finetune, images, tmp_path):
    results = finetune("--adapt-last 1 --cache-features disk --workers 1 --epochs 1")
    adapter = results["folder"] / "lora.pth"
    rows = deploy_lora.main(f"predict {adapter} {images}/val --workers 1 --output {tmp_path}/rows.csv".split())
    assert len(rows) == 15
    told = "--image-size 8 --batch-size 7 --epochs 1 --dim 8 --queue-size 14 --device cpu --workers 1"
    results = pretrain.main(f"--data-dir {images} --output-dir {tmp_path}/stage1 --moco-version 2 {told}".split())
    assert results["epochs"] == 1
