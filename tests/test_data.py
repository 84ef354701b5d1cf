"""Reading STL-10 and image folders, the cache, and the download."""

import errno
import os
import shutil
import tarfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision import transforms
from torchvision.datasets import STL10

CLASSES = "airplane bird car cat deer dog horse monkey ship truck".split()
CONTENT = {
    "train": ["bird", "horse", "truck"],
    "unlabeled": [None, None],
    "test": ["horse", "airplane", "horse"],
}


def stl10_bytes(picture):
    """A picture (row, column, channel) as STL-10 stores it: channel by channel, and each column from top to bottom."""
    rows, columns, channels = picture.shape
    return bytes(picture[r, c, k] for k in range(channels) for c in range(columns) for r in range(rows))


def as_tensor(pictures):
    """Pictures (row, column, channel) as load_images returns them, (N, channel, row, column)."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def drawn():
    """Eight pictures of 96x96, no two alike and none symmetrical, by part."""
    rng = np.random.default_rng(3)
    return {part: list(rng.integers(0, 256, (len(names), 96, 96, 3), np.uint8)) for part, names in CONTENT.items()}


@pytest.fixture
def stl10(drawn, tmp_path):
    """A data folder that holds the drawn pictures as STL-10."""
    folder = tmp_path / "data" / "stl10_binary"
    folder.mkdir(parents=True)
    for part, pictures in drawn.items():
        (folder / f"{part}_X.bin").write_bytes(b"".join(map(stl10_bytes, pictures)))
        if part != "unlabeled":
            (folder / f"{part}_y.bin").write_bytes(bytes(CLASSES.index(name) + 1 for name in CONTENT[part]))
    (folder / "class_names.txt").write_text("\n".join(CLASSES) + "\n")
    return folder.parent


@pytest.fixture
def stl10_cfg(cfg, stl10):
    """Settings for it that leave the pixels alone."""
    return cfg.model_copy(update={"data_dir": stl10, "image_size": 96})


@pytest.fixture
def folder_cfg(cfg, image_folder):
    """Settings for the image folder that leave the pixels alone."""
    return cfg.model_copy(update={"data_dir": image_folder, "image_size": 96})


def read_folder(folder):
    return as_tensor(Image.open(file).convert("RGB") for file in sorted(folder.iterdir()))


def cache_of(cfg):
    """The only cache that there is."""
    (file,) = cfg.output_dir.rglob("*.safetensors")
    return file


def leftovers(cfg):
    """All files below the folder that caches are made in, but for locks."""
    return [path for path in cfg.output_dir.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_stl10_is_read_the_right_way_up_and_in_order(pv, stl10_cfg, drawn):
    images = pv.load_images(stl10_cfg, "train+unlabeled")
    assert images.dtype == torch.uint8
    assert torch.equal(images, as_tensor(drawn["train"] + drawn["unlabeled"]))
    assert torch.equal(pv.load_images(stl10_cfg, "test"), as_tensor(drawn["test"]))


def test_a_class_of_stl10_is_chosen_by_name(pv, stl10_cfg, drawn):
    horses = pv.load_images(stl10_cfg, "test", "horse")
    assert torch.equal(horses, as_tensor([drawn["test"][0], drawn["test"][2]]))
    assert torch.equal(pv.load_images(stl10_cfg, "train+unlabeled", "bird"), as_tensor(drawn["train"][:1]))


def test_a_split_comes_with_the_index_of_each_pictures_class(pv, stl10_cfg, folder_cfg):
    images, labels, classes = pv.load_split(stl10_cfg, "train+unlabeled")
    assert [classes[label] for label in labels] == ["bird", "horse", "truck", "", ""] and len(images) == 5
    images, labels, classes = pv.load_split(folder_cfg, "train+unlabeled")
    assert [classes[label] for label in labels] == ["bird"] * 6 + ["horse"] * 6 + [""] * 6 and len(images) == 18


@pytest.mark.parametrize("split", ["train+unlabeled", "test"])
def test_torchvision_reads_the_same_pixels_and_labels_from_the_same_files(pv, cfg, monkeypatch, split):
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)  # it knows the real files only, by their md5
    theirs = STL10(cfg.data_dir, split)
    cfg = cfg.model_copy(update={"image_size": 96})
    assert torch.equal(pv.load_images(cfg, split), torch.from_numpy(theirs.data))
    for name in ("horse", "bird"):
        chosen = theirs.data[theirs.labels == theirs.classes.index(name)]
        assert torch.equal(pv.load_images(cfg, split, name), torch.from_numpy(chosen))


def test_pictures_are_resized_as_torchvisions_resize_does_it(pv, stl10_cfg, drawn):
    images = pv.load_images(stl10_cfg.model_copy(update={"image_size": 64}), "test")
    resized = [transforms.Resize(64)(Image.fromarray(picture)) for picture in drawn["test"]]
    assert torch.equal(images, as_tensor(resized))


def test_an_image_folder_has_the_same_splits_and_classes(pv, folder_cfg, image_folder):
    parts = [read_folder(image_folder / part) for part in ("train/bird", "train/horse", "unlabeled")]
    assert torch.equal(pv.load_images(folder_cfg, "train+unlabeled"), torch.cat(parts))
    assert torch.equal(pv.load_images(folder_cfg, "train+unlabeled", "horse"), parts[1])
    assert torch.equal(pv.load_images(folder_cfg, "test", "bird"), read_folder(image_folder / "test/bird"))


def test_unlabeled_pictures_of_a_folder_have_no_class(pv, folder_cfg):
    with pytest.raises(pv.ReaderError, match="no class 'unlabeled' .*bird.*horse"):
        pv.load_images(folder_cfg, "train+unlabeled", "unlabeled")


def test_the_class_is_the_folder_below_the_split_however_deep_a_picture_lies(pv, folder_cfg, image_folder):
    for place in ("train/horse/brown", "unlabeled/first", "train"):
        (image_folder / place).mkdir(exist_ok=True)
        shutil.copy(image_folder / "test/bird/000.png", image_folder / place / "900.png")
    _, labels, classes = pv.load_split(folder_cfg, "train+unlabeled")
    assert classes == ["", "bird", "horse"] and labels.bincount().tolist() == [6 + 2, 6, 6 + 1]


def test_a_link_that_leads_nowhere_is_passed_over(pv, folder_cfg, image_folder):
    (image_folder / "test/bird/900.png").symlink_to(image_folder / "gone.png")
    assert len(pv.load_images(folder_cfg, "test", "bird")) == 5


def test_a_folder_without_unlabeled_pictures_will_do(pv, folder_cfg, image_folder):
    shutil.rmtree(image_folder / "unlabeled")
    assert len(pv.load_images(folder_cfg, "train+unlabeled")) == 12


def test_jpeg_grey_and_transparent_pictures_become_rgb_and_other_files_are_ignored(pv, folder_cfg, image_folder):
    Image.new("L", (96, 96), 70).save(image_folder / "unlabeled/900.JPG")
    Image.new("RGBA", (96, 96), (10, 20, 30, 255)).save(image_folder / "unlabeled/901.png")
    (image_folder / "unlabeled/notes.txt").write_text("not a picture")
    images = pv.load_images(folder_cfg, "unlabeled")
    assert len(images) == 8
    assert images[6].unique().tolist() == [70] and images[7, :, 0, 0].tolist() == [10, 20, 30]


def test_a_picture_that_is_not_square_loses_its_ends_and_keeps_its_proportions(pv, folder_cfg, image_folder):
    wide = np.zeros((96, 192, 3), np.uint8)
    wide[:, 48:144] = 255
    Image.fromarray(wide).save(image_folder / "unlabeled/000.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(image_folder / "unlabeled/001.png")
    assert (pv.load_images(folder_cfg, "unlabeled")[:2] == 255).all()


def misstate_length(file):
    """Let a PNG file say that its pixels take half the bytes that they take."""
    content = bytearray(file.read_bytes())
    start = content.index(b"IDAT") - 4
    content[start : start + 4] = (int.from_bytes(content[start : start + 4], "big") // 2).to_bytes(4, "big")
    file.write_bytes(content)


def claim_to_be_huge(file):
    """Let a PNG file say, with a valid checksum, that it is a hundred thousand pixels wide and high."""
    content = bytearray(file.read_bytes())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    file.write_bytes(content)


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "text": lambda file: file.write_text("not a picture"),
    "a wrong length inside": misstate_length,
    "absurdly large": claim_to_be_huge,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_broken_picture_is_reported_counted_and_left_out(pv, folder_cfg, image_folder, capsys, damage):
    whole = read_folder(image_folder / "train/horse")
    damage(image_folder / "train/horse/003.png")
    assert torch.equal(pv.load_images(folder_cfg, "train", "horse"), whole[[0, 1, 2, 4, 5]])
    assert len(pv.load_images(folder_cfg, "train")) == 11
    said = capsys.readouterr().out
    assert "1 of 12" in said and "003.png" in said


def test_a_folder_of_broken_pictures_is_refused_and_leaves_no_cache(pv, folder_cfg, image_folder):
    for file in (image_folder / "unlabeled").iterdir():
        file.write_bytes(b"")
    with pytest.raises(pv.ReaderError, match=f"none of the 6 files in {image_folder} is a readable image"):
        pv.load_images(folder_cfg, "unlabeled")
    assert leftovers(folder_cfg) == []


def test_a_photograph_taken_with_the_camera_on_its_side_is_turned_upright(pv, folder_cfg, image_folder):
    upright = Image.open(image_folder / "unlabeled/000.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation of a camera held on its side
    upright.rotate(90).save(image_folder / "unlabeled/000.png", exif=exif)
    assert torch.equal(pv.load_images(folder_cfg, "unlabeled")[0], as_tensor([upright])[0])


def test_a_class_that_is_not_there_is_refused_with_the_classes_there_are(pv, stl10_cfg):
    with pytest.raises(pv.ReaderError, match="'zebra' in test .*airplane.*horse"):
        pv.load_images(stl10_cfg, "test", "zebra")


def test_no_data_at_all_is_refused_with_the_place_and_the_way_out(pv, cfg, tmp_path):
    with pytest.raises(pv.ReaderError, match=f"{tmp_path / 'nowhere'}.*PEGASUS_DATA_DIR"):
        pv.load_images(cfg.model_copy(update={"data_dir": tmp_path / "nowhere"}), "test")


@pytest.mark.parametrize("name", ["unlabeled_X.bin", "train_X.bin", "train_y.bin", "class_names.txt"])
def test_a_missing_file_of_stl10_is_named(pv, stl10_cfg, stl10, name):
    file = stl10 / "stl10_binary" / name
    file.unlink()
    with pytest.raises(pv.ReaderError, match=str(file)):
        pv.load_images(stl10_cfg, "train+unlabeled")


def truncate(file):
    os.truncate(file, file.stat().st_size - 1)


FLAWS = {
    "a picture cut short": ("test_X.bin", truncate, f"size {3 * 96 * 96 * 3 - 1} into shape .3,96,96"),
    "no pictures": ("test_X.bin", lambda file: os.truncate(file, 0), "empty file"),
    "a label too few": ("test_y.bin", truncate, "3 images, 2 labels"),
    "a label 0": ("test_y.bin", lambda file: file.write_bytes(b"\x07\x00\x0a"), "not all of 1 to 10"),
    "a label without a class": ("test_y.bin", lambda file: file.write_bytes(b"\x07\x01\x0b"), "not all of 1 to 10"),
}


@pytest.mark.parametrize("name, spoil, figure", FLAWS.values(), ids=FLAWS)
def test_a_flawed_file_of_stl10_is_named_and_leaves_no_cache(pv, stl10_cfg, stl10, name, spoil, figure):
    spoil(stl10 / "stl10_binary" / name)
    with pytest.raises(pv.ReaderError, match=f"{stl10 / 'stl10_binary'}/test_.*{figure}"):
        pv.load_images(stl10_cfg, "test")
    assert leftovers(stl10_cfg) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's mapped files")
def test_the_images_are_mapped_from_the_cache_and_not_read(pv, stl10_cfg):
    pv.load_images(stl10_cfg, "test")  # makes the cache
    images = pv.load_images(stl10_cfg, "test")
    assert str(cache_of(stl10_cfg)) in Path("/proc/self/maps").read_text()
    assert len(images) == 3


def test_a_change_to_the_images_in_memory_does_not_reach_the_cache(pv, stl10_cfg, drawn):
    pv.load_images(stl10_cfg, "test")  # makes the cache, which the next one maps
    pv.load_images(stl10_cfg, "test").zero_()
    assert torch.equal(pv.load_images(stl10_cfg, "test"), as_tensor(drawn["test"]))


def test_a_second_start_uses_the_same_cache(pv, stl10_cfg, monkeypatch):
    first = pv.load_images(stl10_cfg, "test").clone()
    before = cache_of(stl10_cfg).stat()
    monkeypatch.setattr(pv.Image, "fromarray", None)  # no picture can be made now
    second = pv.load_images(stl10_cfg, "test")
    after = cache_of(stl10_cfg).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert torch.equal(first, second)


def test_pictures_exchanged_for_others_of_the_same_size_are_noticed(pv, stl10_cfg, drawn):
    pv.load_images(stl10_cfg, "test")
    file = stl10_cfg.data_dir / "stl10_binary" / "test_X.bin"
    time = file.stat().st_mtime_ns
    file.write_bytes(b"".join(stl10_bytes(255 - picture) for picture in drawn["test"]))
    os.utime(file, ns=(time, time + 10**9))
    assert torch.equal(pv.load_images(stl10_cfg, "test"), as_tensor(255 - picture for picture in drawn["test"]))


def test_splits_sizes_and_folders_have_caches_of_their_own(pv, stl10_cfg, folder_cfg):
    small = stl10_cfg.model_copy(update={"image_size": 32})
    wanted = [(stl10_cfg, "test"), (small, "test"), (small, "train"), (small, "train+unlabeled"), (folder_cfg, "test")]
    shapes = [(3, 96), (3, 32), (3, 32), (5, 32), (10, 96)]
    assert [tuple(pv.load_images(*each).shape[::3]) for each in wanted * 2] == shapes * 2
    assert len(list(small.output_dir.rglob("*.safetensors"))) == 5


SPOILED = {
    "truncated": truncate,
    "empty": lambda file: os.truncate(file, 0),
    "cut in its header": lambda file: os.truncate(file, 20),
    "missing": Path.unlink,
    "text": lambda file: file.write_text("not a cache, though it is long enough to be one"),
    "without a stamp": lambda file: save_file({"images": torch.zeros(1)}, file),
    "with another stamp": lambda file: save_file({"images": torch.zeros(1)}, file, {"stamp": "x", "classes": "[]"}),
    "without its images": lambda file: save_file({"labels": torch.zeros(1)}, file, safe_open(file, "pt").metadata()),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_spoiled_cache_is_made_again(pv, stl10_cfg, drawn, spoil):
    pv.load_images(stl10_cfg, "test")
    spoil(cache_of(stl10_cfg))
    assert torch.equal(pv.load_images(stl10_cfg, "test"), as_tensor(drawn["test"]))
    assert torch.equal(pv.load_images(stl10_cfg, "test", "airplane"), as_tensor(drawn["test"][1:2]))


def test_a_second_process_waits_for_the_first_ones_cache(pv, stl10_cfg, drawn, monkeypatch):
    made, build, lock = [], pv.build_cache, pv.FileLock
    asked, waits = threading.Semaphore(0), threading.Event()

    def build_slowly(cfg, named, cache, stamp):
        made.append(cache)
        assert waits.wait(60)
        return build(cfg, named, cache, stamp)

    monkeypatch.setattr(pv, "build_cache", build_slowly)
    monkeypatch.setattr(pv, "FileLock", lambda file: asked.release() or lock(file))
    with ThreadPoolExecutor() as pool:
        results = [pool.submit(pv.load_images, stl10_cfg, "test") for _ in range(2)]
        both = all(asked.acquire(timeout=60) for _ in results)
        waits.set()
        assert both and all(torch.equal(result.result(), as_tensor(drawn["test"])) for result in results)
    assert len(made) == 1


def test_a_changed_source_picture_makes_a_new_cache_in_place_of_the_old(pv, folder_cfg, image_folder):
    pv.load_images(folder_cfg, "test", "bird")
    Image.new("RGB", (96, 96), (1, 2, 3)).save(image_folder / "test/bird/002.png")
    assert torch.equal(pv.load_images(folder_cfg, "test", "bird"), read_folder(image_folder / "test/bird"))
    assert cache_of(folder_cfg).is_file()


def test_images_that_are_in_use_stay_as_they_are_when_the_cache_is_made_again(pv, folder_cfg, image_folder):
    pv.load_images(folder_cfg, "test")  # makes the cache, which the next one maps
    in_use = pv.load_images(folder_cfg, "test")
    before = in_use.clone()
    (image_folder / "test/bird/000.png").unlink()
    pv.load_images(folder_cfg, "test")
    assert torch.equal(in_use, before)


def test_a_picture_that_changed_without_its_name_and_size_makes_a_new_cache(pv, folder_cfg, image_folder):
    for brightness in (10, 20):
        Image.new("RGB", (96, 96), (brightness,) * 3).save(image_folder / "test/bird/002.png")
        birds = pv.load_images(folder_cfg, "test", "bird")
        assert birds[2].unique().tolist() == [brightness]


def test_a_picture_that_is_gone_is_gone_from_the_cache(pv, folder_cfg, image_folder):
    assert len(pv.load_images(folder_cfg, "test", "horse")) == 5
    (image_folder / "test/horse/000.png").unlink()
    assert len(pv.load_images(folder_cfg, "test", "horse")) == 4
    assert cache_of(folder_cfg).is_file()


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failure_half_way_leaves_no_half_made_cache(pv, stl10_cfg, drawn, failure):
    with pytest.MonkeyPatch.context() as patch:
        pictures = iter(drawn["test"][:2])

        def fail_at_the_third(picture, *_):
            if next(pictures, None) is None:
                raise failure
            return picture

        patch.setattr(pv.ImageOps, "fit", fail_at_the_third)
        with pytest.raises((KeyboardInterrupt, OSError, pv.ReaderError)):
            pv.load_images(stl10_cfg, "test")
    assert leftovers(stl10_cfg) == []
    assert torch.equal(pv.load_images(stl10_cfg, "test"), as_tensor(drawn["test"]))


@pytest.fixture
def empty_cfg(cfg, tmp_path):
    """Settings for a data folder that is still to be made."""
    return cfg.model_copy(update={"data_dir": tmp_path / "new"})


def deliver(url, root, md5):
    """In place of download_url: put a small archive, made of the smoke data, where the real one would lie."""
    assert url == STL10.url and md5 == STL10.tgz_md5
    source = Path(os.environ["PEGASUS_DATA_DIR"]) / "stl10_binary"
    with tarfile.open(Path(root) / STL10.filename, "w:gz", compresslevel=1) as archive:
        archive.add(source, "stl10_binary")


def test_a_downloaded_archive_is_checked_by_md5_and_unpacked(pv, empty_cfg, cfg, monkeypatch):
    monkeypatch.setattr(pv, "download_url", deliver)
    pv.download_stl10(empty_cfg)
    assert sorted(p.name for p in empty_cfg.data_dir.iterdir()) == ["stl10_binary", STL10.filename]
    assert torch.equal(pv.load_images(empty_cfg, "test"), pv.load_images(cfg, "test"))


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("File not found or corrupted.")])
def test_a_failed_download_says_what_to_fetch_and_where_to_put_it(pv, empty_cfg, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pv, "download_url", fail)
    with pytest.raises(pv.ReaderError) as refusal:
        pv.download_stl10(empty_cfg)
    message = str(refusal.value)
    assert STL10.url in message and str(empty_cfg.data_dir / STL10.filename) in message and str(error) in message
    assert pv.find_data(empty_cfg) is None


def test_a_disk_that_fills_while_unpacking_leaves_the_archive_and_no_half_unpacked_folder(pv, empty_cfg, monkeypatch):
    def fill_the_disk(archive, folder):
        (Path(folder) / "stl10_binary").mkdir()
        (Path(folder) / "stl10_binary" / "train_X.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pv, "download_url", deliver)
    monkeypatch.setattr(pv, "extract_archive", fill_the_disk)
    with pytest.raises(pv.ReaderError, match=f"No space left on device.*7 GB in {empty_cfg.data_dir}"):
        pv.download_stl10(empty_cfg)
    assert [path.name for path in empty_cfg.data_dir.iterdir()] == [STL10.filename]
    assert pv.find_data(empty_cfg) is None
