"""DICOM files: their windows, units and inverted greys, in folders, archives and with --channels 1."""

import io
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.image_files import bytes_of, tar_of, write
from toolkit import InputError
from toolkit.images import bands, dicom, shards, transforms
from toolkit.images.folders import ImageFiles, image_names

pydicom = pytest.importorskip("pydicom")


def tagged(**tags) -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset


def file_of(pixels: np.ndarray, **tags) -> bytes:
    """A DICOM file of 16-bit greys (H, W), or frames of them, with these tags."""
    usual = {"SamplesPerPixel": 1, "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 0}
    usual |= {"Rows": pixels.shape[-2], "Columns": pixels.shape[-1], "PhotometricInterpretation": "MONOCHROME2"}
    if pixels.ndim == 3:
        usual["NumberOfFrames"] = len(pixels)
    dataset = tagged(**usual | tags)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset.PixelData = pixels.astype(np.uint16).tobytes()
    return bytes_of(dataset.save_as, enforce_file_format=True)


RAMP = np.arange(0, 4000, 40).reshape(10, 10)
SIGNED = {"BitsStored": 13, "PixelRepresentation": 1}  # -4096 to 4095, and -4095 to 4096 with the sign exchanged
WINDOW = {"WindowCenter": 1500, "WindowWidth": 1001}  # from 1000 to 2000
WIDE = {"WindowCenter": 0, "WindowWidth": 10001}  # no pixel reaches its dark end
INVERTED = {"PhotometricInterpretation": "MONOCHROME1"}
SQUARES = np.arange(4000) ** 2 // 4000
TABLE = {"VOILUTSequence": [tagged(LUTDescriptor=[4000, 0, 12], LUTData=SQUARES.astype(np.uint16).tobytes())]}


def test_a_picture_is_seen_through_the_window_of_its_file_or_by_its_bits():
    for tags, greys in (
        ({"BitsStored": 12, "HighBit": 11}, 255 * RAMP / 4095),
        (WINDOW | {"RescaleSlope": 2, "RescaleIntercept": -1000}, 255 * np.clip((2.0 * RAMP - 2000) / 1000, 0, 1)),
        (INVERTED | {"BitsStored": 12}, 255 - 255 * RAMP / 4095),
        (SIGNED, 255 * (RAMP + 4096) / 8191),
        (SIGNED | {"RescaleSlope": -1, "RescaleIntercept": 0}, 255 * (4095 - RAMP) / 8191),
        (WINDOW | {"RescaleSlope": -1, "RescaleIntercept": 4000}, 255 * np.clip((3000.0 - RAMP) / 1000, 0, 1)),
        (WIDE, 255 * (RAMP + 5000) / 10000),
        (WIDE | INVERTED, 255 - 255 * (RAMP + 5000) / 10000),
        (TABLE, 255 * SQUARES[RAMP] / 4095),  # in the place of a window, with the range of its bits
    ):
        image = dicom.picture(file_of(RAMP, **tags))
        np.testing.assert_allclose(np.asarray(image), greys, atol=1, err_msg=str(tags))
        assert np.asarray(transforms.to_rgb(image)).shape == (10, 10, 3)


def test_numbers_are_in_their_own_unit_which_frames_share():
    """As the window is in enhanced CT and MR, where these stand in sequences."""
    unit = {"RescaleSlope": 2, "RescaleIntercept": -1000}
    frames = np.stack([RAMP, RAMP + 7])
    group = tagged(PixelValueTransformationSequence=[tagged(**unit)], FrameVOILUTSequence=[tagged(**WINDOW)])
    shared = file_of(frames, SharedFunctionalGroupsSequence=[group])
    for content in (file_of(frames, **WINDOW, **unit), shared):
        np.testing.assert_array_equal(bands.decoded(content)[..., 0], 2 * RAMP - 1000)  # of the first frame
    greys = 255 * np.clip((2.0 * RAMP - 2000) / 1000, 0, 1)
    np.testing.assert_allclose(np.asarray(dicom.picture(shared)), greys, atol=1)
    np.testing.assert_array_equal(bands.decoded(file_of(RAMP, BitsStored=12, **INVERTED))[..., 0], 4095 - RAMP)


def test_files_without_suffix_are_known_by_their_mark(tmp_path):
    """In folders, at addresses and in archives; one called by its UID has a mask of its own."""
    names = ["1.2.840.100", "1.2.840.101", "a.dcm"]
    for name in (*names, "DICOMDIR", "scan.old"):  # the fourth lists a disc, and nothing else is opened
        (tmp_path / name).write_bytes(file_of(RAMP))
    (tmp_path / "README").write_text("of the disc")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "1.2.840.101_mask.png").write_bytes(b"")
    assert image_names(tmp_path, others=Counter()) == names
    assert [image.size for image in ImageFiles(tmp_path, names)] == [(10, 10)] * 3
    pytest.importorskip("fsspec").filesystem("memory").put(f"{tmp_path}/1.2.840.100", "/disc/IM0001")
    [name] = image_names(Path("memory://disc"))
    assert ImageFiles("memory://disc", [name])[0].size == (10, 10)
    write(tmp_path / "tar/a.tar", tar_of({"1.dcm": file_of(RAMP)}))
    assert shards.read_shards(tmp_path / "tar")[0][0].size == (10, 10)


def test_damaged_files_a_missing_package_and_what_may_grow_to_any_size_are_one_line(tmp_path, monkeypatch):
    dataset = pydicom.dcmread(io.BytesIO(file_of(RAMP)))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    deflated = bytes_of(dataset.save_as, enforce_file_format=True)
    large = file_of(RAMP, Rows=60_000, Columns=60_000)
    said = "an image of 7,200,000,000 bytes, which is more than its bytes can hold"
    for content, reason in ((deflated, "compressed as a whole"), (large, said)):
        with pytest.raises(ValueError, match=reason):
            dicom.read(content)
    (tmp_path / "torn.dcm").write_bytes(file_of(RAMP)[:-50])
    images = ImageFiles(tmp_path, ["torn.dcm"])
    with pytest.raises(InputError, match=r"torn.dcm: not a readable image \(.*\); repair or remove it"):
        images[0]
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(InputError, match=r"a DICOM file needs pydicom .*: pip install pydicom pylibjpeg\[all\]"):
        images[0]
