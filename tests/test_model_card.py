"""The model card of an adapter."""

import shutil

import pytest

import deploy_lora
from finetune_lora import load_finetuned
from lora.adapter_file import read_adapter_file, write_adapter_file
from lora_utils import LoRAManager
from toolkit import InputError
from toolkit.answers.model_card import write_card

ABOUT = {"checkpoint": "base.pth", "arch": "vit_mini", "image_size": 16, "class_names": ["a", "b"]}


def card_of(**about) -> str:
    """The card of an adapter that no run has measured."""
    return write_card(ABOUT | about, {}, "flowers", "lora.pth")


def test_a_card_has_the_figures_of_the_run_and_what_the_hub_reads(finished_once, once, tmp_path, capsys):
    deploy_lora.main(["card", str(once / "lora.pth"), "--output", str(tmp_path / "README.md")])
    assert capsys.readouterr().out == f"wrote {tmp_path}/README.md\n"
    text = (tmp_path / "README.md").read_text()
    low, high = finished_once["val_accuracy_interval"]
    accuracy = f"| accuracy | {finished_once['val_accuracy']:.4g} | {low:.4g} to {high:.4g} |"
    of_dark = f"| dark | {finished_once['accuracy_per_class']['dark']:.4g} |"
    about = ("lora_rank: 8", "look it up on its publisher's page.", "On 15 evaluation images, after training on 21:")
    assert [words for words in (accuracy, of_dark, *about) if words not in text] == []
    assert str(once.parent) not in text  # no path of this machine
    write_adapter_file(read_adapter_file(once / "lora.pth"), once / "lora.safetensors")
    (once / "below").mkdir()
    other = deploy_lora.main(["card", f"{once}/below/../lora.safetensors", "--output", str(once / "README.md")])
    assert "\n# out\n" in other and accuracy in other  # as its folder is called
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(text)
    assert (card.data.license, card.data.pipeline_tag) == ("unknown", "image-classification")
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["accuracy"] == pytest.approx(finished_once["val_accuracy"])


def test_a_card_of_labels_has_the_figures_of_each_and_its_groups():
    about = ABOUT | {"task": {"kind": "multilabel", "thresholds": [0.5, 0.5]}}
    by_label = {"a": {"auroc": 0.9, "auroc_interval": [0.8, 1.0], "threshold": 0.25}, "b": {"threshold": 1.0}}
    results = {"val_images": 35, "val_groups": 18, "train_images": 70, "macro_f1": 0.5, "macro_f1_interval": [0.4, 0.6]}
    results |= {"val_macro_ap": 1.0, "val_macro_ap_interval": None}
    text = write_card(about, results | {"labels": by_label}, "flowers", "lora.pth")
    assert "On 35 evaluation images in 18 groups, over which the intervals are, after training on 70:" in text
    assert "| macro_f1 | 0.5 | 0.4 to 0.6 |\n| macro_ap | 1 | none |" in text
    assert "| label | auroc | threshold |\n|---|---|---|\n| a | 0.9 | 0.25 |\n| b |  | 1 |" in text


def test_a_card_of_masks_says_by_what_it_was_trained_on_what_and_what_that_gained():
    config = {"data": {"data_list": ["/mine/a.csv", "/mine/b.csv"], "data_dir": "/mine/images"}}
    about = ABOUT | {"task": {"kind": "segmentation"}, "config": config, "version": "0.1"}
    results = {"val_images": 5, "val_miou": 0.6, "val_miou_interval": None, "probe_miou_before": 0.4}
    results |= {"iou_per_class": {"a": 0.25, "b": None}}
    results["backbone"] = {"name": "moco-v9", "licence": "mit", "source": "somewhere"}
    text = write_card(about, results, "streets", "lora.pth")
    assert "\nWeights for vit_mini, trained over `moco-v9` on a.csv, b.csv: segmentation" in text
    assert "what is made of it: mit (somewhere)." in text
    assert "| miou of the linear probe, before training | 0.4 | |" in text
    assert "| class | iou_per_class |\n|---|---|\n| a | 0.25 |\n| b |  |" in text
    assert "--output maps " in text and "Settings, of version 0.1 of" in text


def test_a_card_names_the_base_its_licence_and_what_made_the_adapter_another():
    text = card_of(checkpoint="/somewhere/moco_v2_800ep_pretrain.pth.tar", config=3)
    assert "\nlicense: cc-by-nc-4.0\n" in text and "trained over `moco-v2-800ep`" in text
    assert "what is made of it: cc-by-nc-4.0 (https://dl.fbaipublicfiles.com/moco/" in text
    assert "Not measured." in text and "model-index: []" in text
    data = {"data_dir": "/mine/tulips", "dataset": "imagefolder"}
    text = card_of(checkpoint="/mine/moco-v2-of-my-own.pth", config={"data": data})
    assert "\nlicense: unknown\n" in text and "` on tulips: " in text
    # `load_finetuned` looks for a stage-1 adapter beside the file.
    text = card_of(**{"thresholds chosen": "for f1, in /mine/list.csv", "stage1_adapter": "/mine/moco_lora.pth"})
    assert "Not measured since the thresholds were chosen anew, for f1: `threshold` below is the run's." in text
    assert "`moco_lora.pth`, which is merged into it, has to lie next to `lora.pth`" in text
    text = card_of(**{"cut to rank": "2, 90.0% of the change's energy kept"})
    assert "since it was cut to rank 2, 90.0% of the change's energy kept: `lora_rank` below is the run's" in text


def test_a_card_says_what_its_images_have_chosen():
    for chosen, told in (
        ({"eval_split": "validation"}, ", set aside of the training images to choose settings by:"),
        ({"chosen_by": {"epoch": "they"}}, ", which chose the epoch: on others the figures are lower:"),
        ({"eval_split": "held-out", "chosen_by": {"learning rate": "trials"}}, ":"),
    ):
        results = {"val_images": 90, "val_accuracy": 0.5, "val_accuracy_interval": [0.4, 0.6], **chosen}
        assert f"\nOn 90 evaluation images{told}\n" in write_card(ABOUT, results, "flowers", "lora.pth")


@pytest.mark.parametrize("way", ["an adapter of an own loop", "trained on", "results of evaluate"])
def test_figures_of_another_adapter_are_refused(once, images, tmp_path, way):
    """Of one whose file says nothing of a run, or still says what it was loaded with; and of no run."""
    model, info = load_finetuned(once / "lora.pth")
    if way == "results of evaluate":
        deploy_lora.main(f"evaluate {once}/lora.pth {images}/val --output {tmp_path}/results.json".split())
        shutil.copy(tmp_path / "results.json", once)
    else:  # the file stays as large
        next(value for name, value in model.named_parameters() if "lora_B" in name).data += 1
    kept = {key: value for key, value in info.items() if key not in ("transform", "config")}
    LoRAManager(model).save_lora_checkpoint(once / "other.pth", kept if way == "an adapter of an own loop" else None)
    with pytest.raises(InputError, match="is of another file than"):
        deploy_lora.main(["card", str(once / "other.pth"), "--output", str(tmp_path / "README.md")])
