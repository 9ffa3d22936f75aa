"""eval_attention_masks.py: scores against a loop over pixels, on real photographs with drawn objects."""

import re

import numpy as np
import pytest
import torch
from conftest import arguments_of, assert_near, shared, sharp_nano
from PIL import Image

import dino_backbones
import dino_features
import dino_images
import dino_sample
import eval_attention_masks
import utils

SMALL = ["--arch", "vit_nano", "--patch_size", 16, "--num_workers", 0, "--device", "cpu", "--image_size", 64, 96]


def jaccard_by_hand(mask, labels, label):
    """Jaccard index of a mask of patches [h, w] with an object, pixel by pixel."""
    height, width = labels.shape
    both = either = 0
    for y, x in np.ndindex(labels.shape):
        if labels[y, x] == 255:
            continue
        in_mask = bool(mask[y * mask.shape[0] // height, x * mask.shape[1] // width])
        of_object = labels[y, x] == label
        both += in_mask and of_object
        either += in_mask or of_object
    return both / either


def test_an_object_has_the_score_of_its_best_head_without_void_pixels():
    rng = np.random.RandomState(0)
    masks, labels = rng.rand(3, 4, 5) > 0.6, np.zeros((41, 33), dtype=np.int64)
    labels[5:20, 3:15], labels[18:39, 12:30], labels[30:41, 0:9], labels[:3] = 1, 7, 255, 255
    got = eval_attention_masks.jaccard_of_objects(torch.from_numpy(masks), torch.from_numpy(labels))
    want = [max(jaccard_by_hand(mask, labels, label) for mask in masks) for label in (1, 7)]
    assert_near(got, want, 1e-6)
    assert len({*want}) == 2


def test_a_head_that_covers_an_object_exactly_has_a_score_of_1():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[1, 1:3, 2:] = True
    labels = torch.zeros(32, 32, dtype=torch.int64)
    labels[8:24, 16:] = 3
    assert eval_attention_masks.jaccard_of_objects(masks, labels).tolist() == [1.0]
    assert eval_attention_masks.jaccard_of_objects(masks, torch.full((8, 8), 255)).shape == (0,)


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """Three photographs in the layout of VOC2012; the second one has no object."""
    root = tmp_path_factory.mktemp("VOC2012")
    for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationObject"):
        (root / folder).mkdir(parents=True)
    photographs = dino_sample.find_photographs(["astronaut.png", "coffee.png", "chelsea.png"])
    for number, path in enumerate(photographs):
        image = Image.open(path).convert("RGB").resize((100, 80))
        image.save(root / "JPEGImages" / f"2007_{number}.jpg")
        labels = np.zeros((80, 100), dtype=np.uint8)
        if number != 1:
            labels[10:40, 20:60], labels[38:42, 20:60], labels[50:75, 10 + number : 50] = 1, 255, 2
        Image.fromarray(labels).save(root / "SegmentationObject" / f"2007_{number}.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_0\n2007_1\n2007_2\n")
    return root


def network(seed):
    torch.manual_seed(seed)
    return sharp_nano(48)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(our network's file, a file with the layout of a supervised DeiT's)."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(network(0).state_dict(), folder / "ours.pth")
    torch.save({"model": dino_backbones.build_backbone("vit_nano", 16, 48)[0].state_dict()}, folder / "supervised.pth")
    return folder / "ours.pth", folder / "supervised.pth"


def scores(capsys, *flags):
    """(the line about the data, {column: [(over objects, over images) per threshold]}) that the script prints."""
    eval_attention_masks.main(arguments_of(eval_attention_masks, *SMALL, *flags))
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Jaccard"))
    names = re.split(r"\s{2,}", lines[start])[1:]
    rows = [re.findall(r"([\d.]+) \(over images ([\d.]+)\)", line) for line in lines[start + 1 :]]
    columns = [[tuple(map(float, cell)) for cell in column] for column in zip(*rows, strict=True)]
    return lines[start - 1], dict(zip(names, columns, strict=True))


def test_the_table_has_the_means_over_objects_and_over_images(voc, weights, capsys):
    ours, supervised = map(str, weights)
    data, found = scores(capsys, "--data_path", voc, "--pretrained_weights", ours, "--compare", supervised, "random")
    assert data == "4 objects in 2 images of 3, the best head for each object"
    assert list(found) == [ours, supervised, "random"]
    model = dino_backbones.build_backbone("vit_nano", 16, 48)[0]
    for source in (ours, supervised):
        file = torch.load(source, weights_only=True)
        model.load_state_dict(file.get("model", file))
        for threshold, got in zip((0.6, 0.8), found[source], strict=True):
            images = [best_by_hand(model.eval(), voc, number, threshold) for number in (0, 2)]
            want = np.mean(np.concatenate(images)), np.mean([np.mean(image) for image in images])
            assert got == pytest.approx([100 * share for share in want], abs=0.051)
    assert found[ours] != found[supervised] != found["random"]


def best_by_hand(model, voc, number, threshold):
    """The scores of the two objects of an image: all heads' maps of the last block, their masks one patch at a time."""
    image = dino_images.load_image(voc / f"JPEGImages/2007_{number}.jpg")
    with torch.no_grad():
        maps = model.get_last_selfattention(utils.RGB.normalize(dino_features.prepare(image, (64, 96), 16))[None])
    labels, found = np.array(Image.open(voc / f"SegmentationObject/2007_{number}.png")), {1: [], 2: []}
    for head in maps[0, :, 0, 1:].double().numpy():
        mask, held = np.zeros(24, dtype=bool), 0.0
        for place in np.argsort(-head):
            if held >= threshold * head.sum():
                break
            mask[place], held = True, held + head[place]
        for label in found:
            found[label].append(jaccard_by_hand(mask.reshape(4, 6), labels, label))
    return [max(of_object) for of_object in found.values()]


def test_an_untrained_network_is_the_same_wherever_it_is_listed_and_a_share_counts_once(voc, weights, capsys):
    flags = ("--data_path", voc, "--pretrained_weights", "random", "--threshold", 0.6, 0.8, 0.6)
    data, alone = scores(capsys, *flags, "--compare")
    assert data == "4 objects in 2 images of 3, the best head for each object"
    flags = ("--data_path", voc, "--pretrained_weights", weights[0], "--compare", weights[1], "random")
    assert scores(capsys, *flags)[1]["random"] == alone["random"]


def test_a_mask_of_another_size_is_one_line(refusal, voc, weights, tmp_path):
    Image.open(voc / "SegmentationObject/2007_0.png").transpose(Image.Transpose.ROTATE_90).save(tmp_path / "2007_0.png")
    flags = ["--pretrained_weights", weights[0], "--data_path", voc / "JPEGImages", "--mask_path", tmp_path]
    line = refusal(eval_attention_masks, *SMALL, *flags)
    assert "2007_0.png has 80 x 100 pixels, and" in line
    assert "2007_0.jpg 100 x 80" in line


def test_images_and_masks_can_be_folders_such_as_those_of_davis(weights, capsys):
    davis = shared("data/davis_mini")
    masks = [next(davis.glob("Annotations/480p/*/*.png"))]
    folders = ("--data_path", davis / "JPEGImages/480p", "--mask_path", davis / "Annotations/480p")
    data, found = scores(capsys, *folders, "--pretrained_weights", weights[0], "--compare", "--threshold", 0.6)
    number = len({*np.unique(dino_images.read_labels(masks[0]))} - {0, 255})
    assert data == f"{number} objects in 1 images of 1, the best head for each object"
    assert len(found) == 1


def test_binary_masks_are_one_object_per_image(voc, weights, tmp_path, capsys):
    for number in (0, 2):
        labels = np.array(Image.open(voc / f"SegmentationObject/2007_{number}.png"))
        soft = np.where(labels == 1, 255, 0) // (1 + np.arange(100) % 2) - (labels == 1)  # 254 or 126
        Image.fromarray(soft.clip(0, 255).astype(np.uint8)).save(tmp_path / f"2007_{number}.png")
    flags = (
        "--data_path",
        voc / "JPEGImages",
        "--mask_path",
        tmp_path,
        "--pretrained_weights",
        weights[0],
        "--compare",
    )
    assert scores(capsys, *flags, "--binary", "true")[0].startswith("2 objects in 2 images of 2")
    assert scores(capsys, *flags)[0].startswith("4 objects")


def test_timm_weights_are_loaded_into_the_same_network(voc, weights, capsys, monkeypatch):
    state = torch.load(weights[1], weights_only=True)["model"]
    monkeypatch.setattr(dino_backbones, "timm_weights", lambda arch, patch_size: (state, f"{arch} {patch_size}"))
    flags = ("--data_path", voc, "--pretrained_weights", weights[0], "--compare", weights[1], "timm")
    _, found = scores(capsys, *flags)
    assert found["timm"] == found[str(weights[1])]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_path", "{voc}/JPEGImages"], "can't read {voc}/JPEGImages/ImageSets/Segmentation/val.txt"),
        (["--data_path", "{voc}", "--split", "trainval"], "ImageSets/Segmentation/trainval.txt"),
        (["--data_path", "{voc}", "--compare", "nothing.pth"], "--compare nothing.pth does not exist"),
        (["--data_path", "{voc}", "--image_size", 60, 64], "--image_size 60"),
        (["--data_path", "{voc}", "--image_size", 32, 60], "--image_size 60"),
        (["--data_path", "{voc}", "--image_size", 60], "--image_size 60"),
        (["--data_path", "{voc}", "--image_size", 1, 2, 3], "--image_size 1 2 3 has more than two numbers"),
        (["--data_path", "{voc}", "--arch", "resnet18"], "--arch resnet18 has no CLS token"),
        (["--data_path", "{voc}", "--binary", "true"], "--binary true is for the masks of --mask_path"),
        (["--data_path", "{voc}/JPEGImages", "--mask_path", "{tmp}"], "has a mask in --mask_path {tmp}"),
        (["--data_path", "{voc}/JPEGImages", "--mask_path", "{tmp}/none"], "--mask_path {tmp}/none is not a folder"),
    ],
)
def test_bad_input_is_one_line(refusal, voc, weights, tmp_path, flags, message):
    flags, message = [str(flag).format(voc=voc, tmp=tmp_path) for flag in flags], message.format(voc=voc, tmp=tmp_path)
    assert message in refusal(eval_attention_masks, *SMALL, "--pretrained_weights", weights[0], *flags)


def test_masks_that_are_no_labels_or_have_no_objects_are_one_line(refusal, voc, weights, tmp_path):
    flags = [*SMALL, "--pretrained_weights", weights[0], "--compare", "--data_path", voc / "JPEGImages", "--mask_path"]
    for name, image, message in (
        ("colors", Image.new("RGB", (100, 80)), "is an image in mode RGB"),
        ("empty", Image.new("L", (100, 80)), "the masks have no objects"),
        ("white", Image.fromarray(np.eye(80, 100, dtype=np.uint8) * 255), "has the values 0 and 255 only"),
    ):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "2007_0.png")
        assert message in refusal(eval_attention_masks, *flags, tmp_path / name)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "2007_0.png").write_bytes((voc / "SegmentationObject/2007_0.png").read_bytes()[:60])
    assert "can't read" in refusal(eval_attention_masks, *flags, tmp_path / "cut")
