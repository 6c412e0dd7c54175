"""The names that options choose from: by themselves, since a command line is read before PyTorch is loaded."""

UNLABELLED_SET = "unlabelled"  # all images of a folder, for pretraining alone
DATASETS = ("digits", "imagefolder", UNLABELLED_SET)
EVALUATION_NAMES = ("val", "valid", "validation")  # of the folder of evaluation images; or else test
AUGMENTATIONS = ("crop", "trivial", "affine", "none")
TWO_CROPS = ("moco_v2", "moco_v3", "digits")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
ARITHMETICS = ("float", "int8")

# What each task reads as the truth about an image: a class, labels, numbers or a mask.
TRUTHS = {"classification": "class", "multilabel": "labels", "regression": "numbers", "segmentation": "mask"}
DEFAULT_TASK = "classification"  # and the task of an adapter file that names none
PER_PIXEL = {task for task, truth in TRUTHS.items() if truth == "mask"}  # the tasks with a class for every pixel
# The values of --keep-best that each task has, with the column of metrics.csv that each value means.
KEEP_BEST = {
    "classification": {"accuracy": "val_accuracy", "balanced": "val_balanced_accuracy", "f1": "val_macro_f1"},
    "multilabel": {"macro-ap": "val_macro_ap", "micro-ap": "val_micro_ap", "auroc": "val_macro_auroc"},
    "regression": {"r2": "val_r2", "spearman": "val_spearman"},
    "segmentation": {"miou": "val_miou", "dice": "val_macro_dice", "pixels": "val_pixel_accuracy"},
}
TO_LABEL = ("to_label.csv", "to_label.html")  # the list that `deploy_lora.py choose` writes, and its pictures
