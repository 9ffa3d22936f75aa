"""utils.load_run: a trained backbone and its preprocessing in two lines."""

import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_RUN, arguments_of
from PIL import Image, ImageOps

import dino_images
import eval_knn
import hubconf
import main_dino
import utils
import vision_transformer as vits
from utils import UserError

pytestmark = pytest.mark.usefixtures("small_networks")

MEAN, STD = (0.4, 0.5, 0.55), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def run_dir(tiny_root, small_networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    flags = ["--patch_size", 8, "--epochs", 1, "--warmup_epochs", 0, "--exif", "true", "--mean", *MEAN, "--std", *STD]
    main_dino.train_dino(
        arguments_of(main_dino, *SMALL_RUN, *flags, "--data_path", tiny_root / "train", "--output_dir", folder)
    )
    return folder


def test_features_are_those_that_an_evaluation_extracts(run_dir, tiny_root, tmp_path):
    flags = ["--data_path", tiny_root, "--dump_features", tmp_path, "--num_workers", 0, "--device", "cpu"]
    eval_knn.main(arguments_of(eval_knn, "--pretrained_weights", run_dir, *flags))
    model, transform = utils.load_run(str(run_dir))
    paths = sorted((tiny_root / "val").rglob("*.*"))
    features = model(torch.stack([transform(Image.open(path)) for path in paths]))
    extracted = torch.load(tmp_path / "testfeat.pth", weights_only=True)
    torch.testing.assert_close(F.normalize(features, dim=1), extracted, atol=1e-5, rtol=0)


def test_the_model_is_frozen_and_explains_its_attention(run_dir):
    model, _ = utils.load_run(run_dir / "checkpoint.pth")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(block.attn.fused for block in model.blocks)
    assert model.get_last_selfattention(torch.zeros(1, 3, 32, 32)).shape[-1] == 17


def test_the_transform_resizes_crops_rotates_and_normalizes(run_dir):
    _, transform = utils.load_run(run_dir)
    pixels = np.random.RandomState(0).randint(0, 256, (50, 36, 3), dtype=np.uint8)  # resized to 50 x 36 for crops of 32
    image = Image.fromarray(pixels)
    values = transform(image)
    assert (values.dtype, values.shape) == (torch.float32, (3, 32, 32))
    back = 255 * (values * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])
    assert np.array_equal(back.round().permute(1, 2, 0).numpy(), pixels[9:41, 2:34])
    image.getexif()[0x0112] = 6
    turned = Image.fromarray(np.asarray(ImageOps.exif_transpose(image)))
    assert not torch.equal(transform(turned), values)
    assert torch.equal(transform(image), transform(turned))
    assert transform(image.convert("L")).shape == (3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), transform(image))  # loaders send it to processes


def test_the_student_is_loaded_on_request(run_dir):
    checkpoint = torch.load(run_dir / "checkpoint.pth", weights_only=True)
    for key, prefix in (("teacher", "backbone."), ("student", "module.backbone.")):
        model, _ = utils.load_run(run_dir, checkpoint_key=key)
        assert torch.equal(model.norm.bias, checkpoint[key][f"{prefix}norm.bias"])


def test_a_published_name_loads_the_authors_weights(monkeypatch):
    torch.manual_seed(3)
    source = vits.vit_small(patch_size=16)
    monkeypatch.setattr(hubconf, "_download", lambda url: source.state_dict())
    model, transform = utils.load_run("dino_vits16", device="auto")
    images = transform(Image.new("RGB", (300, 260), (200, 120, 40)))[None]
    assert torch.allclose(images[0, :, 0, 0], (torch.tensor([200, 120, 40]) / 255 - torch.tensor(utils.IMAGENET_MEAN))
                          / torch.tensor(utils.IMAGENET_STD))  # fmt: skip
    device = next(model.parameters()).device
    torch.testing.assert_close(model(images.to(device)).cpu(), source.eval()(images), atol=1e-4, rtol=0)


def test_networks_of_several_channels_take_arrays(tmp_path):
    state = vits.vit_nano(patch_size=8, img_size=[32], in_chans=4).state_dict()
    torch.save(state, tmp_path / "four.pth")
    settings = {"arch": "vit_nano", "patch_size": 8, "image_size": 32, "in_chans": 4, "mean": [0.5] * 4}
    (tmp_path / "four.json").write_text(json.dumps({**settings, "std": [0.25] * 4, "value_range": [0, 100]}))
    np.save(tmp_path / "a.npy", np.full((40, 40, 4), 75, np.uint8))
    model, transform = utils.load_run(tmp_path / "four.pth")
    values = transform(dino_images.open_image(tmp_path / "a.npy"))
    torch.testing.assert_close(values, torch.ones(4, 32, 32), atol=1e-3, rtol=0)
    assert model(values[None]).shape == (1, 128)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("dino_vits61", "dino_vits61 is neither .* nor a published network; did you mean dino_vits16"),
        ("FOLDER", "FOLDER is a folder without a checkpoint.pth"),
        ("FOLDER/plain.pth", "plain.pth does not say its network. .* utils.load_pretrained_weights"),
    ],
)
def test_what_can_not_be_loaded_is_named(tmp_path, source, says):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "plain.pth")
    with pytest.raises(UserError, match=says.replace("FOLDER", str(tmp_path))):
        utils.load_run(source.replace("FOLDER", str(tmp_path)))
